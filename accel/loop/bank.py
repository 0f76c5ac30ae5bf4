"""What a feature bank keeps of the frames before, and what becomes of a frame beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor
from torch.nn import functional

from accel.errors import UnsupportedModel
from accel.loop.likeness import cosine
from accel.seams.attention import UNREACHED, Asked, answer_attention
from accel.seams.denoisers import Denoiser, Row
from accel.seams.modules import Module, find_modules
from accel.seams.rows import index_rows, scatter

if TYPE_CHECKING:
    from accel.loop.feature_bank import FeatureBank

Undo = Callable[[], None]

FUSED = ("mid_block", "up_blocks.0.", "up_blocks.1.")
"""Beginnings of the paths at which outputs are mixed."""


@dataclass(frozen=True)
class Kept:
    """Features of one row at one attention.

    Attributes:
        key: ``[H, N, D]``.
        value: ``[H, N, D]``.
        output: What the module gave, ``[N, C]``.
    """

    key: Tensor
    value: Tensor
    output: Tensor

    @property
    def bytes(self) -> int:
        """Of all three."""
        return self.key.nbytes + self.value.nbytes + self.output.nbytes


def merged(bank: Kept, frame: Kept, seed: int) -> Kept:
    """As many tokens as before, of both: a random half joins the likest of the other half.

    Tokens are compared by their keys, and a group is its mean.

    Args:
        bank: N tokens.
        frame: N tokens.
        seed: Of the halves.
    """
    key = torch.cat([bank.key, frame.key], 1)
    value = torch.cat([bank.value, frame.value], 1)
    output = torch.cat([bank.output, frame.output])
    count = len(output)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).to(output.device)
    sources, targets = order[: count // 2], order[count // 2 :]
    metric = functional.normalize(key.transpose(0, 1).flatten(1).float(), dim=1)
    joined = (metric[sources] @ metric[targets].T).argmax(1)
    size = torch.ones(len(targets), device=output.device).index_add_(
        0, joined, torch.ones(len(sources), device=output.device)
    )

    def mean(tokens: Tensor) -> Tensor:
        """Of ``[2N, …]``, ``[N, …]``."""
        total = tokens[targets].float().index_add_(0, joined, tokens[sources].float())
        return (total / size.view(-1, *[1] * (tokens.ndim - 1))).to(tokens.dtype)

    return Kept(
        mean(key.transpose(0, 1)).transpose(0, 1),
        mean(value.transpose(0, 1)).transpose(0, 1),
        mean(output),
    )


def queued(bank: Sequence[Kept], frame: Kept, frames: int) -> tuple[Kept, ...]:
    """The last frames, the newest at the end."""
    return (*bank, frame)[-frames:]


def joined(parts: Sequence[Kept]) -> Kept:
    """Several frames as one bank."""
    if len(parts) == 1:
        return parts[0]
    return Kept(
        torch.cat([part.key for part in parts], 1),
        torch.cat([part.value for part in parts], 1),
        torch.cat([part.output for part in parts]),
    )


def fused(output: Tensor, bank: Tensor, mix: float, threshold: float) -> Tensor:
    """Tokens ``[N, C]``, mixed with the nearest of the bank ``[M, C]`` where it is near enough."""
    like = functional.normalize(output.float(), dim=1) @ functional.normalize(bank.float(), dim=1).T
    near, place = like.max(1)
    mixture = (1.0 - mix) * output + mix * bank[place]
    return torch.where((near >= threshold)[:, None], mixture, output)


class Scenes:
    """Says of each frame whether it begins another scene than the one before.

    Args:
        threshold: Cosine below which it does; -1: never.
    """

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold
        self._last: Tensor | None = None

    def reset(self) -> None:
        """Forget the frame before."""
        self._last = None

    def cuts(self, frame: Tensor) -> bool:
        """Whether a frame ``[1, 3, H, W]`` begins another scene."""
        last, self._last = self._last, frame
        if last is None or self._threshold <= -1.0:
            return False
        return cosine(last, frame) < self._threshold


class Layer:
    """The banks of one attention, one for each row that was seen.

    Args:
        method: Its fields.
        module: The attention.
    """

    def __init__(self, method: FeatureBank, module: Module) -> None:
        self._method, self._module = method, module
        self._mixes = method.mix > 0.0 and module.path.startswith(FUSED)
        self.kept: dict[Row, tuple[Kept, ...]] = {}
        self.frames: dict[Row, int] = {}
        self.uses = 0
        self._asked: Asked | None = None

    def attach(self, streaming: Callable[[], bool]) -> Iterator[Undo]:
        """Hook the module: its attention, and what it answers."""

        def attend(asked: Asked) -> Tensor:
            return self._attend(asked) if streaming() else asked.dense()

        def around(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            output = inner(*args, **kwargs)
            return self._after(output) if streaming() else output

        yield answer_attention(self._module, attend)
        yield self._module.wrap(around)

    @property
    def bytes(self) -> int:
        """Of all banks."""
        return sum(part.bytes for parts in self.kept.values() for part in parts)

    @property
    def _rows(self) -> tuple[Row, ...]:
        return self._module.denoiser.rows

    def _attend(self, asked: Asked) -> Tensor:
        """EA: attend to the bank as well, in the rows that have one."""
        self._asked = asked
        if len(asked.query) != len(self._rows) or asked.attn_mask is not None:
            self._refuse(f"computes {len(asked.query)} rows of {len(self._rows)}, or with a mask")
        groups: dict[int, list[int]] = {}
        for place, row in enumerate(self._rows):
            seen = self.kept.get(row, ()) if self._method.attend else ()
            groups.setdefault(sum(len(part.output) for part in seen), []).append(place)
        parts = [(places, self._beside(asked, places, size)) for size, places in groups.items()]
        return scatter(parts, len(self._rows))

    def _beside(self, asked: Asked, places: list[int], size: int) -> Tensor:
        """The attention of some rows whose banks have as many tokens."""
        own = replace(
            asked,
            query=index_rows(asked.query, places),
            key=index_rows(asked.key, places),
            value=index_rows(asked.value, places),
        )
        if not size:
            return own.dense()
        self.uses += 1
        banks = [joined(self.kept[self._rows[place]]) for place in places]
        return replace(
            own,
            key=torch.cat([own.key, torch.stack([bank.key for bank in banks])], 2),
            value=torch.cat([own.value, torch.stack([bank.value for bank in banks])], 2),
        ).dense()

    def _after(self, output: Tensor) -> Tensor:
        """FF, and the update of the banks by what was there before it."""
        asked, self._asked = self._asked, None
        if asked is None:
            self._refuse(UNREACHED)
        mixed = output.clone() if self._mixes else output
        for place, row in enumerate(self._rows):
            bank = self.kept.get(row)
            if self._mixes and bank is not None:
                self.uses += 1
                nearest = joined(bank).output
                mixed[place] = fused(
                    output[place], nearest, self._method.mix, self._method.threshold
                )
            self._update(row, Kept(asked.key[place], asked.value[place], output[place]))
        return mixed

    def _update(self, row: Row, frame: Kept) -> None:
        count = self.frames.get(row, 0)
        self.frames[row] = count + 1
        if count % self._method.interval:
            return
        bank = self.kept.get(row, ())
        own = Kept(frame.key.clone(), frame.value.clone(), frame.output.clone())
        if self._method.keep == "queue":
            self.kept[row] = queued(bank, own, self._method.frames)
        else:
            seed = self._method.seed + count
            self.kept[row] = (merged(bank[0], own, seed),) if bank else (own,)

    def drop(self, levels: frozenset[int]) -> None:
        """Drop the banks of some levels."""
        for row in [row for row in self.frames if row.sample in levels]:
            self.kept.pop(row, None)
            del self.frames[row]

    def _refuse(self, what: str) -> NoReturn:
        raise UnsupportedModel(
            f"{self._method.name}: {self._module.denoiser.name}.{self._module.path} {what}; leave "
            "it out of the plan."
        )


class Banks:
    """The banks of all self-attentions of a network.

    Args:
        method: Its fields.
    """

    def __init__(self, method: FeatureBank) -> None:
        self._method = method
        self._layers: list[Layer] = []

    def attach(self, denoiser: Denoiser, streaming: Callable[[], bool]) -> Iterator[Undo]:
        """Hook a network.

        Raises:
            UnsupportedModel: If it is no UNet.
        """
        name = type(denoiser.core).__name__
        modules = [module for module in find_modules(denoiser) if module.kind == "self"]
        if not hasattr(denoiser.core, "up_blocks") or not modules:
            raise UnsupportedModel(
                f"{self._method.name} does not fit {name}: it works at self-attentions of a UNet. "
                "Leave it out of the plan."
            )
        for module in modules:
            layer = Layer(self._method, module)
            self._layers.append(layer)
            yield from layer.attach(streaming)

    def reset(self) -> None:
        """Drop all banks."""
        for layer in self._layers:
            layer.kept.clear()
            layer.frames.clear()
            layer.uses = 0

    def drop(self, levels: frozenset[int]) -> None:
        """Drop the banks of levels whose frame begins another scene."""
        if levels:
            for layer in self._layers:
                layer.drop(levels)

    @property
    def bytes(self) -> int:
        """Memory of all banks."""
        return sum(layer.bytes for layer in self._layers)

    @property
    def told(self) -> str | None:
        """How often a bank was looked at, in words; ``None`` for never."""
        uses = sum(layer.uses for layer in self._layers)
        return f"looked at {uses} times in {len(self._layers)} attentions" if uses else None
