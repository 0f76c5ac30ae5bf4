"""What every scheduler of this package shares: the face that diffusers pipelines see.

A concrete scheduler adds the settings of its solver and two methods: what it prepares for a
schedule, and how it advances by one step. Grids come from `samplers.vp` and `samplers.flow`,
conversions from `samplers.prediction`.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from difflib import get_close_matches
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.schedulers.scheduling_utils import (
    KarrasDiffusionSchedulers,
    SchedulerMixin,
    SchedulerOutput,
)
from torch import Tensor

import samplers
from accel.errors import BadInput
from accel.seams.seeding import Generator
from samplers.flow import FlowNoise
from samplers.origin import SAID, settings_from
from samplers.prediction import Conversion, Level
from samplers.schedule import Grid, Request, request
from samplers.vp import VPNoise

Settings = Mapping[str, Any]


class SolverScheduler(SchedulerMixin, ConfigMixin, ABC):  # type: ignore[misc]
    """A diffusers scheduler on a variance-preserving process or a rectified flow.

    Its ``model`` settings are the fields of `samplers.prediction.Conversion` and, by
    ``prediction_type``, of `samplers.flow.FlowNoise` or `samplers.vp.VPNoise`.

    Attributes:
        timesteps: What the pipeline hands to the network, ``[N]``.
        sigmas: Noise levels, ``[N + 1]`` in float32: σ of a flow (on the device of the run), σ/α
            otherwise (on the CPU).
        num_inference_steps: N, or ``None`` before ``set_timesteps``.
    """

    _compatibles = [entry.name for entry in KarrasDiffusionSchedulers]  # noqa: RUF012
    order = 1  # evaluations per step, as pipelines count them; not the order of the solver
    init_noise_sigma = 1.0
    _step_index: int | None
    _begin_index: int | None

    def __init__(self, solver: Settings, model: Settings) -> None:
        parts = _parts(model)
        _refuse_unknown(type(self).__name__, model, parts)
        settings = {"_class_name": type(self).__name__, **solver}
        for part in parts:
            settings |= asdict(_read(part, model))
        unset = [name for name in settings if name not in {*solver, *model, "_class_name"}]
        self.register_to_config(**settings, _use_default_values=unset)
        noise = self._noise()
        if isinstance(noise, VPNoise):
            self.alphas_cumprod = noise.alphas_cumprod()
        self.num_inference_steps: int | None = None
        self._take(noise.training_grid(), None)

    @classmethod
    def from_config(
        cls, config: Settings, return_unused_kwargs: bool = False, **settings: Any
    ) -> Any:
        """Build this scheduler for the model of another one.

        Args:
            config: ``pipe.scheduler.config`` of a stock scheduler, or a config of ours.
            return_unused_kwargs: Return ``(scheduler, {})``, as the loaders of diffusers expect.
            **settings: Settings that replace those of ``config``.

        Raises:
            BadInput: If the model's process is not served, or a setting is not known.
        """
        if not isinstance(config, Mapping):
            raise BadInput(
                "from_config needs a config such as pipe.scheduler.config; found a "
                f"{type(config).__name__}. To read a folder, use from_pretrained."
            )
        config = _model_of(cls, config)
        found = settings_from(config, **settings)
        ours = {f.name for part in _parts(found) for f in fields(part)}
        ours |= {*inspect.signature(cls.__init__).parameters, *settings}
        scheduler = cls(**{name: value for name, value in found.items() if name in ours})
        kept = SAID | set(scheduler.config)
        unread = {name: value for name, value in config.items() if name not in kept}
        scheduler.register_to_config(**unread | {"_class_name": cls.__name__})
        return (scheduler, {}) if return_unused_kwargs else scheduler

    @abstractmethod
    def _prepare(self, levels: Sequence[Level]) -> None:
        """Get ready for a run over these N + 1 levels, forgetting any earlier run."""

    @abstractmethod
    def _advance(self, index: int, output: Tensor, sample: Tensor, generator: Generator) -> Tensor:
        """The sample at level ``index + 1``, without device synchronisation.

        Args:
            index: Which level the sample is at.
            output: The network's output, ``[B, C, ...]``; that of a flow as ``ε − x0``.
            sample: ``[B, C, ...]`` in float32 or float64.
            generator: Where noise is drawn from.
        """

    @property
    def follows_ode(self) -> bool:
        """Whether a run evaluates once a step, on its own trajectory, and adds no noise.

        Methods that fill in what the network would say along the trajectory rely on it (SADA,
        ZEUS).
        """
        return False

    @property
    def step_index(self) -> int | None:
        """How far the run is, counted from the noisiest level; ``None`` before the first step."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """Where the run starts, if the pipeline said so."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start the run at this position of ``timesteps`` (image-to-image)."""
        self._begin_index = begin_index

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        *,
        sigmas: Sequence[float] | None = None,
        timesteps: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Start a new run.

        Args:
            num_inference_steps: Number of evaluations; may be left out with a list.
            device: Where ``timesteps`` go.
            sigmas: Noise levels of the evaluations, descending: σ in (0, 1] for a flow, before
                its shift and without a final 0; σ/α otherwise, with or without a final 0.
            timesteps: What the network is told, descending.
            mu: Shift of a flow with ``use_dynamic_shifting``.

        Raises:
            BadInput: If the arguments contradict each other or the config.
        """
        grid = self._schedule(request(num_inference_steps, sigmas, timesteps, mu))
        self.num_inference_steps = len(grid.timesteps)
        self._take(grid, device)
        self._conversion = _read(Conversion, self.config)
        self._prepare(grid.levels)

    def index_for_timestep(
        self, timestep: float | Tensor, schedule_timesteps: Tensor | None = None
    ) -> int:
        """The position of a timestep in the schedule; reads a tensor from its device.

        Raises:
            BadInput: If the schedule does not have it.
        """
        times = self._times if schedule_timesteps is None else schedule_timesteps.tolist()
        value = float(timestep)
        if value not in times:
            raise BadInput(
                f"Timestep {value} is not one of the {len(times)} of this schedule, which run from "
                f"{times[0]} to {times[-1]}. Pass an element of scheduler.timesteps, or call "
                "set_begin_index first."
            )
        return int(times.index(value))

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Generator = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """Go from the present noise level to the next one.

        Synchronises with the device only in the first step of a run, and only if the pipeline did
        not call ``set_begin_index``.

        Args:
            model_output: The network's output after guidance, ``[B, C, ...]``.
            timestep: The element of ``timesteps`` that the network was told.
            sample: ``[B, C, ...]``; the result has its dtype.
            generator: Where the noise of an SDE is drawn from, one or one per sample; without
                it, from generators of the scheduler's own, seeded by the sample at its first step.
            return_dict: Return a ``SchedulerOutput`` instead of ``(sample,)``.

        Raises:
            BadInput: Before ``set_timesteps``, or when the run has made all its steps.
        """
        index = self._locate(timestep)
        if self._noise_inverted:
            model_output = -model_output
        wide = sample.to(torch.promote_types(sample.dtype, torch.float32))
        result = self._advance(index, model_output, wide, generator).to(sample.dtype)
        self._step_index = index + 1
        return SchedulerOutput(prev_sample=result) if return_dict else (result,)

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:  # noqa: ARG002
        """The sample itself: no process here scales the network's input."""
        return sample

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noise clean samples to where the run is (or starts); else to the given timesteps.

        Args:
            original_samples: Clean samples, ``[B, C, ...]``.
            noise: Standard normal noise, same shape.
            timesteps: ``[B]`` or ``[1]``; read only if the pipeline set no begin index.
        """
        levels = [self._levels[index] for index in self._noising_indices(timesteps)]
        dtype = torch.promote_types(original_samples.dtype, torch.float32)
        weights = torch.tensor([(level.alpha, level.sigma) for level in levels], dtype=dtype).to(
            original_samples.device
        )
        alpha, sigma = weights.view(-1, 2, *[1] * (original_samples.ndim - 1)).unbind(1)
        return (alpha * original_samples + sigma * noise).to(original_samples.dtype)

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """`add_noise` under the name and argument order that pipelines of flows use."""
        return self.add_noise(sample, noise, timestep)

    def __len__(self) -> int:
        return int(self.config.num_train_timesteps)

    def _schedule(self, asked: Request) -> Grid:
        """The evaluations of a run, and where it ends; for schedulers with levels of their own."""
        return self._noise().grid(asked)

    def _noise(self) -> FlowNoise | VPNoise:
        """The process, read anew: pipelines may edit a scheduler's config after it is built."""
        noise: FlowNoise | VPNoise = _read(_parts(self.config)[1], self.config)
        return noise

    def _take(self, grid: Grid, device: str | torch.device | None) -> None:
        flow = self.config.prediction_type == "flow_prediction"
        self.timesteps = torch.from_numpy(grid.timesteps).to(device)
        self.sigmas = torch.from_numpy(grid.sigmas).to(device if flow else None)
        self._levels = grid.levels
        self._times = grid.timesteps.tolist()
        self._noise_inverted = bool(self.config.get("invert_sigmas", False))
        self._step_index = None
        self._begin_index = None

    def _locate(self, timestep: float | Tensor) -> int:
        if self.num_inference_steps is None:
            raise BadInput("step() was called before set_timesteps(); call that first.")
        index = self._step_index
        if index is None:
            index = self._begin_index
        if index is None:
            index = self.index_for_timestep(timestep)
            if index and self._times.count(self._times[index]) > 1:
                raise BadInput(
                    f"Timestep {float(timestep)} is evaluated more than once, so it does not say "
                    "where the run starts. Call set_begin_index first."
                )
        if index >= self.num_inference_steps:
            raise BadInput(
                f"The run has made all its {self.num_inference_steps} steps. Call set_timesteps() "
                "to start another one."
            )
        return index

    def _noising_indices(self, timesteps: Tensor) -> list[int]:
        if self._begin_index is None:
            return [self.index_for_timestep(value) for value in timesteps.flatten().tolist()]
        return [self._begin_index if self._step_index is None else self._step_index]


def _model_of(cls: type, config: Settings) -> Settings:
    """A config without what only concerns the solver of another scheduler of this package."""
    name = str(config.get("_class_name"))
    if name == cls.__name__ or name not in samplers.__all__:
        return config
    solver = inspect.signature(getattr(samplers, name).__init__).parameters
    return {key: value for key, value in config.items() if key not in solver}


def _parts(model: Settings) -> tuple[type, type]:
    """The classes whose fields are the model settings."""
    flow = model.get("prediction_type") == "flow_prediction"
    return Conversion, FlowNoise if flow else VPNoise


def _read(part: Any, settings: Settings) -> Any:
    """Build a settings class from the entries that it knows."""
    known = {f.name: settings[f.name] for f in fields(part) if f.name in settings}
    if known.get("trained_betas") is not None:
        known["trained_betas"] = tuple(float(value) for value in known["trained_betas"])
    return part(**known)


def _refuse_unknown(owner: str, model: Settings, parts: tuple[type, type]) -> None:
    known = {f.name for part in parts for f in fields(part)}
    for name in model:
        if name not in known:
            close = get_close_matches(name, known, 1)
            hint = f"Did you mean {close[0]}?" if close else f"It has: {', '.join(sorted(known))}."
            raise BadInput(f"{owner} has no setting {name!r} for such a model. {hint}")
