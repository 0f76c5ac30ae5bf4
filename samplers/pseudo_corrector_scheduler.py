"""FlowTurbo's pseudo-corrector as a diffusers scheduler.

``pipe.scheduler = samplers.PseudoCorrectorScheduler.from_config(pipe.scheduler.config)``
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diffusers.schedulers.scheduling_utils import SchedulerMixin

from accel.errors import BadInput
from samplers.multistep import Update
from samplers.prediction import Level
from samplers.predictor_corrector import PredictorCorrectorScheduler
from samplers.pseudo_corrector import arranged, correct, predict
from samplers.schedule import Grid, Request

__all__ = ["PseudoCorrectorScheduler", "SchedulerMixin"]  # pipelines on disk look it up here


class PseudoCorrectorScheduler(PredictorCorrectorScheduler):
    """Heun's method at one evaluation a step, for variance-preserving models and flows.

    The sample handed to the pipeline is the predicted one; it is corrected at the start of the
    next ``step``.
    """

    def __init__(self, heun: int = 0, **model: Any) -> None:
        """Choose the solver and describe the model.

        Args:
            heun: Steps of Heun's method proper at the start, of two evaluations and two levels.
            **model: Fields of `samplers.prediction.Conversion`, and of `samplers.flow.FlowNoise`
                or `samplers.vp.VPNoise`; best read from a model's own scheduler (`from_config`).

        Raises:
            BadInput: If a setting is out of its range or not known.
        """
        if heun < 0:
            raise BadInput(f"heun is {heun}; it counts steps at the start of a run: 0 or more.")
        super().__init__({"heun": heun}, model)

    @property
    def follows_ode(self) -> bool:
        """Whether there is one evaluation a step: no steps of Heun's method."""
        return not self.config.heun

    def stage(self, position: int) -> int:
        """How many evaluations of the same step come before: 1 for Heun's second one."""
        here, there = self._levels[position : position + 2]
        return int(here == there)

    def updates(self, levels: Sequence[Level], index: int) -> list[Update]:
        """Euler's step; between the two evaluations at one level, the correction of Heun's."""
        here, there = levels[index], levels[index + 1]
        if here != there:
            return [predict(there, here, flow=self._flow)]
        half = predict(here, levels[index - 1], flow=self._flow).history[0] / 2.0
        return [Update(1.0, (0.0,)), Update(1.0, (half, -half))]

    def corrected(self, levels: Sequence[Level], index: int) -> list[Update]:
        """The trapezoid, except over steps of Heun's method, which bring their own."""
        here, there, after = levels[index : index + 3]
        if there in (here, after) or (here.pure_noise and not self._flow):
            return []
        return [correct(there, here, flow=self._flow)]

    @property
    def _flow(self) -> bool:
        return bool(self.config.prediction_type == "flow_prediction")

    def _prepare(self, levels: Sequence[Level]) -> None:
        self.space = "velocity" if self._flow else "noise"
        super()._prepare(levels)

    def _schedule(self, asked: Request) -> Grid:
        grid = super()._schedule(asked)
        if not self.config.heun:
            return grid
        return self._noise().moved(grid, arranged(grid.levels, self.config.heun, flow=self._flow))
