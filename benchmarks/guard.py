"""A guard's promise against the real error, on captions that it was not calibrated on.

    python benchmarks/guard.py [--model scenes-flux] [--captions 32] [--steps 20] [--fresh]

For each plan the scale is calibrated on captions of training seeds (as `accel calibrate guard` does
it), then every held-out caption is drawn without approximations and with each promise. The real
error is ‖x − x*‖/‖x*‖ of the final latents. Nothing is timed, so it may run beside other work;
what is saved is counted in evaluations of the network, spot checks included. A run that was cut off
goes on where it was.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import RESULTS, Lines, digest, here, save, signature

import accel
from accel import cache, guidance
from accel.promises import COVERAGE, LEAST, Measured, measured, rank
from accel.scenes import HELD_OUT, TRAINING, Scene, scene

PLANS = {
    "EasyCache": accel.Plan(cache.EasyCache(threshold=0.3)),
    "Adaptive + EasyCache": accel.Plan(
        guidance.Adaptive(threshold=0.9), cache.EasyCache(threshold=0.3)
    ),
}
"""Bold ones: what holds them back is the guard."""

BUDGETS = (0.005, 0.01, 0.03, 0.1)
"""Estimated errors that the scale is measured at."""

PROMISES = (0.01, 0.02, 0.05, 0.1, 0.2)
FIRST_TRAINING = TRAINING[500_000]
"""Training seeds from here on are those of a calibration."""


def fill(
    lines: Lines,
    pipe: Any,
    call: dict[str, Any],
    what: tuple[str, str],
    scenes: Iterable[Scene],
    guards: list[accel.Guard],
) -> None:
    """Draw what is not in the file yet: a line a caption."""
    part, name = what
    for subject in scenes:
        if found(lines, part, name, [subject.seed], guards):
            continue
        generator = torch.Generator().manual_seed(subject.seed)
        arguments = {**call, "prompt": subject.caption, "generator": generator}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            runs = measured(pipe, arguments, PLANS[name], guards)
        scale = guards[0].scale
        points = [asdict(one) for one in runs]
        line = {"part": part, "plan": name, "seed": subject.seed, "scale": scale, "runs": points}
        lines.add(line)
        print(f"{name}, {part}: {subject.seed}", end="\r", flush=True)


def found(
    lines: Lines, part: str, name: str, seeds: Iterable[int], guards: list[accel.Guard]
) -> list[list[dict[str, Any]]]:
    """The runs of some captions that are in the file, with these guards."""
    wanted, asked = set(seeds), [guard.max_error for guard in guards]
    return [
        line["runs"]
        for line in lines.found
        if (line["part"], line["plan"], line["scale"]) == (part, name, guards[0].scale)
        and line["seed"] in wanted
        and [run["budget"] for run in line["runs"]] == asked
    ]


def scale_of(runs: list[list[dict[str, Any]]]) -> float:
    """The scale that calibration runs come to."""
    scores = sorted(max(Measured(**run).score for run in one) for one in runs)
    return float(scores[rank(len(scores)) - 1])


def summary(promise: float, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """How one promise was kept, over the captions."""
    real = np.array([run["real"] for run in runs])
    return {
        "promised": promise,
        "coverage": float((real <= promise).mean()),
        "real_median": float(np.median(real)),
        "real_95": float(np.quantile(real, 0.95)),
        "real_worst": float(real.max()),
        "estimated_median": float(np.median([run["spent"] for run in runs])),
        "evaluations_saved": float(np.mean([1 - run["nfe"] / run["stock"] for run in runs])),
        "checks": float(np.mean([run["checks"] for run in runs])),
    }


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The summaries, and by plan the coverage over all promises."""
    parts = []
    for name, row in rows.items():
        parts += [
            f"### {name}",
            "",
            f"Scale {row['scale']:.3g}, from {row['calibrated_on']} captions of training seeds. "
            f"Over all promises {row['coverage']:.1%} of {row['pictures']} pictures keep theirs.",
            "",
            "| promised | kept by | real: median | 95 % | worst | estimated: median | evaluations "
            "saved |",
            "|---:|---:|---:|---:|---:|---:|---:|",
        ]
        parts += [
            f"| {one['promised']:g} | {one['coverage']:.1%} | {one['real_median']:.4f} | "
            f"{one['real_95']:.4f} | {one['real_worst']:.4f} | {one['estimated_median']:.4f} | "
            f"{one['evaluations_saved']:.0%} |"
            for one in row["promises"]
        ]
        parts.append("")
    return "\n".join(parts)


def diagram(rows: dict[str, dict[str, Any]], points: dict[str, Any], path: Path) -> None:
    """Promised against real, and estimated against real."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 5), sharey=True)
    marks = zip(rows, ("tab:blue", "tab:orange", "tab:green"), strict=False)
    for shift, (name, colour) in enumerate(marks):
        runs = [run for one in points[name] for run in one if run["real"] > 0]
        aside = 0.96 + 0.08 * shift
        promised = [run["budget"] * aside for run in runs]
        real = [run["real"] for run in runs]
        label = f"{name}: {rows[name]['coverage']:.1%} keep the promise"
        axes[0].scatter(promised, real, s=8, alpha=0.4, color=colour, label=label)
        axes[1].scatter([run["spent"] for run in runs], real, s=8, alpha=0.4, color=colour)
    for one, title in zip(axes, ("max_error promised", "error estimated (spent)"), strict=True):
        one.plot([1e-3, 0.3], [1e-3, 0.3], color="black", linewidth=0.8)
        one.set(xscale="log", yscale="log", xlabel=title, xlim=(2e-3, 0.3), ylim=(1e-3, 0.3))
        one.grid(alpha=0.3)
    axes[0].set_ylabel("real relative error of the final latents")
    axes[0].legend(loc="upper left", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def arguments() -> argparse.Namespace:
    """What was typed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="scenes-flux")
    parser.add_argument("--captions", type=int, default=32, help="held-out captions")
    parser.add_argument("--calibration", type=int, default=32, help=f"at least {LEAST}")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--folder", type=Path, default=RESULTS)
    parser.add_argument("--fresh", action="store_true")
    return parser.parse_args()


def main() -> None:
    """Calibrate, draw, write."""
    asked = arguments()
    pipe, call = accel.load(asked.model)
    pipe.set_progress_bar_config(disable=True)
    call = {**call, "num_inference_steps": asked.steps, "output_type": "latent"}
    stem = asked.folder / f"guard-{asked.model}"
    if asked.fresh:
        stem.with_suffix(".jsonl").unlink(missing_ok=True)
    header = {**here(), "model": asked.model, "weights": digest(pipe), "steps": asked.steps}
    lines = Lines(stem.with_suffix(".jsonl"), header)
    trained = [scene(FIRST_TRAINING + number) for number in range(asked.calibration)]
    held_out = [scene(seed) for seed in HELD_OUT[: asked.captions]]
    rows: dict[str, Any] = {}
    points: dict[str, Any] = {}
    for name in PLANS:
        guards = [accel.Guard(max_error=budget, scale=1.0) for budget in BUDGETS]
        fill(lines, pipe, call, ("calibration", name), trained, guards)
        seeds = [one.seed for one in trained]
        scale = scale_of(found(lines, "calibration", name, seeds, guards))
        guards = [accel.Guard(max_error=one, scale=scale) for one in PROMISES]
        fill(lines, pipe, call, ("held-out", name), held_out, guards)
        seeds = [one.seed for one in held_out]
        points[name] = found(lines, "held-out", name, seeds, guards)
        by_promise = zip(PROMISES, zip(*points[name], strict=True), strict=True)
        promises = [summary(promise, list(runs)) for promise, runs in by_promise]
        rows[name] = {
            "scale": scale,
            "calibrated_on": len(trained),
            "pictures": len(points[name]) * len(PROMISES),
            "coverage": float(np.mean([one["coverage"] for one in promises])),
            "promises": promises,
        }
    told = {"model": asked.model, "steps": asked.steps, "asked": COVERAGE, "plans": rows}
    save(stem.name, {**told, "captions": [one.seed for one in held_out]}, asked.folder)
    text = f"# Guarded runs on {asked.model}\n\n{signature()}\n\n{table(rows)}"
    stem.with_suffix(".md").write_text(text)
    diagram(rows, points, stem.with_suffix(".png"))
    print(text)


if __name__ == "__main__":
    main()
