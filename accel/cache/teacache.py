"""TeaCache: skip the blocks while what the time makes of their input changes little.

Source: Liu et al., "Timestep Embedding Tells: It's Time to Cache for Video Diffusion Model",
arXiv 2411.19108, sections 3.2 and 3.3. The residual that is kept is that of the blocks, before the
last norm: kept behind it, a stale modulation would be kept too.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any, ClassVar, get_args

from pydantic import Field, field_validator

from accel.attach import Site, Undo
from accel.cache.fields import AdaptiveCache
from accel.cache.policies import Accumulated
from accel.cache.rescaling import BY_TIME, POLYNOMIALS, Name, Polynomial


class TeaCache(AdaptiveCache):
    """Sum the estimated change of the output; compute when it reaches the threshold.

    The estimate is a polynomial of the relative change, from step to step, of the first block's
    input as the time modulates it. Of the time embedding alone, the same for every input, where
    the coefficients are of that, or where it is not found how a block modulates (Flux2, HiDream,
    Kandinsky). Decides for each sample; reads the device once a step. `accel calibrate teacache`
    fits the polynomial to a model.
    """

    name: ClassVar[str] = "cache.TeaCache"
    layer: ClassVar[str] = "block cache"
    seam: ClassVar[str] = "blocks"
    supports: ClassVar[str] = (
        "transformers with a list of blocks that are given the time, every guidance layout"
    )
    source: ClassVar[str] = "arXiv 2411.19108, sections 3.2 and 3.3"

    threshold: float = Field(
        default=0.15,
        ge=0.0,
        description="accumulated estimate of the output's relative change at which a step is "
        "computed; 0 is off. The authors use 0.25 to 0.8 (FLUX), 0.1 to 0.15 (HunyuanVideo)",
    )
    coefficients: Name | Polynomial = Field(
        default="identity",
        description="the polynomial: a model's name, 'identity', or five numbers, the highest "
        "power first. Those of cogvideox and wan2.1 are of the time embedding",
    )
    clamp_nonneg: bool = Field(
        default=True,
        description="count an estimate below 0 as 0; false: as the authors' code does",
    )
    warmup: int = Field(
        default=1, ge=1, description="steps at the start that are always computed (≥ 1)"
    )
    max_skips: int = Field(
        default=5,
        ge=0,
        description="consecutive skips after which a step is computed, so that a polynomial "
        "outside of what it was fitted to cannot skip for ever; 0: no cap (the authors)",
    )

    @field_validator("coefficients", mode="before")
    @classmethod
    def _known(cls, value: Any) -> Any:
        names = get_args(Name)
        numbers = isinstance(value, (list, tuple)) and len(value) == len(POLYNOMIALS["identity"])
        if value in names or numbers:
            return tuple(value) if numbers else value
        raise ValueError(f"give five numbers, or one of {', '.join(names)}")

    @property
    def polynomial(self) -> Polynomial:
        """The five numbers."""
        chosen = self.coefficients
        return POLYNOMIALS[chosen] if isinstance(chosen, str) else chosen

    def attach(self, site: Site) -> Iterator[Undo]:
        """Put the cache into every denoiser.

        Raises:
            UnsupportedModel: For a network without a plain list of blocks (every UNet), or whose
                blocks are given no time.
        """
        from accel.cache.block_range import BlockRangeCache, Spans
        from accel.cache.decisions import Decisions
        from accel.cache.indicators import SignalChange
        from accel.seams.modulation import input_signal, time_signal

        yield site.claim("blocks")
        yield site.claim("decisions for all branches")
        chosen = self.coefficients
        by_time = isinstance(chosen, str) and chosen.startswith(BY_TIME)
        signal = cache(time_signal if by_time else input_signal)  # looked up once a block
        for denoiser in site.denoisers:
            signal(site.blocks(denoiser)[0])  # refuses here, not in the middle of a run
        decisions = Decisions(
            lambda: SignalChange(self.polynomial, clamp=self.clamp_nonneg),
            lambda: self.guarded(Accumulated(self.threshold)),
        )
        site.tally.reason = lambda: decisions.why_idle("the estimated change", self.threshold)
        range_cache = BlockRangeCache(
            site.tally,
            decisions,
            lambda count: Spans((range(count),)),
            self.forecast,
            entry=lambda block, arguments: signal(block)(block, arguments),
        )
        yield from range_cache.attach(site)
