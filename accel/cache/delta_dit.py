"""Δ-DiT: at skipped steps leave out the rear blocks early in a run, the front blocks later.

Source: Chen et al., "Δ-DiT: A Training-Free Acceleration Method Tailored for Diffusion
Transformers", arXiv 2406.01125, sections 3.2 and 3.3. The paper's idea is that rear blocks make
the details and front blocks the outlines; it states no defaults for where to switch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from accel.attach import Site, Undo
from accel.cache.fields import StaticCache
from accel.cache.policies import Every
from accel.errors import UnsupportedModel

if TYPE_CHECKING:
    from accel.cache.block_range import Spans
    from accel.trajectory import Step

REAR, FRONT = 0, 1


class DeltaDiT(StaticCache):
    """Compute every ``interval``-th step; add a kept difference for a range of blocks in between.

    Both differences, of the front and of the rear range, are kept up to date at every compute, so
    that the switch needs none. The other blocks, and what is injected between them (ControlNet),
    are live at every step. Never reads the device.
    """

    name: ClassVar[str] = "cache.DeltaDiT"
    layer: ClassVar[str] = "block cache"
    seam: ClassVar[str] = "blocks"
    supports: ClassVar[str] = (
        "transformers with a list of blocks and without long skips, every guidance layout"
    )
    source: ClassVar[str] = "arXiv 2406.01125, sections 3.2 and 3.3"

    interval: int = Field(
        default=2, ge=1, description="steps from one compute to the next; 1 is off"
    )
    share: float = Field(
        default=0.67, gt=0.0, le=1.0, description="share of the blocks that is left out"
    )
    boundary: float = Field(
        default=0.5,
        ge=0.0,
        le=1.0,
        description="share of the run in which the rear is left out; behind it, the front",
    )
    last: bool = Field(default=False, description="always compute the last step")

    def attach(self, site: Site) -> Iterator[Undo]:
        """Put the cache into every denoiser.

        Raises:
            UnsupportedModel: For a network without a plain list of blocks (every UNet), or with
                long skips.
        """
        from accel.cache.block_range import BlockRangeCache, Spans, check_skips
        from accel.cache.decisions import Decisions
        from accel.cache.indicators import Unmeasured

        yield site.claim("blocks")
        check_skips(site, self.name)

        def spans(count: int) -> Spans:
            length = max(1, round(self.share * count))
            return Spans((range(count - length, count), range(length)), choose=self._choose)

        decisions = Decisions(Unmeasured, lambda: self.guarded(Every(self.interval)))
        site.tally.reason = lambda: (
            f"the run had no step to skip after {self.warmup} of warm-up, at interval "
            f"{self.interval}"
        )
        yield from BlockRangeCache(site.tally, decisions, spans, self.forecast).attach(site)

    def _choose(self, step: Step) -> int:
        if self.boundary in (0.0, 1.0):
            return REAR if self.boundary else FRONT
        if step.turns is None:
            raise UnsupportedModel(
                "cache.DeltaDiT switches at a share of the run, and this pipeline cuts its "
                "schedule where no public call shows it: set boundary to 0 or 1."
            )
        return REAR if step.turn < self.boundary * step.turns else FRONT
