"""What a guard is: a promise about the final latents, and how it is kept."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    field_serializer,
    field_validator,
    model_validator,
)

UNCALIBRATED = 3.0
"""The scale of a guard that nobody calibrated: what it promises then is a guess."""


class Guard(BaseModel):
    """A run-time budget of error, for each sample by itself.

    Promises that the final latents x differ from those of the same run without approximations, x*,
    by ‖x − x*‖/‖x*‖ of at most ``max_error``. x* is what the plan would draw if every network
    answered in full: with its sampler and schedule, without its caches, reduced guidance, tokens
    and attention. Every approximation is charged with the error that spot checks found for it;
    where that does not fit into what is left, the network computes.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    max_error: float = Field(
        ge=0.0,
        description="relative RMS difference of the final latents that is promised, for each "
        "sample; 0: nothing is approximated, inf: no guard",
    )
    file: Path | None = Field(
        default=None,
        description="what `accel calibrate guard` wrote for the model: the scale, and what it "
        "rests on. Another model is refused",
    )
    scale: float | None = Field(
        default=None,
        gt=0.0,
        description="real error for each unit of estimated error, in place of a file's; without "
        f"either it is {UNCALIBRATED:g}, and the report says 'uncalibrated'",
    )
    check_every: int = Field(
        default=6,
        ge=1,
        description="evaluations after which a spot check counts no more: what it was about is "
        "then computed, and checked again",
    )

    @field_validator("max_error", "scale")
    @classmethod
    def _is_a_number(cls, value: float | None) -> float | None:
        if value is not None and math.isnan(value):
            raise ValueError("nan is no value: it equals nothing, not even the same plan")
        return value

    @field_serializer("max_error", "scale", when_used="json")
    def _infinity_is_text(self, value: Any) -> Any:
        return str(value) if isinstance(value, float) and math.isinf(value) else value

    @model_validator(mode="after")
    def _one_scale(self) -> Guard:
        if self.file is not None and self.scale is not None:
            raise ValueError("file and scale are both given: the file holds the scale, keep one")
        return self

    @property
    def watches(self) -> bool:
        """Whether there is a budget to keep: neither nothing nor everything is allowed."""
        return 0.0 < self.max_error < math.inf

    def beside(self, folder: Path) -> Guard:
        """The guard with a relative ``file`` taken from a folder."""
        if self.file is None:
            return self
        return self.model_copy(update={"file": folder / self.file})
