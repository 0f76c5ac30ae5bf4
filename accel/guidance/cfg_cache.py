"""CFG-Cache: evaluate the unconditional branch now and then, and follow the conditional between.

Source: Lv et al., "FasterCache: Training-Free Video Diffusion Model Acceleration with High
Quality", arXiv 2410.19355, section 3.3; the form with frequencies of its code.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

from pydantic import Field

from accel.attach import Site, Undo
from accel.guidance.switching import HISTORY, Switching

if TYPE_CHECKING:
    from torch import Tensor

    from accel.guidance.branches import Missing, Pair
    from accel.seams.denoisers import Call
    from accel.seams.grids import Grid
    from accel.trajectory import Step


class CFGCache(Switching):
    """Keep Δ = u − c of the last full step by frequency; answer û = c + w₁·Δ_low + w₂·Δ_high.

    Frequencies are those of height and width, frame by frame; tokens are unpacked for it. The
    weights compound, as in the authors' code: at the k-th estimate in a row that lies in a weight's
    range, Δ has been multiplied by it k times. No device read, but one a run for packed tokens.
    Valid for negative prompts. Steps that a cache answered leave Δ as it is.
    """

    name: ClassVar[str] = "guidance.CFGCache"
    layer: ClassVar[str] = "guidance"
    seam: ClassVar[str] = "branches"
    supports: ClassVar[str] = "batched and two-call guidance; not embedded guidance"
    source: ClassVar[str] = "arXiv 2410.19355, section 3.3"

    interval: int = Field(
        default=5, ge=1, description="steps from one full evaluation to the next; 1 is off"
    )
    start: float = Field(
        default=641.0,
        description="timesteps from here up are evaluated in full; 641 is step 18 of 50",
    )
    low: float = Field(
        default=1.1,
        gt=0.0,
        description="weight of the low frequencies; the authors use 1.1 (CogVideoX), 1.15 "
        "(OpenSora)",
    )
    low_range: tuple[float, float] = Field(
        default=(99.0, 901.0), description="timesteps between which that weight is applied"
    )
    high: float = Field(
        default=1.1, gt=0.0, description="weight of the high frequencies; see the low ones"
    )
    high_range: tuple[float, float] = Field(
        default=(-1.0, 301.0), description="timesteps between which that weight is applied"
    )

    reset_history: bool = Field(
        default=False,
        description="take a step of first order where guidance goes from evaluations to estimates "
        f"and back: {HISTORY}",
    )

    @classmethod
    def off(cls) -> Self:
        """Interval 1."""
        return cls(interval=1)

    def why_off(self) -> str | None:
        """Interval 1 evaluates every step."""
        return "interval is 1" if self.interval == 1 else None

    def attach(self, site: Site) -> Iterator[Undo]:
        """Put it around every denoiser."""
        from accel.guidance.branches import Unconditional, claim_all, resetting

        yield from claim_all(site)
        deltas = Deltas(self)
        yield site.on_start(deltas.reset)
        site.tally.memory = deltas.memory
        switched = resetting(site, self)
        engine = Unconditional(
            site.tally, deltas.needed, deltas.keep, deltas.estimate, switched=switched
        )
        yield from engine.attach(site)

    def weights(self, step: Step) -> tuple[float, float]:
        """What Δ_low and Δ_high are multiplied by at a step that is estimated."""
        low, high = (
            weight if bounds[0] < step.timestep < bounds[1] else 1.0
            for weight, bounds in ((self.low, self.low_range), (self.high, self.high_range))
        )
        return low, high


@dataclass
class Delta:
    """u − c of one sample at its last full step.

    Attributes:
        network: Name of the denoiser that gave it.
        low: Its low frequencies, in float32, as rows of the network's answer.
        high: The others.
        weights: What the two have been multiplied by since.
    """

    network: str
    low: Tensor
    high: Tensor
    weights: tuple[float, float] = (1.0, 1.0)


class Deltas:
    """What the samples of a run keep."""

    def __init__(self, method: CFGCache) -> None:
        self._method = method
        self._kept: dict[int, Delta] = {}
        self._grid: Grid | None = None

    def reset(self) -> None:
        """Evaluate every sample again."""
        self._kept.clear()
        self._grid = None

    def memory(self) -> int:
        """Bytes that are kept."""
        return sum(kept.low.nbytes + kept.high.nbytes for kept in self._kept.values())

    def needed(self, call: Call, sample: int) -> bool:
        """Whether a sample is evaluated in full: by the interval, or because it has no Δ yet."""
        kept, step = self._kept.get(sample), call.step
        due = step.index % self._method.interval == 0 or step.timestep >= self._method.start
        return due or kept is None or kept.network != call.denoiser.name

    def keep(self, call: Call, pairs: dict[int, Pair]) -> None:
        """Keep the Δ of the samples that were evaluated in full."""
        from accel.seams.grids import grid_of

        for sample, pair in pairs.items():
            self._grid = self._grid or grid_of(call)
            delta = pair.uncond.float() - pair.cond.float()
            picture = self._grid.unpack(delta)
            low = self._grid.pack(low_frequencies(picture), delta)
            self._kept[sample] = Delta(call.denoiser.name, low, delta - low)

    def estimate(self, missing: Missing) -> Tensor:
        """û = c + w₁·Δ_low + w₂·Δ_high: what the transforms of the paper amount to."""
        kept, now = self._kept[missing.sample], self._method.weights(missing.call.step)
        kept.weights = low, high = kept.weights[0] * now[0], kept.weights[1] * now[1]
        return missing.cond.float() + low * kept.low + high * kept.high


def low_frequencies(picture: Tensor) -> Tensor:
    """The part of ``[…, H, W]`` whose frequencies lie within ⌊min(H, W)/5⌋ of zero."""
    import torch

    height, width = picture.shape[-2:]
    rows, columns = (torch.fft.fftfreq(n, 1 / n, device=picture.device) for n in (height, width))
    inside = rows[:, None].square() + columns.square() <= (min(height, width) // 5) ** 2
    low: Tensor = torch.fft.ifft2(torch.fft.fft2(picture) * inside).real
    return low
