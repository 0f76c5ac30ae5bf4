"""DeepCache: recompute only the shallow part of a UNet; what lies deep changes slowly.

Source: Ma et al., "DeepCache: Accelerating Diffusion Models for Free", CVPR 2024,
arXiv 2312.00858, sections 3.3 (uniform) and 3.4 (non-uniform).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal, Self

from pydantic import Field

from accel.attach import Site, Undo
from accel.cache.clustered import Clustered
from accel.cache.fields import StaticCache
from accel.cache.policies import Accumulated, Every, Rule


class DeepCache(StaticCache):
    """Between full passes, run only the layers around input and output of a UNet.

    Per sample; ControlNet and T2I-Adapter act live on what is computed. Reads the device once a
    step where ``threshold`` decides, else never.
    """

    name: ClassVar[str] = "cache.DeepCache"
    layer: ClassVar[str] = "block cache"
    seam: ClassVar[str] = "blocks"
    supports: ClassVar[str] = "UNets with down, middle and up blocks, every guidance layout"
    source: ClassVar[str] = "arXiv 2312.00858, sections 3.3 and 3.4"

    interval: int = Field(
        default=3, ge=1, description="steps from full pass to full pass; 1 is off. Usual: 2 to 10"
    )
    branch: int = Field(
        default=0,
        ge=0,
        description="layers of the up path that a skipped step runs besides the last one: 0 is "
        "the fastest, each more costs time and loses less",
    )
    schedule: Literal["uniform", "nonuniform"] = Field(
        default="uniform",
        description="full passes evenly spaced, or as many of them, densest around ``centre``",
    )
    centre: float = Field(
        default=0.3,
        ge=0.0,
        le=1.0,
        description="where 'nonuniform' is densest, as a share of the run (step 15 of 50)",
    )
    power: float = Field(
        default=1.4, ge=1.0, le=4.0, description="how much denser; 1 is evenly spaced"
    )
    threshold: float = Field(
        default=0.0,
        ge=0.0,
        description="above 0 it replaces the interval: full passes when EasyCache's accumulated "
        "estimate of the output's relative change reaches it. Usual: 0.05 to 0.2",
    )
    last: bool = Field(default=False, description="always compute the last step in full")

    @classmethod
    def off(cls) -> Self:
        """Interval 1, threshold 0."""
        return cls(interval=1)

    def why_off(self) -> str | None:
        """Interval 1 runs every step in full, unless a threshold decides instead."""
        return None if self.threshold else super().why_off()

    def attach(self, site: Site) -> Iterator[Undo]:
        """Put the cache into every denoiser.

        Raises:
            UnsupportedModel: For a network that is no UNet.
        """
        from accel.cache.decisions import Decisions
        from accel.cache.deep_branch import DeepBranchCache
        from accel.cache.indicators import InputChange, Unmeasured

        yield site.claim("blocks")
        decisions = Decisions(
            InputChange if self.threshold else Unmeasured, lambda: self.guarded(self._rule())
        )
        site.tally.reason = lambda: decisions.why_idle("the estimated change", self.threshold)
        yield from DeepBranchCache(site.tally, decisions, self.branch, self.forecast).attach(site)

    def _rule(self) -> Rule:
        if self.threshold:
            return Accumulated(self.threshold)
        if self.schedule == "uniform":
            return Every(self.interval)
        return Clustered(self.interval, self.centre, self.power, "schedule='uniform'")
