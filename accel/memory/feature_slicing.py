"""Feature slicing: the operators of a UNet run one after the other in slices of their features.

Source: "Fast and Memory-Efficient Video Diffusion Using Streamlined Inference" (arXiv 2411.01171),
section 3, Feature Slicer.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Self

from pydantic import Field

from accel.attach import Accelerator, Site, Undo


class FeatureSlicing(Accelerator):
    """Run each convolution, attention, feed-forward and projection in slices.

    Saves what an operator needs inside itself: a feed-forward's wide layer, queries, keys, values
    and scores, a convolution's workspace. Each answer is whole again before the next operator, so
    `memory.OperatorGrouping` saves more. Spatial operators are cut along batch and frames,
    temporal ones along positions, with all frames of each; what norms over positions is left
    whole, and what another method of the plan works inside of. Equal to the stock pipeline up to
    the rounding of kernels that are chosen by size. Costs time: more and smaller calls.
    """

    name: ClassVar[str] = "memory.FeatureSlicing"
    layer: ClassVar[str] = "memory"
    seam: ClassVar[str] = "operators"
    supports: ClassVar[str] = (
        "UNets for video (AnimateDiff, SVD, UNet3D) and pictures, not compiled; operators with "
        "attention processors of a user's own stay whole"
    )
    source: ClassVar[str] = "arXiv 2411.01171 §3, Feature Slicer"

    spatial: int = Field(
        default=7, ge=1, description="slices of batch and frames, about; 1 leaves them whole"
    )
    temporal: int = Field(
        default=7, ge=1, description="slices of positions, about; 1 leaves them whole"
    )

    @classmethod
    def off(cls) -> Self:
        """One slice of each."""
        return cls(spatial=1, temporal=1)

    def why_off(self) -> str | None:
        """Off with one slice of each."""
        return "one slice of each" if self.spatial == self.temporal == 1 else None

    def attach(self, site: Site) -> Iterator[Undo]:
        """Hook the operators.

        Raises:
            Conflict: Beside operator grouping, which cuts the same.
            UnsupportedModel: If a network is no UNet, or compiled around its operators.
        """
        from accel.memory.slices import Slices

        counts = {"spatial": self.spatial, "temporal": self.temporal}
        yield from Slices(site.tally, counts, grouped=False).attach(site)
