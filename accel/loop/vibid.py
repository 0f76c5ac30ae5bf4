"""ViBiD: a clip between two pictures, each step denoised from either end in turn.

Source: Yang, Kwon, Ye, "ViBiDSampler: Enhancing Video Interpolation Using Bidirectional Diffusion
Sampler", ICLR 2025, arXiv 2410.05651.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Self

from pydantic import Field

from accel.attach import Accelerator, Site, Undo

HELD = (
    *("scheduler", "denoiser", "blocks", "noise prediction"),
    *("frames", "branches over processes"),
    "branches: what answers for the unconditional one",
    "branches: when guidance ends",
    "branches: where guidance acts",
    "branches: where the scale is 1",
)
"""Seams of methods that follow a sample from step to step, of other solvers, and of what shares a
clip out: here two passes take turns with fresh noise between them, so that what the network said of
one noise is no answer for the next, and each makes its step by itself."""


class ViBiD(Accelerator):
    """Make one clip between two pictures by a pipeline that makes clips from a first one.

    Call the pipeline with both: ``pipe([first, last], …)``. At each step the clip is denoised as
    one that begins with the first picture, given fresh noise up to the level of the step, turned
    round in time, and denoised as one that begins with the last picture; nothing is averaged. A
    pass is a step of DDIM with CFG++: the guided clean estimate, and the noise of the
    unconditional branch. It sets the last frame of its clean estimate to the latents of the other
    picture, so the clip begins with just those of the first one; it ends with what the last pass
    made of the last picture.

    The pipeline gives back one clip (``frames[0]``), from the noise of the first of its two; until
    its last step its latents are the clip twice. Two evaluations a step, of one clip each: the
    work of two stock clips. Of the pipeline's guidance counts only whether there is any
    (``max_guidance_scale`` above 1): without it, passes are conditional alone and take half. The
    scheduler gives the noise levels, and makes no steps. The pictures' latents are those that the
    network is shown, with the noise of ``noise_aug_strength`` on them.

    Published: Stable Video Diffusion XT, 25 frames of 1024 × 576, 195 s on an RTX 3090.
    """

    name: ClassVar[str] = "loop.ViBiD"
    layer: ClassVar[str] = "loop"
    seam: ClassVar[str] = "loop"
    supports: ClassVar[str] = "Stable Video Diffusion, called with two pictures"
    source: ClassVar[str] = "arXiv 2410.05651"

    scale: float = Field(
        default=1.0,
        ge=0.0,
        le=1.0,
        description="λ of CFG++: 0 the unconditional clean estimate, 1 the conditional one (the "
        "authors')",
    )
    replace: bool = Field(
        default=True,
        description="whether a pass sets the last frame of its clean estimate to the latents of "
        "the picture there (the paper's DDS, whose solution for one frame this is)",
    )

    @classmethod
    def off(cls) -> Self | None:
        """There is no stock call of a clip between two pictures: leave it out."""
        return None

    def why_off(self) -> str | None:
        """Never."""
        return None

    def attach(self, site: Site) -> Iterator[Undo]:
        """Take the loop.

        Raises:
            BadInput: At the call of the pipeline, if that has not two pictures.
            Conflict: Beside methods that follow a sample from step to step, and other solvers.
            UnsupportedModel: For another pipeline, and for a scheduler that evaluates a step more
                than once or whose latents are not known.
        """
        from accel.loop.bidirectional import Bidirectional
        from accel.seams.loop import Loop

        for seam in HELD:
            yield site.claim(seam)
        passes = Bidirectional(self, site)
        yield from passes.attach(site)
        yield from Loop(passes, guides=True).attach(site)
