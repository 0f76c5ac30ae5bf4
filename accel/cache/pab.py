"""Pyramid Attention Broadcast: the steadier a kind of attention, the longer it is kept.

Source: Zhao et al., "Real-Time Video Generation with Pyramid Attention Broadcast",
arXiv 2408.12588, section 3.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Self

from pydantic import Field

from accel.attach import Site, Undo
from accel.cache.fields import Cache, Limited
from accel.cache.policies import Within


class PAB(Cache, Limited):
    """Within a range of timesteps, reuse each kind of module for its own number of steps.

    The middle of a run is flat: attention to the text changes least there, then attention along
    time, then attention within a picture. Kept outputs belong to one guidance branch each. It
    never reads the device.
    """

    name: ClassVar[str] = "cache.PAB"
    layer: ClassVar[str] = "block cache"
    seam: ClassVar[str] = "modules"
    supports: ClassVar[str] = "transformers and UNets whose blocks hold attention modules"
    source: ClassVar[str] = "arXiv 2408.12588, section 3"

    spatial: int = Field(
        default=2,
        ge=1,
        description="steps that share one compute of self-attention (joint attention too); 1: all "
        "are computed. The authors use 2",
    )
    temporal: int = Field(
        default=4, ge=1, description="the same for attention along time. The authors use 4"
    )
    cross: int = Field(
        default=6, ge=1, description="the same for attention to the text. The authors use 6"
    )
    mlp: int = Field(default=1, ge=1, description="the same for feed-forward modules")
    low: float = Field(
        default=100.0,
        description="timesteps at or below are computed; the authors use 100 (CogVideoX), 450 "
        "(Open-Sora)",
    )
    high: float = Field(
        default=850.0,
        description="timesteps at or above are computed; the authors use 850 (CogVideoX), 930 "
        "(Open-Sora)",
    )

    @classmethod
    def off(cls) -> Self:
        """All intervals 1."""
        return cls(spatial=1, temporal=1, cross=1, mlp=1)

    def why_off(self) -> str | None:
        """All intervals 1, or no timestep in the range, compute everything."""
        if max(self.spatial, self.temporal, self.cross, self.mlp) == 1:
            return "all intervals are 1"
        return None if self.low < self.high else "no timestep is between low and high"

    def attach(self, site: Site) -> Iterator[Undo]:
        """Put the cache into every module.

        Raises:
            UnsupportedModel: For a network without such modules, or with compiled blocks.
        """
        from accel.cache.modules import ModuleCache

        yield site.claim("blocks")
        intervals = {
            "self": self.spatial,
            "temporal": self.temporal,
            "cross": self.cross,
            "mlp": self.mlp,
        }
        cache = ModuleCache(
            site.tally,
            lambda module: module.kind if intervals[module.kind] > 1 else None,
            lambda kind: self.guarded(Within(intervals[str(kind)], self.low, self.high)),
            self.forecast,
            self.memory_limit,
        )
        yield from cache.attach(site)
        site.tally.reason = lambda: (
            f"no timestep between {self.low:g} and {self.high:g} had a module of a kind whose "
            "interval is above 1 to skip"
        )
