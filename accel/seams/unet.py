"""The deep and the shallow part of a UNet, told apart by structure, and a pass of the shallow one.

The down path leaves skip residuals behind: r_0 is what ``conv_in`` gave, then come one for each
layer of a down block and one for its downsampler. The up path consumes them in reverse, one a
layer: counted from ``conv_out``, its layer n consumes r_n. Cut at *branch* n, the shallow part is
what r_0 … r_n and the up layers n … 0 need; everything else is deep, and the one thing that the
shallow part needs of it is the *feature* that enters up layer n. What a pipeline adds to residuals
on their way across (ControlNet, T2I-Adapter) is added live to those that the shallow part reads.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from torch import Tensor, nn

from accel.errors import UnsupportedModel
from accel.seams.blocks import wrap_call
from accel.seams.denoisers import Denoiser

SAMPLERS = ("downsamplers", "upsamplers")
RESIDUALS = "res_hidden_states_tuple"
ADAPTER = "additional_residuals"
"""What a T2I-Adapter adds to the last layer of a down block."""

Undo = Callable[[], None]
T = TypeVar("T")


@dataclass(frozen=True)
class Shape:
    """The shape of a tensor whose rows may have frames folded in."""

    folded: int
    rest: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor, rows: int) -> Shape:
        """The shape of a tensor ``[rows · folded, …]``."""
        return cls(len(tensor) // rows, tuple(tensor.shape[1:]))

    def of_rows(self, rows: int) -> tuple[int, ...]:
        """The shape for a number of rows."""
        return (rows * self.folded, *self.rest)


def blank(like: Tensor) -> Tensor:
    """The value of tensors that nobody reads: a scalar."""
    return like.new_zeros(())


def _unread(like: Tensor, shape: Sequence[int]) -> Tensor:
    """A tensor that nobody reads, but that a T2I-Adapter may be added to in place."""
    return blank(like).expand(*shape).contiguous()


@dataclass
class Pass:
    """One call of the network.

    Attributes:
        rows: Rows of the call; frames may be folded into the tensors' first dimension besides.
        feature: What enters the shallow part: captured by a full pass, given to a shallow one.
        full: Whether everything runs.
    """

    rows: int
    feature: Tensor | None
    full: bool


class DeepBranch:
    """The cut through one UNet.

    Args:
        denoiser: The network.
        branch: Where it is cut; 0 leaves the least to the shallow part.

    Raises:
        UnsupportedModel: For a network that is no UNet, or has fewer layers than ``branch``.
    """

    def __init__(self, denoiser: Denoiser, branch: int) -> None:
        self._kind = type(denoiser.core).__name__
        self._down, self._mid, self._up = _paths(denoiser)
        layers = [len(block.resnets) for block in self._up]
        if branch >= sum(layers):
            raise UnsupportedModel(
                f"{self._kind} has {sum(layers)} layers in its up path: branch {branch} does not "
                f"fit it. Take one from 0 to {sum(layers) - 1}."
            )
        self._branch = branch
        self._boundary, outward = 0, branch
        while outward >= layers[self._boundary]:
            outward -= layers[self._boundary]
            self._boundary += 1
        self._skipped = layers[self._boundary] - 1 - outward
        self._shapes: dict[int, tuple[Shape, ...]] = {}
        self._tuples: set[nn.Module] = set()
        self._pass: Pass | None = None

    def attach(self) -> Iterator[Undo]:
        """Hook the blocks of the deep part, and the layers of the blocks that are cut."""
        first = 1
        for index, block in enumerate(self._down):
            count = _residuals(block)
            needed = min(max(self._branch + 1 - first, 0), count)
            first += count
            if needed < count:
                yield wrap_call(block, partial(self._on_down, index, block, needed))
            if 0 < needed < count:
                for layer in range(needed, count):
                    yield from self._bypass(_layer(block, layer))
        if self._mid is not None:
            yield wrap_call(self._mid, partial(self._on_mid, self._mid))
        yield from self._bypass(self._up[self._boundary + 1 :])
        yield from self._attach_boundary(self._up[self._boundary])

    def _attach_boundary(self, block: nn.Module) -> Iterator[Undo]:
        yield wrap_call(block, partial(self._on_boundary, block))
        for layer in range(self._skipped):
            resnet, *others = _layer(block, layer)
            if layer < self._skipped - 1:
                yield from self._bypass([resnet, *others])
                continue
            yield wrap_call(resnet, self._on_feature)
            for module in others:
                yield wrap_call(module, self._on_capture)
                yield from self._bypass([module])

    def _bypass(self, modules: Iterable[nn.Module]) -> Iterator[Undo]:
        for module in modules:
            yield wrap_call(module, partial(self._through, module))

    def forget(self) -> None:
        """Drop what a call left behind that was aborted."""
        self._pass = None
        self._shapes.clear()
        self._tuples.clear()

    def full(self, rows: int, run: Callable[[], T]) -> tuple[T, Tensor | None]:
        """Run everything.

        Returns:
            What ``run`` returned, and the feature ``[rows, frames, …]``: ``None`` where the
            network was not called.
        """
        result, feature = self._run(Pass(rows, None, full=True), run)
        return result, None if feature is None else feature.view(rows, -1, *feature.shape[1:])

    def shallow(self, feature: Tensor, run: Callable[[], T]) -> T:
        """Run the shallow part behind a feature ``[rows, frames, …]``, which FreeU may change."""
        return self._run(Pass(len(feature), feature.flatten(0, 1), full=False), run)[0]

    def _run(self, passed: Pass, run: Callable[[], T]) -> tuple[T, Tensor | None]:
        self._pass = passed
        try:
            return run(), passed.feature
        finally:
            self._pass = None

    @property
    def _now(self) -> Pass | None:
        """The shallow pass that is under way."""
        return None if self._pass is None or self._pass.full else self._pass

    def _on_down(
        self,
        index: int,
        block: Any,
        needed: int,
        inner: Callable[..., Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """A down block whose residuals from ``needed`` on are deep."""
        if self._pass is None:
            return inner(*args, **kwargs)
        if self._pass.full:
            hidden, residuals = inner(*args, **kwargs)
            rows = self._pass.rows
            self._shapes[index] = tuple(Shape.of(value, rows) for value in (hidden, *residuals))
            return hidden, residuals
        rows, entering = self._pass.rows, _first(block, args, kwargs)
        kept: tuple[Tensor, ...] = ()
        if needed:
            if needed < len(block.resnets) and ADAPTER in kwargs:
                kwargs |= {ADAPTER: None}  # it belongs to a layer that does not run
            kept = inner(*args, **kwargs)[1][:needed]
        last, *shapes = self._shapes[index]
        blanks = (blank(entering).expand(*shape.of_rows(rows)) for shape in shapes[needed:])
        return _unread(entering, last.of_rows(rows)), (*kept, *blanks)

    def _on_mid(
        self, block: nn.Module, inner: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """The block in the middle. What it is given may be a residual that is read later."""
        if self._now is None:
            return inner(*args, **kwargs)
        entering = _first(block, args, kwargs)
        return _unread(entering, entering.shape)

    def _on_boundary(
        self, block: nn.Module, inner: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """The up block that is cut: its first layers are deep."""
        passed = self._pass
        if passed is None:
            return inner(*args, **kwargs)
        names = _names(block)
        arguments = dict(zip(names, args, strict=False)) | kwargs
        if passed.full:
            if not self._skipped:
                passed.feature = arguments[names[0]].clone()
            return inner(*args, **kwargs)
        if not self._skipped:
            return inner(**arguments | {names[0]: passed.feature})
        residuals = list(arguments[RESIDUALS])
        thin = residuals[-1][:, :1]
        arguments[names[0]] = _unread(thin, thin.shape)
        for layer in range(self._skipped):  # joined to the stream in any case: keep it narrow
            residuals[-1 - layer] = residuals[-1 - layer][:, :1]
        return inner(**arguments | {RESIDUALS: tuple(residuals)})

    def _on_feature(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The resnet of the last deep layer: it answers with the feature."""
        if self._now is not None:
            return self._now.feature
        return self._on_capture(inner, *args, **kwargs)

    def _on_capture(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A module of the last deep layer: the last of them to run gives the feature."""
        returned = inner(*args, **kwargs)
        if self._pass is not None and self._pass.full:
            value = returned[0] if isinstance(returned, tuple) else returned
            self._pass.feature = value.clone()  # FreeU changes it in place
        return returned

    def _through(
        self, module: nn.Module, inner: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """A module of the deep part: it hands its input on."""
        if self._now is not None:
            hidden = _first(module, args, kwargs)
            return (hidden,) if module in self._tuples else hidden
        returned = inner(*args, **kwargs)
        if self._pass is not None and isinstance(returned, tuple):
            self._tuples.add(module)
        return returned


def _paths(denoiser: Denoiser) -> tuple[list[Any], nn.Module | None, list[Any]]:
    """The down blocks, the mid block, and the up blocks from ``conv_out`` inwards."""
    core, kind = denoiser.core, type(denoiser.core).__name__
    down = list(getattr(core, "down_blocks", ()) or ())
    up = list(getattr(core, "up_blocks", ()) or ())[::-1]
    if not down or not up:
        raise UnsupportedModel(
            f"{kind} has no down_blocks and up_blocks: a cache of a UNet's deep branch does not "
            "fit it. Use cache.FirstBlock for a transformer, or cache.EasyCache for any network."
        )
    regular = all(_regular(block) for block in (*down, *up))
    regular = regular and all(RESIDUALS in _names(block) for block in up)
    if not regular or 1 + sum(map(_residuals, down)) != sum(len(block.resnets) for block in up):
        raise UnsupportedModel(
            f"{kind} does not hand one skip residual to each layer of its up path: a cache of its "
            "deep branch does not fit it. Use cache.EasyCache, which works around the whole "
            "network."
        )
    if denoiser.module is not core or denoiser.entry != "forward":
        raise UnsupportedModel(
            f"{kind} is compiled as a whole: its blocks run inside the graph, so a cache of its "
            "deep branch does not fit. Compile the blocks instead (`compile_repeated_blocks`)."
        )
    return down, getattr(core, "mid_block", None), up


def _regular(block: Any) -> bool:
    resnets = getattr(block, "resnets", None)
    return isinstance(resnets, nn.ModuleList) and not hasattr(block, "skip_conv")


def _residuals(block: Any) -> int:
    """Skip residuals that a down block leaves behind."""
    return len(block.resnets) + (getattr(block, "downsamplers", None) is not None)


def _layer(block: Any, index: int) -> list[nn.Module]:
    """The modules of one layer, its resnet first; behind the layers come the samplers."""
    count = len(block.resnets)
    if index == count:
        return [module for name in SAMPLERS for module in getattr(block, name, None) or ()]
    lists = [
        part
        for name, part in block.named_children()
        if isinstance(part, nn.ModuleList) and len(part) == count and name not in SAMPLERS
    ]
    modules = [part[index] for part in lists if part is not block.resnets]
    return [block.resnets[index], *modules]


def _names(module: nn.Module) -> list[str]:
    parameters = inspect.signature(type(module).forward).parameters.values()
    return [p.name for p in parameters if p.kind == p.POSITIONAL_OR_KEYWORD][1:]


def _first(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The stream that a module is given: its first parameter."""
    value: Tensor = args[0] if args else kwargs[_names(module)[0]]
    return value
