"""The cache around ranges of blocks: site of First-Block-Cache, DBCache, TeaCache and their kin.

Blocks in front of the range always run and may be the probe; blocks behind it always run too. On
a skipped step the blocks of the range hand their streams through, and the first of them adds what
the whole range added when it was computed: the sum over the blocks of (out − in), each measured
at the block itself, for each stream. Whatever a pipeline injects *between* blocks (ControlNet,
VACE) therefore acts once and for real on every step; "last output minus first input" would
swallow it and add it a second time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from accel.cache.decisions import Decisions, Slot
from accel.cache.predictors import Forecast, Predictor
from accel.errors import UnsupportedModel
from accel.seams.blocks import crosses_long_skips
from accel.seams.denoisers import Call, Inner, Result, stack_rows
from accel.seams.rows import index_rows, scatter

if TYPE_CHECKING:
    from torch import Tensor

    from accel.attach import Site, Undo
    from accel.report import Tally
    from accel.seams.blocks import Block, Streams
    from accel.trajectory import Step


SAVING = 0.7
"""Share of an evaluation that a range of blocks is taken for, where a guard weighs methods: clocks
would decide about bits."""

Stream = tuple[str, int]
"""A stream by name and number of tokens: some networks join text and picture half-way."""


class Sum:
    """Σ (out − in) over blocks, for each stream.

    While nothing is injected, a block's input *is* the output of the block before, and the sum
    telescopes: one subtraction at the end. A stream that was changed in place shows by its
    version; tensors of ``torch.inference_mode`` have none, so there each block is subtracted.
    """

    def __init__(self) -> None:
        self._first: dict[Stream, Tensor] = {}
        self._latest: dict[Stream, tuple[Tensor, int]] = {}
        self._closed: dict[Stream, Tensor] = {}

    def enter(self, streams: Streams) -> None:
        """A block is about to run."""
        for name, value in streams.items():
            stream = (name, value.shape[1])
            latest = self._latest.get(stream)
            if latest is None or latest[0] is not value or latest[1] != _version(value):
                self._close(stream)
                self._first[stream] = value.clone()

    def leave(self, streams: Streams) -> None:
        """The block has run."""
        for name, value in streams.items():
            stream = (name, value.shape[1])
            self._latest[stream] = (value, _version(value))
            if value.is_inference():
                self._close(stream)

    def _close(self, stream: Stream) -> None:
        if stream in self._latest:
            part = self._latest.pop(stream)[0] - self._first.pop(stream)
            closed = self._closed.get(stream)
            self._closed[stream] = part if closed is None else closed + part

    def total(self) -> dict[Stream, Tensor]:
        """The sums."""
        for stream in list(self._first):
            self._close(stream)
        return self._closed


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


class Indicator(Protocol):
    """Measures one sample from a signal of its leading row."""

    def measure(self, signal: Tensor) -> Tensor | None:
        """The change at this step: a scalar tensor, or ``None`` where nothing is known yet."""
        ...

    def learn(self, signal: Tensor) -> None:
        """The step is computed."""
        ...


Entry = Callable[["Block", dict[str, Any]], "Tensor"]
"""From the block in front of which is decided and its arguments to a signal ``[rows, …]``."""


def picture_in(block: Block, arguments: dict[str, Any]) -> Tensor:
    """The entry of indicators that look at the range alone: the picture as it comes in."""
    return block.inputs(arguments)["hidden"]


Told = Callable[[Any, int, "list[Tensor]"], None]
"""Given the indicator of a leading row, the step, and what the first range added to its picture:
``[tokens, width]`` for each length that the picture's stream has on its way."""


@dataclass(frozen=True)
class Spans:
    """Which blocks may be skipped, of ``count``.

    Attributes:
        ranges: The ranges, each kept up to date at every compute.
        front: The block before which is decided. With 0 nothing has run yet; else the gain of
            the blocks in front of it is the signal.
        choose: Which range is skipped at a step.
    """

    ranges: tuple[range, ...]
    front: int = 0
    choose: Callable[[Step], int] = lambda step: 0  # noqa: ARG005


@dataclass
class Pass:
    """One call of the network on its way through the blocks.

    Attributes:
        probe: What the blocks in front add.
        decided: Whether it is known which rows run.
        computed: Rows that run the range for real.
        skipped: Rows that do not.
        span: The blocks that the skipped rows leave out.
        pending: What is still to be added to the skipped rows, by stream.
        totals: What the computed rows gain over each range.
    """

    call: Call
    totals: list[Sum]
    probe: Sum = field(default_factory=Sum)
    decided: bool = False
    computed: list[int] = field(default_factory=list)
    skipped: list[int] = field(default_factory=list)
    span: range = range(0)
    pending: dict[Stream, Tensor] = field(default_factory=dict)


class BlockRangeCache:
    """Skips ranges of blocks; one for all denoisers of a pipeline.

    State is one predictor for each denoiser, sample, branch, stage of the solver, range and
    stream. Reads the device once a step if its indicator measures anything.

    Args:
        tally: Where it says what it did.
        decisions: Decide for each sample.
        spans: From the number of blocks of a denoiser to what may be skipped.
        forecast: How it fills in.
        entry: The signal where nothing has run before the decision; ``None`` for rules that
            measure nothing.
        told: Hears what was added at each compute, for indicators of what the range gives.
    """

    def __init__(
        self,
        tally: Tally,
        decisions: Decisions[Any],
        spans: Callable[[int], Spans],
        forecast: Forecast,
        entry: Entry | None = None,
        told: Told | None = None,
    ) -> None:
        self.decisions = decisions
        self._tally = tally
        self._make_spans = spans
        self._spans: dict[str, Spans] = {}
        self._forecast = forecast
        self._entry = entry
        self._told = told
        self._kept: dict[Slot, dict[tuple[int, Stream], Predictor]] = {}
        self._pass: Pass | None = None

    def attach(self, site: Site) -> Iterator[Undo]:
        """Put the cache into every denoiser of a pipeline."""
        site.tally.memory = self._memory
        self.decisions.gate = site.gate(SAVING)
        yield site.on_start(self.reset)
        yield from self.decisions.conditions.attach(site)
        for denoiser in site.denoisers:
            blocks = site.blocks(denoiser)
            spans = self._spans[denoiser.name] = self._make_spans(len(blocks))
            if not any(spans.ranges):
                site.tally.reason = partial(_nothing_left, len(blocks))
                continue
            _check_skips(blocks, spans)
            yield site.around(denoiser, self)
            last = max(index for span in spans.ranges for index in span)
            for block in blocks[: last + 1]:
                yield block.wrap(partial(self._block, block))

    def _memory(self) -> int:
        kept = sum(one.bytes for kept in self._kept.values() for one in kept.values())
        return kept + self.decisions.bytes

    def reset(self) -> None:
        """Forget the run before."""
        self.decisions.reset()
        self._kept.clear()
        self._pass = None

    def __call__(self, call: Call, inner: Inner) -> Result:
        """Follow one call of the network through its blocks."""
        spans = self._spans[call.denoiser.name]
        self._pass = Pass(call, [Sum() for _ in spans.ranges])
        try:
            result = inner(call)
            passed = self._pass
            self._check(passed, result)
            self._learn(passed)
        finally:
            self._pass = None
        fresh = tuple(
            whole and index not in passed.skipped for index, whole in enumerate(result.fresh)
        )
        return Result(result.value, fresh, result.native)

    def _block(self, block: Block, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        passed = self._pass
        if passed is None:
            return inner(*args, **kwargs)
        spans = self._spans[passed.call.denoiser.name]
        arguments = block.bind(args, kwargs)
        if not passed.decided and block.index >= spans.front:  # skip-layer guidance leaves some out
            self._decide(passed, spans, block, arguments)
        if not passed.decided:
            return self._in_front(passed, block, arguments, partial(inner, *args, **kwargs))
        if passed.skipped and block.index in passed.span:
            return self._bypassed(passed, spans, block, inner, args, kwargs)
        sums = self._sums(passed, spans, block)
        if not sums or not passed.computed:
            return inner(*args, **kwargs)
        _enter(sums, _rows_of(block.inputs(arguments), passed))
        returned = inner(*args, **kwargs)
        _leave(sums, _rows_of(block.outputs(returned), passed))
        return returned

    def _in_front(
        self, passed: Pass, block: Block, arguments: dict[str, Any], run: Callable[[], Any]
    ) -> Any:
        """A block of the probe."""
        passed.probe.enter({"hidden": block.inputs(arguments)["hidden"]})
        returned = run()
        passed.probe.leave({"hidden": block.outputs(returned)["hidden"]})
        return returned

    def _sums(self, passed: Pass, spans: Spans, block: Block) -> list[Sum]:
        pairs = zip(spans.ranges, passed.totals, strict=True)
        return [total for span, total in pairs if block.index in span]

    def _decide(self, passed: Pass, spans: Spans, block: Block, arguments: dict[str, Any]) -> None:
        call = passed.call
        _check_rows(block, arguments, call)
        leaders = self.decisions.leaders(call)
        signal = self._signal(passed, spans, block, arguments) if leaders else None
        if signal is None:
            self.decisions.decide(call, dict.fromkeys(leaders))
        else:
            self._measure(call, leaders, signal)
        for index, row in enumerate(call.rows):
            state = self.decisions.sample(call, row.sample)
            rows = passed.computed if state.must_compute(row.branch) else passed.skipped
            rows.append(index)
        passed.decided = True
        if passed.skipped:
            chosen = spans.choose(call.step)
            passed.span = spans.ranges[chosen]
            passed.pending = self._predict(passed, chosen)

    def _signal(
        self, passed: Pass, spans: Spans, block: Block, arguments: dict[str, Any]
    ) -> Tensor | None:
        if spans.front:
            return next(iter(passed.probe.total().values()), None)
        return None if self._entry is None else self._entry(block, arguments)

    def _measure(self, call: Call, leaders: dict[int, int], signal: Tensor) -> None:
        states = {sample: self.decisions.sample(call, sample) for sample in leaders}
        values = {
            sample: states[sample].indicator.measure(signal[row]) for sample, row in leaders.items()
        }
        self.decisions.decide(call, values)
        for sample, row in leaders.items():
            if states[sample].compute:
                states[sample].indicator.learn(signal[row])

    def _bypassed(
        self,
        passed: Pass,
        spans: Spans,
        block: Block,
        inner: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """The skipped rows go through, the others run the block."""
        through = self._through(passed, block.inputs(block.bind(args, kwargs)))
        if not passed.computed:
            return block.returns(through)
        count = len(passed.call.rows)
        part, named = block.take(args, kwargs, passed.computed, count)
        sums = self._sums(passed, spans, block)
        _enter(sums, block.inputs(block.bind(part, named)))
        rows = tuple(passed.call.rows[index] for index in passed.computed)
        with passed.call.denoiser.computing(rows):
            after = block.outputs(inner(*part, **named))
        _leave(sums, after)
        joined = {
            name: scatter([(passed.computed, value), (passed.skipped, through[name])], count)
            for name, value in after.items()
        }
        return block.returns(joined)

    def _through(self, passed: Pass, streams: Streams) -> Streams:
        """The skipped rows of the streams, with what the range adds, the first time."""
        rows = passed.skipped
        through = {name: index_rows(value, rows) for name, value in streams.items()}
        for name, value in through.items():
            gain = passed.pending.pop((name, value.shape[1]), None)
            if gain is not None:
                through[name] = value + gain
        return through

    def _check(self, passed: Pass, result: Result) -> None:
        """Tell the guard what the rows would have come to that it wanted computed."""
        call, gate = passed.call, self.decisions.gate
        for index in passed.computed:
            row = call.rows[index]
            newest = self.decisions.sample(call, row.sample).learned.get(row.branch)
            if newest is None or Slot.of(call, row) not in self._kept:
                continue
            if gate.wants(call, row.sample):
                guess = self._guess(call.take([index]))
                gate.compare(call, [index], guess.value, result.value[[index]], newest)

    def _guess(self, call: Call) -> Result:
        """What one row comes to without the blocks of its range; nothing is learned of it."""
        spans, before = self._spans[call.denoiser.name], self._pass
        chosen = spans.choose(call.step)
        sums = [Sum() for _ in spans.ranges]
        guess = Pass(call, sums, decided=True, skipped=[0], span=spans.ranges[chosen])
        guess.pending = self._filled(guess, chosen)
        self._pass = guess
        try:
            return self.decisions.gate.dense(call)
        finally:
            self._pass = before

    def _learn(self, passed: Pass) -> None:
        call = passed.call
        for row in (call.rows[index] for index in passed.computed):
            if row.branch not in self.decisions.sample(call, row.sample).learned:
                self._kept.pop(Slot.of(call, row), None)
        for number, total in enumerate(passed.totals if passed.computed else ()):
            gains = total.total()
            for stream, value in gains.items():
                self._update(call, passed.computed, (number, stream), value)
            if number == 0 and self._told is not None:
                self._tell(passed, gains, self._told)
        for index in passed.computed:
            row = call.rows[index]
            self.decisions.sample(call, row.sample).learned[row.branch] = call.step.index
        self._tally.record(
            call.step.index, (call.rows[index] for index in passed.computed), "computed"
        )

    def _tell(self, passed: Pass, gains: dict[Stream, Tensor], told: Told) -> None:
        call = passed.call
        for place, index in enumerate(passed.computed):
            state = self.decisions.sample(call, call.rows[index].sample)
            if state.leads(call.rows[index]):
                picture = [value[place] for (name, _), value in gains.items() if name == "hidden"]
                told(state.indicator, call.step.turn, picture)

    def _update(
        self, call: Call, rows: list[int], which: tuple[int, Stream], value: Tensor
    ) -> None:
        position = self._forecast.position(call.step)
        for place, index in enumerate(rows):
            kept = self._kept.setdefault(Slot.of(call, call.rows[index]), {})
            kept.setdefault(which, self._forecast.make()).update(position, value[place])

    def _predict(self, passed: Pass, chosen: int) -> dict[Stream, Tensor]:
        call = passed.call
        rows = [call.rows[index] for index in passed.skipped]
        left_out = f"blocks {passed.span.start} to {passed.span.stop - 1}"
        self._tally.record(call.step.index, rows, self._forecast.state, parts=(left_out,))
        return self._filled(passed, chosen)

    def _filled(self, passed: Pass, chosen: int) -> dict[Stream, Tensor]:
        call, position = passed.call, self._forecast.position(passed.call.step)
        kept = [self._kept[Slot.of(call, call.rows[index])] for index in passed.skipped]
        streams = [stream for number, stream in kept[0] if number == chosen]
        return {
            stream: stack_rows([one[chosen, stream].predict(position) for one in kept])
            for stream in streams
        }


def check_skips(site: Site, method: str) -> None:
    """Refuse networks in which blocks behind the range would be given what was never computed.

    Raises:
        UnsupportedModel: If a block takes the output of one at the start.
    """
    for denoiser in site.denoisers:
        if any(block.long_skip for block in site.blocks(denoiser)):
            raise UnsupportedModel(
                f"{method}: the last blocks of {type(denoiser.core).__name__} take the outputs of "
                "the first, so a range in between cannot be left out alone. Use cache.FirstBlock, "
                "cache.TeaCache or cache.EasyCache."
            )


def _enter(sums: Sequence[Sum], streams: Streams) -> None:
    for total in sums:
        total.enter(streams)


def _leave(sums: Sequence[Sum], streams: Streams) -> None:
    for total in sums:
        total.leave(streams)


def _rows_of(streams: Streams, passed: Pass) -> Streams:
    """The computed rows of the streams."""
    if not passed.skipped:
        return streams
    return {name: index_rows(value, passed.computed) for name, value in streams.items()}


def _nothing_left(count: int) -> str:
    return f"no block is left to skip: the blocks that always run are all {count}"


def _check_skips(blocks: Sequence[Block], spans: Spans) -> None:
    for span in spans.ranges:
        if crosses_long_skips(blocks, span):
            raise UnsupportedModel(
                f"{blocks[0].kind} has long skips: blocks {span.start} to {span.stop - 1} of "
                f"{len(blocks)} cannot be left out while their counterparts at the rear run, so "
                "this cache does not fit. Use cache.FirstBlock, which leaves out both."
            )


def _check_rows(block: Block, arguments: dict[str, Any], call: Call) -> None:
    rows = {name: len(value) for name, value in block.inputs(arguments).items()}
    if set(rows.values()) != {len(call.rows)}:
        raise UnsupportedModel(
            f"{type(call.denoiser.core).__name__} gives its {block.kind} {rows} rows where the "
            f"call has {len(call.rows)}: frames are folded into the batch, or tokens come first, "
            "so block caches do not fit. Use cache.EasyCache."
        )
