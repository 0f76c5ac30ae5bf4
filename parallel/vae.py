"""VAE: the decoder's rows shared out, with what lies outside of a band exchanged layer by layer.

Source: DistriFusion, arXiv 2402.19481, section 4 (patches with halos); xDiT, arXiv 2411.01738,
section 4.3 (a parallel VAE).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from accel.attach import Accelerator, Site, Undo


class VAE(Accelerator):
    """Decode a band of rows in each process; exact, unlike decoding in tiles.

    Convolutions get the rows beside a band, group normalisations the moments of the whole picture,
    attention the keys and values of all bands. All processes take part, whatever the other methods
    of the plan share out. What a process holds at once falls with their number.
    """

    name: ClassVar[str] = "parallel.VAE"
    layer: ClassVar[str] = "parallel"
    seam: ClassVar[str] = "decoder"
    supports: ClassVar[str] = "pipelines with a convolutional autoencoder of pictures"
    source: ClassVar[str] = "arXiv 2402.19481, section 4; 2411.01738, section 4.3"
    approximates: ClassVar[bool] = False

    @classmethod
    def off(cls) -> None:
        """It is off when it is left out: it changes nothing but rounding."""

    def why_off(self) -> None:
        """It has no fields."""

    def attach(self, site: Site) -> Iterator[Undo]:
        """Hook the decoder.

        Raises:
            UnsupportedModel: If the pipeline has none of that kind, or it is offloaded layer by
                layer.
        """
        from accel.errors import UnsupportedModel
        from accel.seams.offload import check_whole
        from parallel.decoder import Decoder

        vae = getattr(site.pipe, "vae", None)
        if vae is None:
            raise UnsupportedModel(
                f"{type(site.pipe).__name__} has no autoencoder: leave {self.name} out."
            )
        yield site.claim("decoder")
        site.tally.reason = lambda: "there is one process, or nothing was decoded"

        def forget() -> None:
            site.tally.change = None

        yield site.on_start(forget)
        decoder = Decoder(vae, site.tally)
        with site.beside("places of weights"):
            check_whole("vae", vae.decoder)
        yield from decoder.attach()
