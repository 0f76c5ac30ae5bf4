"""What tells a transformer's first block the time: its modulated input, or the time embedding."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from accel.errors import UnsupportedModel
from accel.seams.blocks import ENCODER, Block

TIMES = (
    "temb",
    "emb",
    "adaln_input",
    "embedded_timestep",
    "temb_mod_img",
    "temb_mod",
    "time_embed",
    "modulation_params",
    "timestep",
)
"""Names under which a block is given its embedding of the time."""

EMBEDDING = frozenset({"emb", "temb", "conditioning_embedding"})
"""Names under which an adaptive norm takes it."""

TEXT = frozenset({"encoder_hidden_states", "context"})
"""Names under which a norm of both streams takes the text."""

Signal = Callable[[Block, dict[str, Any]], Tensor]
"""From the first block and its arguments to ``[rows, …]``."""


def time_signal(block: Block) -> Signal:
    """The embedding of the time that a block is given.

    Raises:
        UnsupportedModel: If it is given none.
    """
    if not set(TIMES) & set(block.parameters):
        raise UnsupportedModel(
            f"{block.kind} is given no embedding of the time ({', '.join(TIMES)}), and has no "
            "adaptive norm1: cache.TeaCache has nothing to measure there. Use cache.FirstBlock."
        )
    return lambda block, arguments: _rows(_time(arguments), block, arguments)


def input_signal(block: Block) -> Signal:
    """The block's input as its adaptive ``norm1`` modulates it; without one, the time embedding.

    Raises:
        UnsupportedModel: If the block has neither.
    """
    norm = getattr(block.module, "norm1", None)
    if not isinstance(norm, torch.nn.Module) or not _adaptive(norm):
        return time_signal(block)
    parameters = _parameters(norm)
    if not _can_fill(parameters, block):
        return time_signal(block)

    def signal(block: Block, arguments: dict[str, Any]) -> Tensor:
        hidden = arguments[block.hidden]
        first, *others = parameters
        given = {first: hidden}
        given |= {name: _value(name, norm, block, arguments) for name in others}
        given = {name: value for name, value in given.items() if value is not None}
        returned = _run(norm, given, hidden.device)
        return returned if isinstance(returned, Tensor) else returned[0]

    return signal


def _parameters(norm: torch.nn.Module) -> dict[str, inspect.Parameter]:
    named = list(inspect.signature(type(norm).forward).parameters.items())[1:]
    return {name: one for name, one in named if one.kind == one.POSITIONAL_OR_KEYWORD}


def _adaptive(norm: torch.nn.Module) -> bool:
    return bool((EMBEDDING | {"timestep"}) & set(list(_parameters(norm))[1:]))


def _can_fill(parameters: dict[str, inspect.Parameter], block: Block) -> bool:
    """Whether the block is given everything that its norm needs."""
    needed = [name for name, one in list(parameters.items())[1:] if one.default is one.empty]
    known = {*block.parameters, "hidden_dtype"}
    known |= EMBEDDING if set(TIMES) & known else set()
    known |= TEXT if ENCODER in known else set()
    return set(needed) <= known


def _value(name: str, norm: torch.nn.Module, block: Block, arguments: dict[str, Any]) -> Any:
    if name == "hidden_dtype":
        return arguments[block.hidden].dtype
    if name in EMBEDDING:
        time = _time(arguments)
        pruned = type(norm).__name__.startswith("ChromaAda")  # six vectors here, six of the text's
        return time[:, :6] if pruned else time
    return arguments.get(ENCODER if name in TEXT else name)


def _time(arguments: dict[str, Any]) -> Any:
    named = (arguments.get(name) for name in TIMES)
    time = next((value for value in named if value is not None), None)
    return time[0] if isinstance(time, (tuple, list)) else time


def _rows(time: Any, block: Block, arguments: dict[str, Any]) -> Tensor:
    """The embedding, one row for each row of the block's input."""
    if not isinstance(time, Tensor):
        raise UnsupportedModel(
            f"{block.kind} was called without an embedding of the time: cache.TeaCache has "
            "nothing to measure there. Use cache.FirstBlock."
        )
    count = len(arguments[block.hidden])
    if time.ndim == 0 or len(time) == 1:
        return time.reshape(1, -1).expand(count, -1)
    return time


def _run(norm: torch.nn.Module, given: dict[str, Any], device: torch.device) -> Any:
    """Call a norm outside of its block: an offloaded block's weights are not there yet."""
    weights = dict(norm.named_parameters())
    if all(weight.device == device for weight in weights.values()):
        return norm(**given)
    moved = {name: weight.to(device) for name, weight in weights.items()}
    return torch.func.functional_call(norm, moved, (), given)
