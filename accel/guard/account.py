"""What one sample has spent, and what an approximation will cost. Numbers alone: no tensors."""

from __future__ import annotations

import math
from collections.abc import Iterable
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
    """What one method did for one sample.

    Attributes:
        growth: Its error.
        saving: Share of an evaluation of all branches that it saves.
        settled: Σ gain·error up to the latest check.
        charges: Since then.
        asked: Evaluation of the latest question.
        answer: The latest answer.
        wanted: Evaluation at which a check was asked for.
    """

    growth: Growth
    saving: float
    settled: float = 0.0
    charges: list[Charge] = field(default_factory=list)
    asked: int = -1
    answer: bool = False
    wanted: int = -1

    @property
    def total(self) -> float:
        """Σ gain·error, in units of the final latents."""
        return self.settled + sum(c.gain * self.growth.at(c.horizon) for c in self.charges)

    def learn(self, error: float, horizon: float, index: int) -> None:
        """A check: what was charged since the one before is charged by what it found."""
        found = Growth(self.growth.grows, error, horizon)
        self.settled += sum(charge.gain * found.at(charge.horizon) for charge in self.charges)
        self.charges.clear()
        self.growth.learn(error, horizon, index)

    def unknown(self, index: int) -> None:
        """A check found nothing to measure: what was charged stays, and nothing more is known."""
        self.settled = self.total
        self.charges.clear()
        self.growth.error, self.growth.checked = None, index


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
        """What one unit of Σ gain·error is of the budget."""
        return self.scale / self.unit if self.unit > 0.0 else math.inf

    @property
    def spent(self) -> float:
        """The estimated relative error by now, by the latest checks."""
        total = sum(line.total for line in self.lines.values())
        return total * self.relative if total else 0.0

    @property
    def left(self) -> float:
        """What may still be spent; below 0 where a check has shown that more was."""
        return self.budget - self.spent

    def affords(self, line: Line, charge: Charge, ahead: Iterable[Ahead]) -> bool:
        """Whether an approximation is among the cheapest, for what they save, that fit.

        Everything that may be left out from now on is in one row, by cost over saving. What stands
        in front of this one, and this one, have to fit into what is left.
        """
        cost = charge.gain * line.growth.at(charge.horizon) * self.relative
        left = self.left
        if not cost <= left:
            return False
        price = cost / line.saving
        return cost + self._cheaper(price, ahead) <= left

    def _cheaper(self, price: float, ahead: Iterable[Ahead]) -> float:
        """What all approximations to come cost together that are cheaper for what they save."""
        latest: dict[object, Line] = {}
        for (method, *_), line in self.lines.items():
            if line.growth.error is not None and line.asked >= 0:
                known = latest.setdefault(method, line)
                latest[method] = line if line.asked > known.asked else known
        total = 0.0
        for later in ahead:
            for line in latest.values():
                cost = later.gain * line.growth.at(later.span) * self.relative
                if cost < price * line.saving:
                    total += cost * (TWICE if line.growth.grows else 1.0)
        return total
