"""Leave out the unconditional branch: its answer is taken from the conditional one, or estimated.

Guidance u + w·(c − u) with u = c is exactly c, so no pipeline has to be edited: in a batched call
only the needed rows run, in a pipeline of two calls the second is answered from the first. A method
that knows better than u = c gives an estimate of u.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from accel.errors import AccelWarning, UnsupportedModel
from accel.guard.gate import OPEN, Gate
from accel.seams.branches import embedded_scale
from accel.seams.denoisers import Call, Inner, Result, stack_rows
from accel.seams.rows import scatter

if TYPE_CHECKING:
    from torch import Tensor

    from accel.attach import Site, Undo
    from accel.guidance.switching import Switching
    from accel.report import State, Tally

SAVING = 0.5
"""Share of an evaluation of all branches that the unconditional one is."""

COND = "cond"
UNCOND = "uncond"

ANSWERS = "branches: what answers for the unconditional one"
ENDS = "branches: when guidance ends"
WHERE = "branches: where guidance acts"
"""Seams. A method that estimates u holds all three: its estimate rests on when u was evaluated."""


class Pair(NamedTuple):
    """Both branches of one sample, as the network answered them, and the network's input."""

    cond: Tensor
    uncond: Tensor
    x: Tensor


@dataclass(frozen=True)
class Missing:
    """An unconditional row of a call that is not evaluated.

    Attributes:
        call: The call.
        index: Place of the row in ``call.rows``.
        cond: The conditional answer of the same sample at this step.
        fresh: Whether that was computed in full.
    """

    call: Call
    index: int
    cond: Tensor
    fresh: bool

    @property
    def sample(self) -> int:
        """Position in the batch."""
        return self.call.rows[self.index].sample

    @property
    def x(self) -> Tensor:
        """The network's input for that row."""
        return self.call.sample[self.index]


Guided = Callable[[Call, int], bool]
"""Whether the unconditional branch of a sample is evaluated in a call."""

Observe = Callable[[Call, dict[int, Pair]], None]
"""Told, by sample, of pairs that were both computed in full at this step."""

Estimate = Callable[[Missing], "Tensor | None"]
"""The unconditional answer of a sample; ``None`` where it is the conditional one."""


class Unconditional:
    """Runs the unconditional branch only for the samples that need it.

    Args:
        tally: Gets for each unconditional row a ``computed``, a ``predicted`` where it was
            estimated, or a ``reused`` where the conditional answer stands for it.
        guided: Says which rows are evaluated.
        observe: Sees what was evaluated.
        estimate: Answers for the rows that are not; without it, the conditional answer does.
        switched: Called before the solver's step where another set of samples is guided than at
            the step before, with whether that holds for all samples.
        guides: Says which samples count as guided; without it, those that are evaluated.
    """

    def __init__(
        self,
        tally: Tally,
        guided: Guided,
        observe: Observe | None = None,
        estimate: Estimate | None = None,
        switched: Callable[[bool], None] | None = None,
        guides: Guided | None = None,
    ) -> None:
        self._tally = tally
        self._guided = guided
        self._observe = observe
        self._estimate = estimate
        self._switched = switched
        self._guides = guides
        self._embedded = ""
        self._cond: dict[int, tuple[int, Tensor, bool]] = {}
        self._latest: frozenset[int] | None = None
        self._gate: Gate = OPEN

    def attach(self, site: Site) -> Iterator[Undo]:
        """Put it around every denoiser of a pipeline."""
        site.tally.reason = self._why_idle
        self._gate = site.gate(SAVING, grows=False)
        yield site.on_start(self._start)
        for denoiser in site.denoisers:
            yield site.around(denoiser, self)

    def _start(self) -> None:
        self._embedded = ""
        self._cond.clear()
        self._latest = None

    def _why_idle(self) -> str:
        if self._tally.events:
            return f"all {len(self._tally.events)} unconditional evaluations were needed"
        if self._embedded:
            return (
                f"guidance is embedded: the network is told the scale ({self._embedded}), and its "
                "calls have no unconditional branch to leave out. Leave this method out of the plan"
            )
        return "the calls have one branch: guidance is off"

    def __call__(self, call: Call, inner: Inner) -> Result:
        """Compute the rows that are needed, answer for the others."""
        needed = call.where(lambda row: row.branch == UNCOND)
        if not needed:
            self._embedded = self._embedded or embedded_scale(call)
            result = inner(call)
            self._keep(call, result)
            return result
        spared = [i for i in needed if not self._guided(call, call.rows[i].sample)]
        dropped = [i for i in spared if self._gate.allows(call, call.rows[i].sample)]
        self._follow(call, needed, dropped)
        if dropped:
            result = self._without(call, dropped, inner)
        else:
            result = inner(call)
            self._keep(call, result)
        evaluated = [i for i in needed if i not in dropped]
        self._record(call, evaluated, "computed")
        self._check(call, result, evaluated, spared)
        if self._observe is not None:
            self._observe(call, self._pairs(call, result, evaluated))
        return result

    def _check(self, call: Call, result: Result, evaluated: list[int], spared: list[int]) -> None:
        """Tell the guard what evaluated rows would have been answered.

        An estimate rests on which steps are evaluated: it is made where the method would have.
        """
        places = evaluated if self._estimate is None else [i for i in evaluated if i in spared]
        for index in places:
            sample = call.rows[index].sample
            if not self._gate.listens(sample) or sample not in self._pairs(call, result, [index]):
                continue
            missing = self._missing(call, index)
            value = None if self._estimate is None else self._estimate(missing)
            guess = missing.cond if value is None else value
            self._gate.compare(call, [index], guess[None], result.value[index][None], None)

    def _record(self, call: Call, rows: list[int], state: State) -> None:
        self._tally.record(call.step.index, (call.rows[i] for i in rows), state)

    def _follow(self, call: Call, needed: list[int], dropped: list[int]) -> None:
        samples = {call.rows[i].sample for i in needed}
        if self._guides is None:
            now = frozenset(samples - {call.rows[i].sample for i in dropped})
        else:
            now = frozenset(sample for sample in samples if self._guides(call, sample))
        if self._switched is not None and self._latest not in (None, now):
            self._switched(now ^ self._latest >= samples)
        self._latest = now

    def _keep(self, call: Call, result: Result) -> None:
        for index, row in enumerate(call.rows):
            if row.branch == COND:
                kept = (call.step.index, result.value[index], result.fresh[index])
                self._cond[row.sample] = kept

    def _without(self, call: Call, dropped: list[int], inner: Inner) -> Result:
        kept = [index for index in range(len(call.rows)) if index not in dropped]
        if not kept:
            return Result(self._answer(call, dropped), (False,) * len(call.rows))
        part = call.take(kept)
        computed = inner(part)
        self._keep(part, computed)
        parts = [(kept, computed.value), (dropped, self._answer(call, dropped))]
        whole = dict(zip(kept, computed.fresh, strict=True))
        fresh = tuple(whole.get(index, False) for index in range(len(call.rows)))
        return Result(scatter(parts, len(call.rows)), fresh)

    def _answer(self, call: Call, rows: list[int]) -> Tensor:
        """What stands in for unconditional rows, ``[rows, …]``: a copy."""
        answers = []
        for index in rows:
            missing = self._missing(call, index)
            value = None if self._estimate is None else self._estimate(missing)
            self._record(call, [index], "reused" if value is None else "predicted")
            answers.append(missing.cond if value is None else value.to(missing.cond.dtype))
        return stack_rows(answers)

    def _missing(self, call: Call, index: int) -> Missing:
        step, value, fresh = self._cond.get(call.rows[index].sample, (-1, None, False))
        if value is None or step != call.step.index:
            raise UnsupportedModel(
                "The pipeline asks for its unconditional branch before the conditional one, "
                "so it cannot be answered from that: leave guidance methods out of the plan."
            )
        return Missing(call, index, value, fresh)

    def _pairs(self, call: Call, result: Result, rows: list[int]) -> dict[int, Pair]:
        pairs: dict[int, Pair] = {}
        for index in rows:
            sample = call.rows[index].sample
            step, cond, fresh = self._cond.get(sample, (-1, None, False))
            if result.fresh[index] and fresh and step == call.step.index and cond is not None:
                pairs[sample] = Pair(cond, result.value[index], call.sample[index])
        return pairs


def claim_all(site: Site) -> Iterator[Undo]:
    """Hold everything about the unconditional branch: for methods that estimate its answer."""
    for seam in (ANSWERS, ENDS, WHERE):
        yield site.claim(seam)


def resetting(site: Site, method: Switching) -> Callable[[bool], None] | None:
    """What `Unconditional` calls to make the solver forget its history where guidance switches.

    The history is one for all samples of a batch: where only some of them switch, the others
    take a step of first order too, and that is a warning.

    Returns:
        ``None`` where the method does not ask for it.

    Raises:
        UnsupportedModel: If the scheduler keeps a history that it cannot forget.
    """
    from accel.seams.history import forgetter

    if not method.reset_history:
        return None
    forget = forgetter(site.pipe.scheduler, method.name)

    def switched(everywhere: bool) -> None:
        if not everywhere:
            warnings.warn(
                f"{method.name}: guidance switched for some samples of the batch, and "
                "reset_history lowers the solver's order for all of them: a sample now depends on "
                "its neighbours. Run one sample at a time, or set reset_history=False.",
                AccelWarning,
                stacklevel=2,
            )
        forget()

    return switched
