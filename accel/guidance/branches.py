"""Leave out the unconditional branch: its answer is taken from the conditional one.

Guidance u + w·(c − u) with u = c is exactly c, so no pipeline has to be edited: in a batched call
only the needed rows run, in a pipeline of two calls the second is answered from the first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from accel.errors import UnsupportedModel
from accel.seams.denoisers import Call, Inner, Result, Row, stack_rows
from accel.seams.rows import scatter
from accel.seams.spaces import matching
from accel.trajectory import Step

if TYPE_CHECKING:
    from torch import Tensor

    from accel.attach import Site, Undo
    from accel.report import Tally

COND = "cond"
UNCOND = "uncond"

Pair = tuple["Tensor", "Tensor", "Tensor"]
"""Conditional answer, unconditional answer and input of one sample."""


class Unconditional:
    """Runs the unconditional branch only for the samples that need it.

    Args:
        tally: Gets a ``computed`` or ``reused`` for each unconditional row.
        guided: Whether a sample needs guidance at a step.
        observe: Called with the pairs of the samples whose two branches were both computed in
            full at this step, by sample.
    """

    def __init__(
        self,
        tally: Tally,
        guided: Callable[[Step, int], bool],
        observe: Callable[[Call, dict[int, Pair]], None] | None = None,
    ) -> None:
        self._tally = tally
        self._guided = guided
        self._observe = observe
        self._cond: dict[int, tuple[int, Tensor, bool]] = {}

    def attach(self, site: Site) -> Iterator[Undo]:
        """Put it around every denoiser of a pipeline."""
        site.tally.reason = self._why_idle
        yield site.on_start(self._cond.clear)
        for denoiser in site.denoisers:
            yield site.around(denoiser, self)

    def _why_idle(self) -> str:
        if self._tally.events:
            return f"all {len(self._tally.events)} unconditional evaluations were needed"
        return "the calls have one branch: guidance is off or embedded"

    def __call__(self, call: Call, inner: Inner) -> Result:
        """Compute the rows that are needed, answer the others from the conditional ones."""
        branches = {row.branch for row in call.rows}
        if UNCOND not in branches:
            result = inner(call)
            self._keep(call, result)
            return result
        dropped = call.where(
            lambda row: row.branch == UNCOND and not self._guided(call.step, row.sample)
        )
        result = self._without(call, dropped, inner) if dropped else inner(call)
        self._keep(call, result)
        needed = [row for row in call.rows if row.branch == UNCOND]
        left = [call.rows[index] for index in dropped]
        self._tally.record(call.step.index, (row for row in needed if row not in left), "computed")
        self._tally.record(call.step.index, left, "reused")
        if self._observe is not None:
            self._observe(call, self._pairs(call, result, left))
        return result

    def _keep(self, call: Call, result: Result) -> None:
        for index, row in enumerate(call.rows):
            if row.branch == COND:
                kept = (call.step.index, result.value[index], result.fresh[index])
                self._cond[row.sample] = kept

    def _without(self, call: Call, dropped: list[int], inner: Inner) -> Result:
        needed = [index for index in range(len(call.rows)) if index not in dropped]
        if needed:
            part = call.take(needed)
            computed = inner(part)
            self._keep(part, computed)
            borrowed = self._borrow(call, dropped)
            value = scatter([(needed, computed.value), (dropped, borrowed)], len(call.rows))
            whole = dict(zip(needed, computed.fresh, strict=True))
            return Result(value, tuple(whole.get(i, False) for i in range(len(call.rows))))
        return Result(self._borrow(call, dropped), (False,) * len(call.rows))

    def _borrow(self, call: Call, rows: list[int]) -> Tensor:
        answers = []
        for index in rows:
            step, value, _ = self._cond.get(call.rows[index].sample, (-1, None, False))
            if value is None or step != call.step.index:
                raise UnsupportedModel(
                    "The pipeline asks for its unconditional branch before the conditional one, "
                    "so it cannot be answered from that: leave guidance methods out of the plan."
                )
            answers.append(value)
        return stack_rows(answers)

    def _pairs(self, call: Call, result: Result, left: list[Row]) -> dict[int, Pair]:
        pairs: dict[int, Pair] = {}
        for index, row in enumerate(call.rows):
            if row.branch != UNCOND or row in left or not result.fresh[index]:
                continue
            step, cond, fresh = self._cond[row.sample]
            if fresh and step == call.step.index:
                x, cond = matching(call.sample[index], cond)
                _, uncond = matching(x, result.value[index])
                pairs[row.sample] = (cond, uncond, x)
        return pairs
