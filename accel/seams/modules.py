"""The attention and feed-forward modules inside the blocks of a network, found by structure.

A block is what holds an attention; it lies somewhere in a list of its like. What such a module
answers is not yet multiplied by the block's gate. Networks for video fold frames, or pixels, into
the first dimension; all of diffusers' do so with the row outermost, so that the entries of one row
lie side by side.

Modules cannot be cached inside of blocks that are compiled. A block's graph is one function of its
tensors: whether a module in it runs is a branch on state that changes from step to step, so either
the graph breaks at every module, or it is compiled anew for each set of modules that is skipped –
and what was kept would have to become an input of the graph. `compile_modules` compiles the modules
themselves, which hold nearly all of a block's work: decisions stay outside of every graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from accel.errors import UnsupportedModel
from accel.seams.blocks import wrap_call
from accel.seams.denoisers import Denoiser, find_denoisers

Kind = Literal["self", "cross", "temporal", "mlp"]
KINDS: tuple[Kind, ...] = ("self", "cross", "temporal", "mlp")

APART = ("refiner", "embed")
"""Parts of a path that lead to blocks which prepare the text, not to those of the network."""

IN_TIME = ("temporal", "temp_", "motion", "transformer_in")
"""Parts of a path that lead to blocks whose attention goes along time."""


@dataclass(frozen=True, eq=False)
class Module:
    """One attention or feed-forward module.

    Attributes:
        index: Position among the modules of its denoiser.
        block: Index of the block that holds it.
        kind: ``self`` (joint attention too), ``cross``, ``temporal`` or ``mlp``.
        path: Where it is in the network.
        module: What stands there.
        denoiser: The network.
    """

    index: int
    block: int
    kind: Kind
    path: str
    module: Any
    denoiser: Denoiser

    def wrap(self, around: Callable[..., Any]) -> Callable[[], None]:
        """Put ``around(inner, *args, **kwargs)`` around the module; returns the undo."""
        return wrap_call(self.module, around)

    def rows(self, value: Tensor, count: int) -> Tensor:
        """``[count, entries of one row, …]`` of an output ``[count · entries, …]``.

        Raises:
            UnsupportedModel: If the first dimension does not hold ``count`` rows.
        """
        if value.ndim == 0 or len(value) % count:
            raise UnsupportedModel(
                f"{self.denoiser.name}.{self.path} answers {tuple(value.shape)} where the call has "
                f"{count} rows: they cannot be told apart, so module caches do not fit. Use a "
                "block or network cache."
            )
        return value.reshape(count, len(value) // count, *value.shape[1:])


def find_modules(denoiser: Denoiser) -> tuple[Module, ...]:
    """The attention and feed-forward modules of a network, block by block.

    Raises:
        UnsupportedModel: If there are none, or if they lie inside a compiled graph.
    """
    found: list[Module] = []
    for block, (path, owner) in enumerate(_blocks(denoiser.core)):
        for name, child in owner.named_children():
            where = f"{path}.{name}"
            kind = _kind_of(where, name, child)
            if kind is not None:
                found.append(Module(len(found), block, kind, where, child, denoiser))
    network = type(denoiser.core).__name__
    if not found:
        raise UnsupportedModel(
            f"{network} has no blocks with attention modules, which this method works at. Use a "
            "method that works around the whole network (cache.EasyCache), or leave it out."
        )
    if any(inside_graph(denoiser, module.path) for module in found):
        raise UnsupportedModel(
            f"The blocks of {network} are compiled: their modules run inside the graph, where this "
            "method cannot reach them. Compile the modules instead, on a pipeline whose blocks are "
            "not compiled (accel.seams.modules.compile_modules(pipe)), or use a block or network "
            "cache."
        )
    return tuple(found)


def compile_modules(pipe: Any, **options: Any) -> None:
    """Compile each attention and feed-forward module of a pipeline's denoisers by itself.

    The regional compile for caches of modules, as `compile_repeated_blocks` is for all others: the
    modules of one class share a graph. A module that is one layer (Flux's ``proj_mlp``) has nothing
    to fuse, and stays as it is. Call it before a plan is attached.

    Args:
        pipe: The pipeline.
        **options: For `torch.compile`, such as ``fullgraph=True``.

    Raises:
        UnsupportedModel: For a network without such modules, or whose blocks are compiled.
    """
    for modules in [find_modules(denoiser) for denoiser in find_denoisers(pipe)]:
        for module in modules:
            if next(module.module.children(), None) is not None:
                module.module.compile(**options)


def _blocks(core: Any) -> Iterator[tuple[str, Any]]:
    for path, owner in core.named_modules():
        listed = any(part.isdigit() for part in path.split("."))
        if not listed or any(part in path for part in APART):
            continue
        if isinstance(owner, nn.ModuleList) or not any(map(_is_attention, owner.children())):
            continue
        yield path, owner


def _is_attention(module: Any) -> bool:
    known = hasattr(module, "to_q") or "Attention" in type(module).__name__
    return known and not getattr(module, "residual_connection", False)


def _kind_of(path: str, name: str, module: Any) -> Kind | None:
    if _is_attention(module):
        if _is_cross(name, module):
            return "cross"
        return "temporal" if any(part in path for part in IN_TIME) else "self"
    named = name.startswith(("ff", "feed_forward")) or name.endswith("mlp")
    learned = any(True for _ in module.parameters())  # an activation alone is not worth keeping
    return "mlp" if named and learned and "norm" not in name else None


def _is_cross(name: str, module: Any) -> bool:
    """Whether an attention looks at another sequence alone (joint attention does not)."""
    second = name.endswith("2") or "cross" in name
    return second and bool(getattr(module, "is_cross_attention", True))


def inside_graph(denoiser: Denoiser, path: str) -> bool:
    """Whether something around a module is compiled (the module itself may be)."""
    if denoiser.module is not denoiser.core or "_orig_mod" in path:
        return True
    owner: Any = denoiser.core
    for name in path.split("."):
        if getattr(owner, "_compiled_call_impl", None) is not None:
            return True
        owner = getattr(owner, name)
    return False
