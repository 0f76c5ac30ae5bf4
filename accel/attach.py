"""Put a plan on a pipeline: what a method is, what it is given, and the run that comes of it."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

from pydantic import BaseModel, ConfigDict, field_serializer, field_validator

from accel import hooks
from accel.errors import AccelWarning, BrokenAttachment, Conflict, UnsupportedModel
from accel.guard import Guard
from accel.guard.gate import OPEN, Gate, Switch
from accel.report import INACTIVE, Report, Tally
from accel.trajectory import Editor, Reviser, Step, Trajectory

if TYPE_CHECKING:
    from accel.guard.controller import Controller
    from accel.seams.blocks import Block
    from accel.seams.branches import Layout, Reader
    from accel.seams.denoisers import Denoiser, Layer, Onion

FIRST = ("sampler", "memory")
"""Layers that are attached before all others: what follows the scheduler, or sits on the modules,
then follows the new scheduler and sits above what moves weights. Of them, what replaces the
scheduler (seam ``scheduler``) goes before what changes it."""

INSIDE = {"tokens": 0.2, "attention": 0.2}
"""Layers of what approximates inside a computed call, where a guard switches it as a whole, and
the share of an evaluation that it is taken to save: clocks would decide about bits."""

LAYERS = (
    "loop",
    "sampler",
    "guidance",
    "resolution",
    "region",
    "step cache",
    "branches",
    "block cache",
    "tokens",
    "attention",
    "memory",
    "parallel",
    "weights",
)
"""The onion around every call of a denoiser, outermost first."""

Undo = Callable[[], None]
T = TypeVar("T")

Fitting = Callable[[Iterable["Accelerator"], Mapping[str, Any]], "Accelerator"]
"""Measures a method's fields beside the other methods of a plan, the outermost first, by some
options; raises `AccelError` where there is no such method."""


class Accelerator(BaseModel, ABC):
    """One method: its fields, and how it attaches.

    Attributes:
        name: ``family.Method``, the same in Python, TOML, the CLI and a file's metadata.
        layer: Where it sits in the onion, one of ``LAYERS``.
        seam: What it changes in a pipeline; for the table of methods.
        supports: Which networks and guidance layouts it serves, in words.
        source: Paper and section.
        approximates: Whether it answers otherwise than the network would, beyond rounding. What
            does needs a gate (`Site.gate`) to go with a guard; what does not (a sampler, what
            moves weights, exact reuse) goes with it as it is.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    name: ClassVar[str]
    layer: ClassVar[str]
    seam: ClassVar[str]
    supports: ClassVar[str]
    source: ClassVar[str]
    approximates: ClassVar[bool] = True

    @field_validator("*")
    @classmethod
    def _is_a_number(cls, value: Any) -> Any:
        if isinstance(value, float) and math.isnan(value):
            raise ValueError("nan is no value: it equals nothing, not even the same plan")
        return value

    @field_serializer("*", when_used="json")
    def _infinity_is_text(self, value: Any) -> Any:
        return _infinities_as_text(value)

    @classmethod
    @abstractmethod
    def off(cls) -> Self | None:
        """The method with its fields at the value that does nothing; ``None``: leave it out."""

    @abstractmethod
    def why_off(self) -> str | None:
        """Why these fields do nothing (``"threshold is 0"``), or ``None`` if they do something."""

    def fixed(self, steps: int) -> frozenset[int] | None:  # noqa: ARG002
        """Steps of a run, from 0, at which it leaves nothing out, whatever the picture.

        Args:
            steps: Of the run.

        Returns:
            Them, or ``None``: this method does not state it.
        """
        return None

    @classmethod
    def fitter(cls, pipe: Any, calls: Sequence[Mapping[str, Any]]) -> Fitting | None:  # noqa: ARG003
        """What measures its fields, while plans are searched for (`accel.tuning`).

        Args:
            pipe: The stock pipeline.
            calls: Arguments of some of its calls, each with a generator in its first state.

        Returns:
            It, or ``None``: its fields are chosen, not measured.
        """
        return None

    @abstractmethod
    def attach(self, site: Site) -> Iterator[Undo]:
        """Change the pipeline; yield one undo after each change.

        Raises:
            Conflict: If another method of the plan holds the same seam.
            UnsupportedModel: If the pipeline is none that the method can serve.
        """


def _why_off(method: Accelerator, guard: Guard | None) -> str | None:
    """Why a method of a plan does nothing; under a guard of 0 nothing approximates."""
    refused = guard is not None and guard.max_error == 0 and method.approximates
    return method.why_off() or ("guard.max_error is 0: everything computes" if refused else None)


def _infinities_as_text(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_infinities_as_text(item) for item in value]
    return str(value) if isinstance(value, float) and math.isinf(value) else value


class Site:
    """What a method is given.

    Attributes:
        pipe: The pipeline.
        denoisers: Its networks.
        layout: How it lays out its guidance branches.
        trajectory: Where the run is.
        tally: Where the method says what it did.
    """

    def __init__(self, run: Run, method: Accelerator, tally: Tally) -> None:
        self.pipe = run.pipe
        self.denoisers = run.denoisers
        self.layout: Layout = run.reader.layout
        self.trajectory = run.trajectory
        self.tally = tally
        self._run = run
        self._method = method

    def claim(self, seam: str) -> Undo:
        """Hold a seam for this method alone.

        Raises:
            Conflict: If another method holds it.
        """
        claims = self._run.claims
        if seam in claims:
            raise Conflict(
                f"{self._method.name} and {claims[seam]} both need the seam '{seam}' for "
                "themselves: leave one of them out of the plan."
            )
        claims[seam] = self._method.name

        def undo() -> None:
            del claims[seam]

        return undo

    def shared(self, make: Callable[[], T]) -> T:
        """What the methods of this plan have in common: made for the first that asks for it."""
        if make not in self._run.shared:
            self._run.shared[make] = make()
        found: T = self._run.shared[make]
        return found

    def around(self, denoiser: Denoiser, layer: Layer, at: str | None = None) -> Undo:
        """Put ``layer(call, inner)`` around every call of a denoiser.

        Args:
            denoiser: The network.
            layer: The method's.
            at: One of ``LAYERS``, the depth; ``None``: the method's own.
        """
        depth = LAYERS.index(at or self._method.layer)
        controller = self._run.controller
        if controller is not None and self._method.approximates and self._method.layer in INSIDE:
            layer = self._switched(controller, depth, layer)
        return self._run.onions[denoiser.name].add(depth, layer)

    def _switched(self, controller: Controller, depth: int, layer: Layer) -> Layer:
        """A layer that works inside a computed call, behind a gate."""
        saving = INSIDE[self._method.layer]
        gate = controller.gate(self._method.name, depth, saving, grows=False, silent=True)
        return Switch(gate, layer, self.tally.aside)

    def gate(self, saving: float, *, grows: bool = True, whole: bool = False) -> Gate:
        """The gate that a method asks before it approximates; open without a guard.

        Args:
            saving: Share of an evaluation of all branches that an approximation saves.
            grows: Whether its error grows with the time since the network was computed.
            whole: Whether it acts on the guided output, not on the answer of a network.
        """
        controller, method = self._run.controller, self._method
        if controller is None or not method.approximates:
            return OPEN
        depth = LAYERS.index(method.layer)
        return controller.gate(method.name, depth, saving, grows=grows, whole=whole)

    def blocks(self, denoiser: Denoiser) -> tuple[Block, ...]:
        """The transformer blocks of a denoiser.

        Raises:
            UnsupportedModel: For a network without a plain list of blocks (every UNet).
        """
        from accel.seams.blocks import find_blocks

        return find_blocks(denoiser)

    def on_start(self, reset: Callable[[], None]) -> Undo:
        """Call ``reset`` whenever a run starts."""
        starts = self.trajectory.starts
        starts.append(reset)
        return lambda: starts.remove(reset)

    def on_step(self, observe: Callable[[Step, Any], None]) -> Undo:
        """Call ``observe(step, result)`` after every ``scheduler.step``."""
        observers = self.trajectory.observers
        observers.append(observe)
        return lambda: observers.remove(observe)

    def edit_step(self, editor: Editor) -> Undo:
        """Ask ``editor(update)`` before every ``scheduler.step`` for the output to give to it.

        To replace the x0 that the solver uses, return the output from which it reads that x0
        (`accel.seams.solvers`). Editors are asked in the order of layers, the deepest first.
        """
        return self.trajectory.edit(LAYERS.index(self._method.layer), editor)

    def edit_result(self, reviser: Reviser) -> Undo:
        """Ask ``reviser(step, sample)`` after every ``scheduler.step`` for the sample it gives.

        What the scheduler keeps is not changed by it. `on_step` observes the new sample.
        """
        revisers = self.trajectory.revisers
        revisers.append(reviser)
        return lambda: revisers.remove(reviser)

    @contextmanager
    def beside(self, seam: str) -> Iterator[None]:
        """While a method looks at a seam: what it refuses there is of the one that has claimed it.

        Raises:
            Conflict: For an `UnsupportedModel`, if another method of the plan holds the seam.
        """
        holder = self._run.claims.get(seam)
        try:
            yield
        except UnsupportedModel as error:
            if holder is None:
                raise
            pair = f"{self._method.name} and {holder}"
            raise Conflict(f"{pair} do not go together: {error}") from error

    def swap_scheduler(self, scheduler: Any) -> Undo:
        """Give the pipeline another scheduler; the undo puts the present one back."""
        pipe, before = self.pipe, self.pipe.scheduler
        pipe.scheduler = scheduler

        def undo() -> None:
            pipe.scheduler = before

        return undo


class Run:
    """An attached plan. Use it as a context manager, or call ``detach``.

    Attributes:
        pipe: The pipeline it is attached to.
        report: What the latest call of the pipeline did.
    """

    pipe: Any
    report: Report
    denoisers: tuple[Denoiser, ...]
    reader: Reader
    trajectory: Trajectory
    onions: dict[str, Onion]
    claims: dict[str, str]
    shared: dict[Callable[[], Any], Any]
    controller: Controller | None

    def __init__(
        self, methods: tuple[Accelerator, ...], pipe: Any, guard: Guard | None = None
    ) -> None:
        from accel.seams.branches import Reader, layout_of
        from accel.seams.denoisers import find_denoisers
        from accel.seams.pipelines import evaluations

        self.pipe = pipe
        self.denoisers = find_denoisers(pipe)
        self._refuse_second_plan()
        self.claims = {}
        self.shared = {}
        self.onions = {}
        self.report = Report(
            type(pipe).__name__,
            [Tally(method.name, _why_off(method, guard), site=method.seam) for method in methods],
        )
        self.trajectory = Trajectory(pipe, lambda scheduled: evaluations(pipe, scheduled))
        self.reader = Reader(pipe, layout_of(pipe), self.trajectory)
        self.controller = self.report.guard = self._controlled(methods, guard)
        with ExitStack() as stack:
            self._attach(methods, stack)
            self._stack = stack.pop_all()

    def _refuse_second_plan(self) -> None:
        for denoiser in self.denoisers:
            if hooks.in_place(denoiser.module, denoiser.entry):
                raise Conflict(
                    f"pipe.{denoiser.name} already carries an attached plan: detach it first, or "
                    "put the methods of both into one Plan."
                )

    def _controlled(
        self, methods: tuple[Accelerator, ...], guard: Guard | None
    ) -> Controller | None:
        """The controller of a guard that has a budget to keep."""
        if guard is None or not guard.watches:
            return None
        from accel.guard.controller import Controller
        from accel.guard.file import basis

        plan = {method.name: method.model_dump(mode="json") for method in methods}
        scale, note = basis(guard, self.pipe, plan)
        return Controller(guard, scale, note, self.onions)

    def _attach(self, methods: tuple[Accelerator, ...], stack: ExitStack) -> None:
        from accel.seams.correctors import spare

        active = [
            (method, tally)
            for method, tally in zip(methods, self.report.tallies, strict=True)
            if tally.off is None
        ]
        first = [pair for pair in active if pair[0].layer in FIRST]
        for method, tally in sorted(first, key=lambda pair: pair[0].seam != "scheduler"):
            self._attach_one(method, tally, stack)
        modules = [part for denoiser in self.denoisers for part in denoiser.core.modules()]
        for undo in hooks.guard(self.pipe, modules):
            stack.callback(undo)
        for undo in (*self.trajectory.attach(), *self.reader.attach(self.denoisers)):
            stack.callback(undo)
        self.trajectory.starts += [self._check_entries, self.reader.reset, self.report.start]
        self.trajectory.observers.append(self._on_step)
        self._attach_onions(stack)
        undos = [] if self.controller is None else [self.controller.attach(self.trajectory)]
        if active:
            undos.append(spare(self.trajectory, LAYERS.index("sampler")))
        for undo in chain(*undos):
            stack.callback(undo)
        for method, tally in active:
            if method.layer not in FIRST:
                self._attach_one(method, tally, stack)

    def _attach_onions(self, stack: ExitStack) -> None:
        from accel.seams.denoisers import Onion

        for denoiser in self.denoisers:
            onion = Onion(denoiser, self.reader, self.report.count)
            self.onions[denoiser.name] = onion
            stack.callback(hooks.wrap(denoiser.module, denoiser.entry, onion))

    def _attach_one(self, method: Accelerator, tally: Tally, stack: ExitStack) -> None:
        for undo in method.attach(Site(self, method, tally)):
            stack.callback(undo)
        if self.controller is not None and method.approximates:
            self._guard_one(self.controller, method, tally)

    def _guard_one(self, controller: Controller, method: Accelerator, tally: Tally) -> None:
        """See to it that a method that approximates asks, and says so where it was refused.

        Raises:
            Conflict: If it does not ask.
        """
        gates = controller.gates(method.name)
        if not gates:
            raise Conflict(
                f"{method.name} does not go with a guard: the error of what it does cannot be "
                "checked step by step. Leave the method out of the plan, or the guard."
            )
        idle = tally.reason
        tally.reason = lambda: controller.why_idle(method.name) or idle()

    def _check_entries(self) -> None:
        for denoiser in self.denoisers:
            if not hooks.in_place(denoiser.module, denoiser.entry):
                raise BrokenAttachment(
                    f"pipe.{denoiser.name} was compiled, or its forward replaced, while a plan is "
                    "attached. Detach, compile, attach again."
                )
            if hooks.traced(denoiser.core):
                raise BrokenAttachment(
                    f"A part of pipe.{denoiser.name} that the plan works on was compiled while it "
                    "is attached. Detach, compile, attach again."
                )

    def _on_step(self, _step: Step, _result: Any) -> None:
        self.report.samples = self.reader.batch
        self.report.tick()

    def detach(self) -> None:
        """Take the plan off. The pipeline is as it was; a second call does nothing."""
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.detach()
        if error is None and self.report.steps:
            self._warn()

    def _warn(self) -> None:
        for method, verdict in self.report.verdicts.items():
            if verdict.state == INACTIVE and not verdict.chosen:
                warnings.warn(f"{method} did nothing: {verdict.detail}", AccelWarning, stacklevel=3)
        for tally in self.report.tallies:
            for advice in tally.advice:
                warnings.warn(f"{tally.method}: {advice}", AccelWarning, stacklevel=3)
