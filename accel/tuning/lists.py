"""Lists of steps to compute (`cache.StepRehash`), measured while plans are searched for.

A list is of one sequence of steps: it is measured again beside each sampler, schedule and number of
steps, on a few prompts of the search, and from what was seen there follow the lists of all lengths.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from accel.attach import Accelerator
from accel.plan import Plan
from accel.tuning.bench import Case

if TYPE_CHECKING:
    from accel.cache.step_rehash import Answers

WATCHED = 2
"""Prompts that a list rests on."""

SEQUENCE = "sampler"
"""The layer whose methods say at which steps the networks are asked."""


@dataclass
class Lists:
    """Makes lists for a pipeline.

    Attributes:
        pipe: The stock pipeline.
        cases: Prompts: the first few are watched.
    """

    pipe: Any
    cases: Sequence[Case]
    _seen: dict[Plan, Answers] = field(default_factory=dict)

    def __call__(self, beside: Plan, options: Mapping[str, Any]) -> Accelerator:
        """The method with the best list.

        Args:
            beside: The other methods of the plan.
            options: ``budget``: the share of the steps that is computed.

        Raises:
            AccelError: If there is none, or the other methods do not serve the pipeline.
        """
        from accel.cache.step_rehash import StepRehash, listed, watched

        form = StepRehash()
        sequence = Plan(*(method for method in beside if method.layer == SEQUENCE))
        if sequence not in self._seen:
            calls = [case.arguments() for case in self.cases[:WATCHED]]
            self._seen[sequence] = watched(self.pipe, calls, form, sequence.methods)
        return listed(self._seen[sequence], options["budget"], form)
