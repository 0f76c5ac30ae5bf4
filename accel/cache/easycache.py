"""EasyCache: skip the whole network while its output changes predictably with its input.

Source: Zhou et al., "Less is Enough: Training-Free Video Diffusion Acceleration via
Runtime-Adaptive Caching", arXiv 2507.02860, section 3.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from pydantic import Field

from accel.attach import Site, Undo
from accel.cache.fields import AdaptiveCache
from accel.cache.policies import Accumulated
from accel.cache.predictors import Kind


class EasyCache(AdaptiveCache):
    """Sum an estimate of the output's relative change; compute when it reaches the threshold.

    The estimate is k · mean|x_i − x_{i−1}| / mean|v_p|, with k = mean|Δv| / mean|Δx| over the last
    two computed steps. Reads the device once a step.
    """

    name: ClassVar[str] = "cache.EasyCache"
    layer: ClassVar[str] = "step cache"
    seam: ClassVar[str] = "denoiser"
    supports: ClassVar[str] = "every denoiser, every guidance layout"
    source: ClassVar[str] = "arXiv 2507.02860, section 3"

    threshold: float = Field(
        default=0.05,
        ge=0.0,
        description="accumulated relative change at which a step is computed; 0 is off. The "
        "authors use 0.025 (HunyuanVideo) and 0.05 (Wan)",
    )
    warmup: int = Field(
        default=3, ge=2, description="steps at the start that are always computed (≥ 2)"
    )
    predictor: Kind = Field(
        default="newton",
        description="'reuse' keeps v − x (the paper); the others keep v: 'newton' (polynomial in "
        "the log-SNR), 'taylor', 'hicache', 'foca', 'dmd'",
    )

    def attach(self, site: Site) -> Iterator[Undo]:
        """Put the cache around every denoiser."""
        from accel.cache.decisions import Decisions
        from accel.cache.indicators import InputChange
        from accel.cache.network import NetworkCache

        yield site.claim("denoiser")
        decisions = Decisions(InputChange, lambda: self.guarded(Accumulated(self.threshold)))
        site.tally.reason = lambda: decisions.why_idle("the estimated change", self.threshold)
        yield from NetworkCache(site.tally, decisions, self.forecast).attach(site)
