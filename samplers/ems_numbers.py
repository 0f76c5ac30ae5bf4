"""Statistics of DPM-Solver-v3 that are small enough to stand in a plan; imports no numpy."""

from __future__ import annotations

from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from samplers.fingerprint import Fingerprint


class Scalars(BaseModel):
    """Statistics of one number a level, small enough to stand in a plan; all of them finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    low: float = Field(description="λ of the first numbers, the noisiest ones")
    high: float = Field(description="λ of the last numbers")
    l: tuple[float, ...] = Field(  # noqa: E741
        min_length=2, description="linear part of σ·ε in x, at equal distances of λ"
    )
    s: tuple[float, ...] = Field(min_length=2, description="scale of the change of what is left")
    b: tuple[float, ...] = Field(min_length=2, description="bias of that change")
    measured: Fingerprint | None = Field(
        default=None,
        description="what they were measured on; left out, they serve any model: numbers that were "
        "thought up, such as l = 1, s = b = 0, which makes DPM-Solver++",
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if not self.low < self.high:
            raise ValueError(f"low ({self.low:g}) must be below high ({self.high:g})")
        if len({len(self.l), len(self.s), len(self.b)}) > 1:
            raise ValueError("l, s and b are of one length")
        return self
