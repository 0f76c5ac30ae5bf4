"""Operator grouping: runs of operators of one kind in slices, so that one small intermediate lives.

Source: "Fast and Memory-Efficient Video Diffusion Using Streamlined Inference" (arXiv 2411.01171),
section 3, Operator Grouping (with its Feature Slicer).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Self

from pydantic import Field

from accel.attach import Accelerator, Site, Undo


class OperatorGrouping(Accelerator):
    """Run each resnet, transformer and sampler of a UNet in slices, all of its operators at once.

    A resnet or a transformer within pictures is a run of spatial operators, cut along batch and
    frames; a transformer block along time is a run of temporal ones, cut along positions, with
    all frames of each. Only a slice of what lies between the operators of a run lives; what lies
    between runs is whole. What norms over positions is left whole, and what another method of the
    plan works inside of. Equal to the stock pipeline up to the rounding of kernels that are chosen
    by size. The authors measured 39.5 → 23.4 GB for SVD and 42 → 11 GB for AnimateDiff with 7
    slices of each. Costs time where slices are too small to fill the device.
    """

    name: ClassVar[str] = "memory.OperatorGrouping"
    layer: ClassVar[str] = "memory"
    seam: ClassVar[str] = "operators"
    supports: ClassVar[str] = (
        "UNets for video (AnimateDiff, SVD, UNet3D) and pictures, blocks compiled at most; "
        "operators with attention processors of a user's own stay whole"
    )
    source: ClassVar[str] = "arXiv 2411.01171 §3, Operator Grouping"

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
        """Hook the runs of operators, and the operators that are in none.

        Raises:
            Conflict: Beside feature slicing, which cuts the same.
            UnsupportedModel: If a network is no UNet, or compiled around its operators.
        """
        from accel.memory.slices import Slices

        counts = {"spatial": self.spatial, "temporal": self.temporal}
        yield from Slices(site.tally, counts, grouped=True).attach(site)
