"""Stream Batch: frames at different noise levels go through the network in one call.

Source: Kodaira et al., "StreamDiffusion: A Pipeline-level Solution for Real-time Interactive
Generation", arXiv 2312.12491, section 3.1.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Self

from pydantic import Field

from accel.attach import Accelerator, Site, Undo


class StreamBatch(Accelerator):
    """Denoise several frames of a stream in one call, the newest at the noisiest level.

    A frame enters with each picture that is pushed, and moves on by a level (or by several, where
    fewer frames than levels are in flight) with each call. So a call has a row for each level, and
    a picture comes out with each frame, as many frames late as are in flight beside it. What comes
    out is what would come out of each frame alone: a network without batch statistics treats rows
    apart, and the noise of a level is the same for all frames. It pays where a call of several rows
    is cheaper than as many calls. No device read. Acts in `accel.loop.Stream` alone.
    """

    name: ClassVar[str] = "loop.StreamBatch"
    layer: ClassVar[str] = "loop"
    seam: ClassVar[str] = "loop"
    supports: ClassVar[str] = "streams of a picture-to-picture pipeline"
    source: ClassVar[str] = "arXiv 2312.12491, section 3.1"
    approximates: ClassVar[bool] = False

    frames: int = Field(
        default=0,
        ge=0,
        description="frames in flight, each in a share of the levels of its own; 0: as many as "
        "levels; 1: each frame alone, off",
    )

    @classmethod
    def off(cls) -> Self:
        """One frame after the other."""
        return cls(frames=1)

    def why_off(self) -> str | None:
        """One frame in flight shares no call."""
        return "frames is 1" if self.frames == 1 else None

    def attach(self, site: Site) -> Iterator[Undo]:
        """Tell the stream how many frames share a call."""
        from accel.loop.parts import IDLE, Parts, added

        parts = site.shared(Parts)
        site.tally.reason = lambda: "one level: a call has one row" if parts.streaming else IDLE
        before, parts.in_flight = parts.in_flight, self.frames

        def undo() -> None:
            parts.in_flight = before

        yield undo

        def tell() -> None:
            site.tally.change = f"{parts.widest} frames a call" if parts.widest > 1 else None

        yield added(parts.told, tell)
