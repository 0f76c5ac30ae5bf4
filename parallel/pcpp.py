"""PCPP: bands that see a part of their neighbours alone, which takes far fewer bytes.

Source: Partially Conditioned Patch Parallelism, arXiv 2412.02962, section 3.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from parallel.patch_parallel import PatchParallel

if TYPE_CHECKING:
    from parallel.outside import Options


class PCPP(PatchParallel):
    """As DistriFusion, but a band's self-attention sees itself and the rows next to it alone.

    Keys and values go to two neighbours, a ``fraction`` of a band each, rather than all of them to
    all: some 70 % fewer bytes. The picture is another one than a single process's, in ``sync`` mode
    too, unless two processes see each other whole (``fraction=1``).
    """

    name: ClassVar[str] = "parallel.PCPP"
    source: ClassVar[str] = "arXiv 2412.02962, section 3"

    fraction: float = Field(
        default=0.3, gt=0.0, le=1.0, description="share of a band that its neighbours see"
    )

    def options(self) -> Options:
        """Every band sees a part of its neighbours."""
        from parallel.outside import Options

        return Options(self.warmup, self.mode, self.norm, self.fraction)
