"""What fills in for a computation that is skipped. One predictor holds one row of one stream.

All work on any tensor; none keeps or hands out a tensor that somebody else may change. All but
FoCa and DMD answer a weighted sum of the newest computed values, and differ in the weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Literal, Protocol

from accel.seams.memory import bytes_of

if TYPE_CHECKING:
    from torch import Tensor

    from accel.trajectory import Step

Kind = Literal["reuse", "newton", "taylor", "hicache", "foca", "dmd"]
Keep = Literal["native", "bfloat16", "cpu"]

Weights = Callable[[Sequence[float], float], list[float]]
"""From the positions of the kept values, newest first, and a position: the values' weights."""


class Predictor(Protocol):
    """Learns values at some positions and gives one at another."""

    @property
    def bytes(self) -> int:
        """Memory that the kept values take."""
        ...

    def update(self, position: float, value: Tensor) -> None:
        """Learn the value that was computed at a position."""
        ...

    def predict(self, position: float) -> Tensor:
        """The value at a position at which nothing was computed."""
        ...


class History:
    """The newest computed values with their positions, newest first.

    Args:
        length: Values to keep.
        keep: ``native`` as they are, in ``bfloat16``, or on the ``cpu``; they come back in the
            dtype and on the device that they had.
    """

    def __init__(self, length: int, keep: Keep = "native") -> None:
        self._length = length
        self._keep = keep
        self._nodes: list[tuple[float, Tensor]] = []
        self._like: Tensor | None = None

    def __len__(self) -> int:
        return len(self._nodes)

    @property
    def bytes(self) -> int:
        """Memory of the kept values."""
        return bytes_of(self._nodes)

    @property
    def positions(self) -> list[float]:
        """Where the values were computed."""
        return [position for position, _ in self._nodes]

    def add(self, position: float, value: Tensor) -> None:
        """Add the newest value; a second one at the newest position replaces the first."""
        older = self._nodes
        if older and older[0][0] == position:  # Heun evaluates a noise level twice
            older = older[1:]
        self._like = value.new_empty(0)
        self._nodes = [(position, self._stow(value)), *older[: self._length - 1]]

    def value(self, index: int) -> Tensor:
        """The ``index``-th newest value. Not to be changed: it may be the kept tensor itself."""
        assert self._like is not None
        return self._nodes[index][1].to(self._like)

    def _stow(self, value: Tensor) -> Tensor:
        import torch

        if self._keep == "bfloat16" and value.dtype != torch.bfloat16:
            return value.to(torch.bfloat16)
        if self._keep == "cpu" and value.device.type != "cpu":
            return value.to("cpu")
        return value.clone()


class Weighted:
    """Σ weight · value over the newest computed values."""

    def __init__(self, history: History, weights: Weights) -> None:
        self._history = history
        self._weights = weights

    @property
    def bytes(self) -> int:
        """Memory that the kept values take."""
        return self._history.bytes

    def update(self, position: float, value: Tensor) -> None:
        """Keep the value."""
        self._history.add(position, value)

    def predict(self, position: float) -> Tensor:
        """The weighted sum at a position."""
        return _weighted_sum(self._history, self._weights(self._history.positions, position))


def _weighted_sum(history: History, weights: Sequence[float]) -> Tensor:
    total = history.value(0) * weights[0]
    for index, weight in enumerate(weights[1:], 1):
        if weight:
            total.add_(history.value(index), alpha=weight)
    return total


def reuse() -> Weights:
    """The last computed value as it is."""
    return lambda positions, at: [1.0]  # noqa: ARG005


def newton(damping: float = 0.0) -> Weights:
    """The polynomial through the kept values.

    Exact for values that are polynomials in the position of a degree below their number, for any
    gaps between the computed positions (the Taylor sum of TaylorSeer is exact for degree 1 only).

    Args:
        damping: Share of the change since the newest value that is left out, in [0, 1): what a
            network does is smoother than its differences, and shrinking an extrapolation lowers
            its error wherever those are noisy.
    """

    def weights(positions: Sequence[float], at: float) -> list[float]:
        found = [(1.0 - damping) * weight for weight in _lagrange(positions, at)]
        found[0] += damping
        return found

    return weights


def _lagrange(nodes: Sequence[float], at: float) -> list[float]:
    """Weights of the values at ``nodes`` in the value of their polynomial at ``at``."""
    weights = []
    for here in nodes:
        others = [node for node in nodes if node != here]
        weights.append(math.prod((at - node) / (here - node) for node in others))
    return weights


def taylor() -> Weights:
    """Σ_j D_j k^j / j!, the differences taken as derivatives (TaylorSeer, arXiv 2503.06923).

    D_j is j! times the divided difference of the j + 1 newest values. At even gaps that is the
    paper's recursion (D_{j+1} is the change of D_j since the compute before, over the gap between
    the two). Over uneven ones, as after the warm-up, the recursion would give a parabola third
    differences, and what it takes for a second derivative is none; a divided difference is, of any
    polynomial of its degree.
    """
    return _series(lambda j, k: k**j)


def hicache(scale: float) -> Weights:
    """As `taylor`, with σ^j H_j(σk) in place of k^j: Hermite polynomials (HiCache, 2508.16984).

    Args:
        scale: σ. At order 1 the slope counts 2σ²-fold, so below √½ extrapolation is damped.
    """
    return _series(lambda j, k: scale**j * _hermite(j, scale * k))


def _series(basis: Callable[[int, float], float]) -> Weights:
    def weights(positions: Sequence[float], at: float) -> list[float]:
        total = [0.0] * len(positions)
        for j, row in enumerate(_differences(positions)):
            factor = basis(j, at - positions[0])
            total = [t + factor * r for t, r in zip(total, row, strict=True)]
        return total

    return weights


def _differences(positions: Sequence[float]) -> list[list[float]]:
    """For each j, the weights of the values in D_j / j!, the divided difference of the newest."""
    count = len(positions)
    rows = [[float(i == k) for k in range(count)] for i in range(count)]
    newest = [rows[0]]
    for j in range(1, count):
        rows = [
            [(a - b) / (positions[i] - positions[i + j]) for a, b in zip(new, old, strict=True)]
            for i, (new, old) in enumerate(pairwise(rows))
        ]
        newest.append(rows[0])
    return newest


def _hermite(degree: int, x: float) -> float:
    """The physicists' Hermite polynomial H_j(x)."""
    before, here = 0.0, 1.0
    for j in range(degree):
        before, here = here, 2 * x * here - 2 * j * before
    return here


class FoCa:
    """F̂ = F + (e/2)(d_full + d_now): a predictor-corrector on differences (FoCa, 2508.16211).

    d_full is the difference of the last two computed values, d_now that of the two newest values,
    predictions included; both as they are, not per step. Beyond three steps the horizon e is
    damped to 3·3/e, as cache-dit does.
    """

    def __init__(self, keep: Keep = "native") -> None:
        self._full = History(2, keep)
        self._latest = History(2, keep)
        self._answered: float | None = None

    @property
    def bytes(self) -> int:
        """Memory that the kept values take."""
        return self._full.bytes + self._latest.bytes

    def update(self, position: float, value: Tensor) -> None:
        """Keep a computed value."""
        self._full.add(position, value)
        self._latest.add(position, value)
        self._answered = None

    def predict(self, position: float) -> Tensor:
        """The value ``position − (last computed)`` steps ahead."""
        if self._answered == position:
            return self._latest.value(0).clone()
        ahead = position - self._full.positions[0]
        total = self._full.value(0).clone()
        horizon = ahead if ahead <= 3 else 9.0 / ahead
        for history in (self._full, self._latest):
            if len(history) == 2:
                total.add_(history.value(0) - history.value(1), alpha=horizon / 2)
        self._latest.add(position, total)
        self._answered = position
        return total


class DMD:
    """Linear dynamics through the kept values, advanced by any horizon (dynamic modes, Prony).

    With values x_1 … x_n at even gaps g it finds A with x_{i+1} ≈ A x_i in the space that the
    values span, and answers A^{h/g} x_n. With fewer than four values, or uneven gaps, it answers
    as `newton` of degree 1 does. Reads the device once a prediction: the values' dot products.
    """

    LENGTH = 6
    CUTOFF = 1e-4
    """Singular values below this share of the largest count as noise."""

    def __init__(self, keep: Keep = "native") -> None:
        self._history = History(self.LENGTH, keep)

    @property
    def bytes(self) -> int:
        """Memory that the kept values take."""
        return self._history.bytes

    def update(self, position: float, value: Tensor) -> None:
        """Keep the value."""
        self._history.add(position, value)

    def predict(self, position: float) -> Tensor:
        """The dynamics at a position."""
        return _weighted_sum(self._history, self._weights(position))

    def _weights(self, position: float) -> list[float]:
        positions = self._history.positions
        if len(positions) >= 4 and _even(positions):
            gap = positions[0] - positions[1]
            weights = self._dynamics((position - positions[0]) / gap)
            if all(map(math.isfinite, weights)):
                return weights
        line = newton()(positions[:2], position)
        return line + [0.0] * (len(positions) - len(line))

    def _dynamics(self, steps: float) -> list[float]:
        """Weights, newest first, of the values in A^steps x_n."""
        import torch

        values = [self._history.value(i).flatten() for i in reversed(range(len(self._history)))]
        snapshots = torch.stack(values, dim=1).double()
        squares, sides = torch.linalg.eigh((snapshots.T @ snapshots).cpu())
        sizes = squares.clamp_min(0).sqrt()
        real = sizes > self.CUTOFF * sizes[-1]
        back = sides[:, real] / sizes[real]  # values times this: an orthonormal basis
        inside = (sides[:, real] * sizes[real]).T  # the values in that basis
        matrix = inside[:, 1:] @ torch.linalg.pinv(inside[:, :-1], rtol=self.CUTOFF)
        roots, modes = torch.linalg.eig(matrix)
        start = torch.linalg.pinv(modes) @ inside[:, -1].to(modes.dtype)
        ahead = (modes @ (roots.pow(steps) * start)).real
        weights: list[float] = (back @ ahead).flip(0).tolist()
        return weights


def _even(positions: Sequence[float]) -> bool:
    gaps = [a - b for a, b in pairwise(positions)]
    return all(math.isclose(gap, gaps[0], rel_tol=1e-6) for gap in gaps)


@dataclass(frozen=True)
class Forecast:
    """How a method fills in: the fields that it shares with every other cache.

    Attributes:
        kind: Which predictor.
        order: Degree of the polynomial or series.
        damping: Share of the change that ``newton`` extrapolates that is left out.
        scale: σ of ``hicache``.
        keep: How the kept values are stored.
    """

    kind: Kind
    order: int = 1
    damping: float = 0.0
    scale: float = 0.5
    keep: Keep = "native"

    @property
    def state(self) -> Literal["reused", "predicted"]:
        """What a report calls an answer of this kind."""
        return "reused" if self.kind == "reuse" else "predicted"

    @property
    def depth(self) -> int:
        """Values that one row of one stream keeps at most."""
        return {"reuse": 1, "foca": 4, "dmd": DMD.LENGTH}.get(self.kind, self.order + 1)

    def position(self, step: Step) -> float:
        """Where a step lies for this predictor.

        `newton` extrapolates in the log-SNR, in which networks change evenly; the others in the
        number of the solver's step, as their papers do.
        """
        return step.time if self.kind == "newton" else float(step.turn)

    def make(self) -> Predictor:
        """A predictor for one row of one stream."""
        if self.kind == "foca":
            return FoCa(self.keep)
        if self.kind == "dmd":
            return DMD(self.keep)
        weights = {
            "reuse": reuse(),
            "newton": newton(self.damping),
            "taylor": taylor(),
            "hicache": hicache(self.scale),
        }[self.kind]
        return Weighted(History(self.depth, self.keep), weights)
