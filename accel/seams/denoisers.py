"""The networks of a pipeline, one call of them, and the onion of methods around that call."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from accel.errors import UnsupportedModel
from accel.seams.rows import index_rows, take_rows
from accel.trajectory import Step

NAMES = ("unet", "transformer", "transformer_2")
SAMPLE = ("hidden_states", "sample", "x")


class Row(NamedTuple):
    """One row of a call: a guidance branch of one sample of the batch."""

    branch: str
    sample: int


class Denoiser:
    """One network of a pipeline.

    Attributes:
        name: Attribute of the pipeline.
        module: What stands there, hooks and compiled wrappers of others included.
        core: The network itself, below a compiled wrapper.
        parameters: Names of the parameters of its ``forward``, in order.
        rows: What is being computed at this moment: the rows of the innermost call, or those of
            them for which a part of the network runs (`computing`). Empty between calls.
    """

    def __init__(self, name: str, module: Any) -> None:
        self.rows: tuple[Row, ...] = ()
        self.name = name
        self.module = module
        self.core = getattr(module, "_orig_mod", module)
        self.parameters = tuple(inspect.signature(type(self.core).forward).parameters)[1:]
        self.sample_name = next((n for n in SAMPLE if n in self.parameters), "")
        if not self.sample_name:
            raise UnsupportedModel(
                f"{type(self.core).__name__} has no input named {', '.join(SAMPLE)}: its calls "
                "cannot be followed. Attach to a pipeline whose denoiser has one."
            )

    @property
    def entry(self) -> str:
        """The method that a call of the module runs: the compiled one where there is one."""
        compiled = getattr(self.module, "_compiled_call_impl", None)
        return "forward" if compiled is None else "_compiled_call_impl"

    @contextmanager
    def computing(self, rows: tuple[Row, ...]) -> Iterator[None]:
        """While it is entered, these rows are computed.

        Whoever runs a part of the network for some rows of a call says so by this, so that what
        looks at the inside (attention) knows whose tensors it is given.
        """
        before, self.rows = self.rows, rows
        try:
            yield
        finally:
            self.rows = before


def find_denoisers(pipe: Any) -> tuple[Denoiser, ...]:
    """The denoisers of a pipeline.

    Raises:
        UnsupportedModel: If it has none under a known name.
    """
    found = [(name, getattr(pipe, name, None)) for name in NAMES]
    denoisers = tuple(Denoiser(name, module) for name, module in found if module is not None)
    if not denoisers:
        raise UnsupportedModel(
            f"{type(pipe).__name__} has no denoiser under {', '.join(NAMES)}: there is nothing "
            "to accelerate. `accel explain` lists what a pipeline must have."
        )
    return denoisers


@dataclass(frozen=True)
class Call:
    """One call of a network.

    Attributes:
        rows: What each row of the batched arguments is, in order.
        arguments: By parameter name.
    """

    denoiser: Denoiser
    step: Step
    rows: tuple[Row, ...]
    arguments: dict[str, Any]

    @property
    def raw(self) -> Any:
        """The network's input as passed: ``[rows, …]``, or a list of one tensor a row."""
        return self.arguments[self.denoiser.sample_name]

    @cached_property
    def sample(self) -> Tensor:
        """The network's input ``[rows, …]``."""
        return self.raw if isinstance(self.raw, Tensor) else torch.stack(list(self.raw))

    @property
    def frames(self) -> int:
        """Frames that a video UNet may fold into the first dimension of its arguments."""
        shape = self.raw.shape if isinstance(self.raw, Tensor) else ()
        if self.denoiser.sample_name != "sample" or len(shape) != 5:
            return 1
        return int(shape[2])

    def take(self, rows: Sequence[int]) -> Call:
        """The same call with some of its rows (indices into ``self.rows``)."""
        if len(rows) == len(self.rows):
            return self
        taken = take_rows(self.arguments, rows, len(self.rows), self.frames)
        return replace(self, rows=tuple(self.rows[row] for row in rows), arguments=taken)

    def where(self, keep: Callable[[Row], bool]) -> list[int]:
        """Indices of the rows that ``keep`` accepts."""
        return [index for index, row in enumerate(self.rows) if keep(row)]


@dataclass(frozen=True)
class Result:
    """What a network, or a method in its place, answered.

    Attributes:
        value: ``[rows, …]``.
        fresh: For each row, whether it was computed in full at this step.
        native: The network's own return value where ``value`` is just that, else ``None``.
    """

    value: Tensor
    fresh: tuple[bool, ...]
    native: Any = None

    def take(self, rows: Sequence[int]) -> Result:
        """The same answer for some of its rows."""
        if len(rows) == len(self.fresh):
            return self
        return Result(index_rows(self.value, rows), tuple(self.fresh[row] for row in rows))


def stack_rows(values: Sequence[Tensor]) -> Tensor:
    """Rows ``[…]`` as one tensor ``[rows, …]``: a copy."""
    return torch.stack(list(values))


Inner = Callable[[Call], Result]
Layer = Callable[[Call, Inner], Result]


class Packing:
    """How a network wraps its answer: a tuple, or an output class; a tensor, or a list."""

    def __init__(self) -> None:
        self._kinds: dict[bool, Callable[[Any], Any]] = {}
        self._listed = False

    def unpack(self, native: Any, as_dict: bool) -> Tensor:
        """The tensor ``[rows, …]`` in a network's return value."""
        if isinstance(native, tuple):
            body = native[0]
            self._kinds[as_dict] = lambda value: (value,)
        else:
            body, kind = native.sample, type(native)
            self._kinds[as_dict] = lambda value: kind(sample=value)
        self._listed = not isinstance(body, Tensor)
        return torch.stack(list(body)) if self._listed else body

    def pack(self, value: Tensor, as_dict: bool) -> Any:
        """A return value as the network itself would give it."""
        return self._kinds[as_dict](list(value.unbind()) if self._listed else value)


class Reader(Protocol):
    """Names the rows of a call."""

    @property
    def running(self) -> bool:
        """Whether a run is under way: a call outside one is left alone."""
        ...

    def note(self, denoiser: Denoiser, arguments: dict[str, Any]) -> None:
        """Look at a call that no method is around."""
        ...

    def read(self, denoiser: Denoiser, arguments: dict[str, Any]) -> Call:
        """One call, its rows named."""
        ...

    def answered(self, call: Call, result: Result) -> None:
        """Look at what a call was answered."""
        ...


class Onion:
    """The methods around every call of one denoiser, the lowest layer number outermost."""

    def __init__(self, denoiser: Denoiser, reader: Reader, count: Callable[[int], None]) -> None:
        self.denoiser = denoiser
        self._reader = reader
        self._count = count
        self._layers: list[tuple[int, Layer]] = []
        self._packing = Packing()
        self._evaluate: Inner | None = None

    def add(self, depth: int, layer: Layer) -> Callable[[], None]:
        """Put a method around the call at a depth; returns the undo."""
        entry = (depth, layer)
        self._layers.append(entry)
        self._layers.sort(key=lambda item: item[0])
        return lambda: self._layers.remove(entry)

    def __call__(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the methods around one call; without methods, only count it."""
        if not self._reader.running:
            return inner(*args, **kwargs)
        arguments = dict(zip(self.denoiser.parameters, args, strict=False)) | kwargs
        if not self._layers:
            self._reader.note(self.denoiser, arguments)
            self._count(len(arguments[self.denoiser.sample_name]))
            return inner(*args, **kwargs)
        call = self._reader.read(self.denoiser, arguments)
        as_dict = bool(arguments.get("return_dict", True))

        def evaluate(innermost: Call) -> Result:
            self._count(len(innermost.rows))
            given = (args, kwargs) if innermost is call else ((), innermost.arguments)
            with self.denoiser.computing(innermost.rows):
                native = inner(*given[0], **given[1])
            value = self._packing.unpack(native, as_dict)
            return Result(value, (True,) * len(innermost.rows), native)

        self._evaluate = evaluate
        try:
            result = self._run(0, call, evaluate)
        finally:
            self._evaluate = None
        self._reader.answered(call, result)
        if result.native is not None and len(result.fresh) == len(call.rows):
            return result.native
        return self._packing.pack(result.value, as_dict)

    def below(self, depth: int, call: Call, counts: Callable[[Layer], bool]) -> Result:
        """Run a call beside the one that is under way, below a depth and some layers alone.

        Args:
            depth: What is there, or above, is left out.
            call: Of the same network, at the same evaluation.
            counts: Whether a layer below is run.
        """
        assert self._evaluate is not None
        evaluate = self._evaluate
        layers = [layer for at, layer in self._layers if at > depth and counts(layer)]

        def run(place: int, one: Call) -> Result:
            if place == len(layers):
                return evaluate(one)
            return layers[place](one, lambda inner: run(place + 1, inner))

        return run(0, call)

    def _run(self, depth: int, call: Call, evaluate: Inner) -> Result:
        if depth == len(self._layers):
            return evaluate(call)
        layer = self._layers[depth][1]
        return layer(call, lambda inner: self._run(depth + 1, inner, evaluate))
