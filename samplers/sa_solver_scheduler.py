"""SA-Solver as a diffusers scheduler.

``pipe.scheduler = samplers.SASolverScheduler.from_config(pipe.scheduler.config, tau=0.6)``
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from accel.errors import BadInput
from samplers.adams import correct, predict, usable_order
from samplers.flow import FlowNoise
from samplers.multistep import Update
from samplers.prediction import Level
from samplers.predictor_corrector import PredictorCorrectorScheduler

__all__ = ["SASolverScheduler", "SchedulerMixin"]  # pipelines on disk look the mixin up here


class SASolverScheduler(PredictorCorrectorScheduler):
    """SA-Solver on the x0-prediction, for variance-preserving models and rectified flows."""

    def __init__(
        self,
        predictor_order: int = 2,
        corrector_order: int = 2,
        tau: float = 1.0,
        *,
        tau_from: float = 0.8,
        tau_to: float = 0.2,
        lower_order_final: bool = True,
        **model: Any,
    ) -> None:
        """Choose the solver and describe the model.

        Args:
            predictor_order: How many predictions the predictor uses: 1, 2 or 3.
            corrector_order: How many the corrector uses, the new one counted: 2, 3 or 4; 0: none.
            tau: Noise on the way, at least 0: 0 is the ODE, 1 the ancestral SDE.
            tau_from: Where noise begins, as a share of the training noise levels in [0, 1].
            tau_to: Where noise ends, as the same share.
            lower_order_final: End with orders …, 2, 1.
            **model: Fields of `samplers.prediction.Conversion`, and of `samplers.flow.FlowNoise`
                or `samplers.vp.VPNoise`; best read from a model's own scheduler (`from_config`).

        Raises:
            BadInput: If a setting is out of its range or not known.
        """
        if predictor_order not in (1, 2, 3) or corrector_order not in (0, 2, 3, 4):
            raise BadInput(
                f"predictor_order is {predictor_order!r} and corrector_order {corrector_order!r}; "
                "they must be 1, 2 or 3, and 0 (no corrector), 2, 3 or 4."
            )
        if not 0.0 <= tau < math.inf or not 0.0 <= tau_to <= tau_from <= 1.0:
            raise BadInput(
                f"tau is {tau} from {tau_from} to {tau_to}; it must be at least 0, and the shares "
                "must fall from at most 1 to at least 0."
            )
        solver = {
            "predictor_order": predictor_order,
            "corrector_order": corrector_order,
            "tau": tau,
            "tau_from": tau_from,
            "tau_to": tau_to,
            "lower_order_final": lower_order_final,
        }
        super().__init__(solver, model)

    @property
    def follows_ode(self) -> bool:
        """Whether τ is 0."""
        return not self.config.tau

    def updates(self, levels: Sequence[Level], index: int) -> list[Update]:
        """The predictors of one step, of one prediction, two and so on."""
        target, nodes = levels[index + 1], self._nodes(levels, index, self.config.predictor_order)
        noise = self._noises[index]
        return [predict(target, nodes[:k], noise, "bh1") for k in range(1, len(nodes) + 1)]

    def corrected(self, levels: Sequence[Level], index: int) -> list[Update]:
        """The correctors of one step, of one earlier prediction, two and so on."""
        if not self.config.corrector_order:
            return []
        earlier = int(self.config.corrector_order) - 1
        target, nodes = levels[index + 1], self._nodes(levels, index, earlier)
        noise = self._noises[index]
        return [correct(target, nodes[:k], noise, "bh1") for k in range(1, len(nodes) + 1)]

    def _nodes(self, levels: Sequence[Level], index: int, order: int) -> list[Level]:
        """Levels of the predictions that a step uses at most, the newest first."""
        if self.config.lower_order_final:
            order = min(order, len(levels) - 1 - index)
        nodes = list(levels[max(index - order + 1, 0) : index + 1][::-1])
        return nodes[: usable_order(levels[index + 1], nodes)]

    def _prepare(self, levels: Sequence[Level]) -> None:
        low, high = self.config.tau_to - 1e-6, self.config.tau_from + 1e-6
        amount = float(self.config.tau) ** 2
        shares = self._shares(levels[:-1])
        self._noises = [amount if low <= share <= high else 0.0 for share in shares]
        super()._prepare(levels)

    def _shares(self, levels: Sequence[Level]) -> list[float]:
        """Where levels are among those of the training: 0 no noise, 1 the most."""
        noise = self._noise()
        if isinstance(noise, FlowNoise):
            return [level.sigma for level in levels]
        table = np.log(noise.table())
        ratios = [-level.lam for level in levels]
        found = np.interp(ratios, table, np.arange(len(table))) / len(table)
        return [float(share) for share in found]
