"""Sparse attention alone: seconds of a pattern beside dense attention, by tokens and density.

    python benchmarks/attention.py [--tokens 1024 … 32768] [--heads 4] [--threads 1] [--repeats 5]

For every number of tokens (a picture of twice as many, or as many, columns as rows) and for
every share of pairs to keep, neighbourhood attention in strides of 8×16 tokens is compiled and run
by the gather lowering; GRAT's two patterns with boxes of 16×16 come beside. Dense attention is
PyTorch's own, without a mask. Repeats are interleaved: each takes dense and all patterns in turn,
and ratios are of the same repeat. Reported are medians and quartiles, the density, and what
building a table took, once.

Beside ``attention-DEVICE.json`` comes a ``.png``: seconds and speed-ups by tokens.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import RESULTS, ratio, save, spread
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from accel.attention.blocks import compiled
from accel.attention.patterns.grat import CrissCross, Surrounding
from accel.attention.lowerings.gather import Gather
from accel.attention.patterns.neighbourhood import Neighbourhood
from accel.attention.patterns.pattern import Pattern
from accel.seams.layout import Layout

TOKENS = (1024, 2048, 4096, 8192, 16384, 32768)
DENSITIES = (0.05, 0.1, 0.25, 0.5)
STRIDE = (1, 8, 16)
DENSE = "dense"

Run = Callable[[], Tensor]


def picture(tokens: int, text: int) -> Layout:
    """A layout of a power of two of image tokens: a square, or two side by side."""
    height = 2 ** (int(math.log2(tokens)) // 2)
    return Layout(text, 1, height, tokens // height)


def window(layout: Layout, density: float) -> Neighbourhood:
    """A window of that share of the image, of the image's shape."""
    sides = [max(1, round(side * math.sqrt(density))) for side in layout.grid]
    strides = [min(pair) for pair in zip(STRIDE, sides, strict=True)]
    return Neighbourhood((1, sides[1], sides[2]), (1, strides[1], strides[2]))


def patterns(layout: Layout) -> dict[str, Pattern]:
    """What is measured on a layout, by its name in the plot."""
    found: dict[str, Pattern] = {f"window {d:.0%}": window(layout, d) for d in DENSITIES}
    return found | {"GRAT surrounding": Surrounding(), "GRAT criss-cross": CrissCross()}


def timed(runs: dict[str, Run], repeats: int, sync: Callable[[], None]) -> dict[str, list[float]]:
    """Seconds of each run, one after the other, that many times; the first round is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            sync()
            begin = time.perf_counter()
            run()
            sync()
            if repeat:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


@torch.no_grad()
def measured(
    layout: Layout, heads: int, dim: int, repeats: int, device: str
) -> list[dict[str, Any]]:
    """Rows of one layout: dense attention, then each pattern."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    shape = (3, 1, heads, layout.tokens, dim)
    qkv = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    rows: list[dict[str, Any]] = [{"pattern": DENSE, "density": 1.0, "computed": 1.0}]
    runs: dict[str, Run] = {DENSE: lambda: scaled_dot_product_attention(*qkv)}
    for name, pattern in patterns(layout).items():
        begin = time.perf_counter()
        table = compiled(pattern, layout, device)
        lowering = Gather(table)
        row = {"pattern": name, "parameters": repr(pattern), "density": table.density}
        rows.append(
            row | {"computed": table.computed, "build_seconds": time.perf_counter() - begin}
        )
        runs[name] = lambda lowering=lowering: lowering(*qkv)
    sync = torch.cuda.synchronize if device == "cuda" else lambda: None
    seconds = timed(runs, repeats, sync)
    for row in rows:
        row["tokens"] = layout.tokens
        row["seconds"] = spread(seconds[row["pattern"]])
        row["speedup"] = ratio(seconds[DENSE], seconds[row["pattern"]])
    return rows


def plot(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """Seconds and speed-up by tokens; dense attention dashed in grey."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(14, 6.5), layout="constrained", sharex=True)
    names = list(dict.fromkeys(row["pattern"] for row in rows))
    colours = plt.get_cmap("turbo")
    for number, name in enumerate(names):
        points = [row for row in rows if row["pattern"] == name]
        look: dict[str, Any] = {"marker": "os^vDPX<>*hd"[number % 12], "label": name}
        look["color"] = "grey" if name == DENSE else colours(number / len(names))
        look["linestyle"] = "--" if name == DENSE else "-"
        tokens = [row["tokens"] for row in points]
        for side, key in zip(axes, ("seconds", "speedup"), strict=True):
            found = [row[key] for row in points]
            side.plot(tokens, [one["median"] for one in found], **look)
            low, high = ([one[end] for one in found] for end in ("low", "high"))
            side.fill_between(tokens, low, high, color=look["color"], alpha=0.2)
    for side, what in zip(axes, ("seconds", "times faster than dense attention"), strict=True):
        side.set(xscale="log", yscale="log", xlabel="tokens", ylabel=what)
        side.grid(alpha=0.3, which="both")
    figure.suptitle(title)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", fontsize=9, ncols=4)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    """Measure and write ``results/attention-DEVICE.json`` with its plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    parser.add_argument("--text", type=int, default=0, help="text tokens, always kept")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows: list[dict[str, Any]] = []
    for tokens in options.tokens:
        layout = picture(tokens, options.text)
        found = measured(layout, options.heads, options.dim, options.repeats, device)
        for row in found:
            print(
                f"{row['tokens']:>6} tokens, {row['pattern']:<18} {row['density']:6.1%} "
                f"{row['seconds']['median']:.4f} s, {row['speedup']['median']:.2f} times",
                flush=True,
            )
        rows += found
    setting = {key: getattr(options, key) for key in ("text", "heads", "dim", "repeats")}
    path = save(f"attention-{device}", {"setting": setting, "rows": rows}, options.out)
    title = f"Attention alone on {device}, {options.heads} heads of {options.dim}"
    plot(rows, path.with_suffix(".png"), title)
    print(path)


if __name__ == "__main__":
    main()
