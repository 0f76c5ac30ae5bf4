"""DEIS as a diffusers scheduler: it ends at σ = 0 for flows too.

``pipe.scheduler = samplers.DEISScheduler.from_config(pipe.scheduler.config, order=3)``
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, get_args

import numpy as np
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from accel.errors import BadInput
from samplers.deis import Clock, Form, flow_clock, update
from samplers.multistep import Update
from samplers.multistep_scheduler import MultistepScheduler, Space
from samplers.prediction import Level
from samplers.schedule import Floats
from samplers.vp import VPNoise

__all__ = ["DEISScheduler", "SchedulerMixin"]  # pipelines on disk look the mixin up here

FEW_STEPS = 15
"""Below this many steps, ``lower_order_final`` lowers the order toward the end."""


class DEISScheduler(MultistepScheduler):
    """DEIS (multistep) for variance-preserving models and rectified flows.

    Where a run starts at pure noise its ε is the sample itself. The time t and the index of the
    step are finite there, and tAB and iPNDM go on from it with order 2; σ/α is not, and the others
    take a second step of first order.
    """

    space: Space = "noise"

    def __init__(
        self, order: int = 2, form: Form = "tAB", *, lower_order_final: bool = True, **model: Any
    ) -> None:
        """Choose the solver and describe the model.

        Args:
            order: 1 to 4: how many predictions a step uses.
            form: ``tAB``, ``rhoAB`` or ``lambdaAB``, the variable of their polynomial; ``iPNDM``
                for fixed weights.
            lower_order_final: With fewer than 15 steps, end with orders …, 3, 2, 2; and make the
                step of ``lambdaAB`` to σ = 0 of first order.
            **model: Fields of `samplers.prediction.Conversion`, and of `samplers.flow.FlowNoise`
                or `samplers.vp.VPNoise`; best read from a model's own scheduler (`from_config`).

        Raises:
            BadInput: If a setting is out of its range or not known.
        """
        if order not in (1, 2, 3, 4):
            raise BadInput(f"order is {order!r}; DEIS has orders 1, 2, 3 and 4.")
        if form not in get_args(Form):
            raise BadInput(f"form is {form!r}; it must be one of {', '.join(get_args(Form))}.")
        super().__init__(
            {"order": order, "form": form, "lower_order_final": lower_order_final}, model
        )

    def updates(self, levels: Sequence[Level], index: int) -> list[Update]:
        """The updates of one step by the number of predictions at hand, 1 first."""
        form, target, order = self.config.form, levels[index + 1], self._order(levels, index)
        nodes = levels[max(index - order + 1, 0) : index + 1][::-1]
        if form in ("rhoAB", "lambdaAB"):
            nodes = [node for node in nodes if node.alpha > 0.0]
        return [update(target, nodes[:k], form, self._clock) for k in range(1, len(nodes) + 1)]

    def _order(self, levels: Sequence[Level], index: int) -> int:
        """How many predictions a step uses at most."""
        count, order = len(levels) - 1, int(self.config.order)
        if not self.config.lower_order_final:
            return order
        if self.config.form == "lambdaAB" and levels[index + 1].sigma == 0.0:
            return 1
        return min(order, max(count - index, 2)) if count < FEW_STEPS else order

    def _prepare(self, levels: Sequence[Level]) -> None:
        noise = self._noise()
        self._clock = table_clock(noise.table()) if isinstance(noise, VPNoise) else flow_clock
        super()._prepare(levels)


def table_clock(table: Floats) -> Clock:
    """The timestep as a function of ρ = σ/α, between the entries of a table of training levels.

    ``ln(1 + ρ²)``, the sum of the −ln(1 − β) so far, is taken to be linear from one timestep to
    the next, and on beyond the last; it is 0 one timestep before the first.
    """
    squares = np.asarray(table, np.float64) ** 2
    ends = np.concatenate([[0.0], np.log1p(squares)])
    times = np.arange(len(ends)) - 1.0
    last = ends[-1] - ends[-2]

    def clock(rho: float) -> float:
        at = math.log1p(rho * rho)
        beyond = max(at - ends[-1], 0.0) / last
        return float(np.interp(at, ends, times) + beyond)

    return clock
