"""Clips under every cache, sparse attention and token reducer, and under them together.

    python benchmarks/video.py [--model scenes-wan] [--captions 3] [--budget SECONDS]
    python benchmarks/video.py --size 256 --frames 33 --steps 8 --captions 1

Every method of the families ``cache``, ``attention`` and ``tokens`` is drawn at a knob that fits
the grid of the clip (`clip_forms`), alone; every sparse attention and reducer under EasyCache
besides, as are two samplers; and the two fastest sparse attentions under three other caches. Plans
that are calibrated first (`calibrated`) are made on captions of training seeds. What does not fit
the model, or is refused as it runs, is left out and named with the reason; so is what did nothing.
How it is measured: `contest`. Fidelity is to the stock clip of the same caption and seed: PSNR and
SSIM of the frames, the clip oracle's perceptual distance, flicker; captions and motion are judged
by the clip oracle.

With ``--size`` and ``--frames`` the clip is larger than those that the model was trained on: the
seconds are what such a clip takes, and what it shows means nothing. Of such clips, which take
minutes, the leading sparse attentions are drawn, alone and under EasyCache, without a warm-up.

Each clip's numbers are written at once to ``results/video-[SIZE-FRAMES-]MODEL.jsonl``: a run that
was cut off, by ``--budget`` or otherwise, goes on there when it is started again; the first caption
is drawn by the most important settings first. Beside it come ``.json`` (the sums), ``.png``
(seconds against fidelity) and ``.md``: a row for each setting, and the best composition.
"""

from __future__ import annotations

import argparse
import copy
import re
import time
from typing import Any

import calibrated
import clip_forms
import contest
import torch
from clip_forms import Forms
from contest import OURS, Benches, Contestant, Outcome, active
from measure import save, signature

import accel
from accel.errors import AccelError

FAMILIES = ("cache", "attention", "tokens")
DENSE = ("attention.Backend",)
"""Methods of these families that compute what stock does, only elsewhere: nothing to compare."""

CALIBRATED = (("Table", 0.1), ("StepRehash", 0.4))
"""Curves of `calibrated`, at one knob each."""

NEAR = 0.9
"""SSIM from which on a setting counts as near enough to be the best."""

BEST = 2
"""Sparse attentions that are drawn under more caches than one."""

PUBLISHED = 3.33
"""Times faster: the best composition of sparse attention and a cache that is known."""

COLUMNS = {
    "psnr": ("PSNR", "{:.1f}"),
    "ssim": ("SSIM", "{:.4f}"),
    "ssim_worst_frame": ("worst frame", "{:.4f}"),
    "perceptual": ("perceptual", "{:.4f}"),
    "flicker": ("flicker", "{:.4f}"),
    "caption_accuracy": ("captions right", "{:.1%}"),
    "motion_accuracy": ("motion right", "{:.1%}"),
}

Row = dict[str, Any]


def measured_first(
    options: argparse.Namespace, bench: calibrated.Bench
) -> tuple[Forms, dict[str, str]]:
    """Settings that are calibrated, where they are asked for, and why others cannot be."""
    if options.fresh:
        bench.forget()
    found, left = {}, {}
    for curve, knob in CALIBRATED:
        if options.only and curve not in options.only:
            continue
        try:
            found[curve] = tuple(calibrated.plan_of(curve, knob, bench))
        except RuntimeError as error:
            left[curve] = _first_line(error)
    return found, left


def fitting(pipe: Any, forms: Forms) -> tuple[list[Contestant], dict[str, str]]:
    """Settings that serve the pipeline, and why the others do not."""
    field, left = [], {}
    for name, methods in forms.items():
        try:
            plan = accel.Plan(*methods)
            plan.attach(pipe).detach()
        except AccelError as error:
            left[name] = _first_line(error)
            continue
        field.append(Contestant(OURS, name, 0, plan=plan))
    return field, left


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


def families(row: Row) -> set[str]:
    """Of the methods in a row's plan."""
    return {name.partition(".")[0] for name in row["verdicts"]}


def best_sparse(rows: list[Row]) -> list[str]:
    """The fastest sparse attentions by themselves, those near stock before the others."""
    alone = [row for row in active(rows) if families(row) == {"attention"}]
    alone.sort(key=lambda row: (row["ssim"] < NEAR, -row["speedup"]["median"]))
    return [row["method"] for row in alone[:BEST]]


def joined(grid: Any, names: list[str]) -> Forms:
    """Some sparse attentions under the caches besides EasyCache."""
    chosen = {name: methods for name, methods in clip_forms.sparse(grid).items() if name in names}
    found: Forms = {}
    for name, method in clip_forms.JOINED:
        found |= clip_forms.under(chosen, name, method)
    return found


def density(row: Row) -> float | None:
    """The mean share of pairs that a row's sparse attention kept, as its verdict says."""
    for name, (_, detail) in row["verdicts"].items():
        said = re.search(r"mean density of ([0-9.]+\d)", detail)
        if name.startswith("attention.") and said:
            return float(said[1])
    return None


def composition(rows: list[Row], judged: bool = True) -> dict[str, Any] | None:
    """The fastest of those that join a cache with less attention or fewer tokens, and its parts.

    One that is near stock, where there is one and clips are judged: of a size that the model was
    not trained on, the seconds count alone.
    """
    by_name = {row["method"]: row for row in active(rows)}
    both = [row for row in by_name.values() if "cache" in families(row) and len(families(row)) > 1]
    both = [row for row in both if families(row) & {"attention", "tokens"}]
    if not both:
        return None
    top = min(both, key=lambda row: (judged and row["ssim"] < NEAR, -row["speedup"]["median"]))
    parts = [by_name[name] for name in top["method"].split(" + ") if name in by_name]
    return {
        "method": top["method"],
        "speedup": top["speedup"],
        "ssim": top["ssim"],
        "motion_accuracy": top.get("motion_accuracy"),
        "parts": {row["method"]: row["speedup"] for row in parts},
        "published": PUBLISHED,
    }


def told(best: dict[str, Any] | None) -> str:
    """The best composition in words."""
    if best is None:
        return "No cache was joined with sparse attention or fewer tokens yet."
    parts = ", ".join(f"{name} {fast['median']:.2f}×" for name, fast in best["parts"].items())
    return (
        f"Best composition: {best['method']}, {best['speedup']['median']:.2f}× at SSIM "
        f"{best['ssim']:.4f} (alone: {parts}; the best that is published: {best['published']:g}×)."
    )


def markdown(title: str, result: dict[str, Any]) -> str:
    """The rows as a table to read, the fastest first, with the command and what was left out."""
    lines = [f"{title}. {signature()}", ""]
    if not result["trained_size"]:
        lines += ["The model was not trained on clips of this size: the seconds count alone.", ""]
    lines += [
        f"| method | seconds | speed-up (quartiles) | density | "
        f"{' | '.join(head for head, _ in COLUMNS.values())} |",
        f"|---{'|---' * (len(COLUMNS) + 3)}|",
        _line("stock", f"{result['stock']['seconds']['median']:.2f}", "–", "–", result["stock"]),
    ]
    for row in sorted(active(result["rows"]), key=lambda row: -row["speedup"]["median"]):
        speed = row["speedup"]
        times = f"{speed['median']:.2f}× ({speed['low']:.2f} to {speed['high']:.2f})"
        kept = "–" if row["density"] is None else f"{row['density']:.0%}"
        lines.append(_line(row["method"], f"{row['seconds']['median']:.2f}", times, kept, row))
    lines += ["", told(result["composition"]), ""]
    lines += [f"* {one}" for one in contest.idle(result["rows"])]
    lines += [f"* {name} is left out: {why}" for name, why in result["left_out"].items()]
    return "\n".join(lines).rstrip() + "\n"


def _line(name: str, seconds: str, times: str, kept: str, row: Row) -> str:
    figures = (form.format(row[key]) if key in row else "–" for key, (_, form) in COLUMNS.items())
    return f"| {' | '.join([name, seconds, times, kept, *figures])} |"


def drawn(
    options: argparse.Namespace, benches: Benches, own: bool, name: str
) -> tuple[Outcome, dict[str, str]]:
    """Draw what is missing: first what is known beforehand, then the best attentions' caches."""
    pipe, begin = benches.get(OURS)[0], time.monotonic()
    grid = clip_forms.grid_of(pipe, benches.call)
    forms = clip_forms.small(grid) if own else clip_forms.large(grid)
    bench = calibrated.Bench.of(options.model, pipe, benches.call)
    made, left = measured_first(options, bench) if own else ({}, {})
    field, refused = fitting(pipe, forms | made)
    found = contest.run(name, options, benches, field, own)
    more, refused_too = fitting(pipe, joined(grid, best_sparse(found.rows) if own else []))
    if more and not options.only:
        rest = copy.copy(options)
        rest.fresh, rest.budget = False, options.budget - (time.monotonic() - begin)
        found = contest.run(name, rest, benches, field + more, own)
    return found, left | refused | refused_too | found.undrawn


def measured(options: argparse.Namespace, benches: Benches, own: bool = True) -> dict[str, Any]:
    """Draw what is missing, and write ``video-…`` with its endings.

    Args:
        options: The command line.
        benches: The pipelines, and the size of their clips.
        own: Whether that is the model's own.
    """
    shape = "" if own else "-{height}-{num_frames}".format(**benches.call)
    found, left = drawn(options, benches, own, f"video{shape}")
    contest.show(found.rows)
    for row in found.rows:
        row["density"] = density(row)
    result = {
        "call": benches.call,
        "trained_size": own,
        "captions": found.seeds,
        "stock": found.stock,
        "composition": composition(found.rows, judged=own),
        "left_out": left,
        "rows": found.rows,
    }
    name = f"video{shape}-{options.model}"
    size = "{num_frames} frames of {width} x {height}".format(**benches.call)
    tokens = clip_forms.grid_of(benches.get(OURS)[0], benches.call).image
    steps = benches.call["num_inference_steps"]
    title = f"{options.model}, {size} ({tokens} tokens), {steps} steps, {len(found.seeds)} captions"
    contest.plot_kinds(found.rows, options.out / f"{name}.png", title)
    table = markdown(title, result)
    (options.out / f"{name}.md").write_text(table)
    print(table)
    print(save(name, result, options.out))
    return result


def main() -> None:
    """Measure, and write ``video-…`` with its endings."""
    parser = contest.options_of(__doc__.splitlines()[0])
    parser.set_defaults(model="scenes-wan", captions=3)
    parser.add_argument("--size", type=int, help="pixels a side; the model's own without it")
    parser.add_argument("--frames", type=int, help="4·n + 1; the model's own without it")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    benches = Benches(options.model, options.steps)
    own = dict(benches.call)
    if options.size is not None:
        benches.call |= {"height": options.size, "width": options.size}
    if options.frames is not None:
        benches.call["num_frames"] = options.frames
    measured(options, benches, own == benches.call)


if __name__ == "__main__":
    main()
