"""OLSS as a diffusers scheduler: it keeps the noise and all outputs, and takes fitted sums.

``pipe.scheduler = samplers.OLSSScheduler.from_config(pipe.scheduler.config, **numbers)``, with the
fields of a calibrated `samplers.OLSS` (``method.settings()``); ``save_pretrained`` writes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from pydantic import ValidationError
from torch import Tensor

from accel.errors import BadInput
from accel.seams.seeding import Generator
from samplers.base import SolverScheduler
from samplers.fingerprint import Fingerprint, process_digest
from samplers.multistep import Update
from samplers.olss import OLSS
from samplers.prediction import Conversion, Level
from samplers.schedule import Grid, Request

__all__ = ["OLSSScheduler", "SchedulerMixin"]  # pipelines on disk look the mixin up here


class OLSSScheduler(SolverScheduler):
    """Calibrated steps for variance-preserving models and rectified flows."""

    def __init__(
        self,
        noise: Sequence[float] = (),
        outputs: Sequence[Sequence[float]] = (),
        path_timesteps: Sequence[float] = (),
        path_sigmas: Sequence[float] = (),
        asked_sigmas: Sequence[float] = (),
        refined: int = 0,
        made_for: Fingerprint | dict[str, Any] | None = None,
        **model: Any,
    ) -> None:
        """Take the numbers of a calibration and describe the model.

        Args:
            noise: Weight of the initial noise in each step.
            outputs: Weights of the outputs in each step, the oldest first: k + 1 in step k.
            path_timesteps: What the network is told; without any, the schedule's own.
            path_sigmas: Noise levels of the steps and of the end, with ``path_timesteps``.
            asked_sigmas: Noise levels that the schedule must have by itself, of as many steps or
                more; any where empty.
            refined: Steps of gradient descent behind the numbers.
            made_for: Fingerprint of what the numbers were measured on.
            **model: Fields of `samplers.prediction.Conversion`, and of `samplers.flow.FlowNoise`
                or `samplers.vp.VPNoise`; best read from a model's own scheduler (`from_config`).

        Raises:
            BadInput: If the numbers do not fit together, or were measured on another process.
        """
        given = {
            "noise": noise,
            "outputs": outputs,
            "path_timesteps": path_timesteps,
            "path_sigmas": path_sigmas,
            "asked_sigmas": asked_sigmas,
            "refined": refined,
            "made_for": made_for,
        }
        try:
            self._numbers = OLSS.model_validate(given)
        except ValidationError as error:
            raise BadInput(f"OLSSScheduler cannot use these numbers: {error}") from error
        self._start: Tensor | None = None
        self._kept: list[Tensor] = []
        self.asked: tuple[float, ...] = ()
        super().__init__(self._numbers.model_dump(), model)
        if self._numbers.made_for is not None:
            self._numbers.made_for.check(
                "OLSSScheduler",
                process=process_digest(self),
                prediction=self.config.prediction_type,
            )

    @property
    def follows_ode(self) -> bool:
        """It evaluates once a step, on its own trajectory, and adds no noise."""
        return True

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start the run: from pure noise only.

        Raises:
            BadInput: If the run is to start later (image-to-image at a strength below 1).
        """
        if begin_index:
            self._refuse(f"this run starts at step {begin_index} (a strength below 1)")
        super().set_begin_index(begin_index)

    def _schedule(self, asked: Request) -> Grid:
        numbers = self._numbers
        served = max(len(numbers.asked_sigmas) - 1, len(numbers.noise))
        if asked.count != served:
            self._refuse(f"this run has {asked.count} steps, and the numbers are for {served}")
        own = super()._schedule(asked)
        self.asked = tuple(own.sigmas.tolist())
        if numbers.asked_sigmas and not near(self.asked, numbers.asked_sigmas):
            self._refuse(
                f"this run asks for the noise levels {_listed(self.asked)}, and the numbers were "
                f"measured in the place of {_listed(numbers.asked_sigmas)} (another shift, "
                "resolution or spacing)"
            )
        return self._path() if numbers.path_sigmas else own

    def _path(self) -> Grid:
        numbers, process = self._numbers, self._noise()
        times = np.array(numbers.path_timesteps)
        sigmas = np.array(numbers.path_sigmas, np.float32)
        whole = self.config.prediction_type != "flow_prediction" and (times % 1 == 0).all()
        levels = tuple(process.level(float(sigma)) for sigma in sigmas)
        return Grid(times.astype(np.int64 if whole else np.float32), sigmas, levels)

    def _prepare(self, levels: Sequence[Level]) -> None:  # noqa: ARG002
        self._start = None
        self._kept = []

    def _advance(self, index: int, output: Tensor, sample: Tensor, generator: Generator) -> Tensor:  # noqa: ARG002
        if index != len(self._kept):
            self._refuse(f"this run goes to step {index} after {len(self._kept)} steps")
        if self._start is None:
            self._start = sample.clone()
        elif self._start.shape != sample.shape:
            self._refuse(
                f"this run goes from samples of {tuple(self._start.shape)} to "
                f"{tuple(sample.shape)} on the way"
            )
        self._kept.append(kept(self._conversion, output, sample, self._levels[index]))
        reached = self._combine(index)
        if index == len(self._numbers.noise) - 1:
            self._prepare(())
        return reached

    def _combine(self, index: int) -> Tensor:
        """The state after step ``index``."""
        assert self._start is not None
        step = Update(self._numbers.noise[index], self._numbers.outputs[index])
        return step.apply(self._start, self._kept)

    def _refuse(self, found: str) -> None:
        raise BadInput(
            f"OLSS takes its calibrated steps all, in order, from pure noise, but {found}. "
            "Calibrate it for this run (`accel calibrate olss`), or use samplers.DPMSolverPP."
        )


def kept(conversion: Conversion, output: Tensor, sample: Tensor, level: Level) -> Tensor:
    """What is kept of an output: all but a learned variance; where x0 is clipped, that x0."""
    if conversion.thresholding:
        return conversion.data(output, sample, level)
    return conversion.cut(output, sample).to(sample.dtype, copy=True)


def near(found: Sequence[float], expected: Sequence[float]) -> bool:
    """Whether two lists of noise levels are one schedule."""
    return bool(np.allclose(np.array(found), np.array(expected), rtol=1e-3, atol=1e-5))


def _listed(sigmas: Sequence[float]) -> str:
    return ", ".join(f"{sigma:.4g}" for sigma in sigmas)
