"""Singlestep DPM-Solver++ as a diffusers scheduler.

``pipe.scheduler = samplers.DPMSolverPPSingleScheduler.from_config(pipe.scheduler.config, order=3)``
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from accel.errors import BadInput
from accel.seams.seeding import Generator
from samplers.base import SolverScheduler
from samplers.dpmsolverpp_single import Variant, group_updates, plan_groups
from samplers.multistep import Update
from samplers.prediction import Level

__all__ = ["DPMSolverPPSingleScheduler", "SchedulerMixin"]  # pipelines on disk look it up here


class DPMSolverPPSingleScheduler(SolverScheduler):
    """DPM-Solver++ (singlestep) for variance-preserving models and rectified flows.

    Groups are planned from where a run begins, which the pipeline may say after ``set_timesteps``.

    Attributes:
        history: Predictions of the present group, the newest first.
    """

    def __init__(self, order: int = 2, variant: Variant = "midpoint", **model: Any) -> None:
        """Choose the solver and describe the model.

        Args:
            order: Evaluations in a group, and its order: 2 or 3.
            variant: How groups of two weigh their difference: ``midpoint`` or ``heun``.
            **model: Fields of `samplers.prediction.Conversion`, and of `samplers.flow.FlowNoise`
                or `samplers.vp.VPNoise`; best read from a model's own scheduler (`from_config`).

        Raises:
            BadInput: If a setting is out of its range or not known.
        """
        if order not in (2, 3):
            raise BadInput(
                f"order is {order!r}; singlestep DPM-Solver++ has orders 2 and 3. For order 1 use "
                "DPMSolverPPScheduler."
            )
        if variant not in ("midpoint", "heun"):
            raise BadInput(f"variant is {variant!r}; it must be midpoint or heun.")
        self.history: list[Tensor] = []
        self._planned: dict[int, Update] = {}
        super().__init__({"order": order, "variant": variant}, model)

    def reset_history(self) -> None:
        """Begin a new group at the next step, for when the predictions jump."""
        self._planned.clear()

    def stage(self, position: int) -> int:
        """How many evaluations of the same group come before the one at a position."""
        update = self._planned.get(position)
        return 0 if update is None else len(update.history) - 1

    def _prepare(self, levels: Sequence[Level]) -> None:  # noqa: ARG002
        self.history.clear()
        self._planned.clear()

    def _advance(self, index: int, output: Tensor, sample: Tensor, generator: Generator) -> Tensor:  # noqa: ARG002
        if index not in self._planned:
            self._planned = self._plan(index)
        update = self._planned[index]
        self.history.insert(0, self._conversion.data(output, sample, self._levels[index]))
        del self.history[len(update.history) :]
        return update.apply(sample, self.history)

    def _plan(self, first: int) -> dict[int, Update]:
        """The steps of a run by their index, from ``first`` on."""
        levels, start = self._levels, first
        steps: dict[int, Update] = {}
        for size in plan_groups(levels[first:], self.config.order):
            updates = group_updates(levels[start : start + size + 1], self.config.variant)
            steps |= dict(enumerate(updates, start))
            start += size
        return steps
