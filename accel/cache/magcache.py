"""MagCache: skip the blocks while the size of what they add has changed little.

Source: Ma et al., "MagCache: Fast Video Generation with Magnitude-Aware Cache", arXiv 2506.09045,
section 3. Without a curve γ is measured in the run itself, which the paper does not do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, PositiveFloat

from accel.attach import Site, Undo
from accel.cache.fields import AdaptiveCache
from accel.errors import UnsupportedModel

if TYPE_CHECKING:
    from accel.trajectory import Step


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


@dataclass
class Magnitude:
    """Compute when the error that the skipped steps add up to is above the threshold.

    Attributes:
        threshold: Of the sum of |1 − γ_1 ⋯ γ_k| over the skipped steps.
        share: Of the steps, at the start, that is always computed.
        curve: γ by step; empty: it is what the indicator measures.
        part: From a step to the part of the run that the share is of, in steps of the solver: that
            of the network that serves it. The whole run where there is one network.
    """

    threshold: float
    share: float
    curve: Sequence[float] = ()
    part: Callable[[Step], range] = lambda step: range(_known(step.turns))
    ratio: float = 1.0
    error: float = 0.0
    begun: bool = False

    def due(self, step: Step, value: float | None) -> bool:
        """Whether the error, with this step skipped too, is above the threshold."""
        gamma = self._gamma(step) if self.curve else value
        if gamma is None or not self.begun or (self.share and self._forced(step)):
            return True
        self.ratio *= gamma
        self.error += abs(1.0 - self.ratio)
        return not self.error <= self.threshold

    def computed(self, step: Step) -> None:  # noqa: ARG002
        """Begin anew."""
        self.ratio, self.error, self.begun = 1.0, 0.0, True

    def _gamma(self, step: Step) -> float:
        return resampled(self.curve, step.turn, _known(step.turns))

    def _forced(self, step: Step) -> bool:
        """Whether a step is in the share at the start, in steps of the solver of its expert."""
        own = self.part(step)
        return step.turn - own.start < int(self.share * len(own) + 0.5)


def parts(site: Site) -> Callable[[Step], range]:
    """From a step to the steps of the solver that the same network serves (Wan 2.2: two experts).

    Such a pipeline gives timesteps from ``boundary_ratio`` of the training steps on to its first
    network, those below to its second.
    """
    ratio = site.pipe.config.get("boundary_ratio")
    if ratio is None or len(site.denoisers) < 2:
        return lambda step: range(_known(step.turns))
    boundary = ratio * site.pipe.scheduler.config.num_train_timesteps

    def part(step: Step) -> range:
        begin, count = step.position - step.index, _known(step.turns)
        places = [begin + turn * step.order for turn in range(count)]
        first = sum(step.levels.timesteps[place] >= boundary for place in places)
        return range(first) if step.timestep >= boundary else range(first, count)

    return part


def resampled(curve: Sequence[float], index: int, total: int) -> float:
    """The value of a curve of another length at a step of ``total``: the nearest one."""
    if total == 1:
        return curve[0]
    return curve[round(index * (len(curve) - 1) / (total - 1))]


def _known(turns: int | None) -> int:
    if turns is None:
        raise UnsupportedModel(
            "cache.MagCache counts in shares of the run, and this pipeline cuts its schedule where "
            "no public call shows it. Set share=0 and give no curve, or use cache.FirstBlock."
        )
    return turns
