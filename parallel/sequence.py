"""Sequence parallelism on transformers: every process has a part of the tokens, but for attention.

Where a network's tokens are shared out and put together again is what diffusers' context parallel
plans say, for networks that have one; for others we say it here. Only the plans are taken over:
lengths may be any, and so may the number of heads. For attention, tokens are exchanged for heads
(Ulysses), so that each process has all tokens of some heads; or keys and values go round (Ring) and
what each part of them answers is merged; or both (USP): parts of the ring are shared out by heads.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from accel.errors import UnsupportedModel
from accel.seams.attention import Asked, answer_attention
from accel.seams.denoisers import Call, Denoiser, Inner, Result
from accel.seams.modules import find_modules
from accel.seams.places import Places

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
        self._places = Places(denoiser)
        self._exchanges: dict[str, Exchange] = {}
        self._lengths: dict[Any, tuple[int, ...]] = {}
        self._who: Hashable = None

    def reset(self) -> None:
        """Forget the run before."""
        self._exchanges = {}
        self._tally.change = None
        self._lengths.clear()

    def attach(self, site: Site) -> Iterator[Undo]:
        """Hook the places of the plan, and attention."""
        yield from self._places.attach()
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
        self._who, self._places.shares = call.rows, self
        try:
            result = inner(replace(call, arguments=self._places.arguments(call)))
        finally:
            shared, self._exchanges = self._exchanges.values(), {}
            self._places.shares = None
        count, sent = (math.prod(one.size for one in shared), sum(one.bytes for one in shared))
        self._tally.change = (
            f"a part of the tokens each in {count} processes; this one sent {sent:,} bytes"
        )
        return Result(result.value, result.fresh)

    def cut(self, value: Tensor, dim: int, _text: bool, /) -> Tensor:
        """The part of this process, of the picture's tokens as of the text's."""
        for exchange in self._exchanges.values():
            value = value.tensor_split(exchange.size, dim)[exchange.rank]
        return value

    def joined(self, value: Tensor, dim: int) -> Tensor:
        """The parts of all processes one after the other."""
        for exchange in reversed(self._exchanges.values()):
            lengths = self._known(exchange, ("joined", dim), value, dim)
            value = exchange.gather(value, lengths, dim)
        return value

    def _known(self, exchange: Exchange, place: Any, like: Tensor, dim: int) -> tuple[int, ...]:
        """How much of something each process has; they tell each other once a run and branch.

        All of them do, or none: what a branch has of tokens does not change during a run, while
        another branch's text may be longer in one process alone.
        """
        key = (place, exchange, self._who)
        if key not in self._lengths:
            mine = torch.tensor([like.shape[dim]], device=like.device)
            self._lengths[key] = tuple(exchange.gather(mine).tolist())
        return self._lengths[key]

    def _attention(self, path: str, asked: Asked) -> Tensor:
        if not self._exchanges:
            return asked.dense()
        if asked.attn_mask is not None:
            raise UnsupportedModel(
                f"{self._denoiser.name}.{path} attends under a mask, which sequence parallelism "
                "does not share out: leave it out for this pipeline."
            )
        ulysses = self._exchanges.get("ulysses")
        if ulysses is None:
            return self._ring(path, asked)
        heads, lengths = asked.query.shape[1], self._known(ulysses, path, asked.query, 2)
        groups = heads // asked.key.shape[1]
        key, value = (
            one.repeat_interleave(groups, 1) if groups > 1 else one
            for one in (asked.key, asked.value)
        )
        held = ulysses.heads_for_tokens(torch.stack([asked.query, key, value]), lengths)
        query, key, value = held.unbind()
        found = self._ring(
            path, replace(asked, query=query, key=key, value=value, enable_gqa=False)
        )
        return ulysses.tokens_for_heads(found[None], lengths)[0, :, :heads]

    def _ring(self, path: str, asked: Asked) -> Tensor:
        """Attention to the keys of all processes of the ring, which go round."""
        ring = self._exchanges.get("ring")
        if ring is None:
            return asked.dense()
        both = torch.stack([asked.key, asked.value])
        lengths = self._known(ring, ("ring", path), both, 3)
        found: Tensor | None = None
        for key, value in (held.unbind() for held in ring.rotated(both, lengths, 3)):
            part, level = with_level(replace(asked, key=key, value=value))
            if found is None:
                found, levels = part, level
                continue
            share = torch.sigmoid(level - levels)[..., None]  # exp(l₂) / (exp(l₁) + exp(l₂))
            found = found + share * (part - found)
            levels = torch.logaddexp(levels, level)
        assert found is not None
        return found.to(asked.query.dtype)


def with_level(asked: Asked) -> tuple[Tensor, Tensor]:
    """What an attention answers, ``[B, H, S, D]`` in float32, and log Σ exp of its scores.

    Kernels that give both are torch's own: one for the CPU, one for CUDA.
    """
    query, key, value, scale = asked.query, asked.key, asked.value, asked.scale
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    if query.device.type == "cpu":
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        found, level = flash(query, key, value, 0.0, asked.is_causal, scale=scale)
    else:
        efficient = torch.ops.aten._scaled_dot_product_efficient_attention
        found, level, *_ = efficient(query, key, value, None, True, scale=scale)
        level = level[..., : query.shape[2]]  # it is padded to a multiple of 32
    return found.float(), level.float()
