"""A network's answer as noise, velocity or clean sample."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from accel.trajectory import Step

if TYPE_CHECKING:
    from torch import Tensor

Space = Literal["raw", "x0", "v"]

NEGATED = ("ZImageTransformer2DModel", "Lumina2Transformer2DModel")
"""Networks whose answer a pipeline negates before ``scheduler.step``."""


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
