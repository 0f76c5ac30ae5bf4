"""What a solver remembers of earlier steps, and how to make it forget."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from accel.errors import UnsupportedModel

NOTHING = (
    "CogVideoXDDIMScheduler",
    "DDIMScheduler",
    "DDPMScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "EDMEulerScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "LCMScheduler",
    "TCDScheduler",
)
"""Schedulers of one evaluation a step that remember none before it."""

RAMPED: dict[str, dict[str, Any]] = {
    "DEISMultistepScheduler": {"lower_order_nums": 0},
    "DPMSolverMultistepScheduler": {"lower_order_nums": 0},
    "SASolverScheduler": {"lower_order_nums": 0, "last_sample": None},
    "UniPCMultistepScheduler": {"lower_order_nums": 0, "last_sample": None},
}
"""Schedulers whose order rises with the steps made, and what starts that anew.

Without the sample before, UniPC and SA-Solver make no correction: it would correct the step before
the jump by an output behind it.
"""


def forgetter(scheduler: Any, method: str) -> Callable[[], None]:
    """What makes a scheduler forget earlier outputs: its next step is of first order.

    Args:
        scheduler: Ours, or one of diffusers'.
        method: Name of the method that needs it, for the refusal.

    Raises:
        UnsupportedModel: If it keeps a history in another way, or is not known.
    """
    name = type(scheduler).__name__
    if hasattr(scheduler, "reset_history"):
        forget: Callable[[], None] = scheduler.reset_history
        return forget
    if name in NOTHING:
        return lambda: None
    if name not in RAMPED:
        raise UnsupportedModel(
            f"{method}: reset_history does not fit {name}, whose history is not known. Set "
            "reset_history=False, or put a sampler such as samplers.DPMSolverPP into the plan."
        )

    def reset() -> None:
        for attribute, value in RAMPED[name].items():
            setattr(scheduler, attribute, value)

    return reset
