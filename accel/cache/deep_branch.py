"""The cache of a UNet's deep branch: site of DeepCache.

On a skipped step the network is called all the same, but runs its shallow part only; what the deep
part would have handed to it is filled in from the steps before.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from accel.cache.decisions import Decisions, Slot
from accel.cache.predictors import Forecast, Predictor
from accel.seams.denoisers import Call, Inner, Result, Row, stack_rows
from accel.seams.rows import scatter
from accel.seams.spaces import matching
from accel.seams.unet import DeepBranch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch

    from accel.attach import Site, Undo
    from accel.report import Tally


SAVING = 0.7
"""Share of an evaluation that the deep part is taken for, where a guard weighs methods."""


class DeepBranchCache:
    """Runs the shallow part of a UNet behind a predicted feature.

    State is one predictor for each denoiser, sample, branch and stage of the solver, all frames of
    a row together.
    Rows that differ are two calls of the network. Reads the device once a step if its indicator
    measures anything.

    Args:
        tally: Where it says what it did.
        decisions: Decide for each sample; their indicators see the network's input and output.
        branch: Where the network is cut (see `DeepBranch`).
        forecast: How it fills in.
    """

    def __init__(
        self, tally: Tally, decisions: Decisions[Any], branch: int, forecast: Forecast
    ) -> None:
        self.decisions = decisions
        self._tally = tally
        self._branch = branch
        self._forecast = forecast
        self._cuts: dict[str, DeepBranch] = {}
        self._kept: dict[Slot, tuple[torch.Size, Predictor]] = {}

    def attach(self, site: Site) -> Iterator[Undo]:
        """Put the cache into every denoiser of a pipeline.

        Raises:
            UnsupportedModel: For a network that is no UNet.
        """
        self._cuts = {
            denoiser.name: DeepBranch(denoiser, self._branch) for denoiser in site.denoisers
        }
        site.tally.memory = self._memory
        self.decisions.gate = site.gate(SAVING)
        yield site.on_start(self.reset)
        yield from self.decisions.conditions.attach(site)
        for denoiser in site.denoisers:
            yield site.around(denoiser, self)
            yield from self._cuts[denoiser.name].attach()

    def _memory(self) -> int:
        kept = sum(kept.bytes for _, kept in self._kept.values())
        return kept + self.decisions.bytes

    def reset(self) -> None:
        """Forget the run before."""
        self.decisions.reset()
        self._kept.clear()
        for cut in self._cuts.values():
            cut.forget()

    def __call__(self, call: Call, inner: Inner) -> Result:
        """Run everything for the rows that are computed, the shallow part for the others."""
        self._decide(call)
        count = len(call.rows)
        computed = [index for index in range(count) if self._must_compute(call, index)]
        skipped = [index for index in range(count) if index not in computed]
        if not skipped:
            return self._full(call, inner)
        if not computed:
            return self._shallow(call, inner)
        first = self._full(call.take(computed), inner)
        second = self._shallow(call.take(skipped), inner)
        value = scatter([(computed, first.value), (skipped, second.value)], count)
        fresh = dict(zip(computed, first.fresh, strict=True))
        return Result(value, tuple(fresh.get(index, False) for index in range(count)))

    def _must_compute(self, call: Call, index: int) -> bool:
        row = call.rows[index]
        if not self._fits(call, index):
            return True
        return self.decisions.sample(call, row.sample).must_compute(row.branch)

    def _decide(self, call: Call) -> None:
        leaders = self.decisions.leaders(call)
        if not leaders:
            return
        values = {
            sample: self.decisions.sample(call, sample).indicator.measure(call.sample[row])
            for sample, row in leaders.items()
        }
        self.decisions.decide(call, values)

    def _full(self, call: Call, inner: Inner) -> Result:
        cut = self._cuts[call.denoiser.name]
        result, feature = cut.full(len(call.rows), lambda: inner(call))
        self._check(call, result)
        for index, row in enumerate(call.rows):
            x, y = call.sample[index], result.value[index]
            state = self.decisions.sample(call, row.sample)
            if state.leads(row):
                state.indicator.learn(*matching(x, y))
            if feature is not None:
                self._keep(call, row, x.shape, feature[index])
                state.learned[row.branch] = call.step.index
        self._tally.record(call.step.index, call.rows, "computed")
        return result

    def _check(self, call: Call, result: Result) -> None:
        """Tell the guard what the shallow part would have come to, where it wants to know."""
        gate = self.decisions.gate
        for index, row in enumerate(call.rows):
            newest = self.decisions.sample(call, row.sample).learned.get(row.branch)
            if newest is not None and gate.wants(call, row.sample) and self._fits(call, index):
                one = call.take([index])
                guess = self._behind(one, partial(gate.dense, one))
                gate.compare(call, [index], guess.value, result.value[[index]], newest)

    def _fits(self, call: Call, index: int) -> bool:
        """Whether something is kept of a row, and not that of another resolution."""
        shape, _ = self._kept.get(Slot.of(call, call.rows[index]), (None, None))
        return shape == call.sample[index].shape

    def _keep(self, call: Call, row: Row, shape: torch.Size, feature: torch.Tensor) -> None:
        slot, valid = Slot.of(call, row), self.decisions.sample(call, row.sample).learned
        if row.branch not in valid or slot not in self._kept or self._kept[slot][0] != shape:
            self._kept[slot] = (shape, self._forecast.make())
        self._kept[slot][1].update(self._forecast.position(call.step), feature)

    def _shallow(self, call: Call, inner: Inner) -> Result:
        result = self._behind(call, lambda: inner(call))
        self._tally.record(call.step.index, call.rows, self._forecast.state)
        return Result(result.value, (False,) * len(call.rows), result.native)

    def _behind(self, call: Call, run: Callable[[], Result]) -> Result:
        """Run the shallow part behind the predicted feature."""
        name, position = call.denoiser.name, self._forecast.position(call.step)
        feature = stack_rows(
            [self._kept[Slot.of(call, row)][1].predict(position) for row in call.rows]
        )
        return self._cuts[name].shallow(feature, run)
