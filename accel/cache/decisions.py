"""One decision a sample and step, shared by all its branches, whatever the guidance layout.

The unit of decision is a sample with all its branches: the first call of a step that holds the
sample decides, by its ``cond`` row where there is one; the others follow.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from accel.cache.policies import Guarded
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
        learned: By branch, the step at which its kept state was computed.
    """

    indicator: Measure
    policy: Guarded
    leader: str = ""
    decided: int = -1
    compute: bool = True
    learned: dict[str, int] = field(default_factory=dict)

    def must_compute(self, branch: str) -> bool:
        """Whether a branch has to be computed: by decision, or because its state is too old."""
        newest = max(self.learned.values(), default=-1)
        return self.compute or self.learned.get(branch, -1) < newest or newest < 0

    def leads(self, row: Row) -> bool:
        """Whether what this row computed is what the next decisions are measured against."""
        return self.compute and row.branch == self.leader


class Decisions(Generic[Measure]):
    """The samples of a run, by denoiser."""

    def __init__(self, indicator: Callable[[], Measure], policy: Callable[[], Guarded]) -> None:
        self._indicator = indicator
        self._policy = policy
        self._samples: dict[tuple[str, int], Sample[Measure]] = {}
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
        """What is decided about a sample at a call's denoiser."""
        key = (call.denoiser.name, sample)
        if key not in self._samples:
            self._samples[key] = Sample(self._indicator(), self._policy())
        return self._samples[key]

    def leaders(self, call: Call) -> dict[int, int]:
        """Row of the leading branch, for each sample that this step has not decided about yet."""
        rows: dict[int, int] = {}
        for index, row in enumerate(call.rows):
            undecided = self.sample(call, row.sample).decided != call.step.index
            if undecided and (row.sample not in rows or row.branch == "cond"):
                rows[row.sample] = index
        for number, index in rows.items():
            self._lead(self.sample(call, number), call.rows[index].branch)
        return rows

    def _lead(self, sample: Sample[Measure], branch: str) -> None:
        """Let a branch lead. A new leader is measured afresh: branches are not comparable."""
        if branch != sample.leader:
            sample.leader, sample.indicator = branch, self._indicator()

    def decide(self, call: Call, values: dict[int, Tensor | None]) -> None:
        """Decide about some samples from their indicators; reads the device at most once."""
        numbers = _read(values)
        for sample, value in numbers.items():
            state = self.sample(call, sample)
            self._watch(call.step, state.policy, value)
            state.compute = state.policy.compute(call.step, value)
            state.decided = call.step.index

    def _watch(self, step: Step, policy: Guarded, value: float | None) -> None:
        guarded = step.index < policy.warmup or (policy.last and step.last)
        if value is not None and not guarded:
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
