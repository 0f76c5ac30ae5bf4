"""Solvers that correct: a step is redone with the output at its end, unless nobody computed that.

A method that fills in an output tells the solver nothing new about the step behind it, so that step
is not corrected by it. The output stays the history of the next prediction.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from accel import hooks
from accel.errors import AccelWarning

if TYPE_CHECKING:
    from accel.trajectory import Trajectory, Update

CORRECTS = {
    "SASolverScheduler": "stochastic_adams_moulton_update",
    "UniPCMultistepScheduler": "multistep_uni_c_bh_update",
}
"""Stock schedulers that correct, and the method that gives the corrected sample.

Ours have ``skip_corrector(rows)``: it is called before such a step.
"""

PREDICTED = "this_sample"
"""What that method calls the sample that the predictor reached."""


def spare(trajectory: Trajectory, depth: int) -> Iterator[Callable[[], None]]:
    """Have the scheduler correct no sample by an output that was filled in; yields the undos.

    Args:
        trajectory: Follows the scheduler, and knows what was filled in.
        depth: Of an editor in front of ``scheduler.step``.
    """
    scheduler = trajectory.scheduler
    if hasattr(scheduler, "skip_corrector"):
        yield trajectory.edit(depth, lambda update: _tell(scheduler, update))
        return
    name = type(scheduler).__name__
    method = CORRECTS.get(name)
    if method is None:
        return
    if not hasattr(scheduler, method):
        warnings.warn(
            f"{name} of this version of diffusers corrects steps in another way than is known: "
            "steps that a cache fills in are corrected by what it filled in. Put samplers.UniPC or "
            "samplers.SASolver into the plan.",
            AccelWarning,
            stacklevel=2,
        )
        return
    sparing = _Sparing()
    yield trajectory.edit(depth, sparing.look)
    yield hooks.wrap(scheduler, method, sparing)


def _tell(scheduler: Any, update: Update) -> Any:
    """Name the rows that were filled in; the output stays."""
    if update.filled:
        scheduler.skip_corrector(update.filled)
    return update.output


class _Sparing:
    """Goes around the corrector of a stock scheduler."""

    def __init__(self) -> None:
        self._filled: tuple[int, ...] = ()

    def look(self, update: Update) -> Any:
        """Learn, before a step, which rows stay as predicted; the output stays."""
        self._filled = update.filled
        return update.output

    def __call__(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        predicted = kwargs[PREDICTED]
        if len(self._filled) == len(predicted):
            return predicted
        corrected = inner(*args, **kwargs)
        for row in self._filled:
            corrected[row] = predicted[row]
        return corrected
