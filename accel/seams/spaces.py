"""A network's answer as noise, velocity or clean sample."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from accel.trajectory import Step

if TYPE_CHECKING:
    from torch import Tensor

Space = Literal["raw", "x0", "v"]

NEGATED = ("ZImageTransformer2DModel", "Lumina2Transformer2DModel", "MochiTransformer3DModel")
"""Networks that answer ``x0 − ε`` where flows answer ``ε − x0``."""


def matching(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The parts of input and output (without the row axis) that are the same quantity.

    An image-to-video network takes extra channels that it does not return; PixArt's returns a
    variance that it did not take. Along the one axis where the shapes differ, the first entries
    are what both have.
    """
    if x.shape == y.shape:
        return x, y
    if x.ndim != y.ndim:
        raise ValueError(f"A network's input {tuple(x.shape)} and output {tuple(y.shape)} differ.")
    for axis, (taken, given) in enumerate(zip(x.shape, y.shape, strict=True)):
        if taken != given:
            width = min(taken, given)
            x, y = x.narrow(axis, 0, width), y.narrow(axis, 0, width)
    return x, y


def convert(y: Tensor, x: Tensor, step: Step, space: Space, network: str) -> Tensor:
    """A network's answer in another space (any affine scale: made for comparing directions).

    Args:
        y: The answer for one row.
        x: The network's input for that row, ``α·x0 + σ·ε``, of the same shape.
        step: Gives α, σ and what the network predicts.
        space: ``raw`` leaves it; ``x0`` is the clean sample; ``v`` the velocity ``α·ε − σ·x0``.
        network: Class name of the network.
    """
    y = -y if network in NEGATED else y
    prediction = step.levels.prediction
    if space == "raw" or (space == "v" and prediction in ("flow_prediction", "v_prediction")):
        return y
    _, alpha, noise = step.level
    clean = _clean(y, x, prediction, alpha, noise)
    if space == "x0":
        return clean
    return (x - alpha * clean) * (alpha / max(noise, 1e-6)) - noise * clean


def _clean(y: Tensor, x: Tensor, prediction: str, alpha: float, noise: float) -> Tensor:
    if prediction == "flow_prediction":
        return x - noise * y
    if prediction == "v_prediction":
        return alpha * x - noise * y
    if prediction == "sample":
        return y
    if math.isclose(alpha, 0.0):  # pure noise: the direction of −ε is that of the clean sample
        return -y
    return (x - noise * y) / alpha


def answer(x: Tensor, clean: Tensor, step: Step, network: str, scale: float = 1.0) -> Tensor:
    """What a network would answer that saw ``clean`` in its input: the inverse of `convert`.

    Args:
        x: The network's input for one row, ``α·x0 + σ·ε``.
        clean: The clean sample, of the same shape.
        step: Gives α, σ and what the network predicts.
        network: Class name of the network.
        scale: What the noise ε is multiplied by, at the same x; 1 where α is 0.
    """
    _, alpha, sigma = step.level
    noise = (x - alpha * clean) / sigma * scale
    if scale != 1.0:
        clean = (x - sigma * noise) / alpha
    value = {
        "sample": (0.0, 1.0),
        "epsilon": (1.0, 0.0),
        "v_prediction": (alpha, -sigma),
        "flow_prediction": (1.0, -1.0),
    }[step.levels.prediction]
    found = value[0] * noise + value[1] * clean
    return -found if network in NEGATED else found
