"""Stochastic Similarity Filter: a frame that is like the last one processed may be skipped.

Source: Kodaira et al., "StreamDiffusion: A Pipeline-level Solution for Real-time Interactive
Generation", arXiv 2312.12491, section 3.4. The counter of skips is cleared by every frame that is
processed; in the authors' code only by one that is forced.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, Self

from pydantic import Field

from accel.attach import Accelerator, Site, Undo

if TYPE_CHECKING:
    from torch import Tensor


class SimilarityFilter(Accelerator):
    """Show the last picture again with probability (cos − η)/(1 − η), cos of a frame with the last.

    The last is the last frame that was processed. Skipped frames take no call of the network, and
    nothing in flight moves on. It begins to skip when the stream is filled. The draws have a seed
    of their own. Reads the device once a frame. Acts in `accel.loop.Stream` alone.
    """

    name: ClassVar[str] = "loop.SimilarityFilter"
    layer: ClassVar[str] = "loop"
    seam: ClassVar[str] = "loop"
    supports: ClassVar[str] = "streams of a picture-to-picture pipeline"
    source: ClassVar[str] = "arXiv 2312.12491, section 3.4"

    threshold: float = Field(
        default=0.98,
        ge=-1.0,
        description="η, cosine of frames (pixels from -1 to 1) from which on skipping begins; 1 "
        "and above is off",
    )
    max_skip: int = Field(
        default=10,
        ge=0,
        description="after more than so many skips in a row a frame is processed",
    )
    seed: int = Field(default=0, description="of the draws")

    @classmethod
    def off(cls) -> Self:
        """A cosine that no frame exceeds."""
        return cls(threshold=1.0)

    def why_off(self) -> str | None:
        """No cosine is above 1."""
        return "threshold is 1 or more" if self.threshold >= 1.0 else None

    def attach(self, site: Site) -> Iterator[Undo]:
        """Have the stream ask for each frame.

        Raises:
            Conflict: If another method decides about frames.
        """
        from accel.loop.parts import IDLE, Parts, added

        yield site.claim("frames")
        parts = site.shared(Parts)
        similar = Similar(self)
        site.tally.reason = lambda: "no frame was like the last one" if parts.streaming else IDLE
        parts.skips = similar.skips

        def undo() -> None:
            parts.skips = None

        yield undo
        yield added(parts.resets, similar.reset)

        def tell() -> None:
            site.tally.change = similar.told

        yield added(parts.told, tell)


class Similar:
    """Decides frame by frame.

    Attributes:
        skipped: Frames that were skipped.
        seen: Frames that were asked about.
    """

    def __init__(self, method: SimilarityFilter) -> None:
        self._method = method
        self.reset()

    def reset(self) -> None:
        """Forget all frames; the draws begin anew."""
        self._last: Tensor | None = None
        self._random = random.Random(self._method.seed)
        self._in_a_row = self.skipped = self.seen = 0

    @property
    def told(self) -> str | None:
        """What was skipped, in words; ``None`` for nothing."""
        return f"{self.skipped} of {self.seen} frames skipped" if self.skipped else None

    def skips(self, frame: Tensor, filled: bool) -> bool:
        """Whether the picture before may stand for a frame; if not, the frame is the last one.

        Args:
            frame: ``[1, 3, H, W]``, from -1 to 1.
            filled: Whether there is a picture to show again.
        """
        from accel.loop.likeness import cosine

        self.seen += 1
        drawn = self._random.random()
        may = filled and self._in_a_row <= self._method.max_skip
        last = self._last if may else None
        if last is not None and drawn < self.chance(cosine(last, frame)):
            self._in_a_row += 1
            self.skipped += 1
            return True
        self._last, self._in_a_row = frame, 0
        return False

    def chance(self, likeness: float) -> float:
        """max(0, (cos − η)/(1 − η))."""
        least = self._method.threshold
        return max(0.0, (likeness - least) / (1.0 - least))
