"""What fills in for a computation that is skipped. One predictor holds one row of one stream.

All work on any tensor; none keeps or hands out a tensor that somebody else may change.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from torch import Tensor

Kind = Literal["reuse", "newton"]


class Predictor(Protocol):
    """Learns values at some positions and gives one at another."""

    def update(self, position: float, value: Tensor) -> None:
        """Learn the value that was computed at a position."""
        ...

    def predict(self, position: float) -> Tensor:
        """The value at a position at which nothing was computed."""
        ...


class Reuse:
    """The last computed value as it is."""

    def __init__(self) -> None:
        self._value: Tensor | None = None

    def update(self, position: float, value: Tensor) -> None:  # noqa: ARG002
        """Keep the value."""
        self._value = value.clone()

    def predict(self, position: float) -> Tensor:  # noqa: ARG002
        """The value kept."""
        assert self._value is not None
        return self._value.clone()


class Newton:
    """The polynomial through the last ``order + 1`` computed values.

    Exact for values that are polynomials of degree ≤ ``order`` in the position, for any gaps
    between the computed positions (the Taylor sum of TaylorSeer is exact for degree 1 only).
    Written with Lagrange's weights, so that nothing but the values is kept.

    Args:
        order: Degree of the polynomial, once enough values are there.
        damping: Share of the change since the newest value that is left out, in [0, 1): what a
            network does is smoother than its differences, and shrinking an extrapolation lowers
            its error wherever those are noisy.
    """

    def __init__(self, order: int, damping: float = 0.0) -> None:
        self._order = order
        self._damping = damping
        self._nodes: list[tuple[float, Tensor]] = []

    def update(self, position: float, value: Tensor) -> None:
        """Add the newest node; a second value at the newest position replaces the first."""
        older = self._nodes
        if older and older[0][0] == position:  # Heun evaluates a noise level twice
            older = older[1:]
        self._nodes = [(position, value.clone()), *older[: self._order]]

    def predict(self, position: float) -> Tensor:
        """The polynomial at a position, damped."""
        positions = [node for node, _ in self._nodes]
        weights = [(1.0 - self._damping) * w for w in _lagrange(positions, position)]
        weights[0] += self._damping
        total = self._nodes[0][1] * weights[0]
        for weight, (_, value) in zip(weights[1:], self._nodes[1:], strict=True):
            total.add_(value, alpha=weight)
        return total


def _lagrange(nodes: list[float], at: float) -> list[float]:
    """Weights of the values at ``nodes`` in the value of their polynomial at ``at``."""
    weights = []
    for here in nodes:
        others = [node for node in nodes if node != here]
        weights.append(math.prod((at - node) / (here - node) for node in others))
    return weights


@dataclass(frozen=True)
class Forecast:
    """How a method fills in: the fields that it shares with every other cache.

    Attributes:
        kind: ``reuse`` or ``newton``.
        order: Degree of the polynomial.
        damping: Share of the extrapolated change that is left out.
    """

    kind: Kind
    order: int = 1
    damping: float = 0.0

    @property
    def state(self) -> Literal["reused", "predicted"]:
        """What a report calls an answer of this kind."""
        return "reused" if self.kind == "reuse" else "predicted"

    def make(self) -> Predictor:
        """A predictor for one row of one stream."""
        return Reuse() if self.kind == "reuse" else Newton(self.order, self.damping)
