"""The fields that caches share: their guards, and how they fill in."""

from __future__ import annotations

from typing import Self

from pydantic import Field

from accel.attach import Accelerator
from accel.cache.policies import Guarded, Rule
from accel.cache.predictors import Forecast, Keep, Kind


class Cache(Accelerator):
    """A cache: some steps are computed, the others filled in by a predictor."""

    warmup: int = Field(default=1, ge=1, description="steps at the start that are always computed")
    max_skips: int = Field(
        default=0, ge=0, description="consecutive skips after which a step is computed; 0: no cap"
    )
    last: bool = Field(default=True, description="always compute the last step")
    predictor: Kind = Field(
        default="reuse",
        description="what fills in: 'reuse', 'newton' (polynomial in the log-SNR), 'taylor', "
        "'hicache' (Hermite), 'foca', 'dmd' (linear dynamics)",
    )
    order: int = Field(
        default=1, ge=1, le=4, description="degree of 'newton', 'taylor' and 'hicache'"
    )
    damping: float = Field(
        default=0.4,
        ge=0.0,
        lt=1.0,
        description="share of the change that 'newton' extrapolates that is left out",
    )
    scale: float = Field(default=0.5, gt=0.0, le=1.0, description="σ of 'hicache'")
    keep: Keep = Field(
        default="native",
        description="how the values that are filled in from are stored: 'native', in 'bfloat16', "
        "or on the 'cpu'. What an indicator compares stays native: it is read at every step, and "
        "its small differences would be rounding in bfloat16",
    )

    def guarded(self, rule: Rule) -> Guarded:
        """A fresh policy for one sample: a rule inside this method's guards."""
        return Guarded(rule, self.warmup, self.max_skips, self.last)

    def fixed(self, steps: int) -> frozenset[int]:
        """Those of the warm-up, and the last."""
        first = frozenset(range(min(self.warmup, steps)))
        return first | {steps - 1} if self.last else first

    @property
    def forecast(self) -> Forecast:
        """How skipped values are filled in."""
        return Forecast(self.predictor, self.order, self.damping, self.scale, self.keep)


class Thresholded(Accelerator):
    """Has a threshold; 0 is off."""

    threshold: float = Field(ge=0.0)

    @classmethod
    def off(cls) -> Self:
        """Threshold 0."""
        return cls.model_validate({"threshold": 0.0})

    def why_off(self) -> str | None:
        """Threshold 0 computes every step."""
        return "threshold is 0" if self.threshold == 0 else None


class Spaced(Accelerator):
    """Has an interval; 1 is off."""

    interval: int = Field(ge=1)

    @classmethod
    def off(cls) -> Self:
        """Interval 1."""
        return cls.model_validate({"interval": 1})

    def why_off(self) -> str | None:
        """Interval 1 computes every step."""
        return "interval is 1" if self.interval == 1 else None


class AdaptiveCache(Cache, Thresholded):
    """A cache that computes when an indicator reaches its threshold."""


class StaticCache(Cache, Spaced):
    """A cache that computes every ``interval``-th step. It never reads the device."""


class Limited(Accelerator):
    """Keeps so much that it says what it will keep before it does."""

    memory_limit: float = Field(
        default=0.0,
        ge=0.0,
        description="MiB that kept module outputs may come to take, summed up in the first "
        "computed step; more is an error there. 0: no limit",
    )
