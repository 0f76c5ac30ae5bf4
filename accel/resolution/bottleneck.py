"""Bottleneck Sampling: begin and end in the full size, and do the middle of the run in a small one.

Source: Bottleneck Sampling, arXiv 2503.18940, sections 3 and 4. The authors' code was not at hand;
what is said of it here follows the paper's abstract and its published settings.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Self

from pydantic import Field, model_validator

from accel.attach import Accelerator, Site, Undo

Share = Annotated[int, Field(ge=0)]
Strength = Annotated[float, Field(gt=0.0, le=1.0)]
Shift = Annotated[float, Field(gt=0.0)]

HELD = (
    *("size of the picture", "noise prediction"),
    "branches: what answers for the unconditional one",
    "all steps of the schedule",
)
"""Seams of what keeps, for a picture of one size, where its tokens lie or what they were; and of
solvers whose steps are numbered."""


class Bottleneck(Accelerator):
    """Ask for a large picture, and have the network make most of its steps on a small one.

    The run has three stages, in the full size, in a small one and in the full size again; each has
    a schedule of its own down to a clean picture, which is resized and given fresh noise for the
    next. The first fixes the layout, the second does most of the work, the third the details. The
    pipeline's number of steps is shared out over them. A step in the small size costs scale² of a
    full one, and less where attention rules: with the defaults 28 steps cost about 17.

    Caches start anew with each stage, and methods that share a network out warm up anew. The
    solver, the schedules and what guides are the pipeline's own, for the size at hand (a flow's
    shift by the number of tokens, rotary positions, sizes that the network is told). The fresh
    noise follows from the run's own. Where the small size is below what the network was trained
    for, pictures get worse than stock. Pictures too small to be made smaller are left alone.

    Published: FLUX.1-dev 1024² 3 times, HunyuanVideo 2.5 times as fast.
    """

    name: ClassVar[str] = "resolution.Bottleneck"
    layer: ClassVar[str] = "loop"
    seam: ClassVar[str] = "loop"
    supports: ClassVar[str] = (
        "from noise alone: UNets over pictures (SD 1.5, 2, SDXL and kin), Flux, SD3, Chroma, "
        "CogView4, HunyuanImage, Lumina 2, PixArt, Qwen-Image, Sana; Wan 2.1, HunyuanVideo"
    )
    source: ClassVar[str] = "arXiv 2503.18940"

    scale: float = Field(
        default=0.5,
        gt=0.0,
        le=1.0,
        description="side of the small picture, as a share of the large one's; 1 is off",
    )
    steps: tuple[Share, Share, Share] = Field(
        default=(4, 13, 8),
        description="shares of the run's steps: large, small, large; at least one of the last",
    )
    strengths: tuple[Strength, Strength, Strength] = Field(
        default=(1.0, 0.8, 0.6),
        description="how much of a whole schedule each stage makes: 1 from pure noise; the first "
        "stage of a run is always whole",
    )
    shifts: tuple[Shift, Shift, Shift] | None = Field(
        default=None,
        description="shift of each stage's times, for flows (the authors take 9, 6, 9 for Flux); "
        "none: the pipeline's own for the size",
    )

    @model_validator(mode="after")
    def _ends_large(self) -> Self:
        if self.steps[2] == 0 and self.steps[1] > 0:
            raise ValueError(
                f"steps is {self.steps}: the run would end in the small size. Give the last stage "
                "a share, or the small one none"
            )
        if not any(self.steps):
            raise ValueError("steps has no share above 0: give the first stage one")
        return self

    @classmethod
    def off(cls) -> Self:
        """A scale of 1."""
        return cls(scale=1.0)

    def why_off(self) -> str | None:
        """A scale of 1."""
        return "scale is 1" if self.scale == 1.0 else None

    def attach(self, site: Site) -> Iterator[Undo]:
        """Take the loop.

        Raises:
            Conflict: Beside methods that keep what belongs to one size.
            UnsupportedModel: For a network that is given no plain picture, and for a scheduler
                that evaluates a step more than once; at the call of the pipeline, if that does not
                start from noise alone.
        """
        from accel.resolution.stages import Stages
        from accel.seams.loop import Loop

        for seam in HELD:
            yield site.claim(seam)
        stages = Stages(self, site)
        site.tally.memory = lambda: stages.bytes
        yield from stages.attach(site)
        yield from Loop(stages).attach(site)
