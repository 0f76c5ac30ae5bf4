"""The repeated blocks of a transformer: where they are, what streams they carry, what they return.

A stream is a tensor ``[rows, tokens, width]`` that a block takes in and gives back: ``hidden``
(the picture) and, in joint blocks, ``encoder`` (the text).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from accel import hooks
from accel.errors import UnsupportedModel
from accel.seams.denoisers import Denoiser
from accel.seams.rows import take_rows

LISTS = ("transformer_blocks", "single_transformer_blocks", "blocks", "layers")
HIDDEN = ("hidden_states", "x")
ENCODER = "encoder_hidden_states"

ENCODER_FIRST = (
    "FluxTransformerBlock",
    "FluxSingleTransformerBlock",
    "Flux2TransformerBlock",
    "ChromaTransformerBlock",
    "JointTransformerBlock",
    "QwenImageTransformerBlock",
)
"""Blocks that return ``(encoder, hidden)``."""

HIDDEN_FIRST = (
    "HunyuanVideo",
    "HunyuanImage",
    "CogVideoXBlock",
    "CogView4TransformerBlock",
    "MochiTransformerBlock",
)
"""Blocks that return ``(hidden, encoder)``, by the beginning of their class name."""

Streams = dict[str, Tensor]


class Block:
    """One block of a denoiser.

    Attributes:
        index: Position in the order of execution.
        module: The block.
    """

    def __init__(self, index: int, module: Any) -> None:
        self.index = index
        self.module = module
        core = getattr(module, "_orig_mod", module)
        self.kind = type(core).__name__
        signature = inspect.signature(type(core).forward).parameters.values()
        named = [p.name for p in signature if p.kind == p.POSITIONAL_OR_KEYWORD]
        self.parameters = tuple(named[1:])
        self.hidden = next((name for name in HIDDEN if name in self.parameters), "")
        if not self.hidden:
            raise UnsupportedModel(
                f"{self.kind} has no input named {' or '.join(HIDDEN)}: its stream cannot be "
                "followed, so block caches do not fit. Use a cache of the whole network."
            )
        self._order = _stream_order(self.kind)
        self._form: tuple[str, ...] | None = None

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a call by name."""
        return dict(zip(self.parameters, args, strict=False)) | kwargs

    def inputs(self, arguments: dict[str, Any]) -> Streams:
        """The streams that go through the block (a text that is only attended to does not)."""
        streams = {"hidden": arguments[self.hidden]}
        encoder = arguments.get(ENCODER) if self._order else None
        if isinstance(encoder, Tensor):
            streams["encoder"] = encoder
        return streams

    def outputs(self, returned: Any) -> Streams:
        """The streams that came out; one that ends here (``None``) is left out."""
        if isinstance(returned, Tensor):
            self._form = None
            return {"hidden": returned}
        if not self._order:
            raise UnsupportedModel(
                f"{self.kind} returns {len(returned)} values in an order that is not known. Add "
                "it to accel/seams/blocks.py, or use a cache of the whole network."
            )
        pairs = list(zip(self._order, returned, strict=True))
        self._form = tuple(name if isinstance(value, Tensor) else "" for name, value in pairs)
        return {name: value for name, value in pairs if isinstance(value, Tensor)}

    def returns(self, streams: Streams) -> Any:
        """A return value made of streams, of the form of the block's latest own one."""
        if self._form is None:
            return streams["hidden"]
        return tuple(streams[name] if name else None for name in self._form)

    def take(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], rows: list[int], count: int
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a call for some of its ``count`` rows, passed as they were."""
        unnamed = [f"*{index}" for index in range(len(self.parameters), len(args))]
        names = [*self.parameters, *unnamed][: len(args)]
        taken = take_rows(dict(zip(names, args, strict=True)), rows, count, 1)
        return tuple(taken.values()), take_rows(kwargs, rows, count, 1)

    def wrap(self, around: Callable[..., Any]) -> Callable[[], None]:
        """Put ``around(inner, *args, **kwargs)`` around the block; returns the undo."""
        return wrap_call(self.module, around)


def wrap_call(module: Any, around: Callable[..., Any]) -> Callable[[], None]:
    """Put ``around(inner, *args, **kwargs)`` around a module, compiled or not; returns the undo."""
    compiled = getattr(module, "_compiled_call_impl", None)
    return hooks.wrap(module, "forward" if compiled is None else "_compiled_call_impl", around)


def _stream_order(kind: str) -> tuple[str, ...]:
    if kind.startswith(ENCODER_FIRST):
        return ("encoder", "hidden")
    if kind.startswith(HIDDEN_FIRST):
        return ("hidden", "encoder")
    return ()


def find_blocks(denoiser: Denoiser) -> tuple[Block, ...]:
    """The blocks of a transformer in the order in which they run.

    Raises:
        UnsupportedModel: For a network without a plain list of blocks (every UNet).
    """
    lists = [getattr(denoiser.core, name, None) for name in LISTS]
    modules = [block for part in lists if isinstance(part, torch.nn.ModuleList) for block in part]
    if len(modules) < 2:
        raise UnsupportedModel(
            f"{type(denoiser.core).__name__} has no list of transformer blocks "
            f"({', '.join(LISTS)}): block caches do not fit it. Use cache.EasyCache, which works "
            "around the whole network."
        )
    if denoiser.module is not denoiser.core or denoiser.entry != "forward":
        raise UnsupportedModel(
            f"{type(denoiser.core).__name__} is compiled as a whole: its blocks run inside the "
            "graph. Compile the blocks instead (`compile_repeated_blocks`)."
        )
    return tuple(Block(index, module) for index, module in enumerate(modules))
