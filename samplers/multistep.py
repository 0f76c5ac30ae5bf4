"""Linear multistep updates: one step as a list of weights, and the functions that they need.

Each solver of this package writes a step as ``x_t = a·x + Σ_k b_k·m_{−k} + c·z`` (``m_{−k}``: the
prediction kept from k evaluations ago, ``z``: fresh noise). The weights depend on the noise levels
alone: they are computed once per schedule in float64, so that a step is a few fused additions.

Source: arXiv 0904.3209 section 2 (φ-functions of exponential integrators).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Update:
    """The weights of one step.

    Attributes:
        sample: Weight of the present sample.
        history: Weights of the predictions, the newest first; its length is the order.
        noise: Weight of fresh standard normal noise; 0 for an ODE step.
    """

    sample: float
    history: tuple[float, ...]
    noise: float = 0.0

    def apply(self, x: Tensor, predictions: Sequence[Tensor], z: Tensor | None = None) -> Tensor:
        """Take the step; no device synchronisation.

        Args:
            x: The present sample, ``[B, C, ...]``.
            predictions: At least ``len(history)`` tensors shaped as ``x``, the newest first.
            z: Noise shaped as ``x``; needed where ``noise`` is not 0.
        """
        total = self.sample * x
        for weight, prediction in zip(self.history, predictions, strict=False):
            total.add_(prediction, alpha=weight)
        if self.noise:
            assert z is not None
            total.add_(z, alpha=self.noise)
        return total


def interpolated(places: Sequence[float], moments: Sequence[float]) -> list[float]:
    """Weights of values at ``places`` that integrate the polynomial through them.

    Args:
        places: Where the values are, p of them, each another.
        moments: Integral of each power of the place, from 0 on; the first p count.
    """
    return [
        math.fsum(a * moment for a, moment in zip(_basis(j, places), moments, strict=False))
        for j in range(len(places))
    ]


def _basis(which: int, places: Sequence[float]) -> list[float]:
    """Coefficients, the constant first, of the polynomial that is 1 at one place, 0 elsewhere."""
    coefficients = [1.0]
    for other, place in enumerate(places):
        if other != which:
            width = places[which] - place
            risen, kept = [0.0, *coefficients], [*coefficients, 0.0]
            coefficients = [
                (up - place * same) / width for up, same in zip(risen, kept, strict=True)
            ]
    return coefficients


def phi(order: int, z: float) -> float:
    """``φ_k(z) = ∫_0^1 e^{(1−s)z} s^{k−1}/(k−1)! ds`` for k = 1, 2, 3, …; exact at 0 as well.

    ``φ_1(z) = (e^z − 1)/z`` and ``φ_{k+1}(z) = (φ_k(z) − 1/k!)/z``; near 0, where the recurrence
    cancels, the Taylor series.
    """
    if abs(z) < 1.0:
        return math.fsum(z**k / math.factorial(k + order) for k in range(20))
    value = math.expm1(z) / z
    for k in range(1, order):
        value = (value - 1.0 / math.factorial(k)) / z
    return value
