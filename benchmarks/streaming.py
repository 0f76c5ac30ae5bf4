"""Frames a second of a stream against a loop over the stock picture-to-picture pipeline.

    python benchmarks/streaming.py [--model scenes-unet] [--size 64] [--levels 4] [--budget 300]

Both draw the same frames at the same noise levels: the stock pipeline is called for each frame with
as many evaluations as the stream has levels, prompts and noise are the same, and both decode. A
visit draws a few frames; visits of all settings alternate, there and back, and a ratio is of visits
of one round. A stream is filled before it is timed, so that each frame that is pushed gives a
picture. Evaluations are rows that went through the network, of a frame.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import torch
from measure import RESULTS, clocked, ratio, repeated, save, signature, spread
from PIL import Image

import accel
from accel.loop import RCFG, FeatureBank, SimilarityFilter, Stream, StreamBatch

SCALE = 3.5
STRENGTH = 0.5
NONE, FULL = "stock, no guidance", "stock, guidance"
SETTINGS: dict[str, tuple[str, tuple[accel.Accelerator, ...]]] = {
    "no guidance": (NONE, (StreamBatch(),)),
    "no guidance, one frame after the other": (NONE, ()),
    "full guidance": (FULL, (StreamBatch(),)),
    "full guidance, one frame after the other": (FULL, ()),
    "residual guidance, self": (FULL, (StreamBatch(), RCFG(negative="self"))),
    "residual guidance, onetime": (FULL, (StreamBatch(), RCFG(negative="onetime"))),
    "self, feature bank": (FULL, (StreamBatch(), RCFG(), FeatureBank())),
    "self, similarity filter": (FULL, (StreamBatch(), RCFG(), SimilarityFilter())),
}
"""What a stream is compared with, and its plan."""


def frames(count: int, size: int) -> list[Image.Image]:
    """A pattern that drifts by a pixel from frame to frame."""
    places = np.linspace(0, 6, size)
    waves = np.stack([np.sin(np.add.outer(places * k, places)) for k in (1, 2, 3)], -1)
    pixels = ((waves + 1) * 127).astype(np.uint8)
    return [Image.fromarray(np.roll(pixels, number, 1)) for number in range(count)]


def loaded(model: str, size: int, levels: int) -> tuple[Any, dict[str, Any], str]:
    """The pipeline, the arguments of a call of as many evaluations, and the name of its scale."""
    pipe, call = accel.load(model)
    pipe = diffusers.AutoPipelineForImage2Image.from_pipe(pipe)
    pipe.set_progress_bar_config(disable=True)
    flux = "Flux" in type(pipe).__name__
    sides = ("height", "width")
    call = {name: value for name, value in call.items() if flux or name not in sides}
    call |= dict.fromkeys(sides, size) if flux else {}
    call |= {"prompt": "a red house", "strength": STRENGTH}
    call["num_inference_steps"] = round(levels / STRENGTH)
    return pipe, call, "true_cfg_scale" if flux else "guidance_scale"


class Bench:
    """One pipeline and its frames; streams stay open from visit to visit of one round."""

    def __init__(self, pipe: Any, call: dict[str, Any], scale: str, levels: int) -> None:
        self.pipe, self.call, self.scale, self.levels = pipe, call, scale, levels
        self.found: dict[str, dict[str, Any]] = {}

    def guided(self, name: str) -> dict[str, Any]:
        """The arguments of a call, with or without guidance."""
        return {**self.call, self.scale: 1.0 if name == NONE else SCALE}

    def stock(self, name: str, shown: list[Image.Image]) -> Callable[[], float]:
        """A visit of the stock pipeline: seconds a frame."""
        call = self.guided(name)

        def draw() -> None:
            for frame in shown:
                self.pipe(image=frame, generator=torch.Generator().manual_seed(0), **call)

        return lambda: clocked(draw) / len(shown)

    def stream(self, name: str, shown: list[Image.Image]) -> Callable[[], float]:
        """A visit of a stream: seconds a frame, once it is filled."""
        against, plan = SETTINGS[name]

        def visit() -> float:
            with Stream(self.pipe, plan, levels=self.levels, **self.guided(against)) as stream:
                for frame in frames(self.levels, shown[0].width):
                    stream.push(frame)
                before = stream.report.rows
                seconds = clocked(lambda: [stream.push(frame) for frame in shown])
                made = max(1, len(shown) - stream.skipped)
                self.found[name] = {
                    "evaluations": (stream.report.rows - before) / made,
                    "skipped": stream.skipped,
                    "verdicts": {
                        method: verdict.detail for method, verdict in stream.report.verdicts.items()
                    },
                }
            return seconds / len(shown)

        return visit


def _times(faster: dict[str, float] | None) -> str:
    """A ratio with its quartiles."""
    if faster is None:
        return "–"
    return f"{faster['median']:.2f} ({faster['low']:.2f}–{faster['high']:.2f})"


def markdown(rows: list[dict[str, Any]], title: str) -> str:
    """The table."""
    head = "| setting | ms a frame | frames a second | evaluations | skipped | times stock |"
    body = [
        f"| {row['setting']} | {row['seconds']['median'] * 1e3:.1f} "
        f"({row['seconds']['low'] * 1e3:.1f}–{row['seconds']['high'] * 1e3:.1f}) | "
        f"{1 / row['seconds']['median']:.1f} | {row['evaluations']:g} | {row['skipped']} | "
        + f"{_times(row['faster'])} |"
        for row in rows
    ]
    return "\n".join([title, "", head, "|---" * 6 + "|", *body, "", signature()]) + "\n"


def main() -> None:
    """Measure and write ``results/streaming-MODEL-SIZE.json`` and ``.md``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="scenes-unet")
    parser.add_argument("--size", type=int, default=64, help="pixels a side")
    parser.add_argument("--levels", type=int, default=4)
    parser.add_argument("--frames", type=int, default=8, help="of a visit")
    parser.add_argument("--budget", type=float, default=300.0, help="seconds in all")
    parser.add_argument("--repeats", type=int, help="rounds, whatever they take")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore", UserWarning)
    bench = Bench(*loaded(options.model, options.size, options.levels), options.levels)
    shown = frames(options.frames, options.size)
    unet = hasattr(bench.pipe, "unet")
    names = [name for name in SETTINGS if unet or "feature bank" not in name]
    visits = {name: bench.stock(name, shown) for name in (NONE, FULL)}
    visits |= {name: bench.stream(name, shown) for name in names}
    seconds = repeated(visits, options.budget, options.repeats)
    rows = []
    for name, taken in seconds.items():
        against = SETTINGS[name][0] if name in SETTINGS else None
        branches = 2 if name == FULL else 1
        plain = {"evaluations": branches * options.levels, "skipped": 0, "verdicts": {}}
        faster = ratio(seconds[against], taken) if against else None
        told = bench.found.get(name, plain)
        rows.append({"setting": name, "seconds": spread(taken), "faster": faster, **told})
    title = (
        f"{options.model}, {options.size}², {options.levels} levels, {options.frames} frames a "
        "visit: streams against a loop over the stock picture-to-picture pipeline."
    )
    name = f"streaming-{options.model}-{options.size}"
    asked = {key: getattr(options, key) for key in ("model", "size", "levels", "frames")}
    print(save(name, {"asked": asked, "rows": rows}))
    text = markdown(rows, title)
    (RESULTS / f"{name}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
