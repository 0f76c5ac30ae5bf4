"""Clips under every cache, sparse attention and token reducer, and sparse × EasyCache.

    python benchmarks/video.py [--model scenes-wan] [--captions 16] [--budget SECONDS]

Every method of the families ``cache``, ``attention`` and ``tokens`` that is installed is drawn at
its default knob, and every sparse attention under `cache.EasyCache` besides; what does not fit the
model, or rests on numbers that have to be measured first, is left out and named with the reason.
How it is measured: `contest`. Fidelity is to the stock clip of the same caption and seed: PSNR and
SSIM of the frames, the clip oracle's perceptual distance, flicker; captions and motion are judged
by the clip oracle.

Each clip's numbers are written at once to ``results/video-MODEL.jsonl``: a run that was cut off,
by ``--budget`` or otherwise, goes on there when it is started again. Beside it come ``.json`` (the
sums), ``.png`` (seconds against fidelity) and ``.md``: a row for each setting.
"""

from __future__ import annotations

import sys
from typing import Any

import contest
import torch
from contest import OURS, Benches, Contestant
from measure import machine, save
from pydantic import ValidationError

import accel
from accel.errors import AccelError

FAMILIES = ("cache", "attention", "tokens")
DENSE = ("attention.Backend",)
"""Methods of these families that compute what stock does, only elsewhere: nothing to compare."""

EASY = "cache.EasyCache"

COLUMNS = {
    "psnr": ("PSNR", "{:.1f}"),
    "ssim": ("SSIM", "{:.4f}"),
    "ssim_worst_frame": ("worst frame", "{:.4f}"),
    "perceptual": ("perceptual", "{:.4f}"),
    "flicker": ("flicker", "{:.4f}"),
    "caption_accuracy": ("captions right", "{:.1%}"),
    "motion_accuracy": ("motion right", "{:.1%}"),
}


def plans() -> tuple[dict[str, accel.Plan], dict[str, str]]:
    """Every setting by its name, and why methods are left out that have no default."""
    found: dict[str, accel.Plan] = {}
    left: dict[str, str] = {}
    known = accel.methods()
    for name, kind in sorted(known.items()):
        family = name.partition(".")[0]
        if family not in FAMILIES or name in DENSE:
            continue
        try:
            found[name] = accel.Plan(kind())
        except (ValidationError, AccelError) as error:
            left[name] = _first_line(error)
            continue
        if family == "attention":
            found[f"{name} + {EASY}"] = accel.Plan(kind(), known[EASY]())
    return found, left


def field_of(pipe: Any) -> tuple[list[Contestant], dict[str, str]]:
    """Every setting that serves the pipeline, and why the others do not."""
    found, left = plans()
    field = []
    for name, plan in found.items():
        try:
            plan.attach(pipe).detach()
        except AccelError as error:
            left[name] = _first_line(error)
            continue
        field.append(Contestant(OURS, name, 0, plan=plan))
    return field, left


def _first_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return str(error).splitlines()[0]


def markdown(title: str, result: dict[str, Any]) -> str:
    """The rows as a table to read, the fastest first, with the command and what was left out."""
    here = machine()
    versions = ", ".join(f"{name} {one}" for name, one in here["versions"].items())
    lines = [
        f"{title}. Measured {here['date']} on {here['processor']}, {here['threads']} threads "
        f"({versions}) with `python {' '.join(sys.argv)}`.",
        "",
        f"| method | seconds | speed-up (quartiles) | "
        f"{' | '.join(head for head, _ in COLUMNS.values())} |",
        f"|---{'|---' * (len(COLUMNS) + 2)}|",
        _line("stock", f"{result['stock']['seconds']['median']:.2f}", "–", result["stock"]),
    ]
    for row in sorted(result["rows"], key=lambda row: -row["speedup"]["median"]):
        speed = row["speedup"]
        times = f"{speed['median']:.2f}× ({speed['low']:.2f} to {speed['high']:.2f})"
        lines.append(_line(row["method"], f"{row['seconds']['median']:.2f}", times, row))
    lines += ["", *(f"* {name} is left out: {why}" for name, why in result["left_out"].items())]
    return "\n".join(lines).rstrip() + "\n"


def _line(name: str, seconds: str, times: str, row: dict[str, Any]) -> str:
    figures = (form.format(row[key]) if key in row else "–" for key, (_, form) in COLUMNS.items())
    return f"| {' | '.join([name, seconds, times, *figures])} |"


def measured(options: Any, benches: Benches) -> dict[str, Any]:
    """Draw what is missing, and write ``video-MODEL`` with its endings."""
    field, left = field_of(benches.get(OURS)[0])
    found = contest.run("video", options, benches, field)
    contest.show(found.rows)
    name = f"video-{options.model}"
    result = {
        "call": benches.call,
        "captions": found.seeds,
        "stock": found.stock,
        "left_out": left,
        "rows": found.rows,
    }
    size = "{num_frames} frames of {width} x {height}".format(**benches.call)
    steps = benches.call["num_inference_steps"]
    title = f"{options.model}, {size}, {steps} steps, {len(found.seeds)} captions, default knobs"
    contest.plot(found.rows, options.out / f"{name}.png", title)
    table = markdown(title, result)
    (options.out / f"{name}.md").write_text(table)
    print(table)
    print(save(name, result, options.out))
    return result


def main() -> None:
    """Measure, and write ``video-MODEL`` with its endings."""
    parser = contest.options_of(__doc__.splitlines()[0])
    parser.set_defaults(model="scenes-wan")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    measured(options, Benches(options.model, options.steps))


if __name__ == "__main__":
    main()
