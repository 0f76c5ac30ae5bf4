"""What the patch-parallel methods have in common: their fields, and how they attach.

Source: DistriFusion, arXiv 2402.19481, sections 3 and 4.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from accel.attach import Site, Undo
from parallel.degree import ALONE, OneAxis

if TYPE_CHECKING:
    from parallel.outside import Options


class PatchParallel(OneAxis):
    """Compute a band of rows of every picture in each process."""

    seam: ClassVar[str] = "rows over processes"
    supports: ClassVar[str] = "UNets over pictures (SD 1.5, 2, SDXL and kin), with ControlNets"

    warmup: int = Field(
        default=4,
        ge=0,
        description="steps after the first one of a size in which everything is fresh",
    )
    mode: Literal["stale", "sync"] = Field(
        default="stale", description="stale: of the step before; sync: fresh at every step"
    )
    norm: Literal["corrected", "stale", "local"] = Field(
        default="corrected",
        description="statistics in stale mode: those of the step before and how this band's own "
        "have changed; or but for this band's own; or this band's own alone",
    )

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
        yield site.claim("weights on the CPU")  # they are read where they are
        axis = site.shared(Mesh).claim("patch", self.degree, self.name)
        yield axis.release
        yield site.on_start(axis.reset)
        site.tally.reason = lambda: ALONE
        patches = [
            Patches(denoiser, axis, self.options(), site.tally) for denoiser in site.denoisers
        ]
        site.tally.memory = lambda: sum(one.bytes for one in patches)
        for one in patches:
            yield site.on_start(one.reset)
            yield one.release
            yield from one.attach(site)
