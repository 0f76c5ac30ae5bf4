"""The decoder of pictures over several processes: a band of rows each, and exact."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor, distributed, nn

from accel import hooks
from accel.errors import UnsupportedModel
from parallel.bands import Bands
from parallel.exchange import Exchange
from parallel.mesh import world
from parallel.outside import Now, Options, Outside

if TYPE_CHECKING:
    from accel.attach import Undo
    from accel.report import Tally

SYNC = Options(warmup=0, mode="sync", norm="corrected")


class Decoder:
    """Shares ``vae.decode`` out by rows, over all processes.

    Args:
        vae: The pipeline's autoencoder.
        tally: Is told what was done.

    Raises:
        UnsupportedModel: If it is no convolutional autoencoder of pictures.
    """

    def __init__(self, vae: Any, tally: Tally) -> None:
        blocks = list(getattr(getattr(vae, "decoder", None), "up_blocks", ()))
        known = bool(blocks) and all(hasattr(block, "upsamplers") for block in blocks)
        if not known or any(isinstance(module, nn.Conv3d) for module in vae.modules()):
            raise UnsupportedModel(
                f"{type(vae).__name__} is no convolutional autoencoder of pictures, so "
                "parallel.VAE, which shares their rows out, does not fit: leave it out."
            )
        self._vae = vae
        self._tally = tally
        self._scale = 1 << sum(bool(getattr(block, "upsamplers", None)) for block in blocks)
        self._outside = Outside("vae", SYNC)
        self._exchange: Exchange | None = None

    def attach(self) -> Iterator[Undo]:
        """Hook the decoder."""
        yield from self._outside.layers(self._vae.decoder)
        if getattr(self._vae, "post_quant_conv", None) is not None:
            yield from self._outside.layers(self._vae.post_quant_conv)
        for path, module in self._vae.decoder.named_modules():
            if hasattr(module, "to_q"):
                yield self._outside.attention(f"decoder.{path}", module)
        yield hooks.wrap(self._vae, "decode", self._decode)

    def _decode(
        self, inner: Callable[..., Any], z: Tensor, return_dict: bool = True, **more: Any
    ) -> Any:
        """Decode a band here; the answer is that of all bands."""
        group = distributed.group.WORLD if world() > 1 else None
        if group is None:
            return inner(z, return_dict=return_dict, **more)
        if getattr(self._vae, "use_tiling", False):
            raise UnsupportedModel(
                "The autoencoder decodes in tiles, and parallel.VAE in bands: call "
                "pipe.vae.disable_tiling(), or leave parallel.VAE out."
            )
        self._exchange = exchange = self._exchange or Exchange(group)
        height, width = (self._scale * side for side in z.shape[-2:])
        bands = Bands.of(height, width, self._scale, exchange.size)
        lengths = bands.lengths(self._scale)
        begin = sum(lengths[: exchange.rank])
        band = z[:, :, begin : begin + lengths[exchange.rank]]
        before = exchange.bytes
        with self._outside.of(Now(bands, exchange, "decode", fresh=True)):
            answer = inner(band, return_dict=return_dict, **more)
        whole = exchange.gather(answer[0], bands.lengths(1), dim=2)
        self._tally.change = (
            f"a band each in {exchange.size} processes; this one sent {exchange.bytes - before:,} "
            "bytes"
        )
        return type(answer)(sample=whole) if return_dict else (whole,)
