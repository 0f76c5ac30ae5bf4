"""Stop a run within a step, and keep what there is of it.

Pipelines that look at their ``interrupt`` are let finish the step that they are at; the latents
are then replaced by what the run was heading for, and the pipeline decodes those: a whole picture.
Others, and runs that are compared or timed, are broken off at the next call of a network.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from threading import Event
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from accel.attach import Run
    from accel.trajectory import Step, Update

NETWORKS = ("unet", "transformer", "transformer_2")
LAST = -1
"""Depth of an editor that is asked after those of all methods."""


class Stopped(Exception):
    """The run was broken off because somebody asked for that."""


class Estimate:
    """The result that a run is heading for, by its latest evaluation: no network is asked again.

    Args:
        run: An attached plan. What is put on it goes when the run does.
    """

    def __init__(self, run: Run) -> None:
        self._trajectory = run.trajectory
        self._update: Update | None = None
        run.trajectory.edit(LAST, self._look)

    def _look(self, update: Update) -> Any:
        self._update = update
        return update.output

    @property
    def known(self) -> bool:
        """Whether an evaluation was made."""
        return self._update is not None

    def latents(self) -> Tensor:
        """x0 in float32, ``[rows, …]`` as the pipeline has its latents."""
        from accel.seams.spaces import convert, matching

        update, scheduler = self._update, self._trajectory.scheduler
        assert update is not None
        _, alpha, _ = update.step.level
        inverted = scheduler.config.get("invert_sigmas", False)
        output = update.output.float() * (-1.0 if inverted else 1.0)
        sample = update.sample.float() * (alpha if _over_signal(scheduler) else 1.0)
        sample, output = matching(sample, output)  # a learned variance is left out
        return convert(output, sample, update.step, "x0", network="")


def _over_signal(scheduler: Any) -> bool:
    """Whether its samples are over α: its noise begins as large as σ/α, not as 1."""
    return float(getattr(scheduler, "init_noise_sigma", 1.0)) > 1.5


class Stop:
    """Stops one job.

    Args:
        asked: Set by whoever wants it to stop.

    Attributes:
        partial: Whether the pipeline was made to decode before its last step.
    """

    def __init__(self, asked: Event) -> None:
        self._asked = asked
        self._keeps = False
        self.partial = False

    def check(self) -> None:
        """Break off here if that was asked for.

        Raises:
            Stopped: If it was.
        """
        if self._asked.is_set():
            raise Stopped

    @contextmanager
    def guarding(self, pipe: Any) -> Iterator[None]:
        """Inside, no network of the pipeline is called after a stop was asked for.

        Except where the step that is under way can be kept: then that is finished. Hooks of torch
        are used, because those do not mind a plan that is put on or taken off in the midst of it.
        """
        with ExitStack() as stack:
            for network in filter(None, (getattr(pipe, name, None) for name in NETWORKS)):
                stack.callback(network.register_forward_pre_hook(self._on_call).remove)
            yield

    def _on_call(self, _network: Any, _args: Any) -> None:
        if self.partial or not self._keeps:
            self.check()

    def keeping(self, run: Run, estimate: Estimate) -> None:
        """Have a run end with a picture if it is stopped, where its pipeline can be interrupted.

        Args:
            run: The attached plan.
            estimate: Of the same run.
        """
        pipe = run.pipe
        self._keeps = self.partial = False
        if not hasattr(type(pipe), "interrupt"):
            return

        def look(step: Step, sample: Tensor) -> Tensor:
            self._keeps = True
            complete = step.total is not None and step.index + 1 >= step.total
            if complete or self.partial or not self._asked.is_set():
                return sample
            self.partial = pipe._interrupt = True
            return estimate.latents().to(sample.dtype)

        run.trajectory.revisers.append(look)
