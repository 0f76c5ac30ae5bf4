"""When to compute: from one number a step to yes or no. Pure Python, one object a sample."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from accel.trajectory import Step


class Policy(Protocol):
    """Decides for one sample, once a step."""

    def compute(self, step: Step, value: float | None) -> bool:
        """Whether to compute at this step; ``value`` is ``None`` where nothing is known yet."""
        ...


@dataclass
class Below:
    """Skip while the indicator is below the threshold (First-Block-Cache)."""

    threshold: float

    def exceeded(self, value: float) -> bool:
        """Whether this step has to be computed."""
        return not value < self.threshold

    def computed(self) -> None:
        """Nothing is kept."""


@dataclass
class Accumulated:
    """Skip while the sum of the indicator since the last compute is below it (EasyCache)."""

    threshold: float
    total: float = 0.0

    def exceeded(self, value: float) -> bool:
        """Whether this step has to be computed."""
        self.total += value
        return not self.total < self.threshold

    def computed(self) -> None:
        """Begin a new sum."""
        self.total = 0.0


@dataclass
class Guarded:
    """A rule inside the guards that every adaptive cache shares.

    Attributes:
        rule: Decides where no guard does.
        warmup: Steps at the start that are always computed.
        max_skips: Consecutive skips after which a step is computed; 0 for no cap.
        last: Whether the last step is always computed.
    """

    rule: Below | Accumulated
    warmup: int
    max_skips: int
    last: bool
    skips: int = 0

    def compute(self, step: Step, value: float | None) -> bool:
        """Whether to compute at this step. An indicator that is NaN computes."""
        needed = value is None or math.isnan(value) or self.rule.exceeded(value)
        needed = needed or step.index < self.warmup or (self.last and step.last)
        needed = needed or 0 < self.max_skips <= self.skips
        self.skips = 0 if needed else self.skips + 1
        if needed:
            self.rule.computed()
        return needed
