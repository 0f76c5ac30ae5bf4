"""The fields that methods share which run operators in slices, and how these attach."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Self

from pydantic import Field

from accel.attach import Accelerator, Site, Undo


class Slicing(Accelerator):
    """Operators of UNets run in slices.

    Attributes:
        grouped: Whether runs of consecutive operators are one.
    """

    layer: ClassVar[str] = "memory"
    seam: ClassVar[str] = "operators"
    approximates: ClassVar[bool] = False
    grouped: ClassVar[bool]

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
            Conflict: Beside another method that cuts them.
            UnsupportedModel: If a network is no UNet, or compiled around its operators.
        """
        from accel.memory.slices import Slices

        counts = {"spatial": self.spatial, "temporal": self.temporal}
        yield from Slices(site.tally, counts, grouped=self.grouped).attach(site)
