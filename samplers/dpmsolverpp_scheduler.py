"""DPM-Solver++ as a diffusers scheduler, with a third order that is one.

``pipe.scheduler = samplers.DPMSolverPPScheduler.from_config(pipe.scheduler.config, order=2)``
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diffusers.schedulers.scheduling_utils import SchedulerMixin

from accel.errors import BadInput
from samplers.adams import usable_order
from samplers.dpmsolverpp import Start, Variant, update, update_after_noise
from samplers.multistep import Update
from samplers.multistep_scheduler import MultistepScheduler
from samplers.prediction import Level

__all__ = ["DPMSolverPPScheduler", "SchedulerMixin"]  # pipelines on disk look the mixin up here

FEW_STEPS = 15
"""Below this many steps, ``lower_order_final`` lowers the order toward the end."""


class DPMSolverPPScheduler(MultistepScheduler):
    """DPM-Solver++ (multistep) for variance-preserving models and rectified flows."""

    def __init__(
        self,
        order: int = 2,
        variant: Variant = "midpoint",
        eta: float = 0.0,
        *,
        lower_order_final: bool = True,
        euler_at_final: bool = False,
        start: Start = "first",
        **model: Any,
    ) -> None:
        """Choose the solver and describe the model.

        Args:
            order: 1, 2 or 3. The authors use 2 for guided and 3 for unconditional sampling.
            variant: How order 2 weighs its difference: ``midpoint`` or ``heun``.
            eta: Noise added on the way, in [0, 1]: 0 is the ODE, 1 the ancestral SDE; order ≤ 2.
            lower_order_final: With fewer than 15 steps, end with orders …, 2, 1.
            euler_at_final: Make the last step of first order in any case; one that ends at zero
                noise always is.
            start: Order of the step that follows one from pure noise: ``first``, or ``second``
                (with ``order`` 2 or 3 and ``eta`` 0).
            **model: Fields of `samplers.prediction.Conversion`, and of `samplers.flow.FlowNoise`
                or `samplers.vp.VPNoise`; best read from a model's own scheduler (`from_config`).

        Raises:
            BadInput: If a setting is out of its range or not known.
        """
        _check(order, variant, eta, start)
        solver = {
            "order": order,
            "variant": variant,
            "eta": eta,
            "lower_order_final": lower_order_final,
            "euler_at_final": euler_at_final,
            "start": start,
        }
        super().__init__(solver, model)

    def updates(self, levels: Sequence[Level], index: int) -> list[Update]:
        """The updates of one step by the number of predictions at hand, 1 first."""
        count = len(levels) - 1
        order = int(self.config.order)
        if self.config.lower_order_final and count < FEW_STEPS:
            order = min(order, count - index)
        if self.config.euler_at_final and index == count - 1:
            order = 1
        target, nodes = levels[index + 1], levels[max(index - order + 1, 0) : index + 1][::-1]
        found = [
            update(target, nodes[:k], self.config.variant, self.config.eta)
            for k in range(1, usable_order(target, nodes) + 1)
        ]
        if self.config.start == "second" and _after_noise(target, nodes):
            found.append(update_after_noise(target, nodes[:2]))
        return found


def _after_noise(target: Level, nodes: Sequence[Level]) -> bool:
    """Whether the step is the one after a step from pure noise, and not yet the last."""
    return len(nodes) > 1 and nodes[1].pure_noise and target.sigma > 0.0


def _check(order: int, variant: str, eta: float, start: str) -> None:
    if order not in (1, 2, 3):
        raise BadInput(f"order is {order!r}; DPM-Solver++ has orders 1, 2 and 3.")
    if variant not in ("midpoint", "heun"):
        raise BadInput(f"variant is {variant!r}; it must be midpoint or heun.")
    if not 0.0 <= eta <= 1.0:
        raise BadInput(f"eta is {eta}; it must lie in [0, 1]: 0 is the ODE, 1 the ancestral SDE.")
    if eta and order == 3:
        raise BadInput(
            f"order=3 with eta={eta}: the SDE is solved with order 1 or 2 only. Set order=2, or "
            "eta=0."
        )
    if start not in ("first", "second") or (start == "second" and eta):
        raise BadInput(
            f"start is {start!r} with eta={eta}; it must be first, or second with eta=0."
        )
