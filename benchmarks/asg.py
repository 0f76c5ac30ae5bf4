"""A picture larger than a model was trained for: the stock call against ASGDiffusion.

    python benchmarks/asg.py [--model scenes-unet] [--size 256] [--captions 8] [--steps 0]

Two processes of one thread each share the patches; the stock picture is made by the first alone.
Nothing is timed. What counts is whether the picture keeps to its caption: the oracle reads pictures
of 64 to 128 pixels, so it is given averages of 2 × 2 pixels of those of 256. Its distance is that
to the render of the same scene. Detail is the mean difference of neighbouring pixels, in units of
that of the renders at full size: less is blurred. Calls and rows are those of the network in the
first process, bytes what it sends for a picture. Beside the table comes a sheet, ``.webp``: a row
for each plan.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from measure import RESULTS, save, signature
from PIL import Image

import accel
from accel import Plan, quality
from accel.scenes import HELD_OUT, picture, scene
from accel.scenes.oracle import caption_accuracy
from parallel import ASG
from parallel.launch import Place
from parallel.launch import spread as together

STOCK = "stock call"
PLANS: dict[str, Plan] = {
    STOCK: Plan(),
    "ASG": Plan(ASG()),
    "ASG, stale": Plan(ASG(mode="stale", warmup=0)),
    "combs alone guide (strength 0)": Plan(ASG(strength=0.0)),
    "windows alone (until 0)": Plan(ASG(until=0.0)),
}
PROCESSES = 2
PATIENCE = 3600.0
"""Seconds that the second process waits while the first makes the stock pictures."""
READ = 128
"""Pixels a side of the largest pictures that the oracle reads."""
SHOWN, QUALITY = 8, 88
"""Captions on the sheet, and its quality as WebP."""


@dataclass(frozen=True)
class Asked:
    """What is measured.

    Attributes:
        model: A bundled model of pictures.
        size: Pixels a side, twice those of a usual call.
        captions: Held-out captions, a picture each.
        steps: Of a picture; 0: those of a usual call.
        plans: Names of the plans.
    """

    model: str
    size: int
    captions: int
    steps: int
    plans: tuple[str, ...]


def measured(place: Place, asked: Asked) -> dict[str, dict[str, Any]]:
    """Pictures, counts and bytes of every plan; all processes make the same calls."""
    import torch

    torch.set_num_threads(1)
    pipe, call = accel.load(asked.model)
    pipe.set_progress_bar_config(disable=True)
    call |= {"height": asked.size, "width": asked.size}
    if asked.steps:
        call["num_inference_steps"] = asked.steps
    found: dict[str, dict[str, Any]] = {}
    for name in asked.plans:
        if name == STOCK and place.rank:
            continue
        pictures, counted = [], {}
        with PLANS[name].attach(pipe) as run:
            for seed in HELD_OUT[: asked.captions]:
                noise = torch.Generator().manual_seed(seed)
                made = pipe(scene(seed).caption, generator=noise, output_type="np", **call)
                pictures.append(made.images[0])
                told = [verdict.detail for verdict in run.report.verdicts.values()]
                sent = re.search(r"sent ([\d,]+) bytes", " ".join(told))
                counted = {
                    "calls": run.report.calls,
                    "rows": run.report.rows,
                    "bytes": int(sent[1].replace(",", "")) if sent else 0,
                }
        found[name] = {"pictures": np.stack(pictures), **counted}
    return found


def shrunk(pictures: Any, side: int) -> Any:
    """Pictures ``[N, H, W, 3]`` by averages over squares, ``[N, side, side, 3]``."""
    count, size = len(pictures), pictures.shape[1]
    squares = pictures.reshape(count, side, size // side, side, size // side, 3)
    return squares.mean((2, 4))


def detail(pictures: Any) -> float:
    """Mean difference of neighbouring pixels."""
    return float(np.mean([np.abs(np.diff(pictures, axis=axis)).mean() for axis in (1, 2)]))


def rows(found: dict[str, dict[str, Any]], asked: Asked) -> list[dict[str, Any]]:
    """A line for each plan."""
    scenes = [scene(seed) for seed in HELD_OUT[: asked.captions]]
    renders = np.stack([picture(one, asked.size) for one in scenes]).astype(np.float32) / 255
    lines = []
    for name, one in found.items():
        small = shrunk(one["pictures"], READ)
        accuracy = caption_accuracy(list(small), scenes)
        lines.append(
            {
                "plan": name,
                "calls": one["calls"],
                "rows": one["rows"],
                "bytes": one["bytes"],
                "accuracy": accuracy.mean,
                "whole": accuracy.all_correct,
                "by_attribute": accuracy.by_attribute,
                "perceptual": quality.perceptual(small, shrunk(renders, READ)),
                "detail": detail(one["pictures"]) / detail(renders),
            }
        )
    return lines


def markdown(lines: Sequence[dict[str, Any]], title: str) -> str:
    """The table."""
    head = "| plan | calls | rows | MB sent | right | all right | from renders | detail |"
    body = [
        f"| {one['plan']} | {one['calls']} | {one['rows']} | {one['bytes'] / 1e6:.2f} | "
        f"{one['accuracy']:.1%} | {one['whole']:.1%} | {one['perceptual']:.4f} | "
        f"{one['detail']:.2f} |"
        for one in lines
    ]
    return "\n".join([title, "", head, "|---" * 8 + "|", *body, "", signature()]) + "\n"


def sheet(found: dict[str, dict[str, Any]]) -> Image.Image:
    """The first pictures, a row for each plan."""
    rows = [np.concatenate(list(one["pictures"][:SHOWN]), 1) for one in found.values()]
    whole = (np.concatenate(rows) * 255).round().astype(np.uint8)
    return Image.fromarray(whole)


def main() -> None:
    """Measure and write ``results/asg-MODEL-SIZE.json``, ``.md`` and ``.webp``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="scenes-unet")
    parser.add_argument("--size", type=int, default=256, help="pixels a side")
    parser.add_argument("--captions", type=int, default=8)
    parser.add_argument("--steps", type=int, default=0, help="of a picture; 0: as usual")
    parser.add_argument("--plans", nargs="*", default=[STOCK, "ASG"], choices=list(PLANS))
    options = parser.parse_args()
    names = dict.fromkeys([STOCK, *options.plans])
    asked = Asked(options.model, options.size, options.captions, options.steps, tuple(names))
    found = together(PROCESSES, measured, asked, patience=PATIENCE)
    lines = rows(found, asked)
    name = f"asg-{asked.model}-{asked.size}"
    steps = f"{asked.steps} steps" if asked.steps else "the usual number of steps"
    title = (
        f"{asked.model}, {asked.size}², {asked.captions} captions, {steps}: the stock call of one "
        f"process against {PROCESSES} that share the patches."
    )
    print(save(name, {"asked": asdict(asked), "processes": PROCESSES, "rows": lines}))
    text = markdown(lines, title)
    (RESULTS / f"{name}.md").write_text(text)
    sheet(found).save(RESULTS / f"{name}.webp", quality=QUALITY)
    print(text)


if __name__ == "__main__":
    main()
