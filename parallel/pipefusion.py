"""PipeFusion: patches of a picture flow through the stages of a transformer, a process each.

Source: PipeFusion, arXiv 2405.14430, sections 3 and 4.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

from pydantic import Field

from accel.attach import Site, Undo
from parallel.degree import ALONE, OneAxis


class PipeFusion(OneAxis):
    """Run consecutive blocks in each process; patches of the picture flow through all of them.

    A patch attends to the text, to itself, to what the patches before it are at this step and those
    behind it were at the step before. What is sent does not grow with the depth of the network: the
    tokens of a picture once from stage to stage, and the answer. The cut is made so that the stages
    cost alike, in operations counted at the very first step, which every process computes in full.
    The first ``warmup`` + 1 steps flow whole and are exact; with ``warmup`` as long as the run, or
    one patch, so is the picture, and only memory is gained. A call of N stages takes
    (``patches`` + N - 1) / (``patches`` · N) of one process's time: the stages fill and empty at
    every call, where the paper's overlap.

    With ``weights="split"`` a process has the weights of its own blocks in memory, and those of all
    others in a temporary file, from the first step until the plan is taken off.
    """

    name: ClassVar[str] = "parallel.PipeFusion"
    seam: ClassVar[str] = "blocks over processes"
    supports: ClassVar[str] = (
        "transformers with a list of blocks whose tokens are known (Flux, SD3, PixArt, Wan, "
        "Qwen-Image, LTX, HunyuanVideo), masks of keys alone"
    )
    source: ClassVar[str] = "arXiv 2405.14430, sections 3 and 4"

    patches: int = Field(default=8, ge=1, description="parts in which a picture's tokens flow")
    warmup: int = Field(
        default=1,
        ge=0,
        description="steps after the first one of a size in which the picture flows whole",
    )
    weights: Literal["kept", "split"] = Field(
        default="kept", description="of other stages: kept in memory, or split off to a file"
    )

    def attach(self, site: Site) -> Iterator[Undo]:
        """Hook the blocks of every network, and their attention.

        Raises:
            BadInput: At the first call of the pipeline, if there are not as many processes, or more
                than blocks.
            UnsupportedModel: For a network without a list of blocks, or whose tokens are not known.
        """
        from parallel.mesh import Mesh, world
        from parallel.stages import Stages

        yield site.claim("blocks")
        yield site.claim("attention")
        yield site.claim("tokens")  # they have to be the picture's, all of them
        if self.weights == "split":
            yield site.claim("weights on the CPU")
        axis = site.shared(Mesh).claim("pipe", self.degree, self.name)
        yield axis.release
        yield site.on_start(axis.reset)
        site.tally.reason = lambda: (
            ALONE if world() == 1 else "the run had one step, which all processes computed in full"
        )
        stages = [
            Stages(
                denoiser,
                axis,
                self.patches,
                self.warmup,
                self.weights == "split",
                site.tally,
            )
            for denoiser in site.denoisers
        ]
        site.tally.memory = lambda: sum(one.bytes for one in stages)
        for one in stages:
            yield site.on_start(one.reset)
            yield one.release
            yield from one.attach(site)
