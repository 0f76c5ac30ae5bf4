"""SIGE: of an edited picture, compute the blocks that differ, and keep the original's for the rest.

The original is recorded once; an edit then computes, in every evaluation, the active blocks of its
region alone. What lies outside keeps what the original had, to the bit.

Source: Li et al., "Efficient Spatially Sparse Inference for Conditional GANs and Diffusion Models",
arXiv 2211.02048, sections 3.1 to 3.3. Transformers are not in the paper: there a block is a token,
and all text is computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from accel.attach import Accelerator, Site, Undo

if TYPE_CHECKING:
    from accel.region.active import Pyramid


class SIGE(Accelerator):
    """Compute only the region of an edit, and keep everything else of the original's recorded run.

    Acts where `accel.edit.sparse` records and edits; any other run is left alone. UNets compute
    active blocks of every convolution, norm and attention; transformers the tokens of the region
    and all text, against the recorded keys and values of the others. The recording holds what the
    layers had at every evaluation: that is its price, and the report counts it.
    """

    name: ClassVar[str] = "region.SIGE"
    layer: ClassVar[str] = "region"
    seam: ClassVar[str] = "blocks"
    supports: ClassVar[str] = (
        "UNets over pictures (convolutions of stride 1 or 2), and transformers whose order of "
        "tokens is known and whose blocks do not convolve; every guidance layout"
    )
    source: ClassVar[str] = "arXiv 2211.02048, sections 3.1 to 3.3"

    threshold: float = Field(
        default=0.02,
        ge=0.0,
        description="difference of two inputs, in any channel, above which a place has changed; "
        "used where no region is drawn",
    )
    dilate: int = Field(
        default=1,
        ge=0,
        description="places of the latents, or tokens, by which a region grows at each side (the "
        "authors: 5 of latents of 64 × 64)",
    )
    block: int = Field(
        default=4, ge=1, description="side of the blocks that a UNet computes; a token's is 1"
    )
    level_threshold: float = Field(
        default=0.3,
        ge=0.0,
        lt=1.0,
        description="share of the region above which a place of a coarser level is active",
    )
    level_dilate: int = Field(
        default=0,
        ge=0,
        description="places by which a region grows at every other level, beside the one that a "
        "convolution reaches (the authors: 1)",
    )
    minimum: int = Field(
        default=8,
        ge=1,
        description="levels of a UNet with a shorter side than this are computed everywhere",
    )
    statistics: Literal["original", "recomputed"] = Field(
        default="recomputed",
        description="statistics of norms over groups of channels: of the edit, for which their "
        "inputs are recorded as well; or those of the original, as the authors have it",
    )
    decoder: bool = Field(
        default=True, description="decode the region alone, too, where the decoder is a known one"
    )
    decoder_dilate: int = Field(
        default=1, ge=0, description="places of the latents by which the decoder's region grows"
    )
    most: float = Field(
        default=0.5,
        ge=0.0,
        le=1.0,
        description="share of the picture above which all of it is computed: gathering then costs "
        "more than it saves",
    )
    keep: Literal["native", "bfloat16", "cpu"] = Field(
        default="native",
        description="how what is recorded is stored: 'native', in 'bfloat16', or on the 'cpu'",
    )

    @property
    def pyramid(self) -> Pyramid:
        """How its masks are taken from level to level."""
        from accel.region.active import Pyramid

        return Pyramid(self.block, self.level_threshold, self.level_dilate, self.minimum)

    @classmethod
    def off(cls) -> None:
        """It acts on edits alone: leave it out."""
        return None

    def why_off(self) -> str | None:
        """No field turns it off."""
        return None

    def attach(self, site: Site) -> Iterator[Undo]:
        """Put it around the networks, and their parts."""
        from accel.region.desk import Desk
        from accel.region.editing import Editing

        yield from Editing(self, site, site.shared(Desk)).attach(site)
