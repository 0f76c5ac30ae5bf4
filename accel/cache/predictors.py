"""What fills in for a computation that is skipped. One predictor holds one row of one stream.

All work on any tensor; none keeps or hands out a tensor that somebody else may change.
"""

from __future__ import annotations

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
    """The polynomial through the last ``order + 1`` computed values, by divided differences.

    Exact for values that are polynomials of degree ≤ ``order`` in the position, for any gaps
    between the computed positions (the Taylor sum of TaylorSeer is exact for degree 1 only).
    """

    def __init__(self, order: int) -> None:
        self._order = order
        self._nodes: list[float] = []
        self._differences: list[Tensor] = []

    def update(self, position: float, value: Tensor) -> None:
        """Add the newest node; the oldest leaves when ``order + 1`` are there."""
        fresh = [value.clone()]
        for depth, older in enumerate(self._differences[: self._order]):
            gap = position - self._nodes[depth]
            fresh.append((fresh[depth] - older) / gap)
        self._differences = fresh
        self._nodes = [position, *self._nodes[: self._order]]

    def predict(self, position: float) -> Tensor:
        """The polynomial at a position."""
        total, factor = self._differences[0].clone(), 1.0
        for node, difference in zip(self._nodes, self._differences[1:], strict=False):
            factor *= position - node
            total.add_(difference, alpha=factor)
        return total


def make(kind: Kind, order: int) -> Predictor:
    """The predictor of a method's fields."""
    return Reuse() if kind == "reuse" else Newton(order)
