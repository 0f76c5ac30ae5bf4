"""The fields that methods share which merge tokens, and how these attach."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, ClassVar, Self

from pydantic import Field

from accel.attach import Accelerator, Site, Undo
from accel.tokens.matching import merged_of

if TYPE_CHECKING:
    from accel.tokens.merging import Reducer

SERVED = (
    "self-attention and joint attention of UNets (at their high levels), SD3, Flux, Chroma, "
    "Qwen-Image, PixArt, Sana, DiT, CogView4, Wan, LTX, CogVideoX and HunyuanVideo; every "
    "guidance layout"
)

MaxDownsample = Annotated[
    int,
    Field(
        ge=1,
        description="levels of a UNet that are served: 1 those of the latents' own size (SDXL has "
        "none with attention: 2), 2 the next as well, …; transformers have one level",
    ),
]


def why_whole(window: int, ratio: float) -> str | None:
    """Why windows of so many tokens a side are left whole; ``None`` if they are not."""
    if merged_of(window**2, ratio):
        return None
    return f"a ratio of {ratio:g} merges no token of a window of {window} × {window}"


class Merging(Accelerator):
    """Attention runs on fewer image tokens: they are merged before it and unmerged behind it."""

    layer: ClassVar[str] = "tokens"
    seam: ClassVar[str] = "tokens"
    supports: ClassVar[str] = SERVED

    ratio: float = Field(
        default=0.5, ge=0.0, lt=1.0, description="share of the image tokens to leave out; 0 is off"
    )
    max_downsample: MaxDownsample = 1
    steps: int = Field(
        default=1, ge=1, description="steps that a pattern serves; 1: a new one at each step"
    )
    layers: int = Field(
        default=1,
        ge=0,
        description="successive layers that share a pattern, made by the first; 0: all of a level",
    )
    proportional: bool = Field(
        default=False,
        description="count each merged key as often as the tokens that it stands for: a bias of "
        "log(size), which flash kernels do not take",
    )

    @classmethod
    def off(cls) -> Self:
        """Nothing is merged."""
        return cls(ratio=0.0)

    def why_off(self) -> str | None:
        """A ratio of 0."""
        return "ratio is 0" if self.ratio == 0.0 else None

    @abstractmethod
    def reducer(self) -> Reducer:
        """What makes the patterns of one attached plan."""

    def attach(self, site: Site) -> Iterator[Undo]:
        """Put it around the self-attention of every network.

        Raises:
            UnsupportedModel: If a network's attention cannot be reached. Where tokens lie is known
                at the first call only, and what is not known then is refused there.
        """
        from accel.tokens.layers import Layers
        from accel.tokens.merging import Merger

        reducer = self.reducer()
        merger = Merger(site.tally, reducer, self.steps, self.layers, self.proportional)
        yield site.on_start(merger.reset)
        layers = Layers(
            site.tally, merger, self.max_downsample, reducer.observe, lambda: reducer.note
        )
        yield from layers.attach(site)
