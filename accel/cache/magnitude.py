"""How far the size of what is kept may be off: MagCache's rule.

Source: Ma et al., "MagCache: Fast Video Generation with Magnitude-Aware Cache", arXiv 2506.09045,
section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from accel.errors import UnsupportedModel

if TYPE_CHECKING:
    from accel.attach import Site
    from accel.trajectory import Step


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
            "What rests on the magnitude of the residual counts in shares of the run, and this "
            "pipeline cuts its schedule where no public call shows it. Set share=0 and give no "
            "curve (at the blocks it is measured then), or use cache.FirstBlock."
        )
    return turns
