"""The steps of DPM-Solver-v3: what the statistics make of them. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from samplers.ems import EMS, Floats
from samplers.prediction import Level

CELL = 0.1
"""Longest piece of λ that one quadrature rule is used on."""
POINTS, SHARES = (
    np.array([0.5 - math.sqrt(0.15), 0.5, 0.5 + math.sqrt(0.15)]),
    np.array([5.0, 8.0, 5.0]) / 18.0,
)
"""Nodes and weights of the Gauss–Legendre rule of sixth order on [0, 1]."""


@dataclass(frozen=True)
class Step:
    """The weights of one step: ``a·x + Σ_k w_k·f_k + c``, each a number or an array ``D``.

    Attributes:
        sample: a.
        history: w, in the order of the nodes.
        constant: c.
    """

    sample: Floats
    history: tuple[Floats, ...]
    constant: Floats


def residual_weights(ems: EMS, level: Level) -> tuple[float, Floats]:
    """Weights ``(of ε, of x)`` of ``f = (σε − l·x)/α`` at a level."""
    l = ems.at(np.array([level.lam]))[0][0]  # noqa: E741
    return level.sigma / level.alpha, -l / level.alpha


def clean_weights(ems: EMS, level: Level) -> tuple[Floats, float]:
    """Weights ``(of x, of f)`` of the clean sample ``m = (x − σε)/α`` at a level."""
    l = ems.at(np.array([level.lam]))[0][0]  # noqa: E741
    return (1.0 - l) / level.alpha, -1.0


def step(ems: EMS, target: Level, nodes: Sequence[Level], *, pseudo: bool = False) -> Step:
    """The step from ``nodes[0]`` to ``target``; its order is ``len(nodes)``.

    Args:
        ems: The statistics.
        target: The level to reach, of finite λ.
        nodes: Levels of the values of f, of finite λ, at most five: first where the sample is, then
            those that derivatives are taken from, the nearest first. A corrector has the target
            among them.
        pseudo: Take each derivative from as many nodes as it needs, the first ones, instead of
            from all of them.
    """
    here = nodes[0]
    stride = Stride(ems, here.lam, target.lam, [node.lam for node in nodes[1:]])
    offsets = [node.lam - here.lam for node in nodes[1:]]
    rows = _divided(offsets) if pseudo else _derivatives(offsets)
    moments = [stride.moment(k) for k in range(1, len(nodes))]
    shares = [
        sum((moment * row[j] for moment, row in zip(moments, rows, strict=True)), np.zeros(()))
        for j in range(len(offsets))
    ]
    gain = target.alpha * stride.decay
    weights = [-gain * (stride.moment(0) - sum(shares, np.zeros(())))]
    constant = stride.drift
    for share, (scale, bias) in zip(shares, stride.nodes, strict=True):
        weights.append(-gain * share * scale)
        constant = constant - share * bias
    return Step(gain / here.alpha, tuple(weights), -gain * constant)


def _derivatives(offsets: Sequence[float]) -> list[list[float]]:
    """Weights of ``g_j − g_s`` in the derivatives g', g'', … of the polynomial through all."""
    count = len(offsets)
    if not count:
        return []
    powers = [[d ** (k + 1) / math.factorial(k + 1) for k in range(count)] for d in offsets]
    inverse: list[list[float]] = np.linalg.inv(np.array(powers)).tolist()
    return inverse


def _divided(offsets: Sequence[float]) -> list[list[float]]:
    """The same, the k-th derivative from the first k nodes: k! times the divided difference."""
    places, rows = [0.0, *offsets], []
    for k in range(1, len(places)):
        products = (
            math.prod(places[j] - places[i] for i in range(k + 1) if i != j)
            for j in range(1, k + 1)
        )
        row = [math.factorial(k) / product for product in products]
        rows.append(row + [0.0] * (len(offsets) - k))
    return rows


class Stride:
    """Integrals of the statistics over one step, relative to its start.

    Args:
        ems: The statistics.
        here: λ of the start.
        target: λ of the end.
        others: λ of the other nodes, before the start or up to the end.
    """

    def __init__(self, ems: EMS, here: float, target: float, others: Sequence[float]) -> None:
        self._here, self._target, self._others = here, target, others
        marks = np.array([here, target, *others])
        low, high = marks.min(), marks.max()
        inside = ems.lams[(ems.lams > low) & (ems.lams < high)]
        even = np.linspace(low, high, math.ceil((high - low) / CELL) + 1)
        self._edges = np.unique(np.concatenate([marks, inside, even]))
        self._values = ems.at(self._edges)
        self._start = self._index(here)

    def _index(self, lam: float) -> int:
        return int(np.searchsorted(self._edges, lam))

    @cached_property
    def _widths(self) -> Floats:
        return self._tall(np.diff(self._edges))

    def _tall(self, column: Floats) -> Floats:
        """With a dimension for the nodes of a rule behind it, and those of the statistics."""
        return column.reshape(-1, 1, *[1] * (self._values[0].ndim - 1))

    def _inner(self, table: Floats) -> Floats:
        """A straight function at the nodes of each cell, ``[cells, 3, *D]``."""
        return table[:-1, None] + self._shares * (table[1:] - table[:-1])[:, None]

    @property
    def _shares(self) -> Floats:
        return POINTS.reshape(1, -1, *[1] * (self._values[0].ndim - 1))

    def _sum(self, cells: Floats) -> Floats:
        """From integrals over cells to those from the start to each edge."""
        total = np.concatenate([np.zeros_like(cells[:1]), np.cumsum(cells, axis=0)])
        return np.asarray(total - total[self._start])

    def _rule(self, inner: Floats) -> Floats:
        """The integral over each cell of values at its nodes."""
        weights = SHARES.reshape(1, -1, *[1] * (self._values[0].ndim - 1))
        return np.asarray((inner * weights * self._widths).sum(axis=1))

    def _straight(self, table: Floats) -> tuple[Floats, Floats]:
        """The integral of a straight function at each edge, and at the nodes of each cell."""
        widths = self._widths[:, 0]
        at_edges = self._sum((table[:-1] + table[1:]) / 2.0 * widths)
        rise = (table[1:] - table[:-1])[:, None]
        parts = self._widths * self._shares * (table[:-1, None] + self._shares / 2.0 * rise)
        return at_edges, at_edges[:-1, None] + parts

    @cached_property
    def _linear(self) -> tuple[Floats, Floats]:
        return self._straight(self._values[0])

    @cached_property
    def _scale(self) -> tuple[Floats, Floats]:
        return self._straight(self._values[1])

    @cached_property
    def _bias(self) -> tuple[Floats, Floats]:
        """``∫ e^{−∫s}·b`` at each edge, and at the nodes of each cell, there by Hermite's cubic."""
        exponent, inner = self._scale
        at_edges = self._sum(self._rule(np.exp(-inner) * self._inner(self._values[2])))
        slope = np.exp(-exponent) * self._values[2]
        t, width = self._shares, self._widths
        parts = (
            (1 + 2 * t) * (1 - t) ** 2 * at_edges[:-1, None]
            + t**2 * (3 - 2 * t) * at_edges[1:, None]
            + t * (1 - t) ** 2 * width * slope[:-1, None]
            - t**2 * (1 - t) * width * slope[1:, None]
        )
        return at_edges, parts

    def _over_step(self, inner: Floats) -> Floats:
        """The integral of ``e^{∫(l + s)}`` times some values from start to end."""
        growth = np.exp(self._linear[1] + self._scale[1])
        cells = self._rule(growth * inner)
        return np.asarray(cells[self._start : self._index(self._target)].sum(axis=0))

    @cached_property
    def decay(self) -> Floats:
        """``e^{−∫l}`` over the step."""
        return np.asarray(np.exp(-self._linear[0][self._index(self._target)]))

    @cached_property
    def drift(self) -> Floats:
        """What the bias alone adds to the integral of f over the step."""
        return self._over_step(self._bias[1])

    def moment(self, k: int) -> Floats:
        """``∫ e^{∫(l + s)} (λ − λ_s)^k/k! dλ`` over the step."""
        places = self._edges[:-1, None] + np.diff(self._edges)[:, None] * POINTS
        powers = (places - self._here) ** k / math.factorial(k)
        return self._over_step(powers.reshape(*powers.shape, *[1] * (self._values[0].ndim - 1)))

    @cached_property
    def nodes(self) -> list[tuple[Floats, Floats]]:
        """For each other node the weight of its f in g, and what is taken off: ``w·f − c``."""
        places = [self._index(lam) for lam in self._others]
        return [(np.exp(-self._scale[0][i]), self._bias[0][i]) for i in places]
