"""How long something takes where it is computed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

Clock = Callable[[Callable[[], Any], "torch.device"], float]
"""From something to do, and the device that it is done on, to seconds."""

PATIENCE = 0.25
"""Seconds from which something is measured by its first time alone."""

REPEATS = 3


def seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds that it takes: the median of three, after one that warms up. Waits for the device.

    What takes long is done once: its first time is the measure then. Where kernels are compiled
    when they are first called, a long first time says nothing, and the second is the measure.
    """
    first = _once(run, device)
    if first > PATIENCE:
        return first if device.type == "cpu" else _once(run, device)
    return statistics.median(_once(run, device) for _ in range(REPEATS))


def _once(run: Callable[[], Any], device: torch.device) -> float:
    _wait(device)
    begin = time.perf_counter()
    run()
    _wait(device)
    return time.perf_counter() - begin


def _wait(device: torch.device) -> None:
    import torch

    if device.type != "cpu":
        torch.accelerator.synchronize(device)
