"""More schedules for a pipeline's scheduler: other numbers of steps, other sizes, in one run."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from accel import hooks
from accel.errors import BadInput, UnsupportedModel

CLOSE = 1e-3
"""How far a given mu or σ may lie from what a pipeline computes by itself."""


@dataclass(frozen=True)
class Schedule:
    """A part of a schedule, with a solver of its own.

    Attributes:
        solver: A copy of the pipeline's scheduler that has this schedule.
        begin: Where in the schedule the part begins; it ends where the schedule does.
    """

    solver: Any
    begin: int

    def timestep(self, index: int) -> Tensor:
        """The timestep of a step of the part, a scalar."""
        found: Tensor = self.solver.timesteps[self.begin + index]
        return found

    def scaled(self, sample: Tensor, index: int) -> Tensor:
        """What the network is to be given of a sample."""
        if not hasattr(self.solver, "scale_model_input"):
            return sample
        scaled: Tensor = self.solver.scale_model_input(sample, self.timestep(index))
        return scaled

    def noised(self, clean: Tensor, noise: Tensor) -> Tensor:
        """A clean sample ``[B, …]`` at the noise level that the part begins with."""
        times = self.timestep(0).expand(len(clean)).to(clean.device)
        if hasattr(self.solver, "scale_noise"):
            noised: Tensor = self.solver.scale_noise(clean, times, noise)
        else:
            noised = self.solver.add_noise(clean, noise, times)
        return noised.to(clean.dtype)

    def stepped(
        self, output: Tensor, sample: Tensor, index: int, options: dict[str, Any]
    ) -> Tensor:
        """The sample after a step."""
        stepped: Tensor = self.solver.step(output, self.timestep(index), sample, **options)[0]
        return stepped


class Schedules:
    """Hears how a pipeline asks for its schedule, and makes others in its manner.

    Args:
        method: Name of the method that needs them, for refusals.
    """

    def __init__(self, method: str) -> None:
        self._method = method
        self._asked: dict[str, Any] = {}

    def check(self, scheduler: Any) -> None:
        """Refuse a scheduler that makes no plain steps.

        Raises:
            UnsupportedModel: If it evaluates the network more than once a step.
        """
        if getattr(scheduler, "order", 1) != 1:
            raise UnsupportedModel(
                f"{self._method} does not fit {type(scheduler).__name__}, which evaluates the "
                f"network {scheduler.order} times a step: use a scheduler that does so once."
            )

    def attach(self, scheduler: Any) -> Callable[[], None]:
        """Listen to the scheduler of a pipeline; returns the undo."""
        names = tuple(inspect.signature(type(scheduler).set_timesteps).parameters)[1:]

        def listen(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            self._asked = dict(zip(names, args, strict=False)) | kwargs
            return inner(*args, **kwargs)

        return hooks.wrap(scheduler, "set_timesteps", listen)

    def make(
        self, like: Any, steps: int, strength: float, tokens: tuple[int, int], shift: float | None
    ) -> Schedule:
        """The end of a schedule, of so many steps.

        The whole one has steps / strength, as where a picture is made from another.

        Args:
            like: The pipeline's scheduler, or a copy.
            steps: At least 1.
            strength: Where it begins, in (0, 1]; 1: at pure noise.
            tokens: Of the pipeline's own picture, and of the one that the schedule is for.
            shift: Of a flow's times; ``None``: what the pipeline would take for that size.

        Raises:
            BadInput: If the pipeline was called with timesteps or sigmas of the user's.
            UnsupportedModel: If the scheduler's times cannot be shifted, and a shift is given.
        """
        solver = copy.deepcopy(like)
        whole = max(steps, round(steps / strength))
        asked = self._asked | self._counted(whole)
        if shift is not None:
            asked |= self._shifted(solver, shift)
        elif asked.get("mu") is not None:
            asked["mu"] = _moved(solver.config, float(asked["mu"]), *tokens)
        solver.set_timesteps(**asked)
        begin = len(solver.timesteps) - steps
        if hasattr(solver, "set_begin_index"):
            solver.set_begin_index(begin)
        return Schedule(solver, begin)

    def _counted(self, steps: int) -> dict[str, Any]:
        """The arguments that say how many steps there are."""
        if self._asked.get("timesteps") is not None:
            self._refuse("timesteps")
        sigmas = self._asked.get("sigmas")
        if sigmas is None:
            return {"num_inference_steps": steps}
        given = torch.as_tensor(sigmas, dtype=torch.float64)
        count = len(given)
        if (given - torch.linspace(1.0, 1.0 / count, count)).abs().max() > CLOSE:
            self._refuse("sigmas")
        return {"sigmas": torch.linspace(1.0, 1.0 / steps, steps).tolist()} | (
            {"num_inference_steps": steps} if self._asked.get("num_inference_steps") else {}
        )

    def _refuse(self, name: str) -> None:
        raise BadInput(
            f"{self._method} makes schedules of its own, and this call has {name} that are not the "
            f"pipeline's: leave {name} out of the call, or the method out of the plan."
        )

    def _shifted(self, solver: Any, shift: float) -> dict[str, Any]:
        """Give a solver's times a shift; returns arguments that do so."""
        config = solver.config
        if config.get("use_dynamic_shifting"):
            return {"mu": shift if config.get("time_shift_type") == "linear" else math.log(shift)}
        if hasattr(solver, "set_shift"):
            solver.set_shift(shift)
        elif "flow_shift" in config and config.get("use_flow_sigmas"):
            solver.register_to_config(flow_shift=shift)
        else:
            raise UnsupportedModel(
                f"{self._method}: shifts are of flows, and {type(solver).__name__} has none that "
                "could be set. Leave shifts out."
            )
        return {}


def _moved(config: Any, mu: float, here: int, there: int) -> float:
    """The mu of another number of tokens, where it is the line that pipelines draw; else mu."""
    names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
    low, high, first, last = (config.get(name) for name in names)
    if None in (low, high, first, last) or low == high:
        return mu
    slope = (last - first) / (high - low)
    if abs(first + slope * (here - low) - mu) > CLOSE:
        return mu
    return float(first + slope * (there - low))
