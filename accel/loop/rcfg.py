"""Residual guidance in a stream: a virtual negative, read off the frame that came in.

Source: Kodaira et al., "StreamDiffusion: A Pipeline-level Solution for Real-time Interactive
Generation", arXiv 2312.12491, section 3.2 (RCFG). The authors' recursion over the levels is,
without the skip of consistency models, the closed form that is computed here
(`accel.seams.spaces`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal, Self

from pydantic import Field

from accel.attach import Accelerator, Site, Undo


class RCFG(Accelerator):
    """Guide each frame from δ·s, s = (x − α·x0)/σ, where s leads back to the frame x0 itself.

    With ``self`` a call has a row a level; with ``onetime`` one more, the negative prompt at the
    noisiest level, which then stands for the frame's negative at all others; with neither, the
    pipeline's own guidance takes two rows a level. A pipeline without guidance (a scale of 1) is
    left as it is. No device read. Acts in `accel.loop.Stream` alone; of single calls is
    `guidance.Residual`.
    """

    name: ClassVar[str] = "loop.RCFG"
    layer: ClassVar[str] = "loop"
    seam: ClassVar[str] = "branches"
    supports: ClassVar[str] = "streams of a guided picture-to-picture pipeline"
    source: ClassVar[str] = "arXiv 2312.12491, section 3.2 (RCFG)"

    negative: Literal["none", "self", "onetime"] = Field(
        default="self",
        description="what the virtual negative leads back to: the frame ('self'; the negative "
        "prompt is not used), the negative prompt's picture at the noisiest level ('onetime'), or "
        "'none': off",
    )
    delta: float = Field(
        default=1.0,
        ge=0.0,
        description="δ, scale of the virtual noise; below 1 guides less. At pure noise of a flow "
        "it is 1",
    )

    @classmethod
    def off(cls) -> Self:
        """The pipeline's own guidance."""
        return cls(negative="none")

    def why_off(self) -> str | None:
        """Without a virtual negative guidance is as usual."""
        return "negative is none" if self.negative == "none" else None

    def attach(self, site: Site) -> Iterator[Undo]:
        """Tell the stream how it guides."""
        from accel.loop.parts import IDLE, Parts, added

        parts = site.shared(Parts)
        site.tally.reason = lambda: (
            "the pipeline does not guide: its scale is 1" if parts.streaming else IDLE
        )
        before = parts.negative, parts.delta
        parts.negative, parts.delta = self.negative, self.delta

        def undo() -> None:
            parts.negative, parts.delta = before

        yield undo

        def tell() -> None:
            words = f"{parts.spared} rows of the negative prompt were not computed"
            site.tally.change = words if parts.spared else None

        yield added(parts.told, tell)
