"""UniPC as a diffusers scheduler.

``pipe.scheduler = samplers.UniPCScheduler.from_config(pipe.scheduler.config, order=2)``
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diffusers.schedulers.scheduling_utils import SchedulerMixin

from accel.errors import BadInput
from samplers.adams import correct, predict, usable_order
from samplers.multistep import Update
from samplers.prediction import Level
from samplers.predictor_corrector import PredictorCorrectorScheduler
from samplers.unipc import Variant

__all__ = ["SchedulerMixin", "UniPCScheduler"]  # pipelines on disk look the mixin up here


class UniPCScheduler(PredictorCorrectorScheduler):
    """UniPC on the x0-prediction, for variance-preserving models and rectified flows."""

    def __init__(
        self,
        order: int = 2,
        variant: Variant = "bh2",
        *,
        corrector: bool = True,
        lower_order_final: bool = True,
        **model: Any,
    ) -> None:
        """Choose the solver and describe the model.

        Args:
            order: 1, 2 or 3: of the predictor.
            variant: B(h) of UniP-2 and UniC-1: ``bh1`` or ``bh2``.
            corrector: Whether steps are corrected.
            lower_order_final: End with orders …, 2, 1.
            **model: Fields of `samplers.prediction.Conversion`, and of `samplers.flow.FlowNoise`
                or `samplers.vp.VPNoise`; best read from a model's own scheduler (`from_config`).

        Raises:
            BadInput: If a setting is out of its range or not known.
        """
        if order not in (1, 2, 3):
            raise BadInput(f"order is {order!r}; UniPC has orders 1, 2 and 3.")
        if variant not in ("bh1", "bh2"):
            raise BadInput(f"variant is {variant!r}; it must be bh1 or bh2.")
        solver = {
            "order": order,
            "variant": variant,
            "corrector": corrector,
            "lower_order_final": lower_order_final,
        }
        super().__init__(solver, model)

    def updates(self, levels: Sequence[Level], index: int) -> list[Update]:
        """UniP-1, UniP-2, … for one step."""
        target, nodes = levels[index + 1], self._nodes(levels, index)
        variant = self.config.variant
        return [predict(target, nodes[:k], rule=variant) for k in range(1, len(nodes) + 1)]

    def corrected(self, levels: Sequence[Level], index: int) -> list[Update]:
        """UniC-1, UniC-2, … for one step."""
        if not self.config.corrector:
            return []
        target, nodes = levels[index + 1], self._nodes(levels, index)
        variant = self.config.variant
        return [correct(target, nodes[:k], rule=variant) for k in range(1, len(nodes) + 1)]

    def _nodes(self, levels: Sequence[Level], index: int) -> list[Level]:
        """Levels of the predictions that a step uses at most, the newest first."""
        order = int(self.config.order)
        if self.config.lower_order_final:
            order = min(order, len(levels) - 1 - index)
        nodes = list(levels[max(index - order + 1, 0) : index + 1][::-1])
        return nodes[: usable_order(levels[index + 1], nodes)]
