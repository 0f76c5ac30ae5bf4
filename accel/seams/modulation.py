"""What tells a transformer's first block the time: its modulated input, or the time embedding.

Blocks modulate their input in two ways. Some have an adaptive norm, which takes the time itself.
Others scale and shift what a plain norm gives, by vectors that they make of the time's embedding:
by adding a table of their own to it (LTX, Wan, PixArt, Sana), or by a projection (Qwen-Image,
Z-Image). Which of the vectors is which, a block's own assignment to names says.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
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
    "adaln_noisy",
)
"""Names under which a block is given its embedding of the time."""

EMBEDDING = frozenset({"emb", "temb", "conditioning_embedding"})
"""Names under which an adaptive norm takes it."""

TEXT = frozenset({"encoder_hidden_states", "context"})
"""Names under which a norm of both streams takes the text."""

NORMS = ("norm1", "img_norm1", "attention_norm1", "self_attn_norm")
"""Names of the plain norm in front of a block's first attention."""

TABLES = ("scale_shift_table", "modulation")
"""Names of the parameter ``[…, vectors, width]`` that a block adds to the time's embedding."""

PROJECTIONS = ("img_mod", "adaLN_modulation")
"""Names of the layers that make all vectors, one after the other, of the time's embedding."""

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
    """The block's input as the time modulates it; where that is not found, the time embedding.

    Raises:
        UnsupportedModel: If the block has neither.
    """
    norm = getattr(block.module, "norm1", None)
    if not isinstance(norm, torch.nn.Module) or not _adaptive(norm):
        modulated = _modulated(block)
        return time_signal(block) if modulated is None else modulated.signal
    parameters = _parameters(norm)
    if not _can_fill(parameters, block):
        return time_signal(block)

    def signal(block: Block, arguments: dict[str, Any]) -> Tensor:
        hidden = arguments[block.hidden]
        first, *others = parameters
        given = {first: hidden}
        given |= {name: _value(name, norm, block, arguments) for name in others}
        given = {name: value for name, value in given.items() if value is not None}
        returned = _run(norm, (), given, hidden.device)
        return returned if isinstance(returned, Tensor) else returned[0]

    return signal


@dataclass(frozen=True)
class Modulated:
    """A block that scales and shifts what a plain norm gives.

    Attributes:
        norm: The norm.
        source: The table that is added to the time's embedding, or the layers that project it.
        scale: Which of the vectors is the scale: the norm's answer counts 1 + scale times.
        shift: Which is added; ``None``: none is.
    """

    norm: torch.nn.Module
    source: torch.nn.Module | Tensor
    scale: int
    shift: int | None

    def signal(self, block: Block, arguments: dict[str, Any]) -> Tensor:
        """The modulated input ``[rows, tokens, width]``."""
        hidden = arguments[block.hidden]
        vectors = self._vectors(_rows(_time(arguments), block, arguments)[: len(hidden)], hidden)
        if vectors.shape[1] not in (1, hidden.shape[1]):  # of frames: all tokens of one alike
            vectors = vectors.repeat_interleave(hidden.shape[1] // vectors.shape[1], dim=1)
        normed: Tensor = _run(self.norm, (hidden,), {}, hidden.device)
        scaled = normed * (1 + vectors[:, :, self.scale])
        return scaled if self.shift is None else scaled + vectors[:, :, self.shift]

    def _vectors(self, time: Tensor, hidden: Tensor) -> Tensor:
        """``[rows, 1 or tokens or frames, vectors, width]``."""
        rows, width = len(hidden), hidden.shape[-1]
        if isinstance(self.source, torch.nn.Module):
            projected: Tensor = _run(self.source, (time,), {}, hidden.device)
            return projected.reshape(rows, -1, projected.shape[-1] // width, width)
        table = self.source.to(hidden.device).reshape(-1, width)
        if time.ndim == 4 and time.shape[2] != len(table):  # vectors first, then frames
            time = time.transpose(1, 2)
        return table + time.reshape(rows, -1, len(table), width)


def _modulated(block: Block) -> Modulated | None:
    """How a block modulates its input itself, if it is given the time and its form is known."""
    core: torch.nn.Module = getattr(block.module, "_orig_mod", block.module)
    norm = _first(core, NORMS, torch.nn.Module)
    source = _first(core, TABLES, torch.nn.Parameter)
    if source is None:
        source = _first(core, PROJECTIONS, torch.nn.Sequential)
    kind: type = type(core)
    places = _places(kind)
    if norm is None or source is None or places is None or not set(TIMES) & set(block.parameters):
        return None
    return Modulated(norm, source, *places)


def _first(core: torch.nn.Module, names: tuple[str, ...], kind: type) -> Any:
    found = (getattr(core, name, None) for name in names)
    return next((one for one in found if isinstance(one, kind)), None)


@cache
def _places(kind: type) -> tuple[int, int | None] | None:
    """Which vectors are the first scale and the first shift: the names that they are given to.

    In ``forward``, or in another method of the block (Qwen-Image).
    """
    try:
        methods = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    except (OSError, TypeError):  # installed without its source
        return None
    tuples = [
        [name.id for name in target.elts if isinstance(name, ast.Name)]
        for node in ast.walk(methods)
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Tuple)
    ]
    for names in tuples:
        if names and ("scale" in names[0] or "shift" in names[0]):
            scale, shift = (_place(names, what) for what in ("scale", "shift"))
            return None if scale is None else (scale, shift)
    return None


def _place(names: list[str], what: str) -> int | None:
    return next((index for index, name in enumerate(names) if what in name), None)


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


def _run(
    part: torch.nn.Module, args: tuple[Any, ...], named: dict[str, Any], device: torch.device
) -> Any:
    """Call a part outside of its block: an offloaded block's weights are not there yet.

    Weights on ``meta`` are those of sequential offload, which brings a layer's when it is called.
    """
    weights = dict(part.named_parameters())
    if all(weight.device == device or weight.is_meta for weight in weights.values()):
        return part(*args, **named)
    moved = {name: weight.to(device) for name, weight in weights.items()}
    return torch.func.functional_call(part, moved, args, named)
