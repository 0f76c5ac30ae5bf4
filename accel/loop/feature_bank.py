"""StreamV2V's feature bank: a frame attends to, and is fused with, features of frames before.

Source: Liang et al., "Looking Backward: Streaming Video-to-Video Translation with Feature Banks",
arXiv 2405.15757, section 4: extended attention (EA), feature fusion (FF), dynamic merging (DyMe).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal, Self

from pydantic import Field

from accel.attach import Accelerator, Site, Undo


class FeatureBank(Accelerator):
    """Keep the features of frames before, and let each frame look at them, level by level.

    At every self-attention of a UNet, for each row of a call: keys and values of the bank are
    attended to beside the frame's own; in the middle and in the first two blocks of the up path a
    token's output is mixed with that of the nearest token of the bank, where it is near enough.
    Every few frames the frame's own keys, values and outputs, unmixed, are merged into the bank. A
    stream's level is a sample to the network, so each level, and each branch, has a bank of its
    own. A bank is dropped where prompt, size or scene change. It steadies a stream and costs time.
    Reads the device once a frame, where scenes are watched. Acts in `accel.loop.Stream` alone.
    """

    name: ClassVar[str] = "loop.FeatureBank"
    layer: ClassVar[str] = "loop"
    seam: ClassVar[str] = "attention"
    supports: ClassVar[str] = "streams through a UNet"
    source: ClassVar[str] = "arXiv 2405.15757, section 4"

    attend: bool = Field(
        default=True, description="extended attention: keys and values of the bank beside its own"
    )
    mix: float = Field(
        default=0.75,
        ge=0.0,
        le=1.0,
        description="a, share of the bank in a mixed output; 0: none (the authors' code: 0.8)",
    )
    threshold: float = Field(
        default=0.9,
        ge=-1.0,
        le=1.0,
        description="cosine of outputs from which on they are mixed (the authors' code: 0.98)",
    )
    interval: int = Field(
        default=4, ge=1, description="frames from one update of a bank to the next"
    )
    keep: Literal["merged", "queue"] = Field(
        default="merged",
        description="what a bank keeps: as many tokens as a frame has, merged with each update, or "
        "the last frames as they were",
    )
    frames: int = Field(
        default=1, ge=1, le=8, description="frames that a queue holds (paper: 1, 2, 4)"
    )
    scene: float = Field(
        default=0.5,
        ge=-1.0,
        le=1.0,
        description="cosine of a frame with the one before it below which another scene begins; "
        "-1: never",
    )
    seed: int = Field(default=0, description="of the halves that are merged")

    @classmethod
    def off(cls) -> Self:
        """Neither attended to nor mixed."""
        return cls(attend=False, mix=0.0)

    def why_off(self) -> str | None:
        """A bank that nobody looks at."""
        return "attend is false and mix is 0" if not self.attend and not self.mix else None

    def attach(self, site: Site) -> Iterator[Undo]:
        """Hook every self-attention.

        Raises:
            Conflict: Beside methods that compute attention otherwise, or on fewer tokens.
            UnsupportedModel: For a network that is no UNet.
        """
        from accel.loop.bank import Banks, Scenes
        from accel.loop.parts import IDLE, Parts, added

        yield site.claim("attention")
        yield site.claim("tokens")
        yield site.claim("size of the picture")
        parts = site.shared(Parts)
        site.tally.reason = lambda: "no frame came after the first" if parts.streaming else IDLE
        banks, scenes = Banks(self), Scenes(self.scene)
        site.tally.memory = lambda: banks.bytes
        for denoiser in site.denoisers:
            yield from banks.attach(denoiser, lambda: parts.streaming)
        yield banks.reset
        parts.cuts = scenes.cuts

        def undo() -> None:
            parts.cuts = None

        yield undo
        yield added(parts.resets, banks.reset)
        yield added(parts.resets, scenes.reset)
        yield added(parts.enters, banks.drop)

        def tell() -> None:
            site.tally.change = banks.told

        yield added(parts.told, tell)
