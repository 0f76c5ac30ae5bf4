"""The repeated blocks of a transformer: where they are, what streams they carry, what they return.

A stream is a tensor ``[rows, tokens, width]`` that a block takes in and gives back: ``hidden``
(the picture: the first parameter of every block), in joint blocks ``encoder`` (the text), and
others by the name of their parameter (``audio_hidden_states``). Which of them a block gives back,
and in which order, is what its own ``return`` says: blocks name their results as their parameters.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from accel import hooks
from accel.errors import UnsupportedModel
from accel.seams.denoisers import Denoiser
from accel.seams.rows import take_rows

LISTS = (
    "transformer_blocks",
    "joint_transformer_blocks",
    "double_blocks",
    "double_stream_blocks",
    "single_transformer_blocks",
    "single_stream_blocks",
    "visual_transformer_blocks",
    "transformer_layers",
    "blocks",
    "layers",
    "decoders",
)
"""Names of the lists of blocks that carry the picture, in the order in which networks run them."""

FOLDED = "temporal_transformer_blocks"
"""Blocks in turns with the others: one kind folds the frames into the rows, one the tokens."""

DECODERS = "num_decoder_layers"
"""How many of the last blocks carry another stream than those before (Motif): they always run."""

ENCODER = "encoder_hidden_states"

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
        if not self.parameters:
            raise UnsupportedModel(
                f"{self.kind} has no named input: its stream cannot be followed, so block caches "
                "do not fit. Use a cache of the whole network."
            )
        self.hidden = self.parameters[0]
        self._order = returned_streams(core)
        self._names = {_stream(name, self.hidden): name for name in self._order}
        self._form: tuple[str, ...] | None = None

    @property
    def long_skip(self) -> bool:
        """Whether it takes the output of a block at the start (HunyuanDiT, U-ViT)."""
        return "skip" in self.parameters

    @property
    def streams(self) -> tuple[str, ...]:
        """The streams in the order in which the block returns them."""
        return tuple(self._names) or ("hidden",)

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a call by name."""
        return dict(zip(self.parameters, args, strict=False)) | kwargs

    def inputs(self, arguments: dict[str, Any]) -> Streams:
        """The streams that go through the block (a text that is only attended to does not)."""
        streams = {"hidden": arguments[self.hidden]}
        for stream, name in self._names.items():
            if isinstance(arguments.get(name), Tensor):
                streams[stream] = arguments[name]
        return streams

    def given(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], streams: Streams
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a call with other streams, passed as they were."""
        named = {self._names.get(stream, self.hidden): one for stream, one in streams.items()}
        first = (named.get(name, value) for name, value in zip(self.parameters, args, strict=False))
        rest = {name: named.get(name, value) for name, value in kwargs.items()}
        return (*first, *args[len(self.parameters) :]), rest

    def outputs(self, returned: Any) -> Streams:
        """The streams that came out; one that ends here (``None``) is left out."""
        if isinstance(returned, Tensor):
            self._form = None
            return {"hidden": returned}
        if not self._order:
            raise UnsupportedModel(
                f"{self.kind} returns {len(returned)} values in an order that is not known, so "
                "block caches do not fit. Use a cache of the whole network (cache.EasyCache)."
            )
        pairs = list(zip(self._names, returned, strict=True))
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


def returned_streams(core: Any) -> tuple[str, ...]:
    """The parameters that a block gives back in a tuple; none where it gives one tensor.

    A block that only hands on to another (HiDream's) returns what that one does.
    """
    names, handed = _returned(type(core).forward)
    inner = getattr(core, handed, None)
    return returned_streams(inner) if isinstance(inner, torch.nn.Module) else names


@cache
def _returned(forward: Callable[..., Any]) -> tuple[tuple[str, ...], str]:
    """The parameters in the tuple that a method returns, or the attribute that it hands on to."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    except (OSError, TypeError):  # installed without its source
        return (), ""
    parameters = set(inspect.signature(forward).parameters)
    returns = [node.value for node in ast.walk(tree) if isinstance(node, ast.Return)]
    for value in returns:
        if isinstance(value, ast.Tuple):
            names = tuple(e.id for e in value.elts if isinstance(e, ast.Name))
            if len(names) == len(value.elts) and parameters.issuperset(names):
                return names, ""
    if len(returns) == 1 and isinstance(value := returns[0], ast.Call):
        return (), getattr(value.func, "attr", "")
    return (), ""


def _stream(parameter: str, hidden: str) -> str:
    return {hidden: "hidden", ENCODER: "encoder"}.get(parameter, parameter)


def find_blocks(denoiser: Denoiser) -> tuple[Block, ...]:
    """The blocks of a transformer in the order in which they run.

    Raises:
        UnsupportedModel: For a network without a plain list of blocks (every UNet).
    """
    modules = _modules(denoiser.core)
    if len(modules) < 2:
        raise UnsupportedModel(
            f"{type(denoiser.core).__name__} has no list of transformer blocks "
            f"({', '.join(LISTS)}): block caches do not fit it. Use cache.EasyCache, which works "
            "around the whole network."
        )
    if _list(denoiser.core, FOLDED):
        raise UnsupportedModel(
            f"{type(denoiser.core).__name__} folds frames and tokens into its rows in turns "
            f"({FOLDED}): block caches do not fit it. Use cache.EasyCache, which works around the "
            "whole network."
        )
    if denoiser.module is not denoiser.core or denoiser.entry != "forward":
        raise UnsupportedModel(
            f"{type(denoiser.core).__name__} is compiled as a whole: its blocks run inside the "
            "graph. Compile the blocks instead (`compile_repeated_blocks`)."
        )
    return tuple(Block(index, module) for index, module in enumerate(modules))


def crosses_long_skips(blocks: Sequence[Block], span: range) -> bool:
    """Whether leaving out a range starves a block behind it of a long skip (HunyuanDiT).

    There the k-th block from the end takes in what the k-th from the front gave.
    """
    count = len(blocks)
    return any("skip" in block.parameters for block in blocks) and any(
        index < count // 2 and count - 1 - index not in span for index in span
    )


def _modules(core: Any) -> list[Any]:
    """The blocks in the order in which they run."""
    modules: list[Any] = []
    for name in LISTS:
        modules += _list(core, name)
    behind = int(getattr(core, DECODERS, 0))
    return modules[: len(modules) - behind]


def end_blocks(core: Any) -> tuple[str, ...]:
    """Paths of the first and the last block of a network; none where it has no list of them."""
    modules = _modules(core)
    ends = {id(module) for module in (*modules[:1], *modules[-1:])}
    return tuple(path for path, module in core.named_modules() if id(module) in ends)


def _list(core: Any, name: str) -> list[Any]:
    found = getattr(core, name, None)
    return list(found) if isinstance(found, torch.nn.ModuleList) else []
