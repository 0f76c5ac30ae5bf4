"""What lies outside of a band of rows: had by every layer that looks there, fresh or a step old."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from accel.errors import UnsupportedModel
from accel.seams.attention import Asked, Interception
from accel.seams.blocks import wrap_call
from parallel.bands import Bands
from parallel.exchange import Borders, Exchange, Pending
from parallel.mail import Mail, ToAll, ToNeighbours

if TYPE_CHECKING:
    from accel.attach import Undo

Mode = Literal["stale", "sync"]
Norm = Literal["corrected", "stale", "local"]


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


class Outside:
    """Gives the layers of a network what lies outside of a band.

    Convolutions get the rows beside it, group normalisations the moments of the picture,
    attentions the keys and values of the other bands.

    Args:
        name: Of the network, for messages.
        options: How it is had.
    """

    def __init__(self, name: str, options: Options) -> None:
        self._name = name
        self._options = options
        self._mail = Mail()
        self._now: Now | None = None

    @property
    def bytes(self) -> int:
        """Memory of what is kept for the next step."""
        return self._mail.bytes

    def reset(self) -> None:
        """Forget the run before."""
        self._now = None
        self._mail.reset()

    @contextmanager
    def of(self, now: Now) -> Iterator[None]:
        """Inside, layers see a band, and are given what lies outside of it."""
        self._now = now
        try:
            yield
            self._mail.close()
        finally:
            self._now = None

    def layers(self, core: nn.Module) -> Iterator[Undo]:
        """Hook the convolutions and normalisations of a network.

        Raises:
            UnsupportedModel: For a convolution whose outside is not its padding.
        """
        for path, module in core.named_modules():
            if isinstance(module, nn.Conv2d) and max(module.kernel_size) > 1:
                self._check(path, module)
                yield wrap_call(module, partial(self._convolution, path, module))
            elif isinstance(module, nn.GroupNorm):
                yield wrap_call(module, partial(self._norm, path, module))

    def attention(self, path: str, module: Any) -> Undo:
        """Hook an attention of the picture to itself."""

        def around(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            with Interception(partial(self._attention, path)):
                return inner(*args, **kwargs)

        return wrap_call(module, around)

    def _check(self, path: str, module: nn.Conv2d) -> None:
        (rows, _), (size, _) = _pair(module.padding), module.kernel_size
        plain = module.padding_mode == "zeros" and 2 * rows + 1 == size and module.dilation[0] == 1
        if not plain:
            raise UnsupportedModel(
                f"{self._name}.{path} is a convolution that does not pad by half of its width: it "
                "is not known what lies outside of a band there. Leave the method out."
            )

    def _due(self, key: Hashable, alike: Callable[[Any], bool]) -> Any:
        """What was sent at the step before, where that will do."""
        assert self._now is not None
        before = self._mail.take(key)
        if before is None or alike(before):
            return before
        self._mail.drop(before)
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
        known: Borders | ToNeighbours | None = self._due(
            key, lambda sent: sent.shape == first.shape
        )
        if known is not None and not now.fresh:
            found = known.pair()
            self._mail.write_borders(now.exchange, key, first, last)
            return found
        if known is not None:
            self._mail.drop(known)
        fresh = now.exchange.begin_borders(first, last)
        if self._options.mode == "stale":
            self._mail.put(key, fresh)
        return fresh.pair()

    def _gathered(
        self, key: Hashable, now: Now, x: Tensor, lengths: tuple[int, ...] | None, dim: int
    ) -> tuple[list[Tensor], Tensor | None]:
        """The tensors of all processes, and what this one's was when the others sent theirs.

        This one's is among them as it is now; the second is ``None`` where they are fresh.
        """
        known: Pending | ToAll | None = self._due(key, lambda sent: sent.fits(x, lengths, dim))
        rank = now.exchange.rank
        if known is not None and not now.fresh:
            parts = known.parts()
            own, parts[rank] = parts[rank], x
            self._mail.write_all(now.exchange, key, x, lengths, dim)
            return parts, own
        kept = known if isinstance(known, Pending) else None
        if known is not None:
            self._mail.drop(known)
        fresh = now.exchange.begin(x, lengths, dim, kept=kept)
        parts = fresh.parts()
        if self._options.mode == "stale":
            self._mail.put(key, fresh)
        parts[rank] = x
        return parts, None

    def _norm(
        self, path: str, module: nn.GroupNorm, inner: Callable[..., Tensor], x: Tensor
    ) -> Tensor:
        now = self._now
        if now is None:
            return inner(x)
        mean, variance = _spread(x, module)
        own = torch.stack([mean, variance + mean.square()])
        first, second = self._moments((path, now.who), now, own, self._shares(now, x, path))
        spread = second - first.square()
        spread = torch.where(spread < 0, variance, spread)
        return _normal(x, module, first, (spread + module.eps).rsqrt())

    def _shares(self, now: Now, x: Tensor, path: str) -> list[float]:
        """How much of the picture each process has."""
        rank = now.exchange.rank
        if x.ndim == 4:
            lengths = now.bands.of_rows(rank, *x.shape[2:])
        else:
            lengths = now.bands.of_tokens(rank, x.shape[-1])
        known = self._known(lengths, path, x)
        return [length / sum(known) for length in known]

    def _moments(self, key: Hashable, now: Now, own: Tensor, shares: list[float]) -> Tensor:
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
                f"{self._name}.{path} attends under a mask, which patch parallelism does "
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
                f"{self._name}.{path} works on {tuple(x.shape)}, which is the band of no "
                "level of a UNet: patch parallelism does not fit. Leave it out."
            )
        return lengths


def _spread(x: Tensor, module: nn.GroupNorm) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each group here, ``[rows, groups]`` in float64."""
    rows, channels, groups = len(x), x.shape[1], module.num_groups
    size = x.numel() // (rows * channels)
    flat = x.float().contiguous()
    _, mean, scale = torch.native_group_norm(
        flat, None, None, rows, channels, size, groups, module.eps
    )  # some times as fast as torch.var_mean
    return mean.double(), scale.double() ** -2 - module.eps


def _normal(x: Tensor, module: nn.GroupNorm, mean: Tensor, scale: Tensor) -> Tensor:
    """What a group normalisation answers, by means and scales ``[rows, groups]`` of its groups."""
    each = x.shape[1] // module.num_groups
    mean, scale = (one.repeat_interleave(each, 1) for one in (mean, scale))
    if module.weight is not None:
        scale = scale * module.weight
    shift = -mean * scale if module.bias is None else module.bias - mean * scale
    form = (*mean.shape, *[1] * (x.ndim - 2))
    found = torch.addcmul(shift.float().view(form), x.float(), scale.float().view(form))
    return found.to(x.dtype)


def _weighted(parts: list[Tensor], shares: list[float]) -> Tensor:
    weighted = [part * share for part, share in zip(parts, shares, strict=True)]
    return torch.stack(weighted).sum(0)


def _pair(padding: Any) -> tuple[int, int]:
    return (0, 0) if isinstance(padding, str) else (padding[0], padding[1])
