"""What a run computes, in multiplications: a cost that no neighbour on the machine disturbs.

Counted are the multiplications of linear and convolution layers inside of the denoisers, below all
hooks: a cache that answers for a block, a guidance that leaves out a branch, tokens that are merged
all show. Attention's own products do not.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass
class Work:
    """What one run computed.

    Attributes:
        products: Multiplications of the layers of the denoisers.
        seconds: Host time inside of the denoisers; waits for no device.
    """

    products: int = 0
    seconds: float = 0.0


@contextmanager
def counting(pipe: Any, clock: Callable[[], float] = time.perf_counter) -> Iterator[Work]:
    """Count what the denoisers of a pipeline compute inside of the block."""
    from accel.seams.denoisers import find_denoisers

    work, handles = Work(), []
    for denoiser in find_denoisers(pipe):
        handles += [layer.register_forward_hook(_count(work)) for layer in layers(denoiser.core)]
        handles += _timed(denoiser.core, work, clock)
    try:
        yield work
    finally:
        for handle in handles:
            handle.remove()


def layers(module: Any) -> Iterator[Any]:
    """The linear and convolution layers of a module."""
    from torch import nn

    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return (layer for layer in module.modules() if isinstance(layer, kinds))


def _count(work: Work) -> Callable[..., None]:
    def count(layer: Any, _inputs: Any, returned: Any) -> None:
        work.products += products(layer, returned)

    return count


def products(layer: Any, returned: Any) -> int:
    """Multiplications of a layer's call: its weights at each token, or pixel, of the answer."""
    from torch import nn

    linear = isinstance(layer, nn.Linear)
    places = returned.shape[:-1] if linear else (len(returned), *returned.shape[2:])
    return int(layer.weight.numel() * math.prod(places))


def _timed(module: Any, work: Work, clock: Callable[[], float]) -> list[Any]:
    began: list[float] = []

    def begin(*_: Any) -> None:
        began.append(clock())

    def end(*_: Any) -> None:
        work.seconds += clock() - began.pop()

    return [module.register_forward_pre_hook(begin), module.register_forward_hook(end)]
