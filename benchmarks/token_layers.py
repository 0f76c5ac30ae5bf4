"""Token reduction in one self-attention layer: seconds beside the whole layer, for each reducer.

    python benchmarks/token_layers.py [--sides 32 64 128] [--ratio 0.5] [--repeats 9]

The layer is a UNet's at its highest resolution: four projections and softmax attention, a batch
of two branches. Whole and reduced layers alternate, one repeat each is left out as warm-up. The
content is a smooth random picture with a little noise. ``anew`` makes the reduction in every
layer, ``kept`` uses one that was made before: what a policy of reuse can save lies between.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from measure import ratio, save, spread
from torch import Tensor, nn
from torch.nn.functional import interpolate, scaled_dot_product_attention

from accel.seams.layout import Layout
from accel.tokens.importance import partition
from accel.tokens.matching import cells
from accel.tokens.reduction import Reduction
from accel.tokens.todo import downsampled
from accel.tokens.toma import reduction
from accel.tokens.transforming import transformed

HEADS = 8
BRANCHES = 2


class Layer:
    """Self-attention with projections of its own, in float32.

    Args:
        channels: C, a multiple of `HEADS`.
    """

    def __init__(self, channels: int) -> None:
        self._parts = [nn.Linear(channels, channels, bias=False) for _ in range(4)]

    def __call__(self, x: Tensor, context: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x[B, M, C]`` attends to ``context[B, K, C]``."""
        query, key, value, out = self._parts
        q = query(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        k = key(context).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        v = value(context).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        found = scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return out(found.transpose(1, 2).flatten(2))


def picture(grid: Layout, channels: int) -> Tensor:
    """Tokens of a smooth picture with noise, ``[B, N, C]``."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(BRANCHES, channels, 8, 8, generator=generator)
    smooth = interpolate(coarse, (grid.height, grid.width), mode="bicubic").flatten(2).mT
    return smooth + 0.1 * torch.randn(smooth.shape, generator=generator)


Reducer = Callable[[Tensor], Reduction]


def reducers(grid: Layout, share: float) -> dict[str, Reducer]:
    """By name: from content to a reduction."""
    drawn = cells(grid, torch.Generator().manual_seed(0))
    return {
        "ToMe": lambda x: drawn.match(x, share),
        "importance": lambda x: partition(x.norm(dim=-1), drawn).match(x, share),
        "ToMA": lambda x: reduction(x, grid, share),
        "Token Transforming": lambda x: transformed(x, grid, share),
    }


def forms(layer: Layer, grid: Layout, x: Tensor, share: float) -> dict[str, Callable[[], Tensor]]:
    """By name: the whole layer and every reduced one, ready to run on ``x``."""
    pooled = downsampled(grid)
    found = {
        "whole": lambda: layer(x, x),
        "ToDo, kept": lambda: layer(x, pooled.merge(x)),
        "ToDo, anew": lambda: layer(x, downsampled(grid).merge(x)),
    }
    for name, reduce in reducers(grid, share).items():
        kept = reduce(x)
        found[f"{name}, kept"] = lambda kept=kept: _around(layer, kept, x)
        found[f"{name}, anew"] = lambda reduce=reduce: _around(layer, reduce(x), x)
    return found


def _around(layer: Layer, reduced: Reduction, x: Tensor) -> Tensor:
    few = reduced.merge(x)
    return reduced.unmerge(layer(few, few))


@torch.inference_mode()
def timed(grid: Layout, channels: int, share: float, repeats: int) -> dict[str, dict[str, object]]:
    """Seconds of every form, its speed-up over the whole layer and its distance from it."""
    torch.manual_seed(0)
    x = picture(grid, channels)
    runs = forms(Layer(channels), grid, x, share)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    outputs: dict[str, Tensor] = {}
    for turn in range(repeats + 1):
        for name in list(runs)[:: 1 if turn % 2 else -1]:
            start = time.perf_counter()
            outputs[name] = runs[name]()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    whole = outputs["whole"]
    return {
        name: {
            "seconds": spread(taken),
            "speed_up": ratio(seconds["whole"], taken),
            "relative_error": float((outputs[name] - whole).norm() / whole.norm()),
        }
        for name, taken in seconds.items()
    }


def main() -> None:
    """Measure and write ``results/token-layers.json``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sides", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--channels", type=int, default=320)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    result = {"ratio": options.ratio, "channels": options.channels, "branches": BRANCHES}
    layers = {}
    for side in options.sides:
        grid = Layout(0, 1, side, side)
        layers[grid.image] = timed(grid, options.channels, options.ratio, options.repeats)
        print(f"{grid.image} tokens")
        for name, figures in layers[grid.image].items():
            print(
                f"  {name:<26}{figures['seconds']['median']:8.4f} s"
                f"{figures['speed_up']['median']:7.2f}×  error {figures['relative_error']:.3f}"
            )
    print(save("token-layers", {**result, "layers": layers}))


if __name__ == "__main__":
    main()
