"""What a pipeline tells about its own loop."""

from __future__ import annotations

from typing import Any


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
