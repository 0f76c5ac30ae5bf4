"""Adaptive Guidance: stop evaluating the unconditional branch once both branches agree.

Source: Castillo et al., "Adaptive Guidance: Training-free Acceleration of Conditional Diffusion
Models", arXiv 2312.12487, section 4.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field

from accel.attach import Site, Undo
from accel.guidance.switching import Switching

if TYPE_CHECKING:
    from torch import Tensor

    from accel.guidance.branches import Pair
    from accel.seams.denoisers import Call
    from accel.trajectory import Step, Trajectory


class Adaptive(Switching):
    """Guide a sample until cos(c, u) ≥ threshold, then evaluate its conditional branch alone.

    Each sample of a batch latches by itself; the stages of a solver's step are guided all, or none.
    Reads the device once a step while guidance is on;
    answers that a cache gave do not count. With a flow or v-prediction network the raw answers
    start far apart; ε-networks answer ≈ x at high noise in both branches, which is why there is a
    guard and a choice of space.
    """

    name: ClassVar[str] = "guidance.Adaptive"
    layer: ClassVar[str] = "guidance"
    seam: ClassVar[str] = "branches"
    supports: ClassVar[str] = "batched and two-call guidance; not embedded guidance"
    source: ClassVar[str] = "arXiv 2312.12487, section 4"

    threshold: float = Field(
        default=0.991,
        ge=-1.0,
        le=2.0,
        description="cosine of the two branches at which guidance ends; above 1 is off. The "
        "authors use 0.991 (30 instead of 40 evaluations at 20 steps); 0.994 to 0.996 is safer",
    )
    space: Literal["raw", "x0", "v"] = Field(
        default="raw",
        description="what is compared: the network's answer (the paper), the clean sample, or "
        "the velocity",
    )
    min_guided: float = Field(
        default=0.25,
        ge=0.0,
        le=1.0,
        description="share of the steps that are guided whatever the cosine; together with "
        "min_steps it keeps guidance from ending at once",
    )
    min_steps: int = Field(default=3, ge=0, description="steps that are guided in any case")

    @classmethod
    def off(cls) -> Self:
        """A threshold that no cosine reaches."""
        return cls(threshold=2.0)

    def why_off(self) -> str | None:
        """No cosine is above 1."""
        return "threshold is above 1" if self.threshold > 1 else None

    def fixed(self, steps: int) -> frozenset[int]:
        """Those that are guided in any case: the cosine of the last of them may end it."""
        return frozenset(range(min(self.least_guided(steps), steps)))

    def least_guided(self, steps: int) -> int:
        """Steps at the start that are guided whatever the cosine."""
        return max(self.min_steps, math.ceil(self.min_guided * steps), 1)

    def attach(self, site: Site) -> Iterator[Undo]:
        """Put it around every denoiser."""
        from accel.guidance.branches import ENDS, Unconditional, resetting

        yield site.claim(ENDS)
        latch = Latch(self, site.trajectory)
        yield site.on_start(latch.reset)
        switched = resetting(site, self)
        unconditional = Unconditional(site.tally, latch.guided, latch.observe, switched=switched)
        yield from unconditional.attach(site)
        idle = site.tally.reason
        site.tally.reason = lambda: latch.why_idle() or idle()


class Latch:
    """Which samples of a run still need guidance."""

    def __init__(self, method: Adaptive, trajectory: Trajectory) -> None:
        self._method = method
        self._trajectory = trajectory
        self._ended: dict[int, int] = {}
        self._highest = -math.inf

    def reset(self) -> None:
        """Guide every sample again."""
        self._ended.clear()
        self._highest = -math.inf

    def guided(self, call: Call, sample: int) -> bool:
        """Whether a sample needs its unconditional branch in a call."""
        from accel.seams.stages import start_of

        start = start_of(call.step, self._trajectory.scheduler).index
        return not self._ended.get(sample, start) < start

    def observe(self, call: Call, pairs: dict[int, Pair]) -> None:
        """Compare the branches of some samples; reads the device once."""
        from accel.seams.spaces import convert, matching

        if not pairs or self._guarded(call.step):
            return
        space, network = self._method.space, type(call.denoiser.core).__name__
        cosines = {}
        for sample, pair in pairs.items():
            both = [
                convert(y, x, call.step, space, network)
                for x, y in (matching(pair.x, pair.cond), matching(pair.x, pair.uncond))
            ]
            cosines[sample] = _cosine(*both)
        import torch

        for sample, cosine in zip(
            cosines, torch.stack(list(cosines.values())).tolist(), strict=True
        ):
            self._highest = max(self._highest, cosine)
            if cosine >= self._method.threshold:
                self._ended.setdefault(sample, call.step.index)

    def _guarded(self, step: Step) -> bool:
        return step.index + 1 < self._method.least_guided(step.total or 0)

    def why_idle(self) -> str | None:
        """Why guidance never ended, where a cosine was taken."""
        if self._highest == -math.inf:
            return None
        return (
            f"the branches never agreed: highest cosine {self._highest:.4f}, "
            f"threshold {self._method.threshold:g}"
        )


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    a, b = a.float().flatten(), b.float().flatten()
    lengths = (a.square().sum() * b.square().sum()).sqrt()
    return (a * b).sum() / lengths.clamp_min(1e-12)
