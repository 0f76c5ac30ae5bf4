"""The proof: the best plans are timed beside stock, then checked on prompts not seen before.

Whichever of many plans holds on some prompts was lucky on them. So one set of prompts chooses, with
room, and another one tells what is promised: few plans come that far, mostly one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from accel.plan import Plan
from accel.tuned import Figure
from accel.tuning.bench import Bench, Case, Drawing, Drawn, Line, fidelity
from accel.tuning.targets import TIMES, Target, Targets, may_miss, sure_misses

FINALISTS = 6
"""Plans that are timed together."""

TIMED = 3
"""Prompts that they are timed on."""

RESAMPLES = 2000
"""Of the bootstrap for the confidence interval of a median."""


@dataclass(frozen=True)
class Pair:
    """A prompt drawn by stock and by a plan, one right after the other.

    Attributes:
        stock: Seconds of the stock call; ``None`` where its picture was drawn some time before.
        fast: Seconds of the plan's.
        figures: By measure of fidelity its value; empty where only time counts.
    """

    stock: float | None
    fast: float
    figures: Mapping[str, float]


def timed(bench: Bench, plans: Sequence[Plan], cases: Sequence[Case]) -> dict[Plan, list[Pair]]:
    """Time some plans in one interleaved run: of each case stock, then the plans in turns."""
    found: dict[Plan, list[Pair]] = {plan: [] for plan in plans}
    for turn, case in enumerate(cases):
        stock = bench.time(Plan(), case)
        shift = turn % max(len(plans), 1)
        for plan in [*plans[shift:], *plans[:shift]]:
            fast = bench.time(plan, case)
            found[plan].append(Pair(stock.seconds, fast.seconds, {}))
    return found


@dataclass(frozen=True)
class Finalist:
    """A plan that is to be checked.

    Attributes:
        plan: The plan.
        room: How surely other prompts hold what those of the search did (`targets.Targets.room`).
        speed: How many times faster than stock it was there by the clock.
    """

    plan: Plan
    room: float
    speed: float = 1.0


def finalists(
    bench: Bench,
    ranked: Mapping[Plan, float],
    cases: Sequence[Case],
    told: Callable[[], None] = lambda: None,
) -> Iterator[Finalist]:
    """Plans in the order in which to check them: of each few the fastest by the clock first.

    Args:
        bench: What draws.
        ranked: The plans, the fastest first as far as is known, with their room.
        cases: The prompts of the search: some are timed on.
        told: Called before each few are timed.
    """
    plans = list(ranked)
    for first in range(0, len(plans), FINALISTS):
        told()
        some = plans[first : first + FINALISTS]
        pairs = timed(bench, some, cases[:TIMED])
        found = [Finalist(plan, ranked[plan], speed(pairs[plan])) for plan in some]
        yield from sorted(found, key=lambda one: -one.speed)


def speed(pairs: Sequence[Pair]) -> float:
    """How many times faster than stock, in the median of neighbours."""
    return median(ratios(pairs))


def ratios(pairs: Sequence[Pair]) -> list[float]:
    """How many times faster than stock, of each two calls that were made one after the other."""
    return [pair.stock / pair.fast for pair in pairs if pair.stock is not None]


def time_of(measure: str, pairs: Sequence[Pair]) -> float:
    """What a target of time asks for, of `TIMES`, in the median."""
    return speed(pairs) if measure == "speedup" else median(pair.fast for pair in pairs)


@dataclass(frozen=True)
class Proof:
    """A plan that held on the held-out prompts, and what was measured of it there."""

    plan: Plan
    pairs: tuple[Pair, ...]


@dataclass
class Sample:
    """Prompts that plans are checked on with nothing timed: what was drawn is kept, as trials are.

    Attributes:
        bench: What draws.
        cases: The prompts.
        targets: What is to be held, of fidelity.
        told: Called after each prompt, with how many of a plan are done.
        failed: Plans that `first` found not to hold on them with room.
    """

    bench: Drawing
    cases: Sequence[Case]
    targets: Targets
    told: Callable[[int], None] = lambda _done: None
    failed: list[Plan] = field(default_factory=list)

    def drawn(self, plan: Plan, may: int) -> list[Line]:
        """What a plan does to the prompts, until more than so many have missed a target."""
        lines: list[Line] = []
        for case in self.cases:
            lines.append(self.bench.figures(plan, case))
            self.told(len(lines))
            if self.targets.missed([line.figures for line in lines], may):
                break
        return lines

    def holds(self, lines: Sequence[Line]) -> bool:
        """Whether a plan holds every target, by all of its prompts."""
        every = len(lines) == len(self.cases)
        return every and self.targets.held_by([line.figures for line in lines])

    def chooses(self, plan: Plan) -> bool:
        """Whether a plan holds with room: it is likely to hold on other prompts too.

        Where no target is of fidelity, nothing is drawn, and it does.
        """
        if not self.targets.fidelity:
            return True
        return self.holds(self.drawn(plan, sure_misses(len(self.cases))))


@dataclass
class Checks:
    """Checks plans on the held-out prompts; what stock draws of them is drawn once.

    Attributes:
        bench: What draws.
        cases: The prompts.
        targets: What is to be held.
        measures: What is measured of each.
        told: Called after each prompt, with how many of a plan are done.
        afresh: Of so many prompts at one stock is drawn again for a further plan, to time it
            beside that.
        failed: Plans that `first` found not to hold on them.
    """

    bench: Bench
    cases: Sequence[Case]
    targets: Targets
    measures: Sequence[str]
    told: Callable[[int], None] = lambda _done: None
    afresh: int = 5
    failed: list[Plan] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._stock: dict[str, Drawn] = {}

    def check(self, plan: Plan) -> list[Pair]:
        """Draw the prompts, stock first and plan first in turns, until the plan has failed.

        Returns:
            A pair for each prompt that was drawn: fewer than there are if it failed before.
        """
        pairs: list[Pair] = []
        for turn, case in enumerate(self.cases):
            pairs.append(self._pair(plan, case, turn))
            self.told(len(pairs))
            if self.targets.missed([one.figures for one in pairs], may_miss(len(self.cases))):
                break
        return pairs

    def holds(self, pairs: Sequence[Pair]) -> bool:
        """Whether a plan holds every target, by all of its prompts."""
        if len(pairs) < len(self.cases):
            return False
        in_time = all(
            target.met_by(time_of(target.measure, pairs)) for target in self.targets.times
        )
        return in_time and self.targets.held_by([pair.figures for pair in pairs])

    def _pair(self, plan: Plan, case: Case, turn: int) -> Pair:
        """Both pictures of a prompt; stock's is of before at most prompts of a further plan."""
        known = self._stock.get(case.key)
        fast = self.bench.time(plan, case) if turn % 2 else None
        fresh = known is None or turn % self.afresh == 0
        beside = self.bench.time(Plan(), case) if fresh else None
        fast = fast or self.bench.time(plan, case)
        stock = known or beside
        assert stock is not None
        self._stock[case.key] = stock
        figures = fidelity(self.measures, stock.pictures, fast.pictures, case.scene)
        return Pair(beside.seconds if beside else None, fast.seconds, figures)


def first(
    finalists: Iterable[Finalist],
    choice: Sample,
    held_out: Checks,
    late: Callable[[], bool] = lambda: False,
) -> Proof | None:
    """The first plan that holds with room on the prompts that choose, and then on others.

    Args:
        finalists: Plans in the order in which to check them.
        choice: The prompts that choose; nothing of them is promised.
        held_out: Those that what is promised is measured on.
        late: Asked before each plan: from then on only those are checked that are likely to hold,
            by the search.
    """
    for one in finalists:
        if late() and one.room < 1.0:
            continue
        if not choice.chooses(one.plan):
            choice.failed.append(one.plan)
            continue
        pairs = held_out.check(one.plan)
        if held_out.holds(pairs):
            return Proof(one.plan, tuple(pairs))
        held_out.failed.append(one.plan)
    return None


def figures(pairs: Sequence[Pair], targets: Targets) -> tuple[Figure, ...]:
    """What was measured, with confidence intervals."""
    wanted = {target.measure: target for target in targets.each}
    found = [
        _figure(measure, [pair.figures[measure] for pair in pairs], wanted.get(measure))
        for measure in pairs[0].figures
    ]
    times = {
        "speedup": ratios(pairs),
        "seconds": [pair.fast for pair in pairs],
    }
    assert tuple(times) == TIMES
    return (*found, *(_figure(name, values, wanted.get(name)) for name, values in times.items()))


def _figure(measure: str, values: Sequence[float], target: Target | None) -> Figure:
    centre, low, high = interval(values, of_median=measure in TIMES)
    if target is None:
        return Figure(measure=measure, mean=centre, low=low, high=high)
    met = sum(map(target.met_by, values))
    return Figure(
        measure=measure,
        mean=centre,
        low=low,
        high=high,
        share=met / len(values),
        share_low=lowest_share(met, len(values)),
    )


def interval(values: Sequence[float], *, of_median: bool) -> tuple[float, float, float]:
    """Mean, or median, of some values and its 95 % confidence interval, by bootstrap."""
    import numpy as np

    given = np.asarray(values, np.float64)
    middle = np.median if of_median else np.mean
    if len(given) < 2:
        return float(given[0]), float(given[0]), float(given[0])
    drawn = np.random.default_rng(0).choice(given, (RESAMPLES, len(given)))
    low, high = np.percentile(middle(drawn, axis=1), [2.5, 97.5])
    return float(middle(given)), float(low), float(high)


def lowest_share(met: int, count: int) -> float:
    """Lower end of Wilson's 95 % confidence interval of a share."""
    from scipy.stats import binomtest  # type: ignore[import-untyped]

    return float(binomtest(met, count).proportion_ci(0.95, "wilson").low)


def texts(cases: Sequence[Case]) -> str:
    """A digest of the prompts and their noise."""
    plain: list[Any] = [[str(case.call.get("prompt")), case.seed] for case in cases]
    return hashlib.sha256(json.dumps(plain).encode()).hexdigest()[:16]
