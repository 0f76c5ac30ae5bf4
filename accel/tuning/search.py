"""The search: plans that Optuna suggests, raced over the prompts.

Each plan is drawn on one prompt after the other, and leaves as soon as it can no longer win:
because it misses a target at more prompts than a plan would that just holds it (of 16 at one), or
costs more than one that other prompts are likely to hold too (`targets.Target.room`). What it costs
is told by a model: the share of the denoisers' multiplications that were computed, beside the time
that a stock call spends outside of them. Attention's own products are not in that, so plans that
change them are timed.

Source: Optuna's multi-objective TPE with constraints (arXiv 2304.11127, section 2), racing (Maron
and Moore, NIPS 1993, section 2; here the number of misses decides).
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from accel.errors import AccelError, BadInput
from accel.plan import Plan
from accel.tuning.bench import Case, Drawing, Line
from accel.tuning.space import Space
from accel.tuning.targets import Targets, likely_misses

if TYPE_CHECKING:
    from optuna.storages import BaseStorage
    from optuna.study import Study
    from optuna.trial import FixedTrial, FrozenTrial

FAR = -3.0
"""Margin (in units of `targets.SCALES`) of a mean, below which a plan does not go on."""

FEW = 4
"""Prompts of which none may miss."""

WORSE = (1.15, 1.05)
"""How many times the cost of the best plan that is likely to hold another one may have and go on,
with fewer than `FEW` prompts and with more: what a plan computes differs from prompt to prompt."""

TIMED = ("attention",)
"""Layers whose saving the model of costs does not see."""

SEED = 0
FUTILE = 200
"""Plans in a row that were known or refused, after which there is nothing more to find."""


DRAWN, PLAN = "prompts", "plan"
"""What a trial says besides: on how many prompts it was drawn, and as what plan."""


@dataclass(frozen=True)
class Point:
    """A plan as far as it was drawn.

    Attributes:
        plan: The plan.
        lines: What it did, one a prompt.
        cost: Seconds of a call over those of stock, by the model.
        slack: Margin of the tightest target (`targets.Targets.slack`).
        room: How surely other prompts hold every target (`targets.Targets.room`).
        whole: Whether it was drawn on all prompts.
    """

    plan: Plan
    lines: tuple[Line, ...]
    cost: float
    slack: float
    room: float
    whole: bool

    def mean(self, measure: str) -> float:
        """Mean of a measure over its prompts."""
        return sum(line.figures[measure] for line in self.lines) / len(self.lines)

    @property
    def figures(self) -> tuple[tuple[float, ...], ...]:
        """Of each prompt all measures: what two plans share that draw the same pictures."""
        return tuple(tuple(line.figures.values()) for line in self.lines)

    @property
    def ratio(self) -> float:
        """Seconds of a call over those of stock, in the median of its prompts."""
        return median(line.ratio for line in self.lines)

    @property
    def holds(self) -> bool:
        """Whether every target of fidelity holds, as far as the prompts of the search can tell."""
        return self.whole and self.slack >= 0.0


@dataclass
class Search:
    """Looks for plans until its time is over.

    Attributes:
        bench: What draws.
        cases: The prompts of the search.
        targets: What is to be held.
        space: What may be tried.
        outside: Share of a stock call that is spent outside of the denoisers.
        seconds: Of a stock call.
        folder: Where the study is kept, to go on with it, or with its plans for another target;
            ``None``: in memory.
        seed: Of the sampler.
        points: What was found so far, by plan.
    """

    bench: Drawing
    cases: Sequence[Case]
    targets: Targets
    space: Space
    outside: float
    seconds: float
    folder: Path | None = None
    seed: int = SEED
    points: dict[Plan, Point] = field(default_factory=dict)
    refused: int = 0

    def run(self, until: Callable[[], bool], told: Callable[[], None] = lambda: None) -> None:
        """Try plans until something says that it is enough.

        Args:
            until: Asked before each plan.
            told: Called after each plan.
        """
        self._begin()
        futile = 0
        while not until() and futile < FUTILE:
            futile = 0 if self._try() else futile + 1
            told()

    def recall(self, until: Callable[[], bool] = lambda: False) -> None:
        """Take up what was found before in the folder, for this target or others.

        Nothing is drawn for it. The study learns of what is known, as if it had proposed it; what
        was given up for another target and may win at this one is proposed, the cheapest first.

        Args:
            until: Asked before each plan.
        """
        self._begin()
        own = {_written(trial.params) for trial in self._study.trials}
        for trial in sorted(self._kept(), key=lambda trial: trial.values[0]):
            if until():
                return
            with suppress(AccelError, ValueError):  # what the code or the space have no more
                fixed = imported().trial.FixedTrial(trial.params)
                chosen, known = self.space.chosen(fixed), trial.user_attrs
                plan = Plan.from_json(known[PLAN]) if PLAN in known else self.space.plan(*chosen)
                point = self._longer(self._climb(plan, known.get(DRAWN, 1), more=False))
                if self._is_open(point):
                    self._study.enqueue_trial(trial.params, skip_if_exists=True)
                elif _written(trial.params) not in own:
                    own.add(_written(trial.params))
                    self._study.add_trial(self._learnt(fixed, point))

    def _begin(self) -> None:
        """With the empty plan: it holds every target of fidelity, at the price of stock."""
        if Plan() not in self.points:
            lines = tuple(self.bench.figures(Plan(), case) for case in self.cases)
            self.points[Plan()] = self._point(Plan(), lines)

    @cached_property
    def _storage(self) -> BaseStorage | None:
        """The studies of the folder, of any target; ``None`` where nothing is kept."""
        if self.folder is None:
            return None
        storages = imported().storages
        file = storages.journal.JournalFileBackend(str(self.folder / "study.jsonl"))
        kept: BaseStorage = storages.JournalStorage(file)
        return kept

    @cached_property
    def _study(self) -> Study:
        optuna = imported()
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            sampler = optuna.samplers.TPESampler(seed=self.seed, multivariate=True, group=True)
        study: Study = optuna.create_study(
            study_name=f"{' '.join(map(str, self.targets.each))}, {self.space.digest}, {self._kin}",
            storage=self._storage,
            sampler=sampler,
            directions=["minimize", "maximize" if self._sign > 0 else "minimize"],
            load_if_exists=True,
        )
        if not study.trials:
            for parameters in self.space.seeds():
                study.enqueue_trial(parameters)
        return study

    def _kept(self) -> Iterator[FrozenTrial]:
        """What was drawn in studies of the folder for these prompts."""
        optuna = imported()
        if self._storage is None:
            return
        for name in optuna.get_all_study_names(self._storage):
            if name.endswith(f", {self._kin}"):
                study = optuna.load_study(study_name=name, storage=self._storage)
                yield from study.get_trials(states=(optuna.trial.TrialState.COMPLETE,))

    def _learnt(self, trial: FixedTrial, point: Point) -> FrozenTrial:
        """A trial of another target, or another space, as it is one of this."""
        made: FrozenTrial = imported().trial.create_trial(
            params=trial.params,
            distributions=trial.distributions,
            values=[point.cost, point.mean(self.targets.first)],
            user_attrs=_noted(point),
            constraints=self._constraints(point),
        )
        return made

    @property
    def _kin(self) -> str:
        """Of pipeline, machine and prompts: what studies have in common that help each other."""
        prompts = sha256(" ".join(case.key for case in self.cases).encode()).hexdigest()[:12]
        return f"{self.bench.mark}, {prompts}"

    @property
    def _sign(self) -> int:
        return -1 if self.targets.first == "perceptual" else 1

    def _try(self) -> bool:
        """Have a plan suggested and drawn, and tell what came of it; whether that was new."""
        optuna = imported()
        trial = self._study.ask()
        try:
            plan = self.space.suggest(trial)
            point = self.points.get(plan)
            fresh = point is None or self._is_open(point)
            if point is None or fresh:
                point = self._climb(plan)
        except AccelError as error:
            self.refused += 1
            trial.set_user_attr("refused", str(error))
            self._study.tell(trial, state=optuna.trial.TrialState.FAIL)
            return False
        fresh = fresh and self.points.get(point.plan) != point
        point = self._longer(point)
        for name, limit in self._constraints(point).items():
            trial.set_constraint(name, limit)
        for name, value in _noted(point).items():
            trial.set_user_attr(name, value)
        self._study.tell(trial, [point.cost, point.mean(self.targets.first)])
        return fresh

    def _longer(self, point: Point) -> Point:
        """Of a point and what is known of its plan the one with more prompts, which is kept."""
        known = self.points.get(point.plan, point)
        self.points[point.plan] = max(known, point, key=lambda one: len(one.lines))
        return self.points[point.plan]

    def _is_open(self, point: Point) -> bool:
        """Whether more of a plan is to be drawn: it was given up, and may win now."""
        return not point.whole and self._promising(point)

    def _constraints(self, point: Point) -> dict[str, float]:
        """What must be at most 0: by how much the plan misses fidelity, and each time."""
        limits = [-point.slack, *self._late(point)]
        return {str(number): limit for number, limit in enumerate(limits)}

    def _late(self, point: Point) -> list[float]:
        """By how much a plan misses each target of time; at most 0: it keeps it."""
        return [-target.margin(self._told(target.measure, point)) for target in self.targets.times]

    def _told(self, measure: str, point: Point) -> float:
        """What the model of costs says of a time."""
        return point.cost * self.seconds if measure == "seconds" else 1.0 / point.cost

    def _climb(self, plan: Plan, least: int = 1, *, more: bool = True) -> Point:
        """Draw a plan on one prompt after the other; what does nothing at the first is left out.

        Args:
            plan: The plan.
            least: Prompts that it is drawn on in any case.
            more: Whether it is drawn on others too, for as long as it may still win.

        Raises:
            AccelError: If it does not serve the pipeline.
        """
        lines = [self.bench.figures(plan, self.cases[0])]
        if lines[0].idle:
            busy = Plan(*(method for method in plan if method.name not in lines[0].idle))
            return self._climb(busy, least, more=more)
        point = self._point(plan, tuple(lines))
        for case in self.cases[1:]:
            if len(lines) >= least and not (more and self._promising(point)):
                break
            lines.append(self.bench.figures(plan, case))
            point = self._point(plan, tuple(lines))
        return point

    def _spare(self, prompts: int) -> int:
        """How many of so many prompts may miss: of the first few none, where most plans leave."""
        return likely_misses(len(self.cases)) if prompts > FEW else 0

    def _point(self, plan: Plan, lines: tuple[Line, ...]) -> Point:
        figures = [line.figures for line in lines]
        slack = self.targets.slack(figures, self._spare(len(lines)))
        whole = len(lines) == len(self.cases)
        room = self.targets.room(figures)
        return Point(plan, lines, self._cost(plan, lines), slack, room, whole)

    def _cost(self, plan: Plan, lines: Sequence[Line]) -> float:
        if any(method.layer in TIMED for method in plan):
            return median(line.ratio for line in lines)
        products = sum(line.products for line in lines) / len(lines)
        return self.outside + (1.0 - self.outside) * products

    def _promising(self, point: Point) -> bool:
        if self.targets.fidelity:
            best = min(
                (one.cost for one in self.points.values() if self._is_sure(one)), default=1.0
            )
            worse = WORSE[len(point.lines) >= FEW]
            figures = [line.figures for line in point.lines]
            missed = self.targets.missed(figures, self._spare(len(figures)))
            return not missed and point.slack > FAR and point.cost < worse * best
        return all(limit <= 0.1 for limit in self._late(point))

    def _is_sure(self, point: Point) -> bool:
        """Whether a plan holds every target, and other prompts are likely to hold it too."""
        return point.holds and point.room >= 1.0

    def ranked(self) -> list[Point]:
        """The plans that hold what was asked for at every prompt, the best first.

        The best is the cheapest where fidelity is asked for, and the nearest where only time is. Of
        plans that draw the same pictures there is one: they differ in what does nothing here.
        """
        sign, measure = self._sign, self.targets.first
        good = [
            point
            for point in self.points.values()
            if point.holds and all(limit <= 0.0 for limit in self._late(point))
        ]
        if self.targets.fidelity:
            good.sort(key=lambda point: (point.cost, -sign * point.mean(measure), point.ratio))
        else:
            good.sort(key=lambda point: (-sign * point.mean(measure), point.cost))
        distinct: dict[Any, Point] = {}
        for point in good:
            distinct.setdefault(point.figures, point)
        return list(distinct.values())


def _noted(point: Point) -> dict[str, Any]:
    """What a trial says of its point, besides its values."""
    return {DRAWN: len(point.lines), PLAN: point.plan.to_json()}


def _written(params: Mapping[str, Any]) -> str:
    """Parameters of a trial, to compare them."""
    return json.dumps(params, sort_keys=True)


def imported() -> Any:
    """Optuna.

    Raises:
        BadInput: If it is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise BadInput("Tuning needs Optuna: `pip install diffusers-accel[tune]`.") from error
    return optuna
