"""The cache around a whole network: site of EasyCache and of every step cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from accel.cache.decisions import Decisions, Slot
from accel.cache.predictors import Forecast, Predictor
from accel.seams.denoisers import Call, Inner, Result, stack_rows
from accel.seams.rows import scatter
from accel.seams.spaces import matching

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from accel.attach import Site, Undo
    from accel.report import Tally


class Indicator(Protocol):
    """Measures one sample from the network's input and output."""

    def measure(self, x: Tensor) -> Tensor | None:
        """The change at this step: a scalar tensor, or ``None`` where nothing is known yet."""
        ...

    def learn(self, x: Tensor, v: Tensor) -> None:
        """A step was computed with input ``x`` and output ``v``."""
        ...


class NetworkCache:
    """Answers a call of a network from what earlier calls gave.

    With predictor ``reuse`` the kept quantity is v − x, so that the answer follows the present
    input (EasyCache, section 3); with ``newton`` it is v, as a polynomial in `Step.time`.

    State is one predictor for each denoiser, sample, branch and stage of the solver. Reads the
    device once a step if its indicator measures anything.
    """

    def __init__(
        self,
        tally: Tally,
        decisions: Decisions[Any],
        forecast: Forecast,
    ) -> None:
        self.decisions = decisions
        self._tally = tally
        self._follow = forecast.kind == "reuse"
        self._forecast = forecast
        self._kept: dict[Slot, Predictor] = {}

    def attach(self, site: Site) -> Iterator[Undo]:
        """Put the cache around every denoiser of a pipeline."""
        site.tally.memory = self._memory
        self.decisions.gate = site.gate(1.0)
        yield site.on_start(self.reset)
        yield from self.decisions.conditions.attach(site)
        for denoiser in site.denoisers:
            yield site.around(denoiser, self)

    def _memory(self) -> int:
        kept = sum(kept.bytes for kept in self._kept.values())
        return kept + self.decisions.bytes

    def reset(self) -> None:
        """Forget the run before."""
        self.decisions.reset()
        self._kept.clear()

    def __call__(self, call: Call, inner: Inner) -> Result:
        """Answer the rows that may be skipped, compute the others."""
        self._decide(call)
        samples = {row.sample: self.decisions.sample(call, row.sample) for row in call.rows}
        computed = call.where(lambda row: samples[row.sample].must_compute(row.branch))
        if len(computed) == len(call.rows):
            return self._compute(call, inner)
        fresh = tuple(index in computed for index in range(len(call.rows)))
        skipped = [index for index, done in enumerate(fresh) if not done]
        answer = self._predict(call, skipped)
        if not computed:
            return Result(answer, fresh)
        result = self._compute(call.take(computed), inner)
        value = scatter([(computed, result.value), (skipped, answer)], len(call.rows))
        return Result(value, fresh)

    def _decide(self, call: Call) -> None:
        leaders = self.decisions.leaders(call)
        if not leaders:
            return
        x = call.sample
        values = {
            sample: self.decisions.sample(call, sample).indicator.measure(x[row])
            for sample, row in leaders.items()
        }
        self.decisions.decide(call, values)

    def _compute(self, call: Call, inner: Inner) -> Result:
        result = inner(call)
        self._check(call, result)
        self._learn(call, result)
        return result

    def _check(self, call: Call, result: Result) -> None:
        """Tell the guard what would have been filled in for what was computed."""
        gate, position = self.decisions.gate, self._forecast.position(call.step)
        for index, row in enumerate(call.rows):
            newest = self.decisions.sample(call, row.sample).learned.get(row.branch)
            if newest is not None and gate.listens(row.sample):
                guess = self._fill(call, index, position)
                gate.compare(call, [index], guess[None], result.value[index][None], newest)

    def _learn(self, call: Call, result: Result) -> None:
        for index, row in enumerate(call.rows):
            x, y = call.sample[index], result.value[index]
            sample = self.decisions.sample(call, row.sample)
            if sample.leads(row):
                sample.indicator.learn(*matching(x, y))
            slot = Slot.of(call, row)
            if row.branch not in sample.learned:
                self._kept[slot] = self._forecast.make()
            sample.learned[row.branch] = call.step.index
            self._kept[slot].update(
                self._forecast.position(call.step), _minus_input(y, x) if self._follow else y
            )
        self._tally.record(call.step.index, call.rows, "computed")

    def _predict(self, call: Call, rows: list[int]) -> Tensor:
        position = self._forecast.position(call.step)
        answers = [self._fill(call, index, position) for index in rows]
        rows_done = (call.rows[index] for index in rows)
        self._tally.record(call.step.index, rows_done, self._forecast.state)
        return stack_rows(answers)

    def _fill(self, call: Call, index: int, position: float) -> Tensor:
        value = self._kept[Slot.of(call, call.rows[index])].predict(position)
        return _plus_input(value, call.sample[index]) if self._follow else value


def _minus_input(y: Tensor, x: Tensor) -> Tensor:
    delta = y.clone()
    x, v = matching(x, delta)
    v.sub_(x)
    return delta


def _plus_input(delta: Tensor, x: Tensor) -> Tensor:
    answer = delta.clone()
    x, v = matching(x, answer)
    v.add_(x)
    return answer
