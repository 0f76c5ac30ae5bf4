"""The cache around a range of blocks behind a probe: site of First-Block-Cache and its kin.

The first block always runs and is the probe. On a skipped step the blocks behind it hand their
streams through, and the first of them adds what the whole range added when it was computed: the
sum over the blocks of (out − in), each measured at the block itself, for each stream. Whatever a
pipeline injects *between* blocks (ControlNet, VACE) therefore acts once and for real on every
step; "last output minus first input" would swallow it and add it a second time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from accel.cache.decisions import Decisions
from accel.cache.indicators import ProbeChange
from accel.cache.policies import Guarded
from accel.cache.predictors import Forecast, Predictor
from accel.errors import UnsupportedModel
from accel.seams.denoisers import Call, Inner, Result, Row, stack_rows
from accel.seams.rows import index_rows, scatter

if TYPE_CHECKING:
    from torch import Tensor

    from accel.attach import Site, Undo
    from accel.report import Tally
    from accel.seams.blocks import Block, Streams


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


@dataclass
class Pass:
    """One call of the network on its way through the blocks.

    Attributes:
        computed: Rows that run the range for real.
        skipped: Rows that do not.
        pending: What is still to be added to the skipped rows, by stream.
        total: What the computed rows gain over the range.
    """

    call: Call
    computed: list[int] = field(default_factory=list)
    skipped: list[int] = field(default_factory=list)
    pending: dict[Stream, Tensor] = field(default_factory=dict)
    total: Sum = field(default_factory=Sum)


class BlockRangeCache:
    """First block as probe, the rest as range; one per denoiser.

    State is one predictor for each sample, branch and stream. Reads the device once a step.
    """

    def __init__(
        self,
        tally: Tally,
        policy: Callable[[], Guarded],
        forecast: Forecast,
    ) -> None:
        self.decisions = Decisions(ProbeChange, policy)
        self._tally = tally
        self._forecast = forecast
        self._kept: dict[tuple[str, Row, Stream], Predictor] = {}
        self._pass: Pass | None = None

    def attach(self, site: Site) -> Iterator[Undo]:
        """Put the cache into every denoiser of a pipeline."""
        yield site.on_start(self.reset)
        for denoiser in site.denoisers:
            first, *rest = site.blocks(denoiser)
            yield site.around(denoiser, self)
            yield first.wrap(partial(self._probe, first))
            for block in rest:
                yield block.wrap(partial(self._ranged, block))

    def reset(self) -> None:
        """Forget the run before."""
        self.decisions.reset()
        self._kept.clear()
        self._pass = None

    def __call__(self, call: Call, inner: Inner) -> Result:
        """Follow one call of the network through its blocks."""
        self._pass = Pass(call)
        try:
            result = inner(call)
            passed = self._pass
            self._learn(passed)
        finally:
            self._pass = None
        fresh = tuple(
            whole and index not in passed.skipped for index, whole in enumerate(result.fresh)
        )
        return Result(result.value, fresh, result.native)

    def _probe(self, block: Block, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        returned = inner(*args, **kwargs)
        if self._pass is None:
            return returned
        before = block.inputs(block.bind(args, kwargs))["hidden"]
        residual = block.outputs(returned)["hidden"] - before
        call = self._pass.call
        _check_rows(block, residual, call)
        leaders = self.decisions.leaders(call)
        values = {
            sample: self.decisions.sample(call, sample).indicator.measure(residual[row])
            for sample, row in leaders.items()
        }
        self.decisions.decide(call, values)
        for sample, row in leaders.items():
            state = self.decisions.sample(call, sample)
            if state.compute:
                state.indicator.learn(residual[row])
        self._split(self._pass)
        return returned

    def _split(self, passed: Pass) -> None:
        for index, row in enumerate(passed.call.rows):
            state = self.decisions.sample(passed.call, row.sample)
            rows = passed.computed if state.must_compute(row.branch) else passed.skipped
            rows.append(index)
        if passed.skipped:
            passed.pending = self._predict(passed)

    def _ranged(self, block: Block, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        passed = self._pass
        if passed is None:
            return inner(*args, **kwargs)
        if not passed.skipped:
            passed.total.enter(block.inputs(block.bind(args, kwargs)))
            returned = inner(*args, **kwargs)
            passed.total.leave(block.outputs(returned))
            return returned
        through = self._through(passed, block.inputs(block.bind(args, kwargs)))
        if not passed.computed:
            return block.returns(through)
        part = block.take(args, kwargs, passed.computed, len(passed.call.rows))
        entering = block.inputs(block.bind(*part))
        return self._mixed(block, passed, partial(inner, *part[0], **part[1]), entering, through)

    def _through(self, passed: Pass, streams: Streams) -> Streams:
        """The skipped rows of the streams, with what the range adds, the first time."""
        rows = passed.skipped
        through = {name: index_rows(value, rows) for name, value in streams.items()}
        for name, value in through.items():
            gain = passed.pending.pop((name, value.shape[1]), None)
            if gain is not None:
                through[name] = value + gain
        return through

    def _mixed(
        self,
        block: Block,
        passed: Pass,
        run: Callable[[], Any],
        entering: Streams,
        through: Streams,
    ) -> Any:
        """A part of the rows runs the block, the others go through."""
        count = len(passed.call.rows)
        passed.total.enter(entering)
        after = block.outputs(run())
        passed.total.leave(after)
        joined = {
            name: scatter([(passed.computed, value), (passed.skipped, through[name])], count)
            for name, value in after.items()
        }
        return block.returns(joined)

    def _learn(self, passed: Pass) -> None:
        call = passed.call
        if passed.computed:
            for stream, value in passed.total.total().items():
                self._update(call, passed.computed, stream, value)
        for index in passed.computed:
            row = call.rows[index]
            self.decisions.sample(call, row.sample).learned[row.branch] = call.step.index
        self._tally.record(
            call.step.index, (call.rows[index] for index in passed.computed), "computed"
        )

    def _update(self, call: Call, rows: list[int], stream: Stream, value: Tensor) -> None:
        for position, index in enumerate(rows):
            key = (call.denoiser.name, call.rows[index], stream)
            kept = self._kept.setdefault(key, self._forecast.make())
            kept.update(call.step.time, value[position])

    def _predict(self, passed: Pass) -> dict[Stream, Tensor]:
        call, name = passed.call, passed.call.denoiser.name
        rows = [call.rows[index] for index in passed.skipped]
        streams = [key[2] for key in self._kept if key[:2] == (name, rows[0])]
        self._tally.record(call.step.index, rows, self._forecast.state)
        return {
            stream: stack_rows(
                [self._kept[name, row, stream].predict(call.step.time) for row in rows]
            )
            for stream in streams
        }


def _check_rows(block: Block, residual: Tensor, call: Call) -> None:
    if len(residual) != len(call.rows):
        raise UnsupportedModel(
            f"{block.kind} works on {len(residual)} rows where the call has {len(call.rows)}: "
            "frames are folded into the batch, so block caches do not fit. Use cache.EasyCache."
        )
