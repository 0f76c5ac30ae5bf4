"""Where the guidance scale is 1, leave the unconditional branch out: u + 1·(c − u) is c.

Source: the identity itself. Most pipelines of diffusers do it (they compare the scale with 1 before
the loop, or at each step); those of Wan 2.2 look at the scale of their first network alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

from accel.attach import Accelerator, Site, Undo

if TYPE_CHECKING:
    from accel.seams.denoisers import Call


class SkipAtOne(Accelerator):
    """Evaluate the unconditional branch only where it counts: not where the scale w is 1.

    Acts where a pipeline evaluates it all the same: Wan 2.2 and its kin with
    ``guidance_scale_2=1``. The output there is c to the bit, where the pipeline's own
    u + (c − u) is c but for rounding. Goes with every other method. No device read.
    """

    name: ClassVar[str] = "guidance.SkipAtOne"
    layer: ClassVar[str] = "guidance"
    seam: ClassVar[str] = "branches"
    supports: ClassVar[str] = "acts in pipelines of two networks with a scale each (Wan 2.2)"
    source: ClassVar[str] = "arXiv 2207.12598, eq. 6, at w = 1"
    approximates: ClassVar[bool] = False

    @classmethod
    def off(cls) -> None:
        """It is off when it is left out: it changes nothing but rounding."""

    def why_off(self) -> None:
        """It has no fields."""

    def attach(self, site: Site) -> Iterator[Undo]:
        """Put it around every denoiser."""
        from accel.guidance.branches import Unconditional
        from accel.seams.pipelines import guidance_of, scale_of

        yield site.claim("branches: where the scale is 1")
        numbers: dict[str, float] = {}

        def read() -> None:
            numbers.clear()
            numbers.update(guidance_of(site.pipe))

        def guided(call: Call, _sample: int) -> bool:
            return scale_of(numbers, call.denoiser.name) != 1.0

        yield site.on_start(read)
        yield from Unconditional(site.tally, guided).attach(site)
        idle = site.tally.reason
        site.tally.reason = lambda: (
            "the pipeline leaves the branch out by itself, or its scale is not 1"
            if site.tally.events
            else idle()
        )
