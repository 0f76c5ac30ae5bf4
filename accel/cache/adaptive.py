"""What every adaptive cache has in common: its guards and how it fills in."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field

from accel.attach import Accelerator
from accel.cache.policies import Accumulated, Below, Guarded
from accel.cache.predictors import Forecast


class AdaptiveCache(Accelerator):
    """A cache that computes when an indicator reaches a threshold; 0 is off."""

    threshold: float = Field(ge=0.0)
    warmup: int = Field(ge=1)
    max_skips: int = Field(
        default=0, ge=0, description="consecutive skips after which a step is computed; 0: no cap"
    )
    last: bool = Field(default=True, description="always compute the last step")
    predictor: Literal["reuse", "newton"]
    order: int = Field(default=1, ge=1, le=3, description="degree of the Newton polynomial")
    damping: float = Field(
        default=0.4,
        ge=0.0,
        lt=1.0,
        description="share of the change that 'newton' extrapolates that is left out",
    )

    @classmethod
    def off(cls) -> Self:
        """Threshold 0."""
        return cls.model_validate({"threshold": 0.0})

    def why_off(self) -> str | None:
        """Threshold 0 computes every step."""
        return "threshold is 0" if self.threshold == 0 else None

    def guarded(self, rule: Below | Accumulated) -> Guarded:
        """A fresh policy for one sample: a rule inside this method's guards."""
        return Guarded(rule, self.warmup, self.max_skips, self.last)

    @property
    def forecast(self) -> Forecast:
        """How skipped values are filled in."""
        return Forecast(self.predictor, self.order, self.damping)
