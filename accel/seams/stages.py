"""Where a solver's step starts: solvers of several evaluations a step have stages.

Stages of one step are weighed against each other, so what changes from step to step – whether there
is guidance, above all – must not change between them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from accel.trajectory import Step

RUNGE_KUTTA = 4
"""Evaluations of each of the first steps of PNDM, unless it skips them."""


def start_of(step: Step, scheduler: Any) -> Step:
    """The evaluation at which the solver's step began: the given one, or an earlier one.

    Args:
        step: An evaluation of a run.
        scheduler: What the run follows. One of ours of several stages has ``stage(position)``.
    """
    before = min(_stage(step, scheduler), step.index)
    if not before:
        return step
    return replace(step, index=step.index - before, position=step.position - before)


def _stage(step: Step, scheduler: Any) -> int:
    """How many evaluations of the same step come before."""
    if hasattr(scheduler, "stage"):
        return int(scheduler.stage(step.position))
    name = type(scheduler).__name__
    if name == "DPMSolverSinglestepScheduler":
        return int(scheduler.order_list[step.position]) - 1
    if name == "PNDMScheduler":
        return _pndm(step, scheduler)
    return step.position % int(getattr(scheduler, "order", 1))  # Heun, KDPM2: pairs


def _pndm(step: Step, scheduler: Any) -> int:
    """Some steps of Runge and Kutta; or else the first one is taken again from its end.

    It counts the evaluations that were made, wherever in the schedule the first one was.
    """
    if scheduler.config.skip_prk_steps:
        return int(step.index == 1)
    return step.index % RUNGE_KUTTA if step.index < len(scheduler.prk_timesteps) else 0
