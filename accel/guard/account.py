"""What one sample has spent, and what an approximation will cost. Numbers alone: no tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

TWICE = 0.5
"""Of two steps to come a cache computes one at least, as a rule: so many of them are reckoned."""


@dataclass
class Growth:
    """The error of one approximation, from what spot checks found.

    What fills in from older answers is off the more the farther it reaches: beyond the horizon of
    the latest check with its square, within it in proportion, so that both ways the error is not
    made smaller than a polynomial's would be. A larger error than expected counts at once, a
    smaller one halfway (in its logarithm). What does not reach anywhere (a branch that is left
    out, merged tokens) has the error of the latest check until the next.

    Attributes:
        grows: Whether it depends on the horizon.
        error: RMS in units of the guided output; ``None`` where it is not known.
        horizon: What it was found at, in `Step.time`.
        checked: Index of the evaluation of the latest check.
    """

    grows: bool
    error: float | None = None
    horizon: float = 0.0
    checked: int = -1

    def at(self, horizon: float) -> float:
        """The error of an answer that reaches so far; infinite where nothing is known."""
        if self.error is None:
            return math.inf
        if not self.grows or self.horizon <= 0.0:
            return self.error
        ratio = horizon / self.horizon
        return self.error * (ratio * ratio if ratio > 1.0 else ratio)

    def learn(self, error: float, horizon: float, index: int) -> None:
        """Take in what a check found."""
        expected = self.at(horizon)
        if 0.0 < error < expected < math.inf:
            error = math.sqrt(error * expected)
        self.error, self.horizon, self.checked = error, horizon, index

    def old(self, index: int, check_every: int) -> bool:
        """Whether there was no check yet, or none lately."""
        return self.checked < 0 or index - self.checked >= check_every


@dataclass(frozen=True, slots=True)
class Charge:
    """One approximation that was allowed: its gain and its horizon."""

    gain: float
    horizon: float


@dataclass
class Line:
    """What one method did for one sample: errors that add up, or average out.

    Between two checks a method errs in one direction: its charges add up. From check to check the
    directions have a cosine, the coherence ρ, so that errors a_1, a_2, … of those stretches come
    to E² = Σ_i Σ_j ρ^|i − j|·a_i·a_j: to their sum where a method is off the same way throughout (a
    guidance that was left out), to the root of their squares where it is off now this way, now
    that (a forecast). It begins at 1.

    Attributes:
        growth: The error of the next approximation.
        saving: Share of an evaluation of all branches that it saves.
        coherence: ρ, in [0, 1].
        square: E² up to the latest check.
        drift: Σ_i ρ^(n − i)·a_i: how much of E lies in the direction that comes next.
        charges: Since the latest check.
        asked: Evaluation of the latest question.
        answer: The latest answer.
        wanted: Evaluation at which a check was asked for.
    """

    growth: Growth
    saving: float
    coherence: float = 1.0
    square: float = 0.0
    drift: float = 0.0
    charges: list[Charge] = field(default_factory=list)
    asked: int = -1
    answer: bool = False
    wanted: int = -1

    def squared(self, *more: Charge) -> float:
        """E² in units of the final latents, with charges that are thought of."""
        return self._with(self._sum(self.growth, *more))

    def learn(self, error: float, horizon: float, index: int, cosine: float | None) -> None:
        """A check: what was charged since the one before is charged by what it found.

        Args:
            error: RMS of the guided output.
            horizon: How far the approximation reached, in `Step.time`.
            index: Of the evaluation.
            cosine: Of this error and that of the check before, where there was one.
        """
        if cosine is not None:
            self.coherence += (min(max(cosine, 0.0), 1.0) - self.coherence) / 2
        self._settle(Growth(self.growth.grows, error, horizon))
        self.growth.learn(error, horizon, index)

    def unknown(self, index: int) -> None:
        """A check found nothing to measure: what was charged stays, and nothing more is known."""
        self._settle(self.growth)
        self.growth.error, self.growth.checked = None, index

    def _settle(self, growth: Growth) -> None:
        total = self._sum(growth)
        self.square = self._with(total)
        self.drift = self.coherence * (self.drift + total)
        self.charges.clear()

    def _sum(self, growth: Growth, *more: Charge) -> float:
        return sum(charge.gain * growth.at(charge.horizon) for charge in (*self.charges, *more))

    def _with(self, error: float) -> float:
        return self.square + error * (2.0 * self.drift + error)

    def spread(self, count: int) -> float:
        """What the square of one of many errors comes to among them: 1 to their number."""
        apart = 1.0 - self.coherence
        return float(count) if apart * count <= 1.0 else min((2.0 - apart) / apart, float(count))


@dataclass(frozen=True, slots=True)
class Ahead:
    """An evaluation to come: its gain, and how far it is from the one before."""

    gain: float
    span: float


@dataclass
class Account:
    """The budget of one sample.

    Attributes:
        budget: ``max_error``.
        scale: Real error for each unit of estimate.
        unit: RMS of the clean sample as it is foreseen by now; 0 before the first check.
        checks: Spot checks made.
        lines: By method, denoiser and stage of the solver.
    """

    budget: float
    scale: float
    unit: float = 0.0
    checks: int = 0
    lines: dict[tuple[object, str, int], Line] = field(default_factory=dict)

    @property
    def relative(self) -> float:
        """What one unit of E is of the budget."""
        return self.scale / self.unit if self.unit > 0.0 else math.inf

    @property
    def spent(self) -> float:
        """The estimated relative error by now, by the latest checks; methods err apart."""
        return self._spent(sum(line.squared() for line in self.lines.values()))

    @property
    def left(self) -> float:
        """What may still be spent; below 0 where a check has shown that more was."""
        return self.budget - self.spent

    def affords(self, line: Line, charge: Charge, ahead: Sequence[Ahead]) -> bool:
        """Whether an approximation is among the cheapest, for what they save, that fit.

        Everything that may be left out from now on is in one row, by cost over saving. What stands
        in front of this one, and this one, have to fit into what is left. Costs are squares, as
        errors add up.
        """
        others = sum(one.squared() for one in self.lines.values() if one is not line)
        after = others + line.squared(charge)
        if not self._spent(after) <= self.budget:
            return False
        count = len(ahead) + 1
        price = self._price(line, charge.gain * line.growth.at(charge.horizon), count)
        room = (self.budget / self.relative) ** 2 - after
        return self._cheaper(price, ahead) <= room

    def _spent(self, square: float) -> float:
        return math.sqrt(max(square, 0.0)) * self.relative if square else 0.0

    def _price(self, line: Line, error: float, count: int) -> float:
        return error * error * line.spread(count) / line.saving

    def _cheaper(self, price: float, ahead: Sequence[Ahead]) -> float:
        """What all approximations to come cost together that are cheaper for what they save."""
        latest: dict[object, Line] = {}
        for (method, *_), line in self.lines.items():
            if line.growth.error is not None:
                known = latest.setdefault(method, line)
                latest[method] = line if line.asked > known.asked else known
        total, count = 0.0, len(ahead) + 1
        for later in ahead:
            for line in latest.values():
                one = self._price(line, later.gain * line.growth.at(later.span), count)
                if one < price:
                    total += one * line.saving * (TWICE if line.growth.grows else 1.0)
        return total
