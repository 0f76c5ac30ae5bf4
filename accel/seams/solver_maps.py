"""One-step solvers as the maps that they are: z_{k+1} = A_k·z_k + B_k·output."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from accel.errors import UnsupportedModel

SIZES = (1.0, 1e3)
"""Of the values that the map is checked with: large ones show what is clipped."""

CLOSE = 1e-4


@dataclass(frozen=True)
class Maps:
    """The steps of a schedule, from noise to the clean sample.

    Attributes:
        timesteps: What the network is told.
        kept: A_k, factor of the sample.
        added: B_k, factor of the output.
        scales: What the sample is multiplied by before the network sees it.
    """

    timesteps: tuple[float, ...]
    kept: tuple[float, ...]
    added: tuple[float, ...]
    scales: tuple[float, ...]

    def back(self, index: int, sample: Any, output: Any) -> Any:
        """The sample from which step ``index``, given this output, makes ``sample``."""
        return (sample - self.added[index] * output) / self.kept[index]


def maps_of(scheduler: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Maps:
    """The maps of a scheduler, found by running a copy of it on numbers.

    Args:
        scheduler: Left as it is.
        args: Of ``set_timesteps``.
        kwargs: Of ``set_timesteps``.

    Raises:
        UnsupportedModel: If a step is no such map: it looks back, adds noise, or clips.
    """
    name = type(scheduler).__name__
    if getattr(scheduler, "order", 1) != 1:
        _refuse(name)
    probe = copy.deepcopy(scheduler)
    probe.set_timesteps(*args, **kwargs)
    options: dict[str, Any] = {"return_dict": False}
    if "generator" in inspect.signature(probe.step).parameters:
        options["generator"] = torch.Generator(probe.timesteps.device).manual_seed(0)
    rows = []
    for index, timestep in enumerate(probe.timesteps):
        like = torch.ones(1, 4, 1, 1, dtype=torch.float64, device=timestep.device)
        scaled = like
        if hasattr(probe, "scale_model_input"):
            scaled = probe.scale_model_input(like, timestep)
        samples, outputs = _values(index)
        result = probe.step(
            like.new_tensor(outputs).view_as(like),
            timestep,
            like.new_tensor(samples).view_as(like),
            **options,
        )[0]
        found = result.flatten().tolist()
        _check(name, found, samples, outputs)
        rows.append((float(timestep), found[0], found[1], float(scaled.flatten()[0])))
    timesteps, kept, added, scales = zip(*rows, strict=True)
    return Maps(timesteps, kept, added, scales)


def _values(index: int) -> tuple[list[float], list[float]]:
    """Two unit vectors, and two arbitrary ones that are others at every step."""
    more = [
        (size * math.sin(7 * index + n), size * math.cos(5 * index + n))
        for n, size in enumerate(SIZES, 1)
    ]
    samples, outputs = zip((1.0, 0.0), (0.0, 1.0), *more, strict=True)
    return list(samples), list(outputs)


def _check(
    name: str, found: Sequence[float], samples: Sequence[float], outputs: Sequence[float]
) -> None:
    kept, added = found[:2]
    if not all(map(math.isfinite, found)) or kept == 0.0:
        _refuse(name)
    for value, sample, output in zip(found, samples, outputs, strict=True):
        size = abs(kept * sample) + abs(added * output)
        if abs(value - kept * sample - added * output) > CLOSE * size:
            _refuse(name)


def _refuse(name: str) -> None:
    raise UnsupportedModel(
        f"{name} cannot be inverted step by step: it looks back at earlier steps, adds noise or "
        "clips (order, clip_sample, thresholding, algorithm_type of its config). Give the pipeline "
        "a solver of one step: DDIMScheduler with clip_sample=False, EulerDiscreteScheduler "
        "or, for a flow, FlowMatchEulerDiscreteScheduler."
    )
