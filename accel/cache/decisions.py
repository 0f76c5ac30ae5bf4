"""One decision a sample and step, shared by all its branches, whatever the guidance layout.

The unit of decision is a sample with all its branches: the first call of a step that holds the
sample decides, by its ``cond`` row where there is one; the others follow. Where a scheduler says by
its ``order`` that each step has several evaluations (Heun, KDPM2), each of them (`Step.stage`) has
decisions and state of its own. Of solvers whose steps differ in their number of evaluations, with
an ``order`` of 1 (PNDM, singlestep DPM-Solver, RhoRK, PseudoCorrector's steps of Heun), all
evaluations are one sequence.

What is kept is valid for the conditions that it was computed under (`accel.cache.conditions`).
Where they have changed, the sample is computed, and what was kept of it counts for nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, NamedTuple, Protocol, TypeVar

from accel.cache.conditions import Conditions, Watch
from accel.cache.policies import Guarded
from accel.guard.gate import OPEN, Gate
from accel.seams.denoisers import Call, Row
from accel.trajectory import Step

if TYPE_CHECKING:
    from torch import Tensor


class Sized(Protocol):
    """What every indicator says of itself."""

    @property
    def bytes(self) -> int:
        """Memory of what it keeps between steps."""
        ...


class Slot(NamedTuple):
    """Whose state something is.

    Attributes:
        denoiser: The network.
        stage: Which evaluation of its step the solver makes.
        row: Branch and sample.
    """

    denoiser: str
    stage: int
    row: Row

    @classmethod
    def of(cls, call: Call, row: Row) -> Slot:
        """The slot of a row of a call."""
        return cls(call.denoiser.name, call.step.stage, row)


Measure = TypeVar("Measure", bound=Sized)


@dataclass
class Sample(Generic[Measure]):
    """What is decided about one sample at one denoiser.

    Attributes:
        indicator: Measures it.
        policy: Decides.
        leader: The branch that the latest decision was made by.
        decided: The step of the latest decision.
        compute: The latest decision.
        learned: By branch, the step at which its kept state was computed. A branch that is not
            in it has none that is valid.
        told: By branch, the conditions of its latest call.
        void: Whether they have changed, so that the next decision is to compute.
    """

    indicator: Measure
    policy: Guarded
    leader: str = ""
    decided: int = -1
    compute: bool = True
    learned: dict[str, int] = field(default_factory=dict)
    told: dict[str, Conditions] = field(default_factory=dict)
    void: bool = False

    @property
    def newest(self) -> int | None:
        """The latest step at which a branch was computed; ``None``: there is none that is valid."""
        return max(self.learned.values(), default=None)

    def must_compute(self, branch: str) -> bool:
        """Whether a branch has to be computed: by decision, or because its state is too old."""
        newest = self.newest
        return newest is None or self.compute or self.learned.get(branch, -1) < newest

    def leads(self, row: Row) -> bool:
        """Whether what this row computed is what the next decisions are measured against."""
        return self.compute and row.branch == self.leader


class Decisions(Generic[Measure]):
    """The samples of a run, by denoiser.

    Args:
        indicator: Makes the indicator of a sample.
        policy: Makes its policy.
        conditions: Reads the conditions of calls; one of its own where it is not shared. Whoever
            owns the decisions attaches it.

    Attributes:
        gate: Asked before a sample is skipped; a guard may refuse.
    """

    def __init__(
        self,
        indicator: Callable[[], Measure],
        policy: Callable[[], Guarded],
        conditions: Watch | None = None,
    ) -> None:
        self._indicator = indicator
        self._policy = policy
        self.conditions = conditions or Watch()
        self._samples: dict[tuple[str, int, int], Sample[Measure]] = {}
        self.gate: Gate = OPEN
        self.lowest = math.inf
        self.eligible = 0

    def reset(self) -> None:
        """Forget the run before."""
        self._samples.clear()
        self.lowest, self.eligible = math.inf, 0

    @property
    def bytes(self) -> int:
        """Memory of what the indicators keep."""
        return sum(sample.indicator.bytes for sample in self._samples.values())

    def sample(self, call: Call, sample: int) -> Sample[Measure]:
        """What is decided about a sample at a call's denoiser and stage."""
        key = (call.denoiser.name, call.step.stage, sample)
        if key not in self._samples:
            self._samples[key] = Sample(self._indicator(), self._policy())
        return self._samples[key]

    def leaders(self, call: Call) -> dict[int, int]:
        """Row of the leading branch, for each sample that this step has not decided about yet.

        To be asked at every call, before `decide`.
        """
        rows: dict[int, int] = {}
        for index, row in enumerate(call.rows):
            self._tell(call, row)
            undecided = self.sample(call, row.sample).decided != call.step.index
            if undecided and (row.sample not in rows or row.branch == "cond"):
                rows[row.sample] = index
        for number, index in rows.items():
            self._lead(self.sample(call, number), call.rows[index].branch)
        return rows

    def _tell(self, call: Call, row: Row) -> None:
        """Let a branch hear its conditions: if they are others, what it kept is void.

        Where the step is not decided yet, that of all branches is, so that they go on together.
        """
        sample, now = self.sample(call, row.sample), self.conditions.of(call)
        if sample.told.setdefault(row.branch, now) == now:
            return
        sample.told[row.branch] = now
        if sample.decided == call.step.index:
            sample.learned.pop(row.branch, None)
        else:
            sample.learned.clear()
            sample.void, sample.leader = True, ""

    def _lead(self, sample: Sample[Measure], branch: str) -> None:
        """Let a branch lead. A new leader is measured afresh: branches are not comparable."""
        if branch != sample.leader:
            sample.leader, sample.indicator = branch, self._indicator()

    def decide(self, call: Call, values: dict[int, Tensor | None]) -> None:
        """Decide about some samples from their indicators; reads the device at most once."""
        numbers = _read(values)
        for sample, value in numbers.items():
            state = self.sample(call, sample)
            state.decided = call.step.index
            if state.void:
                state.policy.force(call.step)
                state.compute, state.void = True, False
                continue
            self._watch(call.step, state.policy, value)
            state.compute = state.policy.compute(call.step, value)
            if self._refused(call, sample, state):
                self.overrule(call, sample)

    def _refused(self, call: Call, sample: int, state: Sample[Measure]) -> bool:
        if state.compute or state.newest is None:
            return False
        return not self.gate.allows(call, sample, state.newest)

    def overrule(self, call: Call, sample: int) -> None:
        """Compute a sample at this step, though it was decided that it may be skipped."""
        state = self.sample(call, sample)
        state.policy.overrule(call.step)
        state.compute = True

    def _watch(self, step: Step, policy: Guarded, value: float | None) -> None:
        if value is not None and not policy.guards(step):
            self.eligible += 1
            self.lowest = min(self.lowest, value)

    def why_idle(self, what: str, threshold: float) -> str:
        """Why nothing was skipped in a run."""
        if not self.eligible:
            return "every step was warm-up or the last one: too few steps for a cache"
        return (
            f"{what} never fell below threshold {threshold:g} "
            f"(lowest {self.lowest:.3g} over {self.eligible} steps that were not forced)"
        )


def _read(values: dict[int, Tensor | None]) -> dict[int, float | None]:
    known = {sample: value for sample, value in values.items() if value is not None}
    if not known:
        return dict.fromkeys(values)
    if len(known) == 1:
        numbers = [next(iter(known.values())).item()]
    else:
        import torch

        numbers = torch.stack(list(known.values())).tolist()
    return {**dict.fromkeys(values), **dict(zip(known, numbers, strict=True))}
