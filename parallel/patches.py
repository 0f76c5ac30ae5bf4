"""Patch parallelism on UNets: every process computes a band of rows, and asks for the rest.

What lies outside of a band: the rows next to it, for convolutions; the statistics of the picture,
for group normalisation; the keys and values of the other bands, for self-attention. All else is a
matter of single pixels. The answer is gathered, and every process goes on with the whole latent.

In *stale* mode the outside is that of the step before, so that nobody waits for it, after some
steps at the beginning in which it is fresh, and likewise where the picture gets another size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from accel.errors import UnsupportedModel
from accel.seams.canvas import SPATIAL
from accel.seams.denoisers import Call, Denoiser, Inner, Result
from accel.seams.modules import find_modules
from accel.seams.offload import check_whole
from parallel.age import Age
from parallel.bands import Bands
from parallel.outside import Now, Options, Outside

if TYPE_CHECKING:
    from accel.attach import Site, Undo
    from accel.report import Tally
    from parallel.mesh import Axis

APART = ("AdaGroupNorm", "SpatialNorm")
"""Layers that take statistics of the picture by themselves."""


class Patches:
    """Shares the calls of one UNet out by rows.

    Args:
        denoiser: The network.
        axis: Who shares.
        options: How.
        tally: Is told what was done.

    Raises:
        UnsupportedModel: For a network that is no UNet over pictures.
    """

    def __init__(self, denoiser: Denoiser, axis: Axis, options: Options, tally: Tally) -> None:
        self._denoiser = denoiser
        self._tally = tally
        self._axis = axis
        self._options = options
        self._unit = unit_of(denoiser)
        self._outside = Outside(denoiser.name, options)
        self._age = Age(self._outside.reset)

    @property
    def bytes(self) -> int:
        """Memory of what is kept for the next step."""
        return self._outside.bytes

    def reset(self) -> None:
        """Forget the run before."""
        self.release()
        self._age.reset()
        self._tally.change = None

    def release(self) -> None:
        """Let go of what is kept."""
        self._outside.reset()

    def attach(self, site: Site) -> Iterator[Undo]:
        """Hook what looks outside of its band.

        Raises:
            UnsupportedModel: For a network that is offloaded layer by layer.
        """
        with site.beside("places of weights"):
            check_whole(self._denoiser.name, self._denoiser.core)
        yield from self._outside.layers(self._denoiser.core)
        for part in find_modules(self._denoiser):
            if part.kind == "self":
                yield self._outside.attention(part.path, part.module)
        yield site.around(self._denoiser, self)

    def __call__(self, call: Call, inner: Inner) -> Result:
        """Compute a band here; the answer is that of all bands."""
        if self._axis.size == 1:
            return inner(call)
        exchange = self._axis.exchange(call.sample.device.type)
        height, width = call.sample.shape[-2:]
        bands = Bands.of(height, width, self._unit, exchange.size)
        options, age = self._options, self._age.of(call)
        fresh = options.mode == "sync" or age <= options.warmup
        with self._outside.of(Now(bands, exchange, (call.rows, height, width), fresh)):
            value = inner(self._band(call, bands, exchange.rank)).value
        whole = exchange.gather(value, bands.lengths(1), dim=2)
        self._tally.change = (
            f"a band each in {exchange.size} processes; this one sent {exchange.bytes:,} bytes "
            f"in {exchange.messages:,} messages"
        )
        return Result(whole, (True,) * len(call.rows))

    def _band(self, call: Call, bands: Bands, rank: int) -> Call:
        """A call with the rows of one band alone."""
        name = self._denoiser.sample_name
        arguments = {**call.arguments, name: call.sample[:, :, bands.span(rank)]}
        for spatial in SPATIAL:
            if arguments.get(spatial) is not None:
                arguments[spatial] = _cut(arguments[spatial], bands, rank)
        return replace(call, arguments=arguments)


def _cut(value: Any, bands: Bands, rank: int) -> Any:
    """A band of each picture in an argument; what is no picture stays as it is."""
    if isinstance(value, (list, tuple)):
        return type(value)(_cut(item, bands, rank) for item in value)
    if isinstance(value, Tensor) and value.ndim == 4:
        part = bands.part(rank, value.shape[2])
        return value if part is None else value[:, :, part]
    return value


def unit_of(denoiser: Denoiser) -> int:
    """2^L, where L counts how often a UNet halves its input.

    Raises:
        UnsupportedModel: For a network that is no UNet over pictures.
    """
    core = denoiser.core
    flat = hasattr(core, "down_blocks") and not any(
        isinstance(module, nn.Conv3d) or "motion" in path for path, module in core.named_modules()
    )
    if not flat:
        raise UnsupportedModel(
            f"{type(core).__name__} is no UNet over pictures, so patch parallelism, which shares "
            "their rows out, does not fit: use parallel.CFG."
        )
    for path, module in core.named_modules():
        if getattr(module, "residual_connection", False) or type(module).__name__ in APART:
            raise UnsupportedModel(
                f"{denoiser.name}.{path} is a {type(module).__name__} of its own kind: it is "
                "not known what it sees, so patch parallelism does not fit. Use parallel.CFG."
            )
    halvings = sum(bool(getattr(block, "downsamplers", None)) for block in core.down_blocks)
    return 1 << halvings
