"""Measure what the model of costs needs: a step on one device, and the link between devices."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

from parallel.clusters import Cluster
from parallel.launch import Place
from parallel.work import Work, work_of

SHORT, LONG = 8, 4 * 2**20
"""Bytes of the messages that latency and bandwidth are measured with."""
TIMES = 9
"""How often each is measured; the median counts."""
STEPS = 4
"""Steps of a run that is timed; two runs of a different number tell what a step takes."""


def measured(place: Place, pipe: Any, call: dict[str, Any]) -> tuple[Work, Work, Cluster]:
    """The work of a step of a pipeline, that of its decoder, and what these processes can do.

    The first process computes alone, while the others wait; then all talk to each other. Operations
    a second and what is fixed come from the call and one of half its height and width.

    Args:
        place: Which of the processes this is.
        pipe: The pipeline, with nothing attached.
        call: Arguments of its call.
    """
    from torch import distributed

    sizes = [call, _halved(pipe, call)]
    (large, decoding), (small, _) = (counted(pipe, one) for one in sizes)
    seconds = []
    for one in sizes:
        distributed.barrier()
        seconds.append(_step(pipe, one) if place.rank == 0 else 1.0)
        distributed.barrier()
    latency = _message(SHORT) / (place.size - 1)
    long = _message(LONG) / (place.size - 1)
    bandwidth = LONG / max(long - latency, 1e-9)
    operations, fixed = fitted(large, small, *seconds)
    return large, decoding, Cluster(place.size, operations, bandwidth, latency, fixed)


def fitted(large: Work, small: Work, slow: float, quick: float) -> tuple[float, float]:
    """Operations a second, and seconds of an operator, from two steps.

    Args:
        large: Work of one.
        small: Of the other.
        slow: Seconds of the first.
        quick: Of the second.
    """
    more = large.operations - small.operations
    if more <= 0 or slow <= quick:
        return large.operations / slow, 0.0
    operations = more / (slow - quick)
    fixed = max(0.0, slow - large.operations / operations) / large.launches
    return (operations, fixed) if fixed else (large.operations / slow, 0.0)


def counted(pipe: Any, call: dict[str, Any]) -> tuple[Work, Work]:
    """The work of a step and of the decoder.

    Of two networks, of which one evaluates a step, the one counts that has most to do.
    """
    works, decoding = work_of(pipe, call)
    return max(works.values(), key=lambda work: work.operations), decoding


def _halved(pipe: Any, call: dict[str, Any]) -> dict[str, Any]:
    size = getattr(pipe, "vae_scale_factor", 8) * 4
    sides = {name: call[name] // 2 // size * size for name in ("height", "width") if name in call}
    return {**call, **{name: max(side, size) for name, side in sides.items()}}


def _step(pipe: Any, call: dict[str, Any]) -> float:
    """Seconds of a step, without what comes before and after all steps."""
    import torch

    def run(steps: int) -> float:
        noise = torch.Generator().manual_seed(0)
        begin = time.perf_counter()
        pipe(**{**call, "num_inference_steps": steps, "output_type": "latent"}, generator=noise)
        return time.perf_counter() - begin

    run(1)
    pairs = [run(1 + STEPS) - run(1) for _ in range(3)]
    return median(pairs) / STEPS


def _message(size: int) -> float:
    """Seconds that a gather of so many bytes from each takes."""
    import torch
    from torch import distributed

    device = "cuda" if torch.cuda.is_available() else "cpu"
    mine = torch.zeros(size // 4, device=device)
    buffers = [torch.empty_like(mine) for _ in range(distributed.get_world_size())]
    wait: Callable[[], Any] = torch.cuda.synchronize if device == "cuda" else lambda: None
    took = []
    for _ in range(TIMES):
        distributed.barrier()
        begin = time.perf_counter()
        distributed.all_gather(buffers, mine)
        wait()
        took.append(time.perf_counter() - begin)
    return median(took)
