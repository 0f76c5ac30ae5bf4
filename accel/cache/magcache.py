"""MagCache: skip the blocks while the size of what they add has changed little.

Source: Ma et al., "MagCache: Fast Video Generation with Magnitude-Aware Cache", arXiv 2506.09045,
section 3. Without a curve γ is measured in the run itself, which the paper does not do.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from pydantic import Field, PositiveFloat

from accel.attach import Site, Undo
from accel.cache.fields import AdaptiveCache
from accel.cache.magnitude import Magnitude, parts


class MagCache(AdaptiveCache):
    """Sum how far the kept residual's size is off; compute when that is above the threshold.

    γ is the ratio of the residual's size from one step to the next. At the k-th skip after a
    compute the size is taken to be off by |1 − γ_1 ⋯ γ_k|. With a curve of γ (`accel calibrate
    magcache`) the steps are the same for every input, and the device is not read; without one,
    γ comes for each sample from its last two computed steps, and the device is read once a step.
    """

    name: ClassVar[str] = "cache.MagCache"
    layer: ClassVar[str] = "block cache"
    seam: ClassVar[str] = "blocks"
    supports: ClassVar[str] = "transformers with a list of blocks, every guidance layout"
    source: ClassVar[str] = "arXiv 2506.09045, section 3"

    threshold: float = Field(
        default=0.06,
        ge=0.0,
        description="accumulated error of the residual's size above which a step is computed; 0 "
        "is off. Usual: 0.06 to 0.24",
    )
    max_skips: int = Field(
        default=3,
        ge=0,
        description="consecutive skips after which a step is computed, the paper's K; 0: no cap",
    )
    share: float = Field(
        default=0.2,
        ge=0.0,
        le=1.0,
        description="share of the steps, at the start, that is always computed; of two experts "
        "(Wan 2.2), of the steps of each",
    )
    curve: tuple[PositiveFloat, ...] = Field(
        default=(),
        description="γ at each step of a calibrated run (the first is 1); another number of steps "
        "takes the nearest. Empty: measured in the run",
    )

    def attach(self, site: Site) -> Iterator[Undo]:
        """Put the cache into every denoiser.

        Raises:
            UnsupportedModel: For a network without a plain list of blocks (every UNet).
        """
        from accel.cache.block_range import BlockRangeCache, Spans, picture_in
        from accel.cache.decisions import Decisions
        from accel.cache.indicators import Magnitudes, Unmeasured

        yield site.claim("blocks")
        yield site.claim("decisions for all branches")
        part = parts(site)
        decisions: Decisions[Any] = Decisions(
            Unmeasured if self.curve else Magnitudes,
            lambda: self.guarded(Magnitude(self.threshold, self.share, self.curve, part)),
        )
        site.tally.reason = self._why_idle
        cache = BlockRangeCache(
            site.tally,
            decisions,
            lambda count: Spans((range(count),)),
            self.forecast,
            entry=None if self.curve else picture_in,
            told=None if self.curve else Magnitudes.added,
        )
        yield from cache.attach(site)

    def _why_idle(self) -> str:
        return (
            f"the error of the residual's size was above threshold {self.threshold:g} at every "
            f"step that was not forced (the first {self.share:.0%}, the last one)"
        )
