"""DualParal: a clip of any length, from a queue of blocks that flows through layers in processes.

Source: DualParal, arXiv 2505.21070, section 3.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal, Self

from pydantic import Field

from accel.attach import Accelerator, Site, Undo

Left = Literal["level", "latest"]
Noise = Literal["own", "shuffled"]

HELD = (
    *("denoiser", "blocks", "attention", "tokens", "noise prediction"),
    "branches: what answers for the unconditional one",
    "branches: when guidance ends",
    "branches: where guidance acts",
    "branches: where the scale is 1",
)
"""Seams of methods that follow a sample from step to step, or know its tokens: here blocks at all
noise levels take turns, and each sees frames beside its own."""


class DualParal(Accelerator):
    """Make a clip of any length block by block, with the layers shared out over processes.

    Ask the pipeline for as many frames as you like (``num_frames=257``). A queue holds a block of
    latent frames for each step of the run, the next noisier by a step; all go through the network
    in turn, so that the first leaves it clean and noise comes in at the end. A block sees the last
    ``context`` frames of the one before it, as frames of its own call, and the first ones of the
    one behind it by their keys and values in each layer. Each block has its own copy of the
    pipeline's scheduler, whichever that is, and is guided by the pipeline's own rule. A block of
    another network (Wan 2.2) sees no keys and values of the one behind it: they mean nothing there.

    With several processes each computes some of the layers, and blocks are in all of them at the
    same time; weights that another process computes with wait on the host. The result does not
    depend on how many processes there are. It takes blocks × steps × branches calls.

    The pipeline's own latents stay the noise that they were until its last step, which makes most
    of a long clip: callbacks and previews see noise until then.

    What does not grow with the clip: the activations of the network, its keys and values (a share
    of them in each process), and the queue with its solvers (in the first process). What grows is
    what the pipeline makes: noise, latents with the history of its own scheduler, and the decoded
    frames. The rotary positions go on beyond the network's own table, so that clips longer than it
    can be made.

    With one block as long as the clip the result is the stock pipeline's to the bit; without
    context each block is a clip of its own; a block is the same in any longer clip, once it has one
    block fewer behind it than there are steps. A last block may be shorter. Published: Wan 2.1,
    1,025 frames on 8 RTX 4090, 6.54 times as fast with 1.48 times less memory.
    """

    name: ClassVar[str] = "parallel.DualParal"
    layer: ClassVar[str] = "loop"
    seam: ClassVar[str] = "loop"
    supports: ClassVar[str] = "Wan 2.1 and 2.2, clips from text"
    source: ClassVar[str] = "arXiv 2505.21070, section 3"

    frames: int = Field(
        default=8,
        ge=0,
        description="latent frames of a block (of Wan's, each is 4 frames of the clip); 0 is off",
    )
    context: int = Field(
        default=2,
        ge=0,
        description="latent frames that a block sees of each neighbour, a whole block at most",
    )
    left: Left = Field(
        default="level",
        description="the frames of the block before: level when they were as noisy as the block, "
        "latest as they are, a step cleaner (the authors')",
    )
    noise: Noise = Field(
        default="own",
        description="what a block begins with: own noise of the clip, or shuffled frames of the "
        "first block's, which keeps blocks alike (after the authors, whose pool rolls on)",
    )
    degree: int = Field(
        default=0, ge=0, description="processes that share the layers; 0 all that are left"
    )

    @classmethod
    def off(cls) -> Self:
        """No blocks."""
        return cls(frames=0)

    def why_off(self) -> str | None:
        """No blocks."""
        return "frames is 0" if self.frames == 0 else None

    def attach(self, site: Site) -> Iterator[Undo]:
        """Take the loop, and hook the layers of every network.

        Raises:
            BadInput: At the call of the pipeline, if there are not as many processes.
            Conflict: Beside methods that follow a sample from step to step, or split otherwise.
            UnsupportedModel: For another network than Wan's, or one that is given frames.
        """
        from accel.seams.loop import Loop
        from parallel.blockqueue import BlockQueue
        from parallel.mesh import Mesh, world

        for seam in HELD:
            yield site.claim(seam)
        if world() > 1:
            yield site.claim("weights on the CPU")
        mesh = site.shared(Mesh)
        axis = mesh.claim("pipe", self.degree, self.name)
        yield axis.release
        branches = mesh.claim("cfg", 1, self.name)  # they go through the layers one by one
        yield branches.release
        yield site.on_start(axis.reset)
        queue = BlockQueue(self.frames, self.context, self.left, self.noise, axis, site.tally)
        site.tally.memory = lambda: queue.bytes
        yield from queue.attach(site)
        yield from Loop(queue).attach(site)
