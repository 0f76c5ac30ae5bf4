"""First-Block-Cache: the first block tells whether the others have to run.

Source: ParaAttention's First Block Cache (2024), a TeaCache (arXiv 2411.19108) whose indicator is
the residual of the first transformer block.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from pydantic import Field

from accel.attach import Site, Undo
from accel.cache.fields import AdaptiveCache
from accel.cache.policies import Below


class FirstBlock(AdaptiveCache):
    """Skip the blocks behind the first while its residual changes little since the last compute.

    Per sample; what is injected between blocks (ControlNet) stays live on skipped steps. Reads
    the device once a step.
    """

    name: ClassVar[str] = "cache.FirstBlock"
    layer: ClassVar[str] = "block cache"
    seam: ClassVar[str] = "blocks"
    supports: ClassVar[str] = "transformers with a list of blocks, every guidance layout"
    source: ClassVar[str] = "ParaAttention First Block Cache; arXiv 2411.19108"

    threshold: float = Field(
        default=0.08,
        ge=0.0,
        description="relative L1 change of the first block's residual below which the others are "
        "skipped; 0 is off. Usual: 0.05 to 0.12",
    )
    warmup: int = Field(
        default=2, ge=1, description="steps at the start that are always computed (≥ 1)"
    )

    def attach(self, site: Site) -> Iterator[Undo]:
        """Put the cache into every denoiser.

        Raises:
            UnsupportedModel: For a network without a plain list of blocks (every UNet).
        """
        from accel.cache.block_range import BlockRangeCache, Spans
        from accel.cache.decisions import Decisions
        from accel.cache.indicators import ProbeChange

        yield site.claim("blocks")
        yield site.claim("decisions for all branches")
        decisions = Decisions(ProbeChange, lambda: self.guarded(Below(self.threshold)))
        site.tally.reason = lambda: decisions.why_idle("the first block's change", self.threshold)
        cache = BlockRangeCache(
            site.tally, decisions, lambda count: Spans((range(1, count),), front=1), self.forecast
        )
        yield from cache.attach(site)
