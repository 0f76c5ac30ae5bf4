"""What a pipeline tells about its own loop."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from accel.seams.underway import arguments_of


def evaluations(pipe: Any, scheduled: int) -> int | None:
    """How many evaluations a run makes.

    Args:
        pipe: A diffusers pipeline in its loop.
        scheduled: Timesteps of the schedule from its begin index on.

    Returns:
        The pipeline's own ``num_timesteps`` where it has one (set before the loop, after any
        truncation); ``scheduled`` where the pipeline truncates nothing; else ``None``.
    """
    told = getattr(pipe, "num_timesteps", None)
    if told is not None:
        return int(told)
    return None if hasattr(pipe, "get_timesteps") else scheduled


def guidance_of(pipe: Any) -> dict[str, float]:
    """The numbers of the call that is under way which set its guidance, by name.

    They are read from the frame of that call: many pipelines keep them nowhere else. So this must
    be asked from inside the call (as at the start of a run); elsewhere the answer is empty.
    """
    return {
        name: float(value)
        for name, value in arguments_of(pipe).items()
        if ("guidance" in name or "cfg" in name) and _is_number(value)
    }


def scale_of(numbers: Mapping[str, float], denoiser: str) -> float | None:
    """The guidance scale w of u + w·(c − u) that a network's answers get.

    Args:
        numbers: What `guidance_of` said.
        denoiser: Attribute of the pipeline that holds the network.

    Returns:
        ``None`` where it is one for all networks: then the pipeline itself looks whether it is 1.
        (Z-Image means w − 1 by its scale; CogVideoX may change its own from step to step.)
    """
    if "guidance_scale_2" not in numbers:
        return None
    return numbers["guidance_scale_2" if denoiser == "transformer_2" else "guidance_scale"]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
