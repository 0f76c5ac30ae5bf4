"""Sequence parallelism on transformers: every process has a part of the tokens, but for attention.

Where a network's tokens are shared out and put together again is what diffusers' context parallel
plans say, for networks that have one; for others we say it here. Only the plans are taken over:
lengths may be any, and so may the number of heads. For attention, tokens are exchanged for heads
(Ulysses), so that each process has all tokens of some heads; or keys and values go round (Ring) and
what each part of them answers is merged; or both (USP): parts of the ring are shared out by heads.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput
from torch import Tensor

from accel.errors import UnsupportedModel
from accel.seams.attention import Asked, answer_attention
from accel.seams.blocks import wrap_call
from accel.seams.denoisers import Call, Denoiser, Inner, Result
from accel.seams.modules import find_modules

if TYPE_CHECKING:
    from accel.attach import Site, Undo
    from accel.report import Tally
    from parallel.exchange import Exchange
    from parallel.mesh import Axis

Part = Any
"""What a plan says of a place: how inputs (by name) and outputs (by index) are cut, or how the
output is put together again."""

GIVEN = {0: ContextParallelInput(split_dim=1, expected_dims=3, split_output=True)}
WHOLE = ContextParallelOutput(gather_dim=1, expected_dims=3)

PLANS: dict[str, dict[str, Part]] = {
    "SD3Transformer2DModel": {"pos_embed": GIVEN, "context_embedder": GIVEN, "proj_out": WHOLE},
    "PixArtTransformer2DModel": {"pos_embed": GIVEN, "proj_out": WHOLE},
}
"""Of networks that have none in diffusers, by class."""

RESIDUALS = (
    "block_controlnet_hidden_states",
    "controlnet_block_samples",
    "controlnet_single_block_samples",
)
"""Arguments that hold tokens for the blocks: what ControlNets add."""


def plan_of(denoiser: Denoiser) -> dict[str, Part]:
    """Where a network's tokens are shared out and put together again.

    Raises:
        UnsupportedModel: If nobody has said it.
    """
    kind = type(denoiser.core).__name__
    found: dict[str, Part] | None = getattr(denoiser.core, "_cp_plan", None) or PLANS.get(kind)
    if found is None:
        raise UnsupportedModel(
            f"{kind}: nobody has said where its tokens are shared out, so sequence parallelism "
            "does not fit. Use parallel.CFG or parallel.AsyncDiff, or add it to PLANS in "
            "parallel/sequence.py."
        )
    return found


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
        self._plan = plan_of(denoiser)
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
        for path, part in self._plan.items():
            for module in _modules(self._denoiser.core, path):
                yield wrap_call(module, partial(self._place, module, part))
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
        self._who, root = call.rows, self._plan.get("")
        arguments = dict(call.arguments)
        if isinstance(root, Mapping):
            arguments |= {
                name: self._cut(arguments[name], how)
                for name, how in root.items()
                if arguments.get(name) is not None
            }
        for name in RESIDUALS:
            if arguments.get(name) is not None:
                arguments[name] = [self._cut(one, GIVEN[0]) for one in arguments[name]]
        try:
            result = inner(replace(call, arguments=arguments))
        finally:
            shared, self._exchanges = self._exchanges.values(), {}
        count, sent = (math.prod(one.size for one in shared), sum(one.bytes for one in shared))
        self._tally.change = (
            f"a part of the tokens each in {count} processes; this one sent {sent:,} bytes"
        )
        return Result(result.value, result.fresh)

    def _place(
        self, module: Any, part: Part, inner: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """A module whose input or output is cut, or whose output is put together."""
        if not self._exchanges:
            return inner(*args, **kwargs)
        if not isinstance(part, Mapping):
            return self._joined(inner(*args, **kwargs), part)
        names = _parameters(module)
        given = dict(zip(names, args, strict=False)) | kwargs
        for name, how in part.items():
            if isinstance(name, str) and given.get(name) is not None:
                given[name] = self._cut(given[name], how)
        positional = [given.pop(name) for name in names[: len(args)]]
        return self._outputs(inner(*positional, *args[len(names) :], **given), part)

    def _outputs(self, answer: Any, part: Mapping[Any, Any]) -> Any:
        """An answer of which some tensors are cut."""
        cut = {index: how for index, how in part.items() if isinstance(index, int)}
        if not cut:
            return answer
        values = [answer] if isinstance(answer, Tensor) else list(answer)
        for index, how in cut.items():
            values[index] = self._cut(values[index], how)
        return values[0] if isinstance(answer, Tensor) else tuple(values)

    def _cut(self, value: Any, how: Any) -> Any:
        """The part of this process of a tensor, or of each of several."""
        if isinstance(value, (list, tuple)):
            return type(value)(self._cut(*pair) for pair in zip(value, how, strict=True))
        if how.expected_dims not in (None, value.ndim):
            return value
        for exchange in self._exchanges.values():
            value = value.tensor_split(exchange.size, how.split_dim)[exchange.rank]
        return value

    def _joined(self, answer: Any, part: Any) -> Any:
        """The whole of a tensor, or of each of several."""
        if isinstance(answer, Tensor):
            dim = (part[0] if isinstance(part, (list, tuple)) else part).gather_dim
            for exchange in reversed(self._exchanges.values()):
                lengths = self._known(exchange, ("joined", dim), answer, dim)
                answer = exchange.gather(answer, lengths, dim)
            return answer
        pairs = zip(answer, part, strict=True)
        return tuple(one if how is None else self._joined(one, how) for one, how in pairs)

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


def _modules(core: Any, path: str) -> list[Any]:
    """The modules that a path of a plan names: ``blocks.*`` all in a list; none for the root."""
    found = [core] if path else []
    for name in path.split(".") if path else ():
        found = (
            [child for one in found for child in one]
            if name == "*"
            else [getattr(one, name) for one in found]
        )
    return found


def _parameters(module: Any) -> list[str]:
    core = getattr(module, "_orig_mod", module)
    return list(inspect.signature(type(core).forward).parameters)[1:]
