"""`accel.tune`: the fastest plan that holds a fidelity, or the nearest one that holds a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from accel.errors import BadInput, NotReached
from accel.plan import Plan
from accel.tuned import Tuned, numbers_of
from accel.tuning import proof
from accel.tuning.bench import Case
from accel.tuning.cases import cases
from accel.tuning.search import Point, Search, imported
from accel.tuning.space import Space, fits
from accel.tuning.subject import Subject
from accel.tuning.targets import Targets

if TYPE_CHECKING:
    from PIL import Image

LEAST = 0.3
"""Share of the budget that the search must have, beside what the proof takes."""

FURTHER = 0.6
"""Stock calls a prompt that checking one more plan takes."""

WATCHED = 4
"""Prompts of the search that measured fields rest on."""

Observe = Callable[[str, int, int], None]
"""Stage (``stock``, ``search``, ``timing``, ``choice``, ``held out``), how far it is, of what."""


@dataclass(frozen=True)
class Tuning:
    """What came of it.

    Attributes:
        plan: The plan, with its evidence (`accel.Plan.tuned`).
        targets: What was asked for.
        points: Every plan that was drawn on all prompts of the search.
        pairs: What was measured of the plan on the held-out prompts.
        tried: How many plans were drawn at all.
        refused: How many combinations did not go together.
        failed: Plans that held on the prompts of the search, and then not on others.
    """

    plan: Plan
    targets: Targets
    points: tuple[Point, ...]
    pairs: tuple[proof.Pair, ...]
    tried: int
    refused: int
    failed: tuple[Plan, ...] = ()

    @property
    def evidence(self) -> Tuned:
        """What the plan promises, and on what it was measured."""
        assert self.plan.tuned is not None
        return self.plan.tuned

    def front(self) -> list[Point]:
        """The plans that no other one beats in both cost and fidelity, the cheapest first."""
        return front(self.points, self.targets.first)

    def plot(self) -> Image.Image:
        """Cost against fidelity of all plans; needs matplotlib (the extra ``tune``)."""
        from accel.tuning.plot import draw

        return draw(self)

    def __str__(self) -> str:
        proven = self.evidence
        names = ", ".join(method.name for method in self.plan) or "no method: nothing faster holds"
        return (
            f"{' and '.join(proven.targets)}: {names}\n"
            f"  on {proven.held_out} prompts that the search never saw: {proven.measured}\n"
            f"  {self.tried} plans tried on {proven.prompts} prompts, chosen from on "
            f"{proven.chosen_on} others, in {proven.minutes:.1f} min"
        )


@dataclass(kw_only=True)
class Session:
    """One tuning: what it works on, and its time.

    Attributes:
        pipe: The stock pipeline.
        targets: What is to be held.
        cases: The prompts of the search.
        choice: Those that choose among the plans that it found.
        held_out: Those of the proof.
        budget: Seconds in all.
        folder: Where trials are kept, to go on with them.
        observe: Hears how far it is.
        clock: Tells seconds.
    """

    pipe: Any
    targets: Targets
    cases: Sequence[Case]
    choice: Sequence[Case]
    held_out: Sequence[Case]
    budget: float
    folder: Path | None = None
    observe: Observe = lambda _stage, _done, _total: None
    clock: Callable[[], float] = time.perf_counter

    def __post_init__(self) -> None:
        imported()
        self.subject = Subject.of(self.pipe, self.targets, self.folder, self.clock)
        self.subject.check((*self.cases, *self.choice, *self.held_out))
        self.bench = self.subject.bench
        self.began = self.clock()

    def run(self) -> Tuning:
        """Search, time, prove."""
        search = self._search()
        reserve = self._reserve(search.seconds)
        ends = self.began + self.budget - reserve

        room = int(self.budget - reserve)

        def told() -> None:
            self.observe("search", min(int(self.clock() - self.began), room), room)

        search.recall(lambda: self.clock() >= ends)
        search.run(lambda: self.clock() >= ends, told)
        return self._proven(search)

    def _search(self) -> Search:
        """Stock on the prompts of the search, and what there is to try.

        Raises:
            BadInput: If the budget is too short for the proof.
        """
        self.bench.time(Plan(), self.cases[0])  # the first call of a process takes longer
        drawn = []
        for number, case in enumerate(self.cases):
            self.observe("stock", number, len(self.cases))
            drawn.append(self.bench.stock(case))
            self._afford(median(one.seconds for one in drawn))
        seconds = median(one.seconds for one in drawn)
        inside = median(one.work.seconds / one.seconds for one in drawn)
        steps = dict(numbers_of(self.cases[0].call)).get("num_inference_steps")
        if steps is None:
            raise BadInput(
                "The call says no num_inference_steps, so there is nothing to hold fewer steps "
                "against: give call={'num_inference_steps': …}."
            )
        watched = [case.arguments() for case in self.cases[:WATCHED]]
        return Search(
            self.bench,
            self.cases,
            self.targets,
            Space.of(self.pipe, int(steps), fits=fits(self.pipe, watched)),
            outside=max(0.0, 1.0 - inside),
            seconds=seconds,
            folder=self.folder,
        )

    def _reserve(self, seconds: float) -> float:
        """Seconds to keep for timing and proof, by the time of a stock call."""
        timing = min(proof.TIMED, len(self.cases)) * (1 + 0.6 * proof.FINALISTS)
        return 1.2 * seconds * (timing + 1.6 * self._checked())

    def _checked(self) -> int:
        """Prompts that a plan is checked on."""
        return len(self.choice) + len(self.held_out)

    def _afford(self, seconds: float) -> None:
        stock = seconds * (1 + len(self.cases))
        least = (stock + self._reserve(seconds)) / (1.0 - LEAST)
        if self.budget < least:
            raise BadInput(
                f"A budget of {self.budget:.0f} s is too short: a stock call takes {seconds:.1f} "
                f"s, and {len(self.cases)} prompts to search, {len(self.choice)} to choose and "
                f"{len(self.held_out)} to prove it need some {least:.0f} s. Give a larger budget, "
                "or fewer prompts."
            )

    def _proven(self, search: Search) -> Tuning:
        """The fastest plan that holds with room on the prompts that choose, and on the held-out.

        Raises:
            NotReached: If there is none.
        """
        fidelity = Targets(self.targets.fidelity)
        choice = proof.Sample(
            self.bench,
            self.choice,
            fidelity,
            lambda done: self.observe("choice", done, len(self.choice)),
        )
        held_out = self.subject.checks(
            self.held_out, lambda done: self.observe("held out", done, len(self.held_out))
        )
        ends = self.began + self.budget - FURTHER * search.seconds * self._checked()
        finalists = self._finalists(search)
        found = proof.first(finalists, choice, held_out, lambda: self.clock() >= ends)
        failed = (*choice.failed, *held_out.failed)
        if found is not None:
            return self._result(search, found, failed)
        raise NotReached(self._nearest(search, len(failed)))

    def _finalists(self, search: Search) -> Iterator[proof.Finalist]:
        """Plans that hold on the prompts of the search, the fastest by the clock first."""
        points = search.ranked()
        if not self.targets.fidelity:  # then they are ranked by it, within the time
            return (proof.Finalist(point.plan, point.room) for point in points)
        # by the clock, which was beside each draw: the model of costs knows no method's own time
        ranked = {one.plan: one.room for one in sorted(points, key=lambda point: point.ratio)}
        return proof.finalists(self.bench, ranked, self.cases, lambda: self.observe("timing", 0, 1))

    def _result(self, search: Search, found: proof.Proof, failed: tuple[Plan, ...]) -> Tuning:
        evidence = self.subject.evidence(
            found.plan,
            self.held_out,
            found.pairs,
            (self.clock() - self.began) / 60.0,
            prompts=len(self.cases),
            chosen_on=len(self.choice),
            plans=len(search.points),
        )
        return Tuning(
            found.plan.proven(evidence),
            self.targets,
            tuple(point for point in search.points.values() if point.whole),
            found.pairs,
            len(search.points),
            search.refused,
            failed,
        )

    def _nearest(self, search: Search, failed: int) -> str:
        """What was found instead, in words."""
        wanted = " and ".join(map(str, self.targets.each))
        whole = [point for point in search.points.values() if point.whole]
        near = max(whole, key=lambda point: (min(point.slack, 0.0), -point.cost))
        measure = self.targets.first
        told = (
            f"the nearest has {measure} {near.mean(measure):.4g} at {1.0 / near.cost:.2f} times "
            "the speed of stock, by the model of costs"
        )
        some = f", {failed} of them held it until other prompts" if failed else ""
        return (
            f"None of {len(search.points)} plans that were tried holds {wanted}{some}; {told}. "
            "Ask for less, or give a larger budget."
        )


def tune(
    pipe: Any,
    target: str | Sequence[str],
    budget: float = 600.0,
    *,
    prompts: Sequence[str] | None = None,
    call: Mapping[str, Any] | None = None,
    split: tuple[int, int, int] = (8, 20, 20),
    folder: Path | None = None,
    observe: Observe = lambda _stage, _done, _total: None,
) -> Tuning:
    """Find the fastest plan that holds a fidelity on this pipeline and machine, with proof.

    Plans over sampler, steps, schedule, guidance, cache, tokens and attention are searched on a few
    prompts; the best are timed beside the stock pipeline, and checked on prompts that the search
    never saw: what is promised then was measured there. Needs the extra ``tune``.

    Args:
        pipe: A stock diffusers pipeline; it is left as it is.
        target: Such as ``"ssim>=0.95"``, or several: ssim, psnr (dB), perceptual or lpips
            (distance in the scenes oracle's features), accuracy (of captions of the scenes),
            speedup, seconds. With times alone, the nearest plan that keeps them is found.
        budget: Seconds in all.
        prompts: What to draw, noise from seeds 0, 1, …; captions of the scenes where none are
            given.
        call: Arguments of the pipeline's call; ``num_inference_steps`` among them.
        split: How many of the prompts are searched on, how many of those that follow choose among
            what was found (of 20 all must hold), and how many more prove it (of 20 one may miss).
        folder: Where trials are kept; the same call goes on there, and another target begins with
            what was tried for this one.
        observe: Hears how far it is.

    Raises:
        BadInput: If the target is none, the budget too short, prompts are missing, or Optuna is.
        NotReached: If no plan that was tried holds the target.
        UnsupportedModel: If the pipeline cannot be served.
    """
    targets, given = Targets.parse(target), dict(call or {})
    searched, choice, held_out = cases(prompts, given, split)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    return Session(
        pipe=pipe,
        targets=targets,
        cases=searched,
        choice=choice,
        held_out=held_out,
        budget=budget,
        folder=folder,
        observe=observe,
    ).run()


def front(points: Sequence[Point], measure: str) -> list[Point]:
    """The points that no other one beats in both cost and a measure, the cheapest first."""
    sign = -1 if measure == "perceptual" else 1
    found: list[Point] = []
    for point in sorted(points, key=lambda one: (one.cost, -sign * one.mean(measure))):
        if not found or sign * point.mean(measure) > sign * found[-1].mean(measure):
            found.append(point)
    return found
