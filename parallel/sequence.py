"""Sequence parallelism on transformers: every process has a part of the tokens, but for attention.

Where a network's tokens are shared out and put together again is what diffusers' context parallel
plans say, for networks that have one; for others we say it here. Only the plans are taken over:
lengths may be any, and so may the number of heads. For attention, tokens are exchanged for heads
(Ulysses): each process then has all tokens of some heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
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
            f"{kind}: nobody has said where its tokens are shared out. Add it to PLANS in "
            "parallel/sequence.py, or use parallel.CFG or parallel.AsyncDiff."
        )
    return found


class Sequence:
    """Shares the tokens of one network out.

    Args:
        denoiser: The network.
        axis: Who shares them.
        tally: Is told what was done.

    Raises:
        UnsupportedModel: If it is not known where.
    """

    def __init__(self, denoiser: Denoiser, axis: Axis, tally: Tally) -> None:
        self._denoiser = denoiser
        self._axis = axis
        self._tally = tally
        self._plan = plan_of(denoiser)
        self._exchange: Exchange | None = None
        self._lengths: dict[Any, tuple[int, ...]] = {}

    def reset(self) -> None:
        """Forget the run before."""
        self._exchange = self._tally.change = None
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
        if self._axis.size == 1:
            return inner(call)
        self._exchange = exchange = self._axis.exchange(call.sample.device.type)
        root = self._plan.get("")
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
            self._exchange = None
        self._tally.change = (
            f"a part of the tokens each in {exchange.size} processes; this one sent "
            f"{exchange.bytes:,} bytes"
        )
        return Result(result.value, result.fresh)

    def _place(
        self, module: Any, part: Part, inner: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """A module whose input or output is cut, or whose output is put together."""
        if self._exchange is None:
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
        assert self._exchange is not None
        parts = value.tensor_split(self._exchange.size, how.split_dim)
        return parts[self._exchange.rank]

    def _joined(self, answer: Any, part: Any) -> Any:
        """The whole of a tensor, or of each of several."""
        if isinstance(answer, Tensor):
            how = part[0] if isinstance(part, (list, tuple)) else part
            assert self._exchange is not None
            length = answer.shape[how.gather_dim]
            lengths = self._known(("joined", how.gather_dim), length, answer.device)
            return self._exchange.gather(answer, lengths, how.gather_dim)
        pairs = zip(answer, part, strict=True)
        return tuple(one if how is None else self._joined(one, how) for one, how in pairs)

    def _known(self, key: Any, length: int, device: torch.device) -> tuple[int, ...]:
        """How much of something each process has; asked for once a run and length."""
        assert self._exchange is not None
        place = (key, length)
        if place not in self._lengths:
            found = self._exchange.gather(torch.tensor([length], device=device))
            self._lengths[place] = tuple(found.tolist())
        return self._lengths[place]

    def _attention(self, path: str, asked: Asked) -> Tensor:
        exchange = self._exchange
        if exchange is None:
            return asked.dense()
        if asked.attn_mask is not None:
            raise UnsupportedModel(
                f"{self._denoiser.name}.{path} attends under a mask, which parallel.Ulysses does "
                "not share out: leave it out for this pipeline."
            )
        heads = asked.query.shape[1]
        lengths = self._known(path, asked.query.shape[2], asked.query.device)
        groups = heads // asked.key.shape[1]
        key, value = (
            one.repeat_interleave(groups, 1) if groups > 1 else one
            for one in (asked.key, asked.value)
        )
        held = exchange.heads_for_tokens(torch.stack([asked.query, key, value]), lengths)
        query, key, value = held.unbind()
        found = replace(asked, query=query, key=key, value=value, enable_gqa=False).dense()
        return exchange.tokens_for_heads(found[None], lengths)[0, :, :heads]


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
    import inspect

    core = getattr(module, "_orig_mod", module)
    return list(inspect.signature(type(core).forward).parameters)[1:]
