"""A picture larger than a model was trained for: the stock call, stages of two sizes, and patches.

    python benchmarks/resolution.py [--model scenes-unet] [--size 256] [--captions 8] [--threads 2]

Every caption is drawn by each plan in turn, there and back from caption to caption, so that seconds
are side by side; the first caption is drawn once before, to warm up. Memory is the most that the
process holds in a run of its own. Whether a picture keeps to its caption says the oracle, which
reads pictures of 64 to 128 pixels: it is given averages over squares. Its distance is that to the
render of the same scene; SSIM is that to the stock picture, which is another one on purpose. Detail
is the mean difference of neighbouring pixels, in units of that of renders: less is blurred, more is
grain. Beside the table comes a sheet, ``.jpg``: a row for each plan.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from asg import READ, detail, shrunk
from measure import RESULTS, ratio, save, signature, spread
from PIL import Image

import accel
from accel import Plan, cache, quality
from accel.peak import MIB, watching
from accel.resolution import Bottleneck, Pixelsmith
from accel.scenes import HELD_OUT, picture, scene
from accel.scenes.oracle import caption_accuracy

STOCK = "stock call"
BASE = 128
"""Pixels a side of the bundled models' usual calls."""
SHOWN = 6
"""Captions on the sheet."""
PLANS: dict[str, Plan] = {
    STOCK: Plan(),
    "Bottleneck": Plan(Bottleneck()),
    "Bottleneck, half at the small size": Plan(Bottleneck(steps=(2, 7, 5))),
    "Bottleneck + EasyCache": Plan(Bottleneck(), cache.EasyCache()),
    "Pixelsmith, slider 0.6": Plan(Pixelsmith(base=BASE)),
    "Pixelsmith, slider 0.9": Plan(Pixelsmith(base=BASE, slider=0.9)),
}


class Painter:
    """Draws held-out captions in a size.

    Args:
        model: A bundled model of pictures.
        size: Pixels a side.
        steps: Of a picture; 0: those of a usual call.
    """

    def __init__(self, model: str, size: int, steps: int) -> None:
        self._pipe, call = accel.load(model)
        self._pipe.set_progress_bar_config(disable=True)
        self._call = call | {"height": size, "width": size}
        if steps:
            self._call["num_inference_steps"] = steps

    def draw(self, plan: Plan, seed: int) -> dict[str, Any]:
        """A picture ``[H, W, 3]`` in [0, 1], its seconds, and what the network was asked."""
        noise = torch.Generator().manual_seed(seed)
        begin = time.perf_counter()
        with plan.attach(self._pipe) as run:
            made = self._pipe(scene(seed).caption, generator=noise, output_type="np", **self._call)
        return {
            "seconds": time.perf_counter() - begin,
            "picture": made.images[0],
            "calls": run.report.calls,
            "rows": run.report.rows,
        }

    def memory(self, plan: Plan) -> float:
        """MiB that the process holds at most while it draws."""
        with watching("cpu") as peak:
            self.draw(plan, HELD_OUT[0])
            found = peak()
        return 0.0 if found is None else found.bytes / MIB


def measured(painter: Painter, names: Sequence[str], captions: int) -> dict[str, dict[str, Any]]:
    """Pictures, seconds and counts of every plan."""
    for name in names:
        painter.draw(PLANS[name], HELD_OUT[0])
    drawn: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for turn, seed in enumerate(HELD_OUT[:captions]):
        for name in names[:: -1 if turn % 2 else 1]:
            drawn[name].append(painter.draw(PLANS[name], seed))
            print(f"{seed} {name}: {drawn[name][-1]['seconds']:.1f} s", flush=True)
    return {
        name: {
            "seconds": [one["seconds"] for one in found],
            "pictures": np.stack([one["picture"] for one in found]),
            "calls": found[-1]["calls"],
            "rows": found[-1]["rows"],
            "mib": painter.memory(PLANS[name]),
        }
        for name, found in drawn.items()
    }


def rows(found: dict[str, dict[str, Any]], size: int) -> list[dict[str, Any]]:
    """A line for each plan."""
    stock = found[STOCK]
    scenes = [scene(seed) for seed in HELD_OUT[: len(stock["pictures"])]]
    renders = np.stack([picture(one, size) for one in scenes]).astype(np.float32) / 255
    lines = []
    for name, one in found.items():
        small = shrunk(one["pictures"], min(READ, size))
        accuracy = caption_accuracy(list(small), scenes)
        lines.append(
            {
                "plan": name,
                "seconds": spread(one["seconds"]),
                "speedup": ratio(stock["seconds"], one["seconds"]),
                "mib": one["mib"],
                "calls": one["calls"],
                "rows": one["rows"],
                "ssim": float(quality.ssim(one["pictures"], stock["pictures"])),
                "accuracy": accuracy.mean,
                "whole": accuracy.all_correct,
                "by_attribute": accuracy.by_attribute,
                "perceptual": quality.perceptual(small, shrunk(renders, min(READ, size))),
                "detail": detail(one["pictures"]) / detail(renders),
            }
        )
    return lines


def markdown(lines: Sequence[dict[str, Any]], title: str) -> str:
    """The table."""
    head = (
        "| plan | seconds | faster | MiB | calls | SSIM to stock | right | all right | "
        "from renders | detail |"
    )
    body = [
        f"| {one['plan']} | {one['seconds']['median']:.2f} | {one['speedup']['median']:.2f} "
        f"({one['speedup']['low']:.2f}–{one['speedup']['high']:.2f}) | {one['mib']:.0f} | "
        f"{one['calls']} | {one['ssim']:.3f} | {one['accuracy']:.1%} | {one['whole']:.1%} | "
        f"{one['perceptual']:.4f} | {one['detail']:.2f} |"
        for one in lines
    ]
    return "\n".join([title, "", head, "|---" * 10 + "|", *body, "", signature()]) + "\n"


def sheet(found: dict[str, dict[str, Any]]) -> Image.Image:
    """The pictures at the base size, a row for each plan."""
    strips = [
        np.concatenate(list(shrunk(one["pictures"][:SHOWN], BASE)), 1) for one in found.values()
    ]
    return Image.fromarray((np.concatenate(strips) * 255).round().astype(np.uint8))


def main() -> None:
    """Measure and write ``results/resolution-MODEL-SIZE.json``, ``.md`` and ``.jpg``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="scenes-unet")
    parser.add_argument("--size", type=int, default=256, help="pixels a side")
    parser.add_argument("--captions", type=int, default=8)
    parser.add_argument("--steps", type=int, default=0, help="of a picture; 0: as usual")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--plans", nargs="*", default=list(PLANS), choices=list(PLANS))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    names = list(dict.fromkeys([STOCK, *options.plans]))
    found = measured(Painter(options.model, options.size, options.steps), names, options.captions)
    lines = rows(found, options.size)
    name = f"resolution-{options.model}-{options.size}"
    steps = f"{options.steps} steps" if options.steps else "the usual number of steps"
    title = (
        f"{options.model}, {options.size}², {options.captions} captions, {steps}. The model was "
        f"trained at up to {BASE}²."
    )
    print(save(name, {"asked": vars(options), "rows": lines}))
    text = markdown(lines, title)
    (RESULTS / f"{name}.md").write_text(text)
    sheet(found).save(RESULTS / f"{name}.jpg", quality=80)
    print(text)


if __name__ == "__main__":
    main()
