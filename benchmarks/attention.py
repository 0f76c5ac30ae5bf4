"""Sparse attention, alone and in a denoiser: seconds beside dense attention, by tokens and density.

    python benchmarks/attention.py [--tokens 1024 … 32768] [--threads 2] [--budget SECONDS]
    python benchmarks/attention.py --layout flux-4k | wan-720p | TEXT,FRAMES,HEIGHT,WIDTH
    python benchmarks/attention.py --denoiser [scenes-flux | pixart] [--tokens 1024 4096 16384]

For every number of tokens (a picture of twice as many, or as many, columns as rows), or the layout
that is given, and for every share of pairs to keep, neighbourhood attention in strides of at most
4×8×16 tokens is compiled, and run by every lowering that the table and the device admit: on a CPU
gather alone, on CUDA FlexAttention and xformers beside it, with how far their answers are apart.
GRAT's two patterns come beside. Dense attention is PyTorch's own, without a mask. Repeats are
interleaved: each takes dense and all patterns in turn, and ratios are of the same repeat. Reported
are medians and quartiles, the density, and what building a table took, once. Methods that search
for their tables while a model runs have a table of their own: what a search takes, and what
attention takes then (`searches`). Queries, keys and values are random numbers.

With ``--denoiser`` it is a whole network (`denoisers`) under the plans that a user would attach to
its pipeline. What is timed is one call of the network, everything but attention included; each
network is called once before, when tables are compiled, and it is measured whether they pay.

There are as many repeats as fit ``--spent`` seconds for each layout, and three at least. The
numbers of each layout are written at once to ``results/attention-….jsonl``: a run that was cut off,
by ``--budget`` or otherwise, goes on there. Beside it come ``.json``, with what is claimed (how
much faster a tenth of the pairs is from 8192 tokens on, and how cost grows with tokens), ``.md``
and ``.png``: seconds and speed-ups by tokens.
"""

from __future__ import annotations

import argparse
import math
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import denoisers
import torch
from measure import (
    RESULTS,
    Lines,
    Visit,
    clocked,
    here,
    ratio,
    repeated,
    save,
    save_plot,
    signature,
    spread,
    waiting,
)
from searches import searched
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from accel import Plan, attention
from accel.attention.blocks import BlockSparse, compiled
from accel.attention.lowerings import NAMES, lowered, refusals
from accel.attention.patterns.grat import CrissCross, Surrounding
from accel.attention.patterns.neighbourhood import Neighbourhood
from accel.attention.patterns.pattern import Pattern
from accel.attention.sparse import Patterned
from accel.seams.layout import Layout

TOKENS = (1024, 2048, 4096, 8192, 16384, 32768)
DENSITIES = (0.05, 0.1, 0.25, 0.5)
STRIDE = (4, 8, 16)
DENSE, GATHER = "dense", "gather"

LAYOUTS = {"flux-4k": Layout(512, 1, 256, 256), "wan-720p": Layout(0, 21, 45, 80)}
"""By name: Flux at 4096² with its text, and Wan at 720p with 81 frames."""

HEADS = {"flux-4k": (24, 128), "wan-720p": (40, 128)}
"""Heads of a layout's model, and their width; Wan 1.3B has 12 heads."""

FEW_HEADS = (4, 64)

KEEPS_ALL = "it keeps all pairs there"

DENOISER_TOKENS = (1024, 4096, 16384)
DENOISER_DENSITIES = (0.05, 0.1, 0.25)

CLAIMED, CLAIMED_FROM, CLAIMED_DENSITY = 3.0, 8192, 0.1
"""How much faster than dense attention a density is to be, from how many tokens on."""

Run = Callable[[], Tensor]


def picture(tokens: int, text: int) -> Layout:
    """A layout of a power of two of image tokens: a square, or two side by side."""
    height = 2 ** (int(math.log2(tokens)) // 2)
    return Layout(text, 1, height, tokens // height)


def layout_of(text: str) -> Layout:
    """A layout by its name, or from ``TEXT,FRAMES,HEIGHT,WIDTH``.

    Raises:
        argparse.ArgumentTypeError: If it is neither.
    """
    if text in LAYOUTS:
        return LAYOUTS[text]
    try:
        return Layout(*map(int, text.split(",", 3)))
    except (TypeError, ValueError) as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no layout: take {' or '.join(LAYOUTS)}, or TEXT,FRAMES,HEIGHT,WIDTH in "
            "tokens."
        ) from error


def window(layout: Layout, density: float) -> Neighbourhood:
    """A window of that share of the image, of the image's shape."""
    axes = sum(side > 1 for side in layout.grid)
    share = density ** (1 / max(1, axes))
    sides = [max(1, round(side * share)) for side in layout.grid]
    strides = [
        min(divisor(side, most), inside)
        for side, most, inside in zip(layout.grid, STRIDE, sides, strict=True)
    ]
    return Neighbourhood((sides[0], sides[1], sides[2]), (strides[0], strides[1], strides[2]))


def divisor(number: int, most: int) -> int:
    """The largest divisor up to a limit."""
    return next(one for one in range(most, 0, -1) if number % one == 0)


def share_name(density: float) -> str:
    """What a window of a density is called."""
    return f"window {density:.0%}"


def patterns(layout: Layout) -> dict[str, Pattern]:
    """What is measured on a layout, by its name in the plot."""
    found: dict[str, Pattern] = {share_name(d): window(layout, d) for d in DENSITIES}
    return found | {"GRAT surrounding": Surrounding(), "GRAT criss-cross": CrissCross()}


def label(row: dict[str, Any]) -> str:
    """A pattern with its lowering, where that is not the usual one."""
    lowering = row.get("lowering", GATHER)
    return row["pattern"] if lowering == GATHER else f"{row['pattern']} by {lowering}"


def admitted(table: BlockSparse, qkv: Tensor) -> tuple[dict[str, Run], dict[str, str]]:
    """What computes a table on a device, tried where there are several; and why others do not."""
    refused = refusals(table, qkv.device)
    names = [name for name in NAMES if name != DENSE and name not in refused]
    runs: dict[str, Run] = {}
    for name in names:
        try:
            runs[name] = partial(lowered(name, table), *qkv)
            if len(names) > 1:
                runs[name]()
        except RuntimeError as error:  # a kernel that this device or width does not have
            runs.pop(name, None)  # it may have failed before it was run
            refused[name] = str(error).partition("\n")[0]
    return runs, refused


def compiled_rows(
    layout: Layout, qkv: Tensor
) -> tuple[list[dict[str, Any]], dict[str, Run], dict[str, str]]:
    """A row and what it runs for each pattern and lowering, and which lowerings are left out."""
    rows: list[dict[str, Any]] = []
    runs: dict[str, Run] = {}
    left: dict[str, str] = {}
    for name, pattern in patterns(layout).items():
        begin = time.perf_counter()
        table = compiled(pattern, layout, qkv.device)
        built = time.perf_counter() - begin
        if table.density == 1.0:
            left[f"{name}, {layout.image} tokens"] = KEEPS_ALL
            continue
        found, refused = admitted(table, qkv)
        left |= {f"{name} by {lowering}": why for lowering, why in refused.items()}
        first = next(iter(found.values()))() if len(found) > 1 else None
        for lowering, run in found.items():
            row = {"pattern": name, "parameters": repr(pattern), "lowering": lowering}
            row |= {"density": table.density, "computed": table.computed, "build_seconds": built}
            if first is not None:
                row["apart"] = float((run() - first).norm() / first.norm())
            rows.append(row)
            runs[label(row)] = run
    return rows, runs, left


@torch.no_grad()
def measured(layout: Layout, options: argparse.Namespace, device: str) -> dict[str, Any]:
    """Rows of one layout: dense attention, then each pattern; and those of what searches."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    shape = (3, 1, options.heads, layout.tokens, options.dim)
    qkv = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    rows, runs, left = compiled_rows(layout, qkv)
    rows.insert(0, {"pattern": DENSE, "density": 1.0, "computed": 1.0})
    runs[DENSE] = lambda: scaled_dot_product_attention(*qkv)
    sync = waiting(device)
    visits = {label(row): partial(clocked, runs[label(row)], sync) for row in rows}
    seconds = repeated(visits, options.spent, options.repeats)
    found = {"rows": summed(rows, seconds, layout.tokens), "left_out": left}
    if options.searched:
        found["searched"] = searched(layout, qkv, options.spent / 5, sync)
    return found


def summed(
    rows: list[dict[str, Any]], seconds: dict[str, list[float]], tokens: int
) -> list[dict[str, Any]]:
    """The rows with their times."""
    for row in rows:
        row["tokens"] = tokens
        row["seconds"] = spread(seconds[label(row)])
        row["speedup"] = ratio(seconds[DENSE], seconds[label(row)])
    return rows


def methods(layout: Layout) -> dict[str, Patterned]:
    """What a denoiser is run under, by its name in the plot."""
    found: dict[str, Patterned] = {}
    for density in DENOISER_DENSITIES:
        shape = window(layout, density)
        fields = {"window": shape.window, "stride": shape.stride, "warm_up": 0.0}
        found[share_name(density)] = attention.Neighbourhood(**fields)
    return found | {"GRAT criss-cross": attention.GRAT(warm_up=0.0)}


@torch.no_grad()
def denoised(layout: Layout, options: argparse.Namespace, device: str) -> dict[str, Any]:
    """Rows of one layout: the dense network, then under each plan; those that keep all are none."""
    build = partial(denoisers.KINDS[options.denoiser], device, options.blocks)
    dense, sync = build(), waiting(device)
    layout = Layout(dense.text, *layout.grid)
    rows: list[dict[str, Any]] = [{"pattern": DENSE, "density": 1.0}]
    visits: dict[str, Visit] = {DENSE: partial(dense.seconds, layout, sync)}
    visits[DENSE]()  # as the others are: first allocations are none of its seconds
    left: dict[str, str] = {}
    for name, method in methods(layout).items():
        density = method.pattern(layout).density(layout)
        if density == 1.0:
            left[f"{name}, {layout.image} tokens"] = KEEPS_ALL
            continue
        one, plan = build(), Plan(method)
        run = plan.attach(one.pipe)
        visits[name] = partial(one.seconds, layout, sync)
        visits[name]()  # compiles the table, and measures whether it pays
        verdict = run.report.verdicts[method.name]
        row = {"pattern": name, "density": density}
        rows.append(row | {"plan": plan.to_dict(), "said": f"{verdict.state} {verdict.detail}"})
    seconds = repeated(visits, options.spent, options.repeats)
    return {"rows": summed(rows, seconds, layout.tokens), "left_out": left}


def claims(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """How much faster gather is at the density that is claimed, and how all costs grow.

    A slope is that of the logarithm of seconds over that of tokens: 2 is dense attention's own, 1
    that of a window of one size; a share of the pairs has 2 as well.
    """
    name = share_name(CLAIMED_DENSITY)
    alone = [row for row in rows if row.get("lowering") == GATHER]  # not a whole denoiser
    large = [row for row in alone if row["pattern"] == name and row["tokens"] >= CLAIMED_FROM]
    faster = {row["tokens"]: row["speedup"]["median"] for row in large}
    return {
        "claimed_speedup": {
            "pattern": name,
            "at_least": CLAIMED,
            "from_tokens": CLAIMED_FROM,
            "density": {row["tokens"]: row["density"] for row in large},
            "speedup": faster,
            "holds": all(one >= CLAIMED for one in faster.values()) if faster else None,
        },
        "slope": {
            name: slope(points) for name, points in by_label(rows).items() if len(points) > 1
        },
    }


def by_label(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The rows of each curve."""
    curves: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        curves.setdefault(label(row), []).append(row)
    return curves


def slope(points: list[dict[str, Any]]) -> float:
    """Power of tokens with which seconds grow, by least squares in the logarithms."""
    x = torch.tensor([row["tokens"] for row in points], dtype=torch.float64).log()
    y = torch.tensor([row["seconds"]["median"] for row in points], dtype=torch.float64).log()
    x, y = x - x.mean(), y - y.mean()
    return float((x @ y) / (x @ x))


def markdown(title: str, result: dict[str, Any], device: str) -> str:
    """The tables to read."""
    lines = [f"{title}. {signature(device)}", ""]
    lines += ["| tokens | attention | density | seconds | times faster (quartiles) |"]
    lines += ["|---|---|---|---|---|"]
    for row in result["rows"]:
        fast, taken = row["speedup"], row["seconds"]["median"]
        times = f"{fast['median']:.2f}× ({fast['low']:.2f} to {fast['high']:.2f})"
        cells = [f"{row['tokens']}", label(row), f"{row['density']:.1%}", f"{taken:.4f}", times]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", *claimed(result["claims"])]
    if result.get("searched"):
        lines += ["", *searched_table(result["searched"])]
    reasons: dict[str, list[str]] = {}
    for name, why in result["left_out"].items():
        reasons.setdefault(why, []).append(name)
    lines += ["", *(f"* left out: {'; '.join(names)}: {why}" for why, names in reasons.items())]
    return "\n".join(lines).rstrip() + "\n"


def claimed(found: dict[str, Any]) -> list[str]:
    """The claims in words."""
    faster = found["claimed_speedup"]
    said = ", ".join(f"{one:.2f}× at {tokens}" for tokens, one in faster["speedup"].items())
    lines = []
    if faster["speedup"]:
        verdict = "holds" if faster["holds"] else "does not hold"
        lines.append(
            f"At least {faster['at_least']:g}× at {faster['pattern']} from "
            f"{faster['from_tokens']} tokens on: {verdict} ({said})."
        )
    slopes = ", ".join(f"{name} {power:.2f}" for name, power in found["slope"].items())
    return [*lines, *([f"Seconds grow with tokens by the power of: {slopes}."] if slopes else [])]


def searched_table(rows: list[dict[str, Any]]) -> list[str]:
    """What searches, as a table."""
    lines = [
        "Methods that search, all keeping the same share of their cells; a search of AdaSpa serves "
        "half a run.",
        "",
        "| tokens | method | density | first search | search | attend | times faster | with "
        "searches |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        first, search = row["first_search_seconds"], row["search_seconds"]["median"]
        cells = [f"{row['tokens']}", row["method"], f"{row['density']:.1%}", f"{first:.4f}"]
        cells += [f"{search:.4f}", f"{row['attend_seconds']['median']:.4f}"]
        cells += [f"{row[f'speedup{with_}']['median']:.2f}×" for with_ in ("", "_with_search")]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def plot(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """Seconds and speed-up by tokens; dense attention dashed in grey."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(14, 6.5), layout="constrained", sharex=True)
    curves, colours = by_label(rows), plt.get_cmap("turbo")
    for number, (name, points) in enumerate(curves.items()):
        look: dict[str, Any] = {"marker": "os^vDPX<>*hd"[number % 12], "label": name}
        look["color"] = "grey" if name == DENSE else colours(number / len(curves))
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
    save_plot(figure, path, dpi=130)


def options_of(given: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--denoiser", nargs="?", const="scenes-flux", choices=denoisers.KINDS, help="a network"
    )
    parser.add_argument("--blocks", type=int, default=2, help="of pixart")
    parser.add_argument("--tokens", type=int, nargs="+", help="powers of two")
    parser.add_argument("--layout", help="in the place of --tokens: a name, or numbers")
    parser.add_argument("--text", type=int, default=0, help="text tokens, always kept")
    parser.add_argument("--heads", type=int, help="4; those of the model of a layout")
    parser.add_argument("--dim", type=int, help="of a head: 64; that of the model of a layout")
    parser.add_argument("--repeats", type=int, help="as many as fit, without it")
    parser.add_argument("--spent", type=float, default=30.0, help="seconds of one layout's repeats")
    parser.add_argument("--no-searched", dest="searched", action="store_false")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds to measure for")
    parser.add_argument("--fresh", action="store_true", help="forget the numbers of earlier runs")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args(given)
    if options.denoiser and options.layout:
        parser.error(
            "--denoiser takes no --layout: a network cuts its own pictures into tokens; give "
            "--tokens."
        )
    heads, dim = HEADS.get(options.layout, FEW_HEADS)
    options.heads, options.dim = options.heads or heads, options.dim or dim
    return options


def layouts_of(options: argparse.Namespace) -> list[Layout]:
    """What is measured."""
    if options.layout:
        return [layout_of(options.layout)]
    usual = DENOISER_TOKENS if options.denoiser else TOKENS
    return [picture(tokens, options.text) for tokens in options.tokens or usual]


def named(options: argparse.Namespace, device: str) -> tuple[str, str, dict[str, Any]]:
    """The result's name, its title and what its numbers hold for."""
    if options.denoiser:
        title = f"{denoisers.told(options.denoiser, options.blocks)}, on {device}"
        setting = {"denoiser": options.denoiser}
        setting |= {"blocks": options.blocks} if options.denoiser == "pixart" else {}
        return f"attention-{options.denoiser}-{device}", title, setting
    where = f"{options.layout.replace(',', '-')}-" if options.layout else ""
    title = f"Attention alone on {device}, {options.heads} heads of {options.dim}"
    setting = {name: getattr(options, name) for name in ("layout", "text", "heads", "dim")}
    return f"attention-{where}{device}", title, setting


def collected(options: argparse.Namespace, path: Path, setting: dict[str, Any]) -> Lines:
    """Measure the layouts that are not in the file yet, until the time is over."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.fresh:
        path.unlink(missing_ok=True)
    lines = Lines(path, {"setting": setting, **here()})
    done = {tuple(line["grid"]) for line in lines.found}
    until = time.monotonic() + options.budget
    for layout in layouts_of(options):
        if layout.grid in done:
            continue
        if time.monotonic() > until:
            break
        found = (denoised if options.denoiser else measured)(layout, options, device)
        lines.add({"grid": layout.grid, **found})
        show(found["rows"])
    return lines


def show(rows: list[dict[str, Any]]) -> None:
    """Print a line for each row."""
    for row in rows:
        print(
            f"{row['tokens']:>6} tokens, {label(row):<30} {row['density']:6.1%} "
            f"{row['seconds']['median']:.4f} s, {row['speedup']['median']:.2f} times",
            flush=True,
        )


def main(given: list[str] | None = None) -> None:
    """Measure, and write ``attention-…`` with its endings.

    Raises:
        SystemExit: If nothing is measured yet.
    """
    options = options_of(given)
    torch.set_num_threads(options.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name, title, setting = named(options, device)
    lines = collected(options, options.out / f"{name}.jsonl", setting)
    found = sorted(lines.found, key=lambda line: math.prod(line["grid"]))
    if not found:
        raise SystemExit(f"Nothing is measured yet: start again to go on. {lines.path}")
    result: dict[str, Any] = {"setting": setting}
    for part in ("rows", "searched"):
        result[part] = [row for line in found for row in line.get(part, ())]
    result["left_out"] = {k: why for line in found for k, why in line.get("left_out", {}).items()}
    result["claims"] = claims(result["rows"])
    path = save(name, result, options.out)
    plot(result["rows"], path.with_suffix(".png"), title)
    table = markdown(title, result, device)
    path.with_suffix(".md").write_text(table)
    print(table, path, sep="\n")


if __name__ == "__main__":
    # that a pattern does not pay is what is measured here
    warnings.simplefilter("ignore", UserWarning)
    main()
