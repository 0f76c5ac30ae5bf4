"""What one evaluation of a network is made of: operations, and what would have to be exchanged.

Counted on one real call, by hooks that are gone after it. Tensors without values (torch's device
``meta``) are counted as well: a network that no machine here could hold.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from accel import hooks
from accel.errors import UnsupportedModel
from accel.report import Tally
from accel.seams.attention import Asked, Interception
from accel.seams.blocks import find_blocks, wrap_call
from accel.seams.denoisers import Call, Denoiser, Inner, Result, Row
from accel.seams.modules import find_modules
from accel.seams.places import plan_of
from accel.trajectory import Levels, Step
from parallel.components import tensors, unet_blocks
from parallel.counting import counter
from parallel.patches import unit_of


@dataclass(frozen=True)
class Attention:
    """A self-attention.

    Attributes:
        heads: Of the queries.
        length: Tokens of the keys.
        bytes: Of keys and values.
        operations: Of the attention itself, without what is projected.
    """

    heads: int
    length: int
    bytes: float
    operations: float


@dataclass(frozen=True)
class Unit:
    """A block, in all calls of a step together.

    Attributes:
        operations: It makes.
        launches: Operators that it runs.
        answer: Bytes that it answers.
        weights: Bytes of its parameters.
    """

    operations: float
    launches: float = 0.0
    answer: float = 0.0
    weights: float = 0.0

    def beside(self, other: Unit) -> Unit:
        """The same block in two calls."""
        return replace(
            self,
            operations=self.operations + other.operations,
            launches=self.launches + other.launches,
            answer=self.answer + other.answer,
        )


@dataclass
class Work:
    """One evaluation of a network for all branches of a call, or one of a decoder.

    Attributes:
        operations: Multiply-adds count twice.
        launches: Operators that are run, each of which takes a while however little it computes.
        branches: Guidance branches that a step evaluates, in one call or in several.
        calls: Calls of the network in a step.
        output: Bytes of the answer.
        rows: Rows that could be shared out; 0: it has none.
        unit: Bands of them begin at multiples of so many.
        borders: Bytes of one border row of every convolution, times the rows that it pads.
        moments: Bytes of the statistics of every normalisation.
        attentions: Every self-attention.
        sequence: Whether it is known where its tokens could be shared out.
        units: Its blocks.
        whole: Whether every block's answer is asked for later on (a UNet's), or the last one's.
        weights: Bytes of the parameters of the networks of the pipeline.
        beside: Bytes of those of its other parts.
        activations: Bytes that a call makes and holds at the most.
    """

    operations: float = 0.0
    launches: float = 0.0
    branches: int = 1
    calls: int = 1
    output: float = 0.0
    rows: int = 0
    unit: int = 1
    borders: list[float] = field(default_factory=list)
    moments: list[float] = field(default_factory=list)
    attentions: list[Attention] = field(default_factory=list)
    sequence: bool = False
    units: list[Unit] = field(default_factory=list)
    whole: bool = False
    weights: float = 0.0
    beside: float = 0.0
    activations: float = 0.0

    @property
    def tokens(self) -> float:
        """Bytes of the keys and values of all self-attentions."""
        return sum(one.bytes for one in self.attentions)

    @property
    def attention(self) -> float:
        """Operations of all self-attentions."""
        return sum(one.operations for one in self.attentions)

    def branch(self) -> Work:
        """The work of one of two branches: one of two calls, or half of the rows of one."""
        apart = self.calls > 1
        size = 1.0 if apart else 0.5

        def half(values: list[float]) -> list[float]:
            return [size * one for one in values[: len(values) // 2 if apart else None]]

        attentions = self.attentions[: len(self.attentions) // 2 if apart else None]
        return replace(
            self,
            operations=self.operations / 2,
            launches=self.launches / (2 if apart else 1),
            branches=1,
            calls=max(1, self.calls // 2),
            output=self.output / 2,
            borders=half(self.borders),
            moments=half(self.moments),
            attentions=[
                replace(one, bytes=size * one.bytes, operations=size * one.operations)
                for one in attentions
            ],
            units=[
                replace(
                    one,
                    operations=one.operations / 2,
                    launches=one.launches / (2 if apart else 1),
                    answer=one.answer / 2,
                )
                for one in self.units
            ],
            activations=size * self.activations,
        )


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operators, and the memory of what they make.

    Attributes:
        launches: Operators that are more than another look at a tensor.
        most: Bytes of what they made that were held at once, at the most.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.launches = self.most = 0
        self._held = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run it, and look at what came of it."""
        made = func(*args, **(kwargs or {}))
        if func.is_view:
            return made
        self.launches += 1
        if not func._schema.is_mutable:
            for one in tensors(made):
                storage = one.untyped_storage()
                self._held += storage.nbytes()
                weakref.finalize(storage, self._gone, storage.nbytes())
            self.most = max(self.most, self._held)
        return made

    def _gone(self, size: int) -> None:
        self._held -= size


class Layers:
    """Counts what the layers of a network would exchange, were its rows or tokens shared out.

    Attributes:
        work: Of what was called last.
    """

    def __init__(self) -> None:
        self.work = Work()
        self._counter: FlopCounterMode | None = None
        self._watch = Watch()

    @contextmanager
    def counted(self) -> Iterator[None]:
        """What is called inside is added to the work."""
        work, self._watch = self.work, Watch()
        with counter() as self._counter, self._watch:
            yield
        work.operations += self._operations()
        work.launches += self._watch.launches
        work.activations = max(work.activations, self._watch.most)

    def layers(self, core: nn.Module) -> Iterator[Callable[[], None]]:
        """Hook convolutions and normalisations."""
        for module in core.modules():
            if isinstance(module, nn.Conv2d) and module.kernel_size[0] > 1:
                yield wrap_call(module, partial(self._convolution, module))
            elif isinstance(module, nn.GroupNorm):
                yield wrap_call(module, partial(self._norm, module))

    def attention(self, module: Any) -> Callable[[], None]:
        """Hook a self-attention."""

        def around(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            with Interception(self._seen):
                return inner(*args, **kwargs)

        return wrap_call(module, around)

    def unit(self, index: int, module: Any) -> Callable[[], None]:
        """Hook a block."""
        return wrap_call(module, partial(self._unit, index, size(module)))

    def _operations(self) -> float:
        assert self._counter is not None
        return float(self._counter.get_total_flops())

    def _convolution(self, module: nn.Conv2d, inner: Any, x: Tensor, *more: Any) -> Any:
        padding = module.padding if isinstance(module.padding, tuple) else (0, 0)
        self.work.borders.append(padding[0] * x.nbytes / x.shape[2])
        return inner(x, *more)

    def _norm(self, module: nn.GroupNorm, inner: Any, x: Tensor) -> Any:
        self.work.moments.append(2.0 * len(x) * module.num_groups * 8)
        return inner(x)

    def _seen(self, asked: Asked) -> Tensor:
        *rest, width = asked.query.shape
        pairs = float(torch.Size(rest).numel() * asked.key.shape[-2])
        self.work.attentions.append(
            Attention(
                asked.query.shape[1],
                asked.key.shape[-2],
                float(asked.key.nbytes + asked.value.nbytes),
                2.0 * pairs * (width + asked.value.shape[-1]),
            )
        )
        return _unseen(asked) if asked.query.is_meta else asked.dense()

    def _unit(self, index: int, weights: float, inner: Any, *args: Any, **kwargs: Any) -> Any:
        operations, launches = self._operations(), self._watch.launches
        answer = inner(*args, **kwargs)
        sizes = sum(one.nbytes for one in tensors(answer))
        found = Unit(
            self._operations() - operations,
            self._watch.launches - launches,
            float(sizes),
            weights,
        )
        units = self.work.units
        if index == len(units):
            units.append(found)
        else:
            units[index] = units[index].beside(found)
        return answer


class Counting(Layers):
    """Counts the work of one network during a run of its pipeline.

    Args:
        denoiser: The network.

    Attributes:
        work: Of the latest evaluation; all branches together.
    """

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self._denoiser = denoiser
        self._step = -1
        self._fixed = Work(
            branches=0,
            calls=0,
            unit=_or(lambda: unit_of(denoiser), 0),
            sequence=_or(lambda: bool(plan_of(denoiser)), False),
            whole=hasattr(denoiser.core, "down_blocks"),
            weights=size(denoiser.core),
        )

    def attach(self) -> Iterator[Callable[[], None]]:
        """Hook the network's inside; yields the undos."""
        yield from self.layers(self._denoiser.core)
        for part in _or(lambda: find_modules(self._denoiser), ()):
            if part.kind == "self":
                yield self.attention(part.module)
        for index, unit in enumerate(_units(self._denoiser)):
            yield self.unit(index, unit)

    def __call__(self, call: Call, inner: Inner) -> Result:
        """Count one call; the calls of one step are one evaluation."""
        if call.step.index != self._step:
            self._step = call.step.index
            self.work = _anew(self._fixed)
        with self.counted():
            result = inner(call)
        work = self.work
        work.branches += len({row.branch for row in call.rows})
        work.calls += 1
        work.output += result.value.nbytes
        work.rows = call.sample.shape[-2] if work.unit and call.sample.ndim == 4 else 0
        return result


class Decoding(Layers):
    """Counts the work of an autoencoder's decoder during a run of its pipeline.

    Args:
        vae: The autoencoder.
    """

    def __init__(self, vae: Any) -> None:
        from parallel.decoder import Decoder

        super().__init__()
        self._vae = vae
        self._shared = _or(lambda: bool(Decoder(vae, Tally("parallel.VAE"))), False)

    def attach(self) -> Iterator[Callable[[], None]]:
        """Hook it; yields the undos."""
        if self._shared:
            yield from self.layers(self._vae.decoder)
            for module in self._vae.decoder.modules():
                if hasattr(module, "to_q"):
                    yield self.attention(module)
        yield hooks.wrap(self._vae, "decode", self._decode)

    def _decode(self, inner: Callable[..., Any], z: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.work = Work(rows=z.shape[-2] if self._shared else 0)
        with self.counted():
            answer = inner(z, *args, **kwargs)
        self.work.output = float(answer[0].nbytes)
        return answer


def _unseen(asked: Asked) -> Tensor:
    """Attention without values, by a kernel that holds no scores: by itself torch takes another."""
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    found: Tensor = flash(asked.query, asked.key, asked.value)[0]
    return found


def _anew(work: Work) -> Work:
    return replace(work, borders=[], moments=[], attentions=[], units=[])


def _or(make: Callable[[], Any], otherwise: Any) -> Any:
    """What a network does not fit, it has none of."""
    try:
        return make()
    except UnsupportedModel:
        return otherwise


def _units(denoiser: Denoiser) -> list[Any]:
    core = denoiser.core
    if hasattr(core, "down_blocks"):
        return unet_blocks(core)
    return [block.module for block in _or(lambda: find_blocks(denoiser), ())]


def size(module: Any) -> float:
    """Bytes of the parameters of a module."""
    return float(sum(one.nbytes for one in module.parameters()))


def work_of(pipe: Any, call: dict[str, Any]) -> tuple[dict[str, Work], Work]:
    """The work of a step, by network, and that of decoding.

    Two steps of the pipeline are run, and the second counts.

    Args:
        pipe: A pipeline without an attached plan.
        call: Arguments of its call; the number of steps is left out of them.
    """
    from accel.attach import LAYERS
    from accel.plan import Plan

    vae = getattr(pipe, "vae", None)
    with ExitStack() as stack:
        run = stack.enter_context(Plan().attach(pipe))
        counting = {one.name: Counting(one) for one in run.denoisers}
        decoding = Decoding(vae) if hasattr(vae, "decode") else None
        for name, one in counting.items():
            _enter(stack, one.attach())
            stack.callback(run.onions[name].add(LAYERS.index("parallel"), one))
        if decoding is not None:
            _enter(stack, decoding.attach())
        noise = torch.Generator().manual_seed(0)
        pipe(**{**call, "num_inference_steps": 2, "output_type": "pt"}, generator=noise)
    weights = sum(size(one.core) for one in run.denoisers)
    parts = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    beside = sum(map(size, parts)) - weights
    found = {
        name: replace(one.work, weights=weights, beside=beside)
        for name, one in counting.items()
        if one.work.operations
    }
    return found, Work() if decoding is None else decoding.work


def work_of_call(network: Any, rows: Sequence[Row], arguments: Mapping[str, Any]) -> Work:
    """The work of one call of a network by itself; it may be without values (``meta``).

    Args:
        network: A UNet or transformer of diffusers.
        rows: What each row of the call is.
        arguments: By the names of its parameters.
    """
    denoiser = Denoiser("network", network)
    counting = Counting(denoiser)

    def evaluate(call: Call) -> Result:
        with denoiser.computing(call.rows):
            answer = network(**call.arguments, return_dict=False)[0]
        return Result(answer, (True,) * len(call.rows))

    with ExitStack() as stack, torch.no_grad():
        _enter(stack, counting.attach())
        counting(
            Call(denoiser, Step(0, 1, 0, Levels(None)), tuple(rows), dict(arguments)), evaluate
        )
    return counting.work


def _enter(stack: ExitStack, undos: Iterator[Callable[[], None]]) -> None:
    for undo in undos:
        stack.callback(undo)
