"""ρRK-DEIS as a diffusers scheduler: one evaluation a ``step``, as pipelines make them.

``pipe.scheduler = samplers.RhoRKScheduler.from_config(pipe.scheduler.config, order=3)``
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from diffusers.schedulers.scheduling_utils import SchedulerMixin

from accel.errors import BadInput
from samplers.multistep import Update
from samplers.multistep_scheduler import MultistepScheduler, Space
from samplers.prediction import Level
from samplers.rho_rk import arranged, plan_steps, stage
from samplers.schedule import Grid, Request

__all__ = ["RhoRKScheduler", "SchedulerMixin"]  # pipelines on disk look the mixin up here


class RhoRKScheduler(MultistepScheduler):
    """Runge-Kutta methods on the noise prediction, for variance-preserving models and flows.

    N evaluations are N ``timesteps``: those inside a step are at its middle and its end, so the
    schedule repeats levels, and of the levels asked for it keeps the starts of the steps.
    """

    space: Space = "noise"

    def __init__(self, order: int = 3, **model: Any) -> None:
        """Choose the solver and describe the model.

        Args:
            order: Evaluations in a step, and its order: 2 (Heun), 3 (Kutta) or 4 (classic).
            **model: Fields of `samplers.prediction.Conversion`, and of `samplers.flow.FlowNoise`
                or `samplers.vp.VPNoise`; best read from a model's own scheduler (`from_config`).

        Raises:
            BadInput: If a setting is out of its range or not known.
        """
        if order not in (2, 3, 4):
            raise BadInput(
                f"order is {order!r}; ρRK has orders 2, 3 and 4. For order 1 use DEISScheduler."
            )
        super().__init__({"order": order}, model)

    @property
    def follows_ode(self) -> bool:
        """Never: evaluations inside a step are beside the trajectory."""
        return False

    def stage(self, position: int) -> int:
        """How many evaluations of the same step come before the one at a position."""
        start, _ = self._step_of(self._levels, position)
        return position - start

    def updates(self, levels: Sequence[Level], index: int) -> list[Update]:
        """From one evaluation to the next, by the number of predictions at hand."""
        start, size = self._step_of(levels, index)
        return stage(levels[start : start + size + 1], index - start)

    def _step_of(self, levels: Sequence[Level], index: int) -> tuple[int, int]:
        """Where the step of an evaluation starts, and how many evaluations it has."""
        sizes = plan_steps(levels, self.config.order)
        starts = accumulate(sizes, initial=0)
        return next(
            (start, size)
            for start, size in zip(starts, sizes, strict=False)
            if index < start + size
        )

    def _schedule(self, asked: Request) -> Grid:
        grid, noise = super()._schedule(asked), self._noise()
        return noise.moved(grid, arranged(grid.levels, self.config.order, noise.at_ratio))
