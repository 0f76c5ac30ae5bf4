"""Patch parallelism on UNets: every process computes a band of rows, and asks for the rest.

What lies outside of a band: the rows next to it, for convolutions; the statistics of the picture,
for group normalisation; the keys and values of the other bands, for self-attention. All else is a
matter of single pixels. The answer is gathered, and every process goes on with the whole latent.

In *stale* mode the outside is that of the step before, so that nobody waits for it, after some
steps at the beginning in which it is fresh.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from accel.errors import UnsupportedModel
from accel.seams.attention import Asked, answer_attention
from accel.seams.blocks import wrap_call
from accel.seams.denoisers import Call, Denoiser, Inner, Result
from accel.seams.modules import find_modules
from parallel.bands import Bands
from parallel.exchange import Borders, Exchange, Kept, Pending

if TYPE_CHECKING:
    from accel.attach import Site, Undo
    from accel.report import Tally
    from parallel.mesh import Axis

Mode = Literal["stale", "sync"]
Norm = Literal["corrected", "stale", "local"]

SPATIAL = (
    "down_block_additional_residuals",
    "mid_block_additional_residual",
    "down_intrablock_additional_residuals",
)
"""Arguments that hold pictures beside the sample: what ControlNets and adapters add."""


APART = ("AdaGroupNorm", "SpatialNorm")
"""Layers that take statistics of the picture by themselves."""


@dataclass(frozen=True)
class Options:
    """How the outside of a band is had.

    Attributes:
        warmup: Steps after the first one in which it is fresh.
        mode: ``stale``: that of the step before; ``sync``: fresh at every step.
        norm: Statistics in stale mode: ``corrected`` by how this band's own have changed, ``stale``
            but for this band's own, or ``local``: this band's own alone.
        fraction: Which share of a band's keys and values its neighbours see; ``None``: all bands
            see all.
    """

    warmup: int
    mode: Mode
    norm: Norm
    fraction: float | None = None


@dataclass(frozen=True)
class Now:
    """The call that is under way.

    Attributes:
        bands: Who has which rows.
        exchange: The processes.
        who: What is kept is kept for these rows.
        fresh: Whether the outside has to be fresh.
    """

    bands: Bands
    exchange: Exchange
    who: Hashable
    fresh: bool


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
        self._unit = _unit(denoiser)
        self._kept = Kept()
        self._now: Now | None = None

    @property
    def bytes(self) -> int:
        """Memory of what is kept for the next step."""
        return self._kept.bytes

    def reset(self) -> None:
        """Forget the run before."""
        self._now = self._tally.change = None
        self._kept.reset()

    def attach(self, site: Site) -> Iterator[Undo]:
        """Hook what looks outside of its band."""
        for path, module in self._denoiser.core.named_modules():
            if isinstance(module, nn.Conv2d) and max(module.kernel_size) > 1:
                _check_convolution(self._denoiser, path, module)
                yield wrap_call(module, partial(self._convolution, path, module))
            elif isinstance(module, nn.GroupNorm):
                yield wrap_call(module, partial(self._norm, path, module))
        for part in find_modules(self._denoiser):
            if part.kind == "self":
                yield answer_attention(part, partial(self._attention, part.path))
        yield site.around(self._denoiser, self)

    def __call__(self, call: Call, inner: Inner) -> Result:
        """Compute a band here; the answer is that of all bands."""
        if self._axis.size == 1:
            return inner(call)
        exchange = self._axis.exchange(call.sample.device.type)
        height, width = call.sample.shape[-2:]
        bands = Bands.of(height, width, self._unit, exchange.size)
        options = self._options
        fresh = options.mode == "sync" or call.step.index <= options.warmup
        self._now = Now(bands, exchange, (call.rows, height, width), fresh)
        try:
            value = inner(self._band(call, bands, exchange.rank)).value
        finally:
            self._now = None
        whole = exchange.gather(value, bands.lengths(1), dim=2)
        self._tally.change = (
            f"a band each in {exchange.size} processes; this one sent {exchange.bytes:,} bytes"
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

    def _due(self, key: Hashable, alike: Callable[[Any], bool]) -> Any:
        """What was sent at the step before, where that will do."""
        assert self._now is not None
        before = self._kept.take(key)
        if before is None or alike(before):
            return before
        before.wait()
        return None

    def _convolution(
        self, path: str, module: nn.Conv2d, inner: Callable[..., Tensor], x: Tensor, *more: Any
    ) -> Tensor:
        now, (rows, columns) = self._now, _pair(module.padding)
        if now is None or not rows:
            return inner(x, *more)
        before, after = self._borders((path, now.who), now, x[:, :, :rows], x[:, :, -rows:])
        outside = x.new_zeros(*x.shape[:2], rows, x.shape[3])
        parts = [outside if before is None else before, x, outside if after is None else after]
        return functional.conv2d(
            torch.cat(parts, 2),
            module.weight,
            module.bias,
            module.stride,
            (0, columns),
            module.dilation,
            module.groups,
        )

    def _borders(
        self, key: Hashable, now: Now, first: Tensor, last: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """The slices next to this process's: fresh ones, or those of the step before."""
        known: Borders | None = self._due(key, lambda sent: sent.shape == first.shape)
        fresh = now.exchange.begin_borders(first, last)
        used = fresh if known is None or now.fresh else known
        if known is not None and used is not known:
            known.wait()
        if self._options.mode == "stale":
            self._kept.put(key, fresh)
        return used.pair()

    def _gathered(
        self, key: Hashable, now: Now, x: Tensor, lengths: tuple[int, ...] | None, dim: int
    ) -> tuple[list[Tensor], Tensor | None]:
        """The tensors of all processes, and what this one's was when the others sent theirs.

        This one's is among them as it is now; the second is ``None`` where they are fresh.
        """
        known: Pending | None = self._due(key, lambda sent: sent.fits(x, lengths, dim))
        rank = now.exchange.rank
        stale = known is not None and not now.fresh
        arrived = [] if known is None else known.parts()
        parts = [part.clone() for part in arrived] if stale else []
        own = parts[rank] if stale else None
        fresh = now.exchange.begin(x, lengths, dim, kept=known)
        if not stale:
            parts = fresh.parts()
        if self._options.mode == "stale":
            self._kept.put(key, fresh)
        parts[rank] = x
        return parts, own

    def _norm(
        self, path: str, module: nn.GroupNorm, inner: Callable[..., Tensor], x: Tensor
    ) -> Tensor:
        now = self._now
        if now is None:
            return inner(x)
        flat = x.reshape(len(x), module.num_groups, -1).float()
        variance, mean = torch.var_mean(flat, -1, correction=0)
        own = torch.stack([mean, variance + mean.square()]).double()
        first, second = self._moments((path, now.who), now, own, self._shares(now, x, path))
        spread = second - first.square()
        spread = torch.where(spread < 0, variance.double(), spread)
        scale = (spread + module.eps).rsqrt().float()[..., None]
        normal = ((flat - first.float()[..., None]) * scale).reshape(x.shape).to(x.dtype)
        if module.weight is None:
            return normal
        form = (1, -1, *[1] * (x.ndim - 2))
        found: Tensor = normal * module.weight.view(form) + module.bias.view(form)
        return found

    def _shares(self, now: Now, x: Tensor, path: str) -> Tensor:
        """How much of the picture each process has."""
        rank = now.exchange.rank
        if x.ndim == 4:
            lengths = now.bands.of_rows(rank, *x.shape[2:])
        else:
            lengths = now.bands.of_tokens(rank, x.shape[-1])
        found = torch.tensor(self._known(lengths, path, x), dtype=torch.float64, device=x.device)
        return found / found.sum()

    def _moments(self, key: Hashable, now: Now, own: Tensor, shares: Tensor) -> Tensor:
        """Mean and mean square of the whole picture, ``[2, rows, groups]``."""
        if self._options.norm == "local" and not now.fresh:
            return own
        parts, before = self._gathered(key, now, own, None, 0)
        if before is not None and self._options.norm == "corrected":
            parts[now.exchange.rank] = before
            return _weighted(parts, shares) + own - before
        return _weighted(parts, shares)

    def _attention(self, path: str, asked: Asked) -> Tensor:
        now = self._now
        if now is None:
            return asked.dense()
        if asked.attn_mask is not None:
            raise UnsupportedModel(
                f"{self._denoiser.name}.{path} attends under a mask, which patch parallelism does "
                "not cut: leave the method out for this pipeline."
            )
        both = torch.cat([asked.key, asked.value], 1)
        lengths = now.bands.of_tokens(now.exchange.rank, both.shape[2])
        known = self._known(lengths, path, both)
        seen = self._seen((path, now.who), now, both, known)
        heads = asked.key.shape[1]
        key, value = seen[:, :heads], seen[:, heads:]
        return replace(asked, key=key, value=value).dense()

    def _seen(self, key: Hashable, now: Now, both: Tensor, lengths: tuple[int, ...]) -> Tensor:
        """Keys and values that this band sees."""
        fraction = self._options.fraction
        if fraction is None:
            return torch.cat(self._gathered(key, now, both, lengths, 2)[0], 2)
        count = max(1, int(fraction * min(lengths)))
        before, after = self._borders(key, now, both[:, :, :count], both[:, :, -count:])
        return torch.cat([part for part in (before, both, after) if part is not None], 2)

    def _known(self, lengths: tuple[int, ...] | None, path: str, x: Tensor) -> tuple[int, ...]:
        if lengths is None:
            raise UnsupportedModel(
                f"{self._denoiser.name}.{path} works on {tuple(x.shape)}, which is the band of no "
                "level of a UNet: patch parallelism does not fit. Leave it out."
            )
        return lengths


def _weighted(parts: list[Tensor], shares: Tensor) -> Tensor:
    return (torch.stack(parts) * shares.view(-1, *[1] * parts[0].ndim)).sum(0)


def _cut(value: Any, bands: Bands, rank: int) -> Any:
    """A band of each picture in an argument; what is no picture stays as it is."""
    if isinstance(value, (list, tuple)):
        return type(value)(_cut(item, bands, rank) for item in value)
    if isinstance(value, Tensor) and value.ndim == 4:
        part = bands.part(rank, value.shape[2])
        return value if part is None else value[:, :, part]
    return value


def _pair(padding: Any) -> tuple[int, int]:
    return (0, 0) if isinstance(padding, str) else (padding[0], padding[1])


def _unit(denoiser: Denoiser) -> int:
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
            f"{type(core).__name__} is no UNet over pictures, whose rows patch parallelism shares "
            "out: use parallel.CFG."
        )
    for path, module in core.named_modules():
        if getattr(module, "residual_connection", False) or type(module).__name__ in APART:
            raise UnsupportedModel(
                f"{denoiser.name}.{path} is a {type(module).__name__} of its own kind, of which "
                "patch parallelism does not know what it sees: use parallel.CFG."
            )
    halvings = sum(bool(getattr(block, "downsamplers", None)) for block in core.down_blocks)
    return 1 << halvings


def _check_convolution(denoiser: Denoiser, path: str, module: nn.Conv2d) -> None:
    """Raise UnsupportedModel for one whose outside is not its padding."""
    (rows, _), (size, _) = _pair(module.padding), module.kernel_size
    plain = module.padding_mode == "zeros" and 2 * rows + 1 == size and module.dilation[0] == 1
    if not plain:
        raise UnsupportedModel(
            f"{denoiser.name}.{path} is a convolution that does not pad by half of its width: "
            "patch parallelism does not know what lies outside of a band there. Leave it out."
        )
