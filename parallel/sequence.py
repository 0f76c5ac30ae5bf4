"""Sequence parallelism on transformers: every process has a part of the tokens, but for attention.

Where a network's tokens are shared out and put together again is what diffusers' context parallel
plans say, for networks that have one; for others we say it here. Only the plans are taken over:
lengths may be any, and so may the number of heads. For attention, tokens are exchanged for heads
(Ulysses), so that each process has all tokens of some heads; or keys and values go round (Ring) and
what each part of them answers is merged; or both (USP): parts of the ring are shared out by heads.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from itertools import repeat
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from accel.errors import UnsupportedModel
from accel.seams.attention import Asked, answer_attention
from accel.seams.denoisers import Call, Denoiser, Inner, Result
from accel.seams.modules import find_modules
from accel.seams.places import Cuts
from parallel.masks import NONE, OTHER, Mask, agreed, kind_of, mask_of

if TYPE_CHECKING:
    from accel.attach import Site, Undo
    from accel.report import Tally
    from parallel.exchange import Exchange
    from parallel.mesh import Axis


class Sequence:
    """Shares the tokens of one network out.

    Args:
        denoiser: The network.
        axes: Who shares them: ``ring``, ``ulysses``, or parts of the ring by ``ulysses``.
        tally: Is told what was done.

    Raises:
        UnsupportedModel: If it is not known where.
    """

    def __init__(self, denoiser: Denoiser, axes: Iterable[Axis], tally: Tally) -> None:
        self._denoiser = denoiser
        self._axes = tuple(axes)
        self._tally = tally
        self._cuts = Cuts(denoiser)
        self._exchanges: dict[str, Exchange] = {}
        self._told: dict[Any, list[tuple[int, ...]]] = {}
        self._turns: Counter[Any] = Counter()
        self._who: Hashable = None

    def reset(self) -> None:
        """Forget the run before."""
        self._exchanges = {}
        self._tally.change = None
        self._told.clear()

    def attach(self, site: Site) -> Iterator[Undo]:
        """Hook the places of the plan, and attention."""
        yield from self._cuts.attach()
        for one in find_modules(self._denoiser):
            if one.kind == "self":
                yield answer_attention(one, partial(self._attention, one.path))
        yield site.around(self._denoiser, self)

    def __call__(self, call: Call, inner: Inner) -> Result:
        """Compute with a part of the tokens here; the answer is whole."""
        device = call.sample.device.type
        self._exchanges = {axis.name: axis.exchange(device) for axis in self._axes if axis.size > 1}
        if not self._exchanges:
            return inner(call)
        self._who, self._cuts.shares = (call.rows, tuple(call.sample.shape[1:])), self
        self._turns.clear()
        try:
            result = inner(replace(call, arguments=self._cuts.arguments(call.arguments)))
        finally:
            shared, self._exchanges = self._exchanges.values(), {}
            self._cuts.shares = None
        count, sent = (math.prod(one.size for one in shared), sum(one.bytes for one in shared))
        self._tally.change = (
            f"a part of the tokens each in {count} processes; this one sent {sent:,} bytes"
        )
        return result

    def cut(self, value: Tensor, dim: int, _text: bool, /) -> Tensor:
        """The part of this process, of the picture's tokens as of the text's."""
        for exchange in self._exchanges.values():
            value = value.tensor_split(exchange.size, dim)[exchange.rank]
        return value

    def joined(self, value: Tensor, dim: int) -> Tensor:
        """The parts of all processes one after the other."""
        place = self._place("joined")
        for exchange in reversed(self._exchanges.values()):
            tell = partial(lambda length: (length,), value.shape[dim])
            told = self._known(exchange, place, tell, value.device)
            value = exchange.gather(value, [length for (length,) in told], dim)
        return value

    def _place(self, name: str) -> tuple[str, int]:
        """Something that takes place in a call, by name and by how often it did before."""
        self._turns[name] += 1
        return name, self._turns[name]

    def _known(
        self, exchange: Exchange, place: Any, tell: Callable[[], tuple[int, ...]], device: Any
    ) -> list[tuple[int, ...]]:
        """What each process tells of a place; they tell each other once a run, branch and size.

        All of them do, or none: what a branch has of tokens in a size of the picture, and whether
        they are masked, does not change during a run, while another branch's text may be longer in
        one process alone.
        """
        key = (place, exchange, self._who)
        if key not in self._told:
            mine = torch.tensor([tell()], device=device)
            self._told[key] = [tuple(one) for one in exchange.gather(mine).tolist()]
        return self._told[key]

    def _attention(self, path: str, asked: Asked) -> Tensor:
        if not self._exchanges:
            return asked.dense()
        place, device = self._place(path), asked.query.device
        spans: dict[str, list[tuple[int, ...]]] = {}
        own: tuple[int, ...] = ()
        for name in ("ulysses", "ring"):
            if name in self._exchanges:
                tell = partial(_tell, asked, own)
                spans[name] = self._known(self._exchanges[name], place, tell, device)
                queries, keys, kinds = zip(*spans[name], strict=True)
                own = (sum(queries), sum(keys), agreed(kinds))
        came_late = own[2] == NONE and asked.attn_mask is not None
        if own[2] == OTHER or came_late:
            raise self._unserved(path, asked)
        mask = mask_of(asked, own[2])
        asked = replace(asked, attn_mask=None)
        if "ulysses" not in spans:
            return self._ring(asked, mask, spans)
        return self._ulysses(asked, mask, spans)

    def _ulysses(
        self, asked: Asked, mask: Mask | None, spans: dict[str, list[tuple[int, ...]]]
    ) -> Tensor:
        """Attention of some heads to all tokens of the processes.

        Heads that the processes do not divide are shared out by queries: each process answers its
        own ones, with the keys of all, while the answers of the other heads are on their way.
        """
        ulysses, told = self._exchanges["ulysses"], spans["ulysses"]
        queries, keys = ([one[index] for one in told] for index in (0, 1))
        everywhere = mask and mask.gathered(ulysses, told)
        asked = _without_groups(asked)
        even = asked.query.shape[1] // ulysses.size * ulysses.size
        divided, left = _heads(asked, slice(even)), _heads(asked, slice(even, None))
        pair = None
        if left.query.shape[1]:
            pair = ulysses.begin(torch.stack([left.key, left.value]), keys, 3)
        found: list[Tensor] = []
        if even:
            given = (divided.query, divided.key, divided.value)
            query, key, value = ulysses.heads_for_tokens(given, [queries, keys, keys])
            divided = replace(divided, query=query, key=key, value=value)
            back = ulysses.tokens_for_heads(self._ring(divided, everywhere, spans), queries)
        if pair is not None:
            key, value = torch.cat(pair.parts(), 3).unbind()
            own = mask and everywhere and replace(mask, keys=everywhere.keys)
            found = [self._ring(replace(left, key=key, value=value), own, spans)]
        if even:
            found = [back(), *found]
        return torch.cat([one.transpose(1, 2) for one in found], 2).transpose(1, 2)

    def _ring(
        self, asked: Asked, mask: Mask | None, spans: dict[str, list[tuple[int, ...]]]
    ) -> Tensor:
        """Attention to the keys of all processes of the ring, which go round."""
        if "ring" not in spans:
            return replace(asked, attn_mask=mask.block() if mask is not None else None).dense()
        ring, lengths = self._exchanges["ring"], [one[1] for one in spans["ring"]]
        pairs = ring.rotated(torch.stack([asked.key, asked.value]), lengths, 3)
        seen: Iterable[Any] = repeat(None)
        if mask is not None:
            seen = ring.rotated(mask.keys, lengths, 1)
        found: Tensor | None = None
        for pair, keys in zip(pairs, seen, strict=False):
            if not pair.shape[3]:
                continue
            bias = mask.bias(keys, asked.query.dtype) if mask is not None else None
            key, value = pair.unbind()
            part, level = with_level(replace(asked, key=key, value=value, attn_mask=bias))
            if found is None:
                found, levels = part, level
                continue
            share = torch.sigmoid(level - levels)[..., None]  # exp(l₂) / (exp(l₁) + exp(l₂))
            found = found + share * (part - found)
            levels = torch.logaddexp(levels, level)
        assert found is not None
        found = mask.blank(found) if mask is not None else found
        return found.to(asked.query.dtype)

    def _unserved(self, path: str, asked: Asked) -> UnsupportedModel:
        mask = "causally"
        if asked.attn_mask is not None:
            mask = f"under a mask of {tuple(asked.attn_mask.shape)}"
        return UnsupportedModel(
            f"{self._denoiser.name}.{path} attends {mask}, with {asked.query.shape[2]} queries and "
            f"{asked.key.shape[2]} keys in this process: only a mask of own tokens, under which "
            "all queries see the same keys, and from the first step on, can be shared out, so "
            "sequence parallelism does not fit. Use parallel.CFG or parallel.AsyncDiff."
        )


def _tell(asked: Asked, own: tuple[int, ...]) -> tuple[int, ...]:
    """Queries, keys and the kind of mask that a process has before an exchange."""
    return own or (asked.query.shape[2], asked.key.shape[2], kind_of(asked))


def _without_groups(asked: Asked) -> Asked:
    """The same with keys and values of its own for every head."""
    groups = asked.query.shape[1] // asked.key.shape[1]
    if groups == 1:
        return asked
    key, value = (one.repeat_interleave(groups, 1) for one in (asked.key, asked.value))
    return replace(asked, key=key, value=value, enable_gqa=False)


def _heads(asked: Asked, some: slice) -> Asked:
    """The attention of some heads."""
    query, key, value = (one[:, some] for one in (asked.query, asked.key, asked.value))
    return replace(asked, query=query, key=key, value=value)


def with_level(asked: Asked) -> tuple[Tensor, Tensor]:
    """What an attention answers, ``[B, H, S, D]`` in float32, and log Σ exp of its scores.

    Kernels that give both are torch's own: one for the CPU, one for CUDA.
    """
    asked = _without_groups(asked)
    query, key, value, scale = asked.query, asked.key, asked.value, asked.scale
    bias = asked.attn_mask
    if query.device.type == "cpu":
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        found, level = flash(query, key, value, 0.0, attn_mask=bias, scale=scale)
    else:
        efficient = torch.ops.aten._scaled_dot_product_efficient_attention
        bias = None if bias is None else _aligned(bias, query, key)
        found, level, *_ = efficient(query, key, value, bias, True, scale=scale)
        level = level[..., : query.shape[2]]  # it is padded to a multiple of 32
    return found.float(), level.float()


def _aligned(bias: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """A bias as the kernel for CUDA wants it: rows that begin at multiples of 16, for all heads."""
    count = key.shape[2]
    padded = functional.pad(bias, (0, -count % 16))[..., :count]
    return padded.expand(*query.shape[:3], count)
