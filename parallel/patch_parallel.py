"""What the patch-parallel methods have in common: their fields, and how they attach.

Source: DistriFusion, arXiv 2402.19481, sections 3 and 4.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field

from accel.attach import Accelerator, Site, Undo

if TYPE_CHECKING:
    from parallel.outside import Options


class PatchParallel(Accelerator):
    """Compute a band of rows of every picture in each process."""

    layer: ClassVar[str] = "parallel"
    seam: ClassVar[str] = "rows over processes"
    supports: ClassVar[str] = "UNets over pictures (SD 1.5, 2, SDXL and kin), with ControlNets"

    degree: int = Field(
        default=0, ge=0, description="processes along this axis; 0 all that are left, 1 is off"
    )
    warmup: int = Field(
        default=4, ge=0, description="steps after the first one in which everything is fresh"
    )
    mode: Literal["stale", "sync"] = Field(
        default="stale", description="stale: of the step before; sync: fresh at every step"
    )
    norm: Literal["corrected", "stale", "local"] = Field(
        default="corrected",
        description="statistics in stale mode: those of the step before and how this band's own "
        "have changed; or but for this band's own; or this band's own alone",
    )

    @classmethod
    def off(cls) -> Self:
        """A degree of 1."""
        return cls(degree=1)

    def why_off(self) -> str | None:
        """A degree of 1."""
        return "degree is 1" if self.degree == 1 else None

    @abstractmethod
    def options(self) -> Options:
        """How the outside of a band is had."""

    def attach(self, site: Site) -> Iterator[Undo]:
        """Hook every layer of every UNet that looks outside of a band.

        Raises:
            BadInput: At the first call of the pipeline, if there are not as many processes.
            UnsupportedModel: For a network that is no UNet over pictures.
        """
        from parallel.mesh import Mesh
        from parallel.patches import Patches

        yield site.claim("attention")
        yield site.claim("tokens")  # they have to be the picture's, all of them
        axis = site.shared(Mesh).claim("patch", self.degree, self.name)
        yield axis.release
        yield site.on_start(axis.reset)
        site.tally.reason = lambda: "there is one process: start more (`--devices`, or torchrun)"
        patches = [
            Patches(denoiser, axis, self.options(), site.tally) for denoiser in site.denoisers
        ]
        site.tally.memory = lambda: sum(one.bytes for one in patches)
        for one in patches:
            yield site.on_start(one.reset)
            yield one.release
            yield from one.attach(site)
