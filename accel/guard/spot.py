"""Spot checks: from what branches were off by to what the guided output was off by.

How a pipeline puts its branches together is read off what it made of them: the guided output g is
c + Σ w_b·(b − c) up to its sign, and least squares says which w. So any scale, a scale that changes
from step to step, several scales and pipelines that negate need no adapter.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from accel.errors import UnsupportedModel
from accel.seams.spaces import convert, matching

if TYPE_CHECKING:
    from torch import Tensor

    from accel.trajectory import Step

LEADER = "cond"
ALIKE = 1e-10
"""Branches count as equal where their squared difference is below this share of their square."""


def rms(tensor: Tensor) -> Tensor:
    """Root of the mean square: a scalar tensor in float32; no device read."""
    found: Tensor = tensor.float().square().mean().sqrt()
    return found


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of two tensors of one shape; 0 of nothing. No device read."""
    a, b = a.float().flatten(), b.float().flatten()
    found: Tensor = (a * b).sum() / (a.norm() * b.norm()).clamp_min(1e-30)
    return found


def fitted(value: Tensor, like: Tensor) -> Tensor:
    """A network's answer in the form of the guided output that was made of it.

    Raises:
        UnsupportedModel: If the two are no more alike than by chance.
    """
    if value.shape == like.shape:
        return value
    if value.numel() == like.numel():
        return value.reshape(like.shape)
    if value.ndim != like.ndim:
        raise UnsupportedModel(
            f"A guard compares what the network answers, {tuple(value.shape)}, with what the "
            f"scheduler is given, {tuple(like.shape)}, and these are not alike: run without one."
        )
    return matching(value, like)[0]


def weights(guided: Tensor, answers: Mapping[str, Tensor]) -> dict[str, float]:
    """What each branch counts in a guided output. Reads the device.

    Args:
        guided: As ``scheduler.step`` takes it.
        answers: By branch, of the same shape.
    """
    lead = LEADER if LEADER in answers else next(iter(answers))
    base = answers[lead].flatten().float()
    others = {branch: value for branch, value in answers.items() if branch != lead}
    shifts = [value.flatten().float() - base for value in others.values()]
    apart = [bool(shift.square().sum() > ALIKE * base.square().sum()) for shift in shifts]
    shifts = [shift for shift, counts in zip(shifts, apart, strict=True) if counts]
    if not shifts:
        return {branch: float(branch == lead) for branch in answers}
    found = _solved(guided.flatten().float(), base, torch.stack(shifts)).tolist()
    left = iter(found)
    shares = {b: next(left) if a else 0.0 for b, a in zip(others, apart, strict=True)}
    return {lead: 1.0 - sum(found), **shares}


def _solved(guided: Tensor, base: Tensor, shifts: Tensor) -> Tensor:
    """The w of the smaller rest, over both signs of the guided output."""
    inverse = torch.linalg.pinv((shifts @ shifts.T).cpu().double())
    fits = []
    for sign in (1.0, -1.0):
        target = sign * guided - base
        found: Tensor = inverse @ (shifts @ target).cpu().double()
        fits.append((found, (target - found.to(shifts) @ shifts).square().sum().item()))
    return min(fits, key=lambda fit: fit[1])[0]


def clean_size(answer: Tensor, sample: Tensor, step: Step, network: str, like: Tensor) -> Tensor:
    """RMS of the clean sample that an answer foresees: a scalar tensor; no device read."""
    sample, answer = matching(sample.float(), answer.float())
    clean = convert(answer, sample, step, "x0", network)
    return rms(fitted(clean, like))
