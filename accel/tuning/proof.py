"""The proof: the best plans are timed beside stock, then checked on prompts not seen before."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from accel.plan import Plan
from accel.tuned import Figure
from accel.tuning.bench import Bench, Case, Drawn, fidelity
from accel.tuning.targets import TIMES, Target, Targets, may_miss

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
        stock: Seconds of the stock call.
        fast: Seconds of the plan's.
        figures: By measure of fidelity its value; empty where only time counts.
    """

    stock: float
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


def finalists(
    bench: Bench,
    ranked: Sequence[Plan],
    cases: Sequence[Case],
    told: Callable[[], None] = lambda: None,
) -> Iterator[Plan]:
    """Plans in the order in which to check them: of each few the fastest by the clock first.

    Args:
        bench: What draws.
        ranked: The plans, the fastest first as far as is known.
        cases: The prompts of the search: some are timed on.
        told: Called before each few are timed.
    """
    for first in range(0, len(ranked), FINALISTS):
        told()
        pairs = timed(bench, ranked[first : first + FINALISTS], cases[:TIMED])
        yield from sorted(pairs, key=lambda plan: -speed(pairs[plan]))


def speed(pairs: Sequence[Pair]) -> float:
    """How many times faster than stock, in the median of neighbours."""
    return median(pair.stock / pair.fast for pair in pairs)


@dataclass
class Checks:
    """Checks plans on the held-out prompts; what stock draws of them is drawn once.

    Attributes:
        bench: What draws.
        cases: The prompts.
        targets: What is to be held.
        measures: What is measured of each.
        told: Called after each prompt, with how many of a plan are done.
    """

    bench: Bench
    cases: Sequence[Case]
    targets: Targets
    measures: Sequence[str]
    told: Callable[[int], None] = lambda _done: None

    def __post_init__(self) -> None:
        self._stock: dict[str, Drawn] = {}

    def check(self, plan: Plan) -> list[Pair]:
        """Draw the prompts, stock first and plan first in turns, until the plan has failed.

        Returns:
            A pair for each prompt that was drawn: fewer than there are if it failed before.
        """
        pairs: list[Pair] = []
        for turn, case in enumerate(self.cases):
            pairs.append(self._pair(plan, case, turn % 2 == 1))
            self.told(len(pairs))
            if self._lost(pairs):
                break
        return pairs

    def holds(self, pairs: Sequence[Pair]) -> bool:
        """Whether a plan holds every target, by all of its prompts."""
        if len(pairs) < len(self.cases):
            return False
        times = {"speedup": speed(pairs), "seconds": median(pair.fast for pair in pairs)}
        in_time = all(target.met_by(times[target.measure]) for target in self.targets.times)
        return in_time and self.targets.held_by([pair.figures for pair in pairs])

    def _pair(self, plan: Plan, case: Case, plan_first: bool) -> Pair:
        fast = self.bench.time(plan, case) if plan_first else None
        if case.key not in self._stock:
            self._stock[case.key] = self.bench.time(Plan(), case)
        stock = self._stock[case.key]
        fast = fast or self.bench.time(plan, case)
        figures = fidelity(self.measures, stock.pictures, fast.pictures, case)
        return Pair(stock.seconds, fast.seconds, figures)

    def _lost(self, pairs: Sequence[Pair]) -> bool:
        """Whether more prompts have missed a target than may in the end."""
        may = may_miss(len(self.cases))
        return any(
            sum(not target.met_by(pair.figures[target.measure]) for pair in pairs) > may
            for target in self.targets.fidelity
            if target.measure != "accuracy"
        )


def figures(pairs: Sequence[Pair], targets: Targets) -> tuple[Figure, ...]:
    """What was measured, with confidence intervals."""
    wanted = {target.measure: target for target in targets.each}
    found = [
        _figure(measure, [pair.figures[measure] for pair in pairs], wanted.get(measure))
        for measure in pairs[0].figures
    ]
    times = {
        "speedup": [pair.stock / pair.fast for pair in pairs],
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
