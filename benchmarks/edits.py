"""Edits of a region against dense edits: time saved, by area, and how near they come.

    python benchmarks/edits.py --models scenes-unet scenes-flux [--side 256] [--sheet FILE]

An original is recorded once for each model: a red house, which the edit paints blue. Then, area by
area, the edit of a square around what the edit changes and the dense edit by the stock pipeline,
from the same noise, are run in turns; the first pair is not counted. The dense one is a second
pipeline of the same model, with nothing attached. Nearness is SSIM to the dense edit inside of the
region, and to the original outside of it; beside it stands how near the original is to the dense
edit inside, which is what an edit that does nothing would reach.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import ratio, save, spread
from PIL import Image

import accel
from accel.quality import ssim

AREAS = (0.01, 0.05, 0.2, 0.5, 1.0)
SHOWN = 0.2
"""The area whose pictures a sheet shows."""
ORIGINAL = "grassy hills with a red house on the left"
EDIT = "grassy hills with a blue house on the left"


def noise() -> torch.Generator:
    """The noise of the original and of all edits."""
    return torch.Generator().manual_seed(0)


def centre(original: Any, edited: Any) -> tuple[int, int]:
    """Row and column of the middle of what differs between two pictures."""
    one, two = (np.asarray(picture, dtype=float) for picture in (original, edited))
    weight = np.abs(one - two).sum(2)
    weight[weight < weight.max() / 4] = 0
    rows, columns = np.indices(weight.shape)
    return tuple(round(float((axis * weight).sum() / weight.sum())) for axis in (rows, columns))


def square(area: float, side: int, middle: tuple[int, int]) -> tuple[int, int, int, int]:
    """A square of an area around a place, in pixels: left, top, width, height."""
    length = max(1, round(side * area**0.5))
    top, left = (min(max(place - length // 2, 0), side - length) for place in middle)
    return left, top, length, length


def near(a: Any, b: Any, box: tuple[int, int, int, int]) -> dict[str, float | None]:
    """SSIM inside of a box, and of what is around it (the box blanked in both)."""
    left, top, width, height = box
    one, two = (np.asarray(picture).copy() for picture in (a, b))
    spot = np.s_[top : top + height, left : left + width]
    inside = float(ssim(one[spot], two[spot])) if min(width, height) >= 11 else None
    one[spot] = two[spot] = 0
    return {"inside": inside, "outside": float(ssim(one, two))}


def measured(
    name: str, repeats: int, changes: dict[str, Any], fields: dict[str, Any]
) -> tuple[Any, list[Image.Image]]:
    """What edits of one model take, by area; the original, an edit of it and the dense edit."""
    pipe, call = accel.load(name)
    stock, _ = accel.load(name)
    call = {**call, **changes}
    for one in (pipe, stock):
        one.set_progress_bar_config(disable=True)
    found, shown = [], []
    with accel.edit.sparse(pipe, **fields) as edits:
        original = edits.record(ORIGINAL, **call, generator=noise())
        aim = stock(EDIT, **call, generator=noise()).images[0]
        middle = centre(original.images[0], aim)
        for area in AREAS:
            box = square(area, call["height"], middle)
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
                    "the original to the dense edit": near(original.images[0], expected, box),
                    "to the original": near(edited.images[0], original.images[0], box),
                }
            )
            print(json.dumps({"model": name, **found[-1]}), flush=True)
            if area == SHOWN:
                shown = [original.images[0], edited.images[0], expected]
        result = {
            "call": call,
            "recording": {"seconds": original.seconds, "bytes": edits.bytes},
            "areas": found,
        }
        return result, shown


def main() -> None:
    """Measure, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["scenes-unet", "scenes-flux"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, help="default: the model's")
    parser.add_argument("--side", type=int, help="of the pictures; default: the model's")
    parser.add_argument("--fields", type=json.loads, default={}, help="of region.SIGE, as JSON")
    parser.add_argument("--name", default="edits", help="of the result")
    parser.add_argument("--sheet", type=Path, help="picture of originals, edits and dense edits")
    asked = parser.parse_args()
    sizes = {"num_inference_steps": asked.steps, "height": asked.side, "width": asked.side}
    changes = {key: value for key, value in sizes.items() if value is not None}
    made = {name: measured(name, asked.repeats, changes, asked.fields) for name in asked.models}
    models = {name: result for name, (result, _) in made.items()}
    path = save(asked.name, {"fields": asked.fields, "models": models})
    if asked.sheet is not None:
        sheet([pictures for _, pictures in made.values()]).save(asked.sheet)
    path.with_suffix(".md").write_text(table(json.loads(path.read_text())))


def sheet(rows: list[list[Image.Image]]) -> Image.Image:
    """Pictures side by side, a row a model, twice their size."""
    side = 2 * rows[0][0].width
    whole = Image.new("RGB", (side * len(rows[0]), side * len(rows)))
    for row, pictures in enumerate(rows):
        for column, one in enumerate(pictures):
            whole.paste(
                one.resize((side, side), Image.Resampling.BICUBIC), (side * column, side * row)
            )
    return whole


def table(document: dict[str, Any]) -> str:
    """A result in words: what is faster by how much, and how near it comes (SSIM)."""
    lines = [
        "Edits of a region against dense edits of the same picture; medians, least and most.\n",
        "| model | side | area | computed | faster | to the dense edit, inside (of the original) "
        "| to the original, outside |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, model in document["models"].items():
        for one in model["areas"]:
            faster = one["faster"]
            lines.append(
                f"| {name} | {model['call']['height']} px | {one['area']:.0%} "
                f"| {one['computed']:.0%} | {faster['median']:.2f} "
                f"({faster['low']:.2f}–{faster['high']:.2f}) "
                f"| {one['to the dense edit']['inside']:.3f} "
                f"({one['the original to the dense edit']['inside']:.3f}) "
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
