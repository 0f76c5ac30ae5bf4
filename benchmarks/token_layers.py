"""Token reduction in one self-attention layer: seconds beside the whole layer, for each reducer.

    python benchmarks/token_layers.py [--grids 32x32 … 128x256] [--ratios 0.25 0.5 0.75]

The layer is a UNet's at its highest resolution: four projections and softmax attention. The whole
layer, the making of every reduction and every reduced layer come in turn, as often as fits
``--spent`` seconds for each grid, three times at least. The content is a smooth random picture with
a little noise. ``anew`` makes the reduction in every layer, ``kept`` uses one that was made before:
what a policy of reuse can save lies between. Beside ours comes tomesd's matching, where the extra
`bench` is installed.

The numbers of each grid are written at once to ``results/token-layers.jsonl``: a run that was cut
off, by ``--budget`` or otherwise, goes on there. Beside it come ``.json`` and ``.md``. The distance
from the whole layer is that of random weights: it ranks reducers and says nothing of pictures.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from measure import RESULTS, Lines, Visit, clocked, here, ratio, repeated, save, signature, spread
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
GRIDS = ("32x32", "32x64", "64x64", "64x128", "128x128", "128x256")
RATIOS = (0.25, 0.5, 0.75)
WHOLE = "whole"
NO_TOMESD = "tomesd is LEFT OUT: it is not installed; the extra 'bench' brings it"

Layered = Callable[[Tensor], Tensor]
"""From a layer's input to its output."""

Make = Callable[[], Layered]
"""Makes a reduction, and gives the layer that uses it."""


class Layer:
    """Self-attention with projections of its own, in float32.

    Args:
        channels: C, a multiple of `HEADS`.
    """

    def __init__(self, channels: int) -> None:
        self._parts = [nn.Linear(channels, channels, bias=False) for _ in range(4)]

    def __call__(self, x: Tensor, context: Tensor) -> Tensor:
        """``x[B, M, C]`` attends to ``context[B, K, C]``."""
        query, key, value, out = self._parts
        q = query(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        k = key(context).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        v = value(context).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        return out(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def grid_of(text: str) -> Layout:
    """A picture's layout from ``ROWSxCOLUMNS``.

    Raises:
        argparse.ArgumentTypeError: If it is none.
    """
    try:
        rows, columns = map(int, text.split("x"))
        return Layout(0, 1, rows, columns)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no grid: take ROWSxCOLUMNS.") from error


def picture(grid: Layout, channels: int, branches: int) -> Tensor:
    """Tokens of a smooth picture with noise, ``[B, N, C]``."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(branches, channels, 8, 8, generator=generator)
    smooth = interpolate(coarse, (grid.height, grid.width), mode="bicubic").flatten(2).mT
    return smooth + 0.1 * torch.randn(smooth.shape, generator=generator)


def reducers(grid: Layout, share: float, x: Tensor) -> dict[str, Callable[[], Reduction]]:
    """By name: what makes a reduction of some content."""
    drawn = cells(grid, torch.Generator().manual_seed(0))
    return {
        "ToMe": lambda: drawn.match(x, share),
        "Importance": lambda: partition(x.norm(dim=-1), drawn).match(x, share),
        "ToMA": lambda: reduction(x, grid, share),
        "Transforming": lambda: transformed(x, grid, share),
    }


def forms(layer: Layer, grid: Layout, share: float, x: Tensor) -> dict[str, Make]:
    """By name: every reduction of a share of the tokens, ours and tomesd's."""
    found: dict[str, Make] = {}
    for name, reduce in reducers(grid, share, x).items():
        found[name] = partial(_ours, layer, reduce)
    if find_spec("tomesd"):
        found["tomesd: ToMe"] = partial(_theirs, layer, grid, share, x)
    return found


def _ours(layer: Layer, reduce: Callable[[], Reduction]) -> Layered:
    made = reduce()

    def reduced(x: Tensor) -> Tensor:
        few = made.merge(x)
        return made.unmerge(layer(few, few))

    return reduced


def _theirs(layer: Layer, grid: Layout, share: float, x: Tensor) -> Layered:
    from tomesd.merge import bipartite_soft_matching_random2d

    count = int(grid.image * share)
    source = torch.Generator().manual_seed(0)
    merge, unmerge = bipartite_soft_matching_random2d(
        x, grid.width, grid.height, 2, 2, count, generator=source
    )

    def reduced(x: Tensor) -> Tensor:
        few = merge(x)
        return unmerge(layer(few, few))

    return reduced


def _pooled(layer: Layer, grid: Layout) -> Layered:
    """ToDo: keys and values of every second row and column."""
    made = downsampled(grid)
    return lambda x: layer(x, made.merge(x))


@torch.inference_mode()
def measured(grid: Layout, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of one grid: seconds of each form, its speed-up, and how far it is from the whole."""
    torch.manual_seed(0)
    x = picture(grid, options.channels, options.branches)
    layer = Layer(options.channels)
    makes: dict[str, Make] = {"ToDo, 0.75": partial(_pooled, layer, grid)}
    for share in options.ratios:
        found = forms(layer, grid, share, x)
        makes |= {f"{name}, {share:g}": make for name, make in found.items()}
    runs: dict[str, Layered] = {WHOLE: lambda x: layer(x, x)}
    runs |= {name: make() for name, make in makes.items()}
    outputs: dict[str, Tensor] = {}

    def run(name: str) -> float:
        return clocked(lambda: outputs.__setitem__(name, runs[name](x)))

    visits: dict[str, Visit] = {name: partial(run, name) for name in runs}
    visits |= {f"{name}, made": partial(clocked, make) for name, make in makes.items()}
    seconds = repeated(visits, options.spent, options.repeats)
    return [row_of(name, grid, seconds, outputs) for name in runs]


def row_of(
    name: str, grid: Layout, seconds: dict[str, list[float]], outputs: dict[str, Tensor]
) -> dict[str, Any]:
    """The figures of one form."""
    whole, kept = outputs[WHOLE], seconds[name]
    method, _, share = name.partition(", ")
    made = seconds.get(f"{name}, made", [0.0] * len(kept))
    anew = [a + b for a, b in zip(kept, made, strict=True)]
    return {
        "grid": [grid.height, grid.width],
        "tokens": grid.image,
        "reducer": method,
        "ratio": float(share or 0),
        "kept_seconds": spread(kept),
        "made_seconds": spread(made),
        "speedup_kept": ratio(seconds[WHOLE], kept),
        "speedup_anew": ratio(seconds[WHOLE], anew),
        "relative_error": float((outputs[name] - whole).norm() / whole.norm()),
    }


def markdown(rows: list[dict[str, Any]], title: str) -> str:
    """The rows as a table."""
    lines = [f"{title}. {signature()}", ""]
    lines += ["| grid | tokens | reducer | ratio | layer | making it | kept | anew | distance |"]
    lines += ["|---|---|---|---|---|---|---|---|---|"]
    for row in rows:
        cells = ["{} × {}".format(*row["grid"]), f"{row['tokens']}", row["reducer"]]
        cells += [f"{row['ratio']:g}", f"{row['kept_seconds']['median']:.4f} s"]
        cells += [f"{row['made_seconds']['median']:.4f} s"]
        cells += [f"{row[f'speedup_{how}']['median']:.2f}×" for how in ("kept", "anew")]
        cells.append(f"{row['relative_error']:.3f}")
        lines.append(f"| {' | '.join(cells)} |")
    if not find_spec("tomesd"):
        lines += ["", f"* {NO_TOMESD}"]
    return "\n".join(lines) + "\n"


def options_of(given: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--grids", type=grid_of, nargs="+", default=[*map(grid_of, GRIDS)])
    parser.add_argument("--ratios", type=float, nargs="+", default=list(RATIOS))
    parser.add_argument("--channels", type=int, default=320)
    parser.add_argument("--branches", type=int, default=1)
    parser.add_argument("--repeats", type=int, help="as many as fit, without it")
    parser.add_argument("--spent", type=float, default=20.0, help="seconds of one grid's repeats")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds to measure for")
    parser.add_argument("--fresh", action="store_true", help="forget the numbers of earlier runs")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    return parser.parse_args(given)


def main(given: list[str] | None = None) -> None:
    """Measure, and write ``token-layers`` with its endings.

    Raises:
        SystemExit: If nothing is measured yet.
    """
    options = options_of(given)
    torch.set_num_threads(options.threads)
    path = options.out / "token-layers.jsonl"
    if options.fresh:
        path.unlink(missing_ok=True)
    setting = {name: getattr(options, name) for name in ("ratios", "channels", "branches")}
    lines = Lines(path, {**setting, "tomesd": bool(find_spec("tomesd")), **here()})
    if not find_spec("tomesd"):
        print(NO_TOMESD)
    done = {tuple(line["grid"]) for line in lines.found}
    until = time.monotonic() + options.budget
    for grid in options.grids:
        if (grid.height, grid.width) in done:
            continue
        if time.monotonic() > until:
            break
        lines.add({"grid": [grid.height, grid.width], "rows": measured(grid, options)})
        print(f"{grid.height} × {grid.width}", flush=True)
    rows = [row for line in lines.found for row in line["rows"]]
    if not rows:
        raise SystemExit(f"Nothing is measured yet: start again to go on. {path}")
    title = f"One self-attention layer of {options.channels} channels, {HEADS} heads"
    table = markdown(sorted(rows, key=lambda row: row["tokens"]), title)
    (options.out / "token-layers.md").write_text(table)
    print(table)
    print(save("token-layers", {**setting, "rows": rows}, options.out))


if __name__ == "__main__":
    main()
