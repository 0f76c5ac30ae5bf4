"""Presets against the stock pipeline: seconds beside fidelity, in one interleaved run.

    python benchmarks/presets.py [--model scenes-flux] [--captions 64] [--plan NAME=FILE …]

Every held-out caption is drawn by the stock pipeline and by each preset, with the same seed, one
after the other in rotating order; a first round is left out as warm-up. Fidelity is measured
against the stock picture of the same caption and seed; caption accuracy by the oracle.
"""

from __future__ import annotations

import argparse
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from measure import RESULTS, ratio, save, spread
from PIL import Image

import accel
from accel.scenes import HELD_OUT, Scene, clip_scene, motion, oracle, scene
from accel.scenes.oracle import Accuracy
from accel.tuning.bench import fidelity

STOCK = "stock"
MEASURES = ("ssim", "psnr", "perceptual")
LEVELS = (0.95, 0.9, 0.8)
"""Of SSIM, of which it is told at how many captions one by one they are held."""


@dataclass
class Variant:
    """One way to draw the captions, and what came of it: of each a picture, or a clip's frames."""

    plan: accel.Plan
    seconds: list[float] = field(default_factory=list)
    nfe: list[float] = field(default_factory=list)
    pictures: list[list[Image.Image]] = field(default_factory=list)
    verdicts: dict[str, Any] = field(default_factory=dict)


def drawn(
    pipe: Any, call: dict[str, Any], subject: Scene, generator: torch.Generator
) -> list[Image.Image]:
    """One picture, or the frames of a clip."""
    made = pipe(subject.caption, generator=generator, **call | {"output_type": "pil"})[0][0]
    return list(made) if isinstance(made, list) else [made]


def draw(pipe: Any, call: dict[str, Any], variant: Variant, subject: Scene, keep: bool) -> None:
    """Draw one caption, timed as a user would: from the prompt to the picture."""
    generator = torch.Generator().manual_seed(subject.seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        with variant.plan.attach(pipe) as run:
            start = time.perf_counter()
            picture = drawn(pipe, call, subject, generator)
            seconds = time.perf_counter() - start
    if keep:
        variant.seconds.append(seconds)
        variant.nfe.append(run.report.nfe)
        variant.pictures.append(picture)
        variant.verdicts = run.report.to_dict()["verdicts"]


def draw_stock(
    pipe: Any, call: dict[str, Any], variant: Variant, subject: Scene, keep: bool
) -> None:
    """The same with no plan attached at all."""
    generator = torch.Generator().manual_seed(subject.seed)
    start = time.perf_counter()
    picture = drawn(pipe, call, subject, generator)
    seconds = time.perf_counter() - start
    if keep:
        variant.seconds.append(seconds)
        variant.pictures.append(picture)


def measure(
    pipe: Any, call: dict[str, Any], variants: dict[str, Variant], scenes: list[Scene]
) -> None:
    """Draw every caption with every variant, in rotating order."""
    names = list(variants)
    for turn, subject in enumerate([scenes[0], *scenes]):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            how = draw_stock if name == STOCK else draw
            how(pipe, call, variants[name], subject, turn > 0)
        print(f"{turn}/{len(scenes)}", end="\r", flush=True)


def count_stock(pipe: Any, call: dict[str, Any], variant: Variant, subject: Scene) -> None:
    """NFE of the stock pipeline, counted in a run of its own."""
    probe = Variant(accel.Plan())
    draw(pipe, call, probe, subject, True)
    variant.nfe = probe.nfe


def summary(variant: Variant, stock: Variant, scenes: list[Scene]) -> dict[str, Any]:
    """Seconds beside fidelity of one variant."""
    figures = [
        fidelity(MEASURES, ours, theirs)
        for ours, theirs in zip(stock.pictures, variant.pictures, strict=True)
    ]
    ssim = [one["ssim"] for one in figures]
    accuracy = told(variant.pictures, scenes)
    return {
        "plan": variant.plan.to_dict(),
        "seconds": spread(variant.seconds),
        "speedup": ratio(stock.seconds, variant.seconds),
        "nfe": mean(variant.nfe),
        **{name: mean(one[name] for one in figures) for name in MEASURES},
        "ssim_worst": min(ssim),
        "share": {str(level): mean(value >= level for value in ssim) for level in LEVELS},
        "caption_accuracy": accuracy.mean,
        "all_correct": accuracy.all_correct,
        "verdicts_of_the_last": variant.verdicts,
    }


def told(pictures: list[list[Image.Image]], scenes: list[Scene]) -> Accuracy:
    """What the oracle of pictures, or that of clips, reads of the captions."""
    if len(pictures[0]) > 1:
        return motion.caption_accuracy(pictures, scenes)
    return oracle.caption_accuracy([one for (one,) in pictures], scenes)


def show(results: dict[str, dict[str, Any]]) -> None:
    """Print the table."""
    print(f"{'':<14}{'seconds':>9}{'speed-up':>10}{'NFE':>7}{'PSNR':>7}{'SSIM':>8}{'caption':>9}")
    for name, row in results.items():
        print(
            f"{name:<14}{row['seconds']['median']:>9.3f}{row['speedup']['median']:>9.2f}×"
            f"{row['nfe']:>7.1f}{row['psnr']:>7.1f}{row['ssim']:>8.4f}"
            f"{row['caption_accuracy']:>9.3f}"
        )


def main() -> None:
    """Measure and write ``results/presets-MODEL.json``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="scenes-flux")
    parser.add_argument("--captions", type=int, default=64)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--plan", action="append", default=[], metavar="NAME=FILE")
    parser.add_argument("--name", default="presets")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pipe, call = accel.load(options.model)
    pipe.set_progress_bar_config(disable=True)
    plans = {name: accel.Plan.preset(name) for name in ("exact", "balanced", "fast", "fastest")}
    for item in options.plan:
        name, path = item.split("=", 1)
        plans[name] = accel.Plan.from_toml(Path(path).read_text())
    variants = {STOCK: Variant(accel.Plan())}
    variants |= {name: Variant(plan) for name, plan in plans.items()}
    first = HELD_OUT.start
    describe = clip_scene if "num_frames" in call else scene
    scenes = [describe(seed) for seed in range(first, first + options.captions)]
    measure(pipe, call, variants, scenes)
    count_stock(pipe, call, variants[STOCK], scenes[0])
    stock = variants[STOCK]
    results = {name: summary(variant, stock, scenes) for name, variant in variants.items()}
    show(results)
    print(save(f"{options.name}-{options.model}", {"call": call, "variants": results}, options.out))


if __name__ == "__main__":
    main()
