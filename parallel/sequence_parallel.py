"""What methods of sequence parallelism have in common: how they attach."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

from accel.attach import Accelerator, Site, Undo
from parallel.degree import ALONE

if TYPE_CHECKING:
    from parallel.mesh import Name


class SequenceParallel(Accelerator):
    """Share the tokens of a transformer out."""

    layer: ClassVar[str] = "parallel"
    seam: ClassVar[str] = "tokens over processes"
    supports: ClassVar[str] = (
        "transformers with a context parallel plan in diffusers (Flux, Flux 2, Qwen-Image, Wan, "
        "LTX, LTX-2, Helios, …), AuraFlow, Chroma, CogVideoX, CogView4, DiT, HunyuanImage, "
        "HunyuanVideo (1.0, 1.5, FramePack), Lumina 2, Mochi, PixArt, SD3, Wan VACE, Z-Image; "
        "masks of tokens"
    )
    approximates: ClassVar[bool] = False

    @abstractmethod
    def degrees(self) -> dict[Name, int]:
        """Processes along ``ring``, ``ulysses`` or both; 0: as many as are left."""

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
        axes = []
        for name, degree in self.degrees().items():
            axes.append(site.shared(Mesh).claim(name, degree, self.name))
            yield axes[-1].release
            yield site.on_start(axes[-1].reset)
        site.tally.reason = lambda: ALONE
        for denoiser in site.denoisers:
            sequence = Sequence(denoiser, axes, site.tally)
            yield site.on_start(sequence.reset)
            yield from sequence.attach(site)
