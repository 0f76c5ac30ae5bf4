"""Video-Infinity: a run of a clip's frames in each process, with attention over two scopes.

Source: Video-Infinity, arXiv 2406.16260, section 4.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

from pydantic import Field

from accel.attach import Site, Undo
from parallel.degree import ALONE, OneAxis


class VideoInfinity(OneAxis):
    """Share the frames of a clip out; what looks along time sees some frames of the others.

    A process sees its own frames, ``reach`` frames on either side of them, and ``anchors`` frames
    spread over the clip. Sent is what others see of its own: little, and no more with more
    processes. The clip is another one than a single process's, unless both scopes together are the
    whole clip and ``bias`` is 0: then it is the same up to rounding. Published, for attention along
    time alone, is a bias of 10; in attention over space and time it blinds a process to its own
    frames while there is much noise (`benchmarks/results/clips-scenes-wan.md`).

    Frames are those that the network sees: latent ones. Where a motion module of AnimateDiff has
    positions for fewer than the clip has, each process counts its own from 0, so that clips may be
    longer than one process can make. Only denoising is shared out: every process decodes the clip.
    """

    name: ClassVar[str] = "parallel.VideoInfinity"
    seam: ClassVar[str] = "frames over processes"
    supports: ClassVar[str] = (
        "UNets with layers along time (AnimateDiff, SVD, ModelScope); Wan, LTX, CogVideoX, "
        "HunyuanVideo; no pictures"
    )
    source: ClassVar[str] = "arXiv 2406.16260, section 4"

    reach: int = Field(default=2, ge=0, description="latent frames on either side that are seen")
    anchors: int = Field(default=2, ge=0, description="latent frames over the clip that all see")
    bias: float = Field(
        default=0.0,
        ge=0.0,
        le=100.0,
        description="added to the logits of the scope that counts more; 0 both count alike",
    )
    switch: float = Field(
        default=0.8,
        ge=0.0,
        description="share of noise σ/(α + σ) from which on that is the frames over the clip; "
        "below, the frames nearby; over 1 always those",
    )
    mode: Literal["sync", "stale"] = Field(
        default="sync", description="others' frames: sync fresh; stale of the step before"
    )
    warmup: int = Field(
        default=4,
        ge=0,
        description="steps after the first one of a size in which stale mode is fresh",
    )

    def attach(self, site: Site) -> Iterator[Undo]:
        """Hook what looks along time in every network.

        Raises:
            BadInput: At the first call of the pipeline, if there are not as many processes, or more
                than frames.
            UnsupportedModel: For a network that makes no clip, or whose frames are not known.
        """
        from parallel.clips import Options, clips_of
        from parallel.mesh import Mesh

        yield site.claim("attention")
        yield site.claim("tokens")  # they have to be the clip's, all of them
        yield site.claim("blocks")  # which have only some frames
        yield site.claim("weights on the CPU")  # they are read where they are
        axis = site.shared(Mesh).claim("clip", self.degree, self.name)
        yield axis.release
        yield site.on_start(axis.reset)
        site.tally.reason = lambda: ALONE
        options = Options(self.reach, self.anchors, self.bias, self.switch, self.mode, self.warmup)
        clips = [clips_of(one, axis, options, site.tally) for one in site.denoisers]
        site.tally.memory = lambda: sum(one.bytes for one in clips)
        for one in clips:
            yield site.on_start(one.reset)
            yield one.release
            yield from one.attach(site)
