"""Pixelsmith: a picture of any size from patches of the network's own, guided by a smaller one.

Source: Pixelsmith, "Is One GPU Enough? Pushing Image Generation at Higher-Resolutions with
Foundation Models", arXiv 2406.07251, section 3.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Self

from pydantic import Field

from accel.attach import Accelerator, Site, Undo

HELD = (
    *("denoiser", "blocks", "tokens", "noise prediction", "decoder"),
    "branches: what answers for the unconditional one",
    "branches: when guidance ends",
    "branches: where guidance acts",
    "branches: where the scale is 1",
)
"""Seams of methods that follow a sample from step to step, or know its tokens: here many patches
of it take turns at each step."""


class Pixelsmith(Accelerator):
    """Make a picture of any size by a network that never sees more than a patch of its own size.

    First a picture of the base size is made. It is enlarged (Lanczos, in pixels), encoded, and
    guides a run at twice its size, and so on up to the size that was asked for. Each step of such
    a run takes patches at random places until every pixel has been in one. For the first steps
    (the *slider*) a patch takes the phases of its Fourier transform half from the guiding picture
    at that noise level, and every other pixel of what comes out is that picture's at the next: a
    higher slider keeps closer to the smaller picture, a lower one invents more, and repeats more.

    The network's memory does not grow with the picture; latents do, and the autoencoder works in
    tiles while such a picture is made. The base picture and all sizes but the last are made within
    the pipeline's first step. Pictures no larger than the base are left to the stock loop. With
    `parallel.Windows` several processes share the patches of a step.

    Published: SDXL at 4096² and beyond on one GPU, in 50 steps with slider 30.
    """

    name: ClassVar[str] = "resolution.Pixelsmith"
    layer: ClassVar[str] = "loop"
    seam: ClassVar[str] = "loop"
    supports: ClassVar[str] = (
        "text to image with an AutoencoderKL (SD 1.5, 2, SDXL, SD3, Flux, Chroma); schedulers of "
        "one step without noise: DDIM, Euler, FlowMatchEuler"
    )
    source: ClassVar[str] = "arXiv 2406.07251, section 3"

    base: int | None = Field(
        default=None,
        ge=0,
        description="pixels a side that the network was trained for; none: the pipeline's usual "
        "size; 0 is off",
    )
    slider: float = Field(
        default=0.6,
        ge=0.0,
        le=1.0,
        description="share of the steps that the smaller picture guides (the authors: 0.4 at twice "
        "the base size, 0.6 at four times); 0: it only sets where a run begins",
    )
    border: int = Field(
        default=10,
        ge=0,
        description="latents at the edge of a patch over which it blends with its neighbours",
    )

    @classmethod
    def off(cls) -> Self:
        """A base of 0."""
        return cls(base=0)

    def why_off(self) -> str | None:
        """A base of 0."""
        return "base is 0" if self.base == 0 else None

    def attach(self, site: Site) -> Iterator[Undo]:
        """Take the loop.

        Raises:
            BadInput: For a base below one token of the network.
            Conflict: Beside methods that follow a sample from step to step.
            UnsupportedModel: For a network that is given no plain picture, an autoencoder that is
                not known, and a scheduler that looks back or adds noise; at the call of the
                pipeline, if that does not start from noise alone.
        """
        from accel.resolution.cascade import Cascade
        from accel.seams.loop import Loop

        for seam in HELD:
            yield site.claim(seam)
        cascade = Cascade(self, site)
        site.tally.memory = lambda: cascade.bytes
        yield from cascade.attach(site)
        yield from Loop(cascade).attach(site)
