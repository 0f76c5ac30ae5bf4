"""Limited guidance interval: guide only where the noise level lies in an interval.

Source: Kynkäänniemi et al., "Applying Guidance in a Limited Interval Improves Sample and
Distribution Quality in Diffusion Models", arXiv 2404.07724, section 3.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, Self

from pydantic import Field, model_validator

from accel.attach import Site, Undo
from accel.guidance.switching import Switching

if TYPE_CHECKING:
    from accel.seams.denoisers import Call


class Interval(Switching):
    """Evaluate the unconditional branch only while σ_lo < σ ≤ σ_hi; elsewhere w = 1.

    σ is in the units of EDM, σ/α: a flow's σ_f is σ_f/(1 − σ_f), infinite at its first step. The
    stages of a solver's step are in or out together, by the level at which the step starts. A pure
    function of the noise level: no state, no device read.
    """

    name: ClassVar[str] = "guidance.Interval"
    layer: ClassVar[str] = "guidance"
    seam: ClassVar[str] = "branches"
    supports: ClassVar[str] = "batched and two-call guidance; not embedded guidance"
    source: ClassVar[str] = "arXiv 2404.07724, section 3"

    low: float = Field(
        default=0.28, ge=0.0, description="σ/α at and below which there is no guidance; 0: none"
    )
    high: float = Field(
        default=math.inf,
        gt=0.0,
        description="σ/α above which there is no guidance; inf: none. The authors use "
        "(0.28, 5.42] for SDXL, (0.19, 1.61] for EDM2-XXL",
    )

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low >= self.high:
            raise ValueError(f"low ({self.low:g}) must be below high ({self.high:g})")
        return self

    @classmethod
    def off(cls) -> Self:
        """The interval of all noise levels."""
        return cls(low=0.0, high=math.inf)

    def why_off(self) -> str | None:
        """The whole range is plain guidance."""
        return "the interval is (0, ∞]" if self.low == 0 and math.isinf(self.high) else None

    def attach(self, site: Site) -> Iterator[Undo]:
        """Put it around every denoiser."""
        from accel.guidance.branches import WHERE, Unconditional, resetting
        from accel.seams.stages import start_of

        yield site.claim(WHERE)

        def guided(call: Call, _sample: int) -> bool:
            return self.low < start_of(call.step, site.trajectory.scheduler).sigma <= self.high

        switched = resetting(site, self)
        yield from Unconditional(site.tally, guided, switched=switched).attach(site)
