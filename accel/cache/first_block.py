"""First-Block-Cache: the first block tells whether the others have to run.

Source: ParaAttention's First Block Cache (2024), a TeaCache (arXiv 2411.19108) whose indicator is
the residual of the first transformer block.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal, Self

from pydantic import Field

from accel.attach import Accelerator, Site, Undo
from accel.cache.policies import Below, Guarded
from accel.cache.predictors import Forecast


class FirstBlock(Accelerator):
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
    max_skips: int = Field(
        default=0, ge=0, description="consecutive skips after which a step is computed; 0: no cap"
    )
    last: bool = Field(default=True, description="always compute the last step")
    predictor: Literal["reuse", "newton"] = Field(
        default="reuse",
        description="'reuse' keeps the residual of the other blocks; 'newton' extrapolates it",
    )
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
        return cls(threshold=0.0)

    def why_off(self) -> str | None:
        """Threshold 0 computes every step."""
        return "threshold is 0" if self.threshold == 0 else None

    def attach(self, site: Site) -> Iterator[Undo]:
        """Put the cache into every denoiser.

        Raises:
            UnsupportedModel: For a network without a plain list of blocks (every UNet).
        """
        from accel.cache.block_range import BlockRangeCache

        yield site.claim("blocks")
        cache = BlockRangeCache(
            site.tally,
            lambda: Guarded(Below(self.threshold), self.warmup, self.max_skips, self.last),
            Forecast(self.predictor, self.order, self.damping),
        )
        site.tally.reason = lambda: cache.decisions.why_idle(
            "the first block's change", self.threshold
        )
        yield from cache.attach(site)
