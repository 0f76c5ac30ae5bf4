"""The cache between network and solver: site of SADA and ZEUS.

On a skipped step the network answers what it answered last, so that the pipeline's own loop goes
on as always, and an editor at ``scheduler.step`` gives the solver what the method predicts. A
multistep solver therefore keeps the predictions in its history, as it would keep outputs.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from accel.cache.conditions import Conditions, Watch
from accel.cache.predictors import History, Keep
from accel.errors import UnsupportedModel
from accel.guard.gate import OPEN, Gate
from accel.seams.denoisers import Call, Inner, Result, Row, stack_rows
from accel.seams.rows import scatter
from accel.seams.solvers import Solver

if TYPE_CHECKING:
    from typing import Any

    from torch import Tensor

    from accel.attach import Site, Undo
    from accel.report import Tally
    from accel.trajectory import Step, Update


@dataclass(frozen=True)
class Point:
    """One sample in front of ``scheduler.step``.

    Attributes:
        step: The evaluation.
        output: The network's output after guidance, as the scheduler takes it.
        place: x̄ of `accel.seams.solvers`.
    """

    step: Step
    output: Tensor
    place: Tensor


class Track(Protocol):
    """Decides about one sample of a run, and predicts for it."""

    @property
    def bytes(self) -> int:
        """Memory that it keeps."""
        ...

    def skips(self, step: Step) -> bool:
        """Whether the network may be left out at a step."""
        ...

    def learn(self, point: Point) -> None:
        """The step was computed."""
        ...

    def fill(self, point: Point) -> Tensor:
        """The output for a step that was not, of any float dtype."""
        ...

    def judge(self, step: Step, after: Tensor) -> Tensor | None:
        """How unstable the sample is, now that the solver has gone on to x̄ ``after``.

        A scalar tensor, or ``None`` where nothing is to be measured.
        """
        ...

    def decide(self, value: float) -> None:
        """What `judge` measured, read from the device."""
        ...

    def forget(self) -> None:
        """What is known is of no use any more: guidance or the network is another now."""
        ...


@dataclass
class Sample:
    """One sample of a run.

    Attributes:
        track: Decides and predicts.
        step: The step of the latest decision.
        skip: The latest decision.
        asked: Branches that the pipeline asked for at this step, with their network and the
            conditions that it was called under.
        computed: Whether one of them was computed at this step.
        before: ``asked`` of the latest step that was learned.
        newest: That step.
        refused: Whether the guard refused the latest skip.
    """

    track: Track
    step: int = -1
    skip: bool = False
    asked: set[tuple[str, str, Conditions]] = field(default_factory=set)
    computed: bool = False
    before: frozenset[tuple[str, str, Conditions]] = frozenset()
    newest: int | None = None
    refused: bool = False


class SolverCache:
    """Leaves the network out where its tracks say so, one track a sample.

    Args:
        tally: Where it says what it did.
        solver: The pipeline's scheduler.
        track: Makes the track of a sample.
        keep: How the network's answers are kept.
    """

    def __init__(
        self, tally: Tally, solver: Solver, track: Callable[[], Track], keep: Keep = "native"
    ) -> None:
        self._tally = tally
        self._solver = solver
        self._track = track
        self._keep = keep
        self._conditions = Watch()
        self._samples: dict[int, Sample] = {}
        self._kept: dict[tuple[str, Row], History] = {}
        self._gate: Gate = OPEN

    def attach(self, site: Site) -> Iterator[Undo]:
        """Put it around every denoiser and in front of ``scheduler.step``."""
        site.tally.memory = self._memory
        self._gate = site.gate(1.0, whole=True)
        yield site.on_start(self.reset)
        yield from self._conditions.attach(site)
        for denoiser in site.denoisers:
            yield site.around(denoiser, self.answer)
        yield site.edit_step(self.edit)
        yield site.on_step(self.judge)

    def reset(self) -> None:
        """Forget the run before."""
        self._samples.clear()
        self._kept.clear()

    def _memory(self) -> int:
        return sum(kept.bytes for kept in self._kept.values()) + sum(
            sample.track.bytes for sample in self._samples.values()
        )

    # At the network.

    def answer(self, call: Call, inner: Inner) -> Result:
        """Answer the rows of skipped samples from what is kept, compute the others."""
        self._decide(call)
        computed = call.where(lambda row: not self._answers(call, row))
        for index, row in enumerate(call.rows):
            sample = self._samples[row.sample]
            sample.asked.add(self._asked(call, row))
            sample.computed |= index in computed
        skipped = [index for index in range(len(call.rows)) if index not in computed]
        if not skipped:
            result = inner(call)
            self._learn(call, result)
            return result
        self._tally.record(call.step.index, (call.rows[i] for i in skipped), "predicted")
        kept = [self._kept[call.denoiser.name, call.rows[index]] for index in skipped]
        answer = stack_rows([history.value(0) for history in kept])
        fresh = tuple(index in computed for index in range(len(call.rows)))
        if not computed:
            return Result(answer, fresh)
        part = call.take(computed)
        result = inner(part)
        self._learn(part, result)
        value = scatter([(computed, result.value), (skipped, answer)], len(call.rows))
        return Result(value, fresh)

    def _decide(self, call: Call) -> None:
        """One decision a sample and step, at its first call: skip if all its rows are kept."""
        index, decided = call.step.index, dict[int, None]()
        for row in call.rows:
            sample = self._samples.setdefault(row.sample, Sample(self._track()))
            if sample.step != index:
                sample.step, sample.asked, sample.computed = index, set(), False
                sample.skip, sample.refused = sample.track.skips(call.step), False
                decided[row.sample] = None
            sample.skip = sample.skip and (
                sample.computed or bool(sample.asked) or self._current(call, row)
            )

        for number in decided:
            sample = self._samples[number]
            if sample.skip and not self._gate.allows(call, number, sample.newest):
                sample.skip, sample.refused = False, True

    def _answers(self, call: Call, row: Row) -> bool:
        return self._samples[row.sample].skip and self._current(call, row)

    def _current(self, call: Call, row: Row) -> bool:
        """Whether the row's answer to the latest step that the sample computed is kept."""
        kept = (call.denoiser.name, row) in self._kept
        return kept and self._asked(call, row) in self._samples[row.sample].before

    def _asked(self, call: Call, row: Row) -> tuple[str, str, Conditions]:
        return call.denoiser.name, row.branch, self._conditions.of(call)

    def _learn(self, call: Call, result: Result) -> None:
        for index, row in enumerate(call.rows):
            key = (call.denoiser.name, row)
            kept = self._kept.setdefault(key, History(1, self._keep))
            kept.add(float(call.step.index), result.value[index])
        self._tally.record(call.step.index, call.rows, "computed")

    # At the solver.

    def edit(self, update: Update) -> Tensor:
        """Give the solver what is predicted for the samples that were skipped."""
        self._solver.check(update.options)
        output: Tensor = update.output
        edited = output
        for number, sample in self._samples.items():
            rows = self._rows(number)
            point = self._point(update, rows)
            asked = frozenset(sample.asked)
            if asked != sample.before:
                sample.track.forget()
            if not sample.skip:
                self._check(number, sample, point, asked)
                sample.before, sample.newest = asked, update.step.index
                sample.track.learn(point)
            elif asked == sample.before and not sample.computed:
                edited = output.clone() if edited is output else edited
                edited[rows] = sample.track.fill(point).to(output.dtype)
        return edited

    def _check(
        self,
        number: int,
        sample: Sample,
        point: Point,
        asked: frozenset[tuple[str, str, Conditions]],
    ) -> None:
        """Tell the guard what the solver would have been given where it refused."""
        if sample.refused and asked == sample.before and self._gate.listens(number):
            guess = copy.copy(sample.track).fill(point)  # what it counts is that of the copy
            told = guess[0], point.output[0], sample.newest
            self._gate.compare_output(point.step, number, *told)

    def judge(self, step: Step, result: Any) -> None:
        """Let the tracks decide about the step to come; reads the device at most once."""
        if step.total is not None and step.index == step.total - 1:
            return
        after: Tensor = result[0]
        found = {}
        for number, sample in self._samples.items():
            place = self._solver.place(after[self._rows(number)], step, ahead=1)
            value = sample.track.judge(step, place)
            if value is not None:
                found[number] = value
        if not found:
            return
        numbers = stack_rows(list(found.values())).tolist()
        for number, value in zip(found, numbers, strict=True):
            self._samples[number].track.decide(value)

    def _rows(self, number: int) -> slice:
        """Rows of a sample's latents: DiT's pipeline steps its two branches side by side."""
        return slice(number, None, len(self._samples))

    def _point(self, update: Update, rows: slice) -> Point:
        place = self._solver.place(update.sample[rows], update.step)
        return Point(update.step, update.output[rows], place)


def first(share: float, step: Step) -> int:
    """The index of the first step in the part of a run that begins at a share of it.

    Raises:
        UnsupportedModel: If the pipeline cuts its schedule unseen.
    """
    if step.total is None:
        raise UnsupportedModel(
            "This pipeline cuts its schedule where no public call shows it, so a share of its "
            "steps is not known: it does not fit. Use a scheduler that has set_begin_index."
        )
    return math.ceil(share * step.total - 1e-9)


class CleanNodes:
    """The clean samples of each ``every``-th step, and the polynomial in λ through them.

    Nodes are the steps 1, 1 + ``every``, 1 + 2·``every``, …, where computed; λ is `Step.time`.

    Args:
        every: Steps from node to node.
        count: Nodes to keep.
        keep: How they are kept.
    """

    def __init__(self, every: int, count: int, keep: Keep = "native") -> None:
        self._every = every
        self._count = count
        self._keep = keep
        self._history = History(count, keep)

    @property
    def bytes(self) -> int:
        """Memory that the nodes take."""
        return self._history.bytes

    @property
    def ready(self) -> bool:
        """Whether there are two nodes, or all that were asked for."""
        return len(self._history) >= min(2, self._count)

    def node(self, step: Step) -> bool:
        """Whether a step is one of the nodes."""
        return step.index % self._every == 1 % self._every

    def learn(self, step: Step, clean: Tensor) -> None:
        """A step was computed."""
        if self.node(step):
            self._history.add(step.time, clean)

    def at(self, step: Step) -> Tensor:
        """The polynomial at a step."""
        from accel.cache.predictors import newton

        weights = newton()(self._history.positions, step.time)
        total = self._history.value(0) * weights[0]
        for index, weight in enumerate(weights[1:], 1):
            total.add_(self._history.value(index), alpha=weight)
        return total

    def clear(self) -> None:
        """Drop the nodes."""
        self._history = History(self._count, self._keep)
