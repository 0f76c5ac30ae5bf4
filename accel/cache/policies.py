"""When to compute: from a number a step, or none, to yes or no. One object a sample."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from accel.errors import UnsupportedModel
from accel.trajectory import Step


class Policy(Protocol):
    """Decides for one sample, once a step."""

    def compute(self, step: Step, value: float | None) -> bool:
        """Whether to compute at this step; ``value`` is ``None`` where nothing is known yet."""
        ...


class Rule(Protocol):
    """The part of a policy that tells methods apart."""

    def due(self, step: Step, value: float | None) -> bool:
        """Whether this step has to be computed. Asked once at every step."""
        ...

    def computed(self, step: Step) -> None:
        """The step is computed, by this rule or by a guard."""
        ...


def known(value: float | None) -> bool:
    """Whether an indicator could be measured; what it could not measure computes."""
    return value is not None and not math.isnan(value)


@dataclass
class Below:
    """Skip while the indicator is below the threshold (First-Block-Cache)."""

    threshold: float

    def due(self, step: Step, value: float | None) -> bool:  # noqa: ARG002
        """Whether the threshold is reached."""
        return value is None or not value < self.threshold

    def computed(self, step: Step) -> None:
        """Nothing is kept."""


@dataclass
class Accumulated:
    """Skip while the sum of the indicator since the last compute is below it (EasyCache)."""

    threshold: float
    total: float = 0.0

    def due(self, step: Step, value: float | None) -> bool:  # noqa: ARG002
        """Whether the sum, this step included, reaches the threshold."""
        if value is None:
            return True
        self.total += value
        return not self.total < self.threshold

    def computed(self, step: Step) -> None:  # noqa: ARG002
        """Begin a new sum."""
        self.total = 0.0


@dataclass
class Every:
    """Compute when ``interval`` steps have gone since the last compute (FORA, DeepCache).

    The steps are the solver's: where it evaluates twice a step, it skips both or none.
    """

    interval: int
    newest: int | None = None

    def due(self, step: Step, value: float | None) -> bool:  # noqa: ARG002
        """Whether the interval is over."""
        return self.newest is None or step.turn - self.newest >= self.interval

    def computed(self, step: Step) -> None:
        """Begin a new interval."""
        self.newest = step.turn


@dataclass
class Listed:
    """Compute at listed evaluations, counted from 0.

    Attributes:
        steps: The steps.
        total: Evaluations of the runs that the list was made for; ``None`` for any.
        owner: Whose list it is, for the refusal.
    """

    steps: Sequence[int]
    total: int | None = None
    owner: str = "The list of computed steps"

    def due(self, step: Step, value: float | None) -> bool:  # noqa: ARG002
        """Whether the step is in the list.

        Raises:
            UnsupportedModel: If the run has another number of evaluations than the list is for, or
                if the pipeline cuts its schedule unseen.
        """
        if self.total is not None and step.total is None:
            raise UnsupportedModel(
                f"{self.owner} is for runs of {self.total} evaluations, and this pipeline cuts its "
                "schedule where no public call shows it: it does not fit. Use a scheduler that "
                "has set_begin_index, or a rule with an interval."
            )
        if self.total is not None and step.total != self.total:
            raise UnsupportedModel(
                f"{self.owner} is for runs of {self.total} evaluations; this one "
                f"has {step.total}. Make a list for it, or use a rule with an interval."
            )
        return step.index in self.steps

    def computed(self, step: Step) -> None:
        """Nothing is kept."""


@dataclass
class Within:
    """Inside a range of timesteps compute every ``interval``-th step, outside it all of them.

    Pyramid Attention Broadcast's rule: the solver's steps count from 0, and both ends are
    exclusive.

    Attributes:
        interval: Steps that share one compute.
        low: Timesteps at or below it are computed.
        high: Timesteps at or above it are computed.
    """

    interval: int
    low: float
    high: float

    def due(self, step: Step, value: float | None) -> bool:  # noqa: ARG002
        """Whether the step is outside the range, or has its turn."""
        inside = self.low < step.timestep < self.high
        return not inside or step.turn % self.interval == 0

    def computed(self, step: Step) -> None:
        """Nothing is kept."""


@dataclass
class Either:
    """Compute when one of several rules says so. Each is asked at every step."""

    rules: Sequence[Rule]

    def due(self, step: Step, value: float | None) -> bool:
        """Whether a rule is due."""
        return any([rule.due(step, value) for rule in self.rules])

    def computed(self, step: Step) -> None:
        """Tell all of them."""
        for rule in self.rules:
            rule.computed(step)


@dataclass
class Guarded:
    """A rule inside the guards that every cache shares.

    Attributes:
        rule: Decides where no guard does.
        warmup: Steps at the start that are always computed.
        max_skips: Consecutive skips after which a step is computed; 0 for no cap.
        last: Whether the last step is always computed.
        budget: Skips in all after which every step is computed; 0 for no cap.
    """

    rule: Rule
    warmup: int
    max_skips: int
    last: bool
    budget: int = 0
    skips: int = 0
    skipped: int = 0

    def compute(self, step: Step, value: float | None) -> bool:
        """Whether to compute at this step. An indicator that is NaN computes."""
        value = value if known(value) else None
        needed = self.rule.due(step, value) or self.guards(step)
        needed = needed or 0 < self.max_skips <= self.skips or 0 < self.budget <= self.skipped
        if needed:
            self._computed(step)
        else:
            self.skips, self.skipped = self.skips + 1, self.skipped + 1
        return needed

    def guards(self, step: Step) -> bool:
        """Whether a step is computed for its place in the run alone, in steps of the solver."""
        return step.turn < self.warmup or (self.last and step.closing)

    def force(self, step: Step) -> None:
        """The step is computed, because what was kept is not valid any more."""
        self.rule.due(step, None)
        self._computed(step)

    def overrule(self, step: Step) -> None:
        """The step, which `compute` said may be skipped, is computed all the same."""
        self.skipped -= 1
        self._computed(step)

    def _computed(self, step: Step) -> None:
        self.skips = 0
        self.rule.computed(step)
