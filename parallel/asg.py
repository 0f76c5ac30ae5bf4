"""ASGDiffusion: a picture larger than the network's own, from patches on several devices.

Source: ASGDiffusion, arXiv 2412.06163, section 4, after CutDiffusion, arXiv 2404.15141. The paper
itself was not at hand: what is said of it here follows its abstract and the parts that reviews
quote. Experimental.

A network that is asked for a picture larger than those it was trained on repeats objects. The paper
makes such a picture in two stages of 25 steps each. First the noise is cut into small pictures that
each show the whole (combs: every k-th pixel); pixels at the same place change between them at
random ("pixel interaction", of CutDiffusion), and what the network says of the first one is the
structure, by which what it says of the others is corrected: ε_i + w·M·(ε_0 − ε_i), with a mask M
of the cross-attention of the way up, because without it backgrounds get blurred. Then the picture
is cut into overlapping windows, each of the network's own size, which refine the details. Patches
are computed on several devices at once. *Asynchronous* is the structure: a device takes that of
the step before, so that it need not wait for the device that has the first patch.

The low-resolution picture is thus no run of its own, and we keep to that: a pipeline cannot be
called twice in a run, a second trajectory would want a second scheduler with all of its state, and
combs are the very latents of the run, at the noise level that the network expects. The scheduler
and all methods above see whole latents and whole answers, the same in every process.

What we could not establish, or do otherwise:

* What is pulled is the clean picture (``space="clean"``), so that each comb keeps its own noise.
  ε_0 is an estimate of the noise in the first comb alone, and the noises of combs are independent:
  the paper's form, ``space="output"``, leaves a part w of their difference in the picture.
* w falls with the time that is left of the first stage, to the power of ``decay``.
* How the map of attention becomes a mask: `parallel.heat`. Networks whose text and picture attend
  together (Flux, SD3) have no cross-attention, and are guided alike everywhere.
* Windows are merged by weights that fall evenly over their overlaps.
* A ControlNet runs on the whole latents, in the pipeline; combs have averages of what it adds.
* The first stage ends at a share of the schedule, which an image-to-image run begins within.

Stale mode saves nothing here, and is not the default. The pipeline steps the whole latents in every
process, so all answers are gathered at every step, the first comb's among them, and the structure
is mixed in behind that: there is no wait for it to be saved. What overlaps with computing is the
sending: patches travel while the next ones are computed.

What came out (``benchmarks/results/asg-scenes-unet-256``; 8 captions, 14 steps, no seconds): the
stock call of scenes-unet at 256², twice the side that it was trained for, keeps to 40 % of what
captions say, and to all of it in no picture; with ASG to 89 %, and to all of it in 3 of 8. Where
the stock call draws two to five houses there is one, in its place, but two in one picture; where it
draws four trees for two there are still four, and the sun may be smeared (``light_side`` is never
right). Edges are soft and grounds blotchy: it is a better picture, not one as good as at 128². The
stock call asks the network 14 times; each of two processes asks 49 times, for a quarter of the
size. It is the combs that do most of it: what the structure adds was too small to tell in 4
pictures of 28 steps, in either space.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field

from accel.attach import Accelerator, Site, Undo
from accel.errors import UnsupportedModel

if TYPE_CHECKING:
    from accel.seams.denoisers import Denoiser
    from parallel.structure import Options, Structure

INSIDE = (
    *("attention", "tokens", "blocks", "branches over processes"),
    "size of the picture",
)
"""Seams of what keeps state inside of the network, or shares its calls out: with several patches a
step it would take one for the other."""


class ASG(Accelerator):
    """Make a picture larger than the network's own of patches that are held together.

    In the first stage of the run the network is asked for k² small pictures of the whole, in the
    second for overlapping windows; every process computes its share of them. The network runs at
    the size that it was trained for, so objects are repeated less, and memory does not grow with
    the picture. One process computes all patches; the picture is the same to the bit on any number.
    Pictures that are no larger than the base are left alone.

    Published: SDXL at 2048² in 14 s on 4 GPUs and in 34 s on one.
    """

    name: ClassVar[str] = "parallel.ASG"
    layer: ClassVar[str] = "parallel"
    seam: ClassVar[str] = "patches over processes"
    supports: ClassVar[str] = (
        "UNets over pictures (SD 1.5, 2, SDXL and kin), Flux, SD3, Chroma, CogView4, HunyuanImage, "
        "Lumina 2, PixArt, Qwen-Image, Sana; with ControlNets; on one process or more"
    )
    source: ClassVar[str] = "arXiv 2412.06163, section 4; experimental"

    degree: int = Field(
        default=0, ge=0, description="processes along this axis; 0 all that are left"
    )
    base: int | None = Field(
        default=None,
        ge=0,
        description="pixels a side that the network was trained for; none: the pipeline's usual "
        "size; 0 is off",
    )
    overlap: float = Field(
        default=0.5,
        ge=0.0,
        lt=1.0,
        description="share of a window that it has in common with the next one, at least",
    )
    until: float = Field(
        default=0.5, ge=0.0, le=1.0, description="share of the schedule that has a structure"
    )
    strength: float = Field(
        default=1.0, ge=0.0, le=1.0, description="weight of the structure at the start; 0 none"
    )
    decay: float = Field(
        default=1.0, ge=0.0, description="power by which that falls to 0; 0: it does not fall"
    )
    mode: Literal["sync", "stale"] = Field(
        default="sync", description="structure of this step, or of the step before"
    )
    warmup: int = Field(
        default=1, ge=0, description="steps after the first one whose structure is fresh, if stale"
    )
    space: Literal["clean", "output"] = Field(
        default="clean", description="what is pulled: clean pictures, or the network's own outputs"
    )
    mask: bool = Field(
        default=True, description="weigh the structure by cross-attention, where there is one"
    )
    shuffle: bool = Field(
        default=True, description="let pixels change places between the small pictures"
    )

    @classmethod
    def off(cls) -> Self:
        """A base of 0."""
        return cls(base=0)

    def why_off(self) -> str | None:
        """A base of 0."""
        return "base is 0" if self.base == 0 else None

    def attach(self, site: Site) -> Iterator[Undo]:
        """Put it around every network, and look at its cross-attention.

        Raises:
            BadInput: For a base below one level or token of the network; at the first call of the
                pipeline, if there are not as many processes.
            UnsupportedModel: For a network that is not given a picture that can be cut, and for a
                scheduler whose clean pictures are not known.
        """
        from parallel.mesh import Mesh

        for seam in INSIDE:
            yield site.claim(seam)
        axis = site.shared(Mesh).claim("patch", self.degree, self.name)
        yield axis.release
        yield site.on_start(axis.reset)
        site.tally.reason = lambda: "the picture was no larger than the base"
        made: list[Structure] = []
        site.tally.memory = lambda: sum(one.bytes for one in made)
        for denoiser in site.denoisers:
            made.append(self._structure(site, denoiser, axis))
            yield site.on_start(made[-1].reset)
            yield made[-1].release
            yield from made[-1].attach(site)

    def _structure(self, site: Site, denoiser: Denoiser, axis: Any) -> Structure:
        from parallel.heat import Heat
        from parallel.structure import Structure

        options = self._options(site.pipe, denoiser)
        heat = Heat(denoiser) if self.mask and self.strength else None
        if heat is not None and not heat.known:
            heat = None
        return Structure(denoiser, axis, options, heat, site.tally)

    def _options(self, pipe: Any, denoiser: Denoiser) -> Options:
        from accel.seams.canvas import grain_of, native_side
        from parallel.structure import Options

        grain = grain_of(pipe, denoiser)
        scheduler = type(pipe.scheduler).__name__
        if self.space == "clean" and scheduler.startswith("EDM"):
            raise UnsupportedModel(
                f"{self.name} with space='clean' does not fit {scheduler}, which scales what the "
                "network is given and what it answers: set space='output', or use another one."
            )
        return Options(
            side=native_side(pipe, denoiser, self.base, self.name),
            grain=grain,
            overlap=self.overlap,
            strength=self.strength,
            decay=self.decay,
            until=self.until,
            space=self.space,
            shuffle=self.shuffle,
            warmup=None if self.mode == "sync" else self.warmup,
        )
