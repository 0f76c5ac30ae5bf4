"""Edits of a region against dense edits: time saved, by area, and how near they come.

    python benchmarks/edits.py --models scenes-unet scenes-flux

An original is recorded once for each model. Then, area by area, the edit of a centred square and
the dense edit by the stock pipeline, from the same noise, are run in turns; the first pair is not
counted. The dense one is a second pipeline of the same model, with nothing attached. Nearness is
SSIM to the dense edit inside of the region, and to the original outside of it.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import numpy as np
import torch
from measure import ratio, save, spread

import accel
from accel.quality import ssim

AREAS = (0.01, 0.05, 0.2, 0.5, 1.0)
ORIGINAL = "a red cube on a green field"
EDIT = "a blue ball on a green field"


def noise() -> torch.Generator:
    """The noise of the original and of all edits."""
    return torch.Generator().manual_seed(0)


def square(area: float, side: int) -> tuple[int, int, int, int]:
    """A centred square of an area, in pixels: left, top, width, height."""
    length = max(1, round(side * area**0.5))
    start = (side - length) // 2
    return start, start, length, length


def near(a: Any, b: Any, box: tuple[int, int, int, int]) -> dict[str, float | None]:
    """SSIM inside of a box, and of what is around it (the box blanked in both)."""
    left, top, width, height = box
    one, two = (np.asarray(picture).copy() for picture in (a, b))
    spot = np.s_[top : top + height, left : left + width]
    inside = float(ssim(one[spot], two[spot])) if min(width, height) >= 11 else None
    one[spot] = two[spot] = 0
    return {"inside": inside, "outside": float(ssim(one, two))}


def measured(name: str, repeats: int, changes: dict[str, Any], fields: dict[str, Any]) -> Any:
    """What edits of one model take, by area."""
    pipe, call = accel.load(name)
    stock, _ = accel.load(name)
    call = {**call, **changes}
    for one in (pipe, stock):
        one.set_progress_bar_config(disable=True)
    found = []
    with accel.edit.sparse(pipe, **fields) as edits:
        original = edits.record(ORIGINAL, **call, generator=noise())
        for area in AREAS:
            box = square(area, call["height"])
            dense, sparse = [], []
            for turn in range(repeats + 1):
                start = time.perf_counter()
                expected = stock(EDIT, **call, generator=noise()).images[0]
                seconds = time.perf_counter() - start
                edited = edits.edit(EDIT, region=box)
                if turn:
                    dense.append(seconds)
                    sparse.append(edited.seconds)
            found.append(
                {
                    "area": area,
                    "computed": edited.share,
                    "dense": spread(dense),
                    "sparse": spread(sparse),
                    "faster": ratio(dense, sparse),
                    "to the dense edit": near(edited.images[0], expected, box),
                    "to the original": near(edited.images[0], original.images[0], box),
                }
            )
            print(json.dumps({"model": name, **found[-1]}), flush=True)
        return {
            "call": call,
            "recording": {"seconds": original.seconds, "bytes": edits.bytes},
            "areas": found,
        }


def main() -> None:
    """Measure, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["scenes-unet", "scenes-flux"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, help="default: the model's")
    parser.add_argument("--side", type=int, help="of the pictures; default: the model's")
    parser.add_argument("--fields", type=json.loads, default={}, help="of region.SIGE, as JSON")
    parser.add_argument("--name", default="edits", help="of the result")
    asked = parser.parse_args()
    sizes = {"num_inference_steps": asked.steps, "height": asked.side, "width": asked.side}
    changes = {key: value for key, value in sizes.items() if value is not None}
    models = {name: measured(name, asked.repeats, changes, asked.fields) for name in asked.models}
    path = save(asked.name, {"fields": asked.fields, "models": models})
    path.with_suffix(".md").write_text(table(json.loads(path.read_text())))


def table(document: dict[str, Any]) -> str:
    """A result in words: what is faster by how much, and how near it comes (SSIM)."""
    lines = [
        "Edits of a region against dense edits of the same picture; medians, least and most.\n",
        "| model | area | computed | faster | to the dense edit, inside | to the original, "
        "outside |",
        "|---|---|---|---|---|---|",
    ]
    for name, model in document["models"].items():
        for one in model["areas"]:
            faster = one["faster"]
            lines.append(
                f"| {name} | {one['area']:.0%} | {one['computed']:.0%} | {faster['median']:.2f} "
                f"({faster['low']:.2f}–{faster['high']:.2f}) "
                f"| {one['to the dense edit']['inside']:.3f} "
                f"| {one['to the original']['outside']:.3f} |"
            )
    made = document["machine"]
    return "\n".join(
        [
            *lines,
            f"\nMeasured {made['date']} on {made['processor']}, {made['threads']} threads, with "
            f"`{document['command']}`.\n",
        ]
    )


if __name__ == "__main__":
    main()
