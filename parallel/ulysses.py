"""Ulysses: a part of the tokens in each process, and all tokens of some heads for attention.

Source: DeepSpeed Ulysses, arXiv 2309.14509, section 3.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from pydantic import Field

from accel.attach import Accelerator, Site, Undo


class Ulysses(Accelerator):
    """Share the tokens of a transformer out; exact, for pictures and clips.

    For attention, each process gives away the other heads of its tokens for the other tokens of its
    heads, and back after it: two exchanges an attention. Any number of tokens, heads and processes
    will do; heads that are missing to a multiple of the processes are computed for nothing.
    """

    name: ClassVar[str] = "parallel.Ulysses"
    layer: ClassVar[str] = "parallel"
    seam: ClassVar[str] = "tokens over processes"
    supports: ClassVar[str] = (
        "transformers with a context parallel plan in diffusers (Flux, Flux 2, Qwen-Image, Wan, "
        "LTX, …), SD3, PixArt"
    )
    source: ClassVar[str] = "arXiv 2309.14509, section 3"

    degree: int = Field(
        default=0, ge=0, description="processes along this axis; 0 all that are left, 1 is off"
    )

    @classmethod
    def off(cls) -> Ulysses:
        """A degree of 1."""
        return cls(degree=1)

    def why_off(self) -> str | None:
        """A degree of 1."""
        return "degree is 1" if self.degree == 1 else None

    def attach(self, site: Site) -> Iterator[Undo]:
        """Hook every network where its tokens are shared out, and its attention.

        Raises:
            BadInput: At the first call of the pipeline, if there are not as many processes.
            UnsupportedModel: For a network of which it is not known where.
        """
        from parallel.mesh import Mesh
        from parallel.sequence import Sequence

        yield site.claim("attention")
        yield site.claim("tokens")  # they have to be all of them, in their order
        yield site.claim("blocks")  # which have only a part of them
        axis = site.shared(Mesh).claim("ulysses", self.degree, self.name)
        yield axis.release
        yield site.on_start(axis.reset)
        site.tally.reason = lambda: "there is one process: start more (`--devices`, or torchrun)"
        for denoiser in site.denoisers:
            sequence = Sequence(denoiser, axis, site.tally)
            yield site.on_start(sequence.reset)
            yield from sequence.attach(site)
