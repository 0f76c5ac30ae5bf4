"""A guard's promise against the real error, on captions that it was not calibrated on.

    python benchmarks/guard.py [--model scenes-flux] [--captions 16] [--steps 14] [--fresh]

For each plan the guard is calibrated on captions of training seeds (as `accel calibrate guard` does
it), then every held-out caption is drawn without approximations and with each promise. The real
error is ‖x − x*‖/‖x*‖ of the final latents. Nothing is timed, so it may run beside other work;
what is saved is counted in evaluations of the network, spot checks included. A run that was cut off
goes on where it was.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import RESULTS, Lines, digest, here, save, save_plot, signature

import accel
from accel import cache, guidance
from accel.guard.file import Basis
from accel.promises import COVERAGE, LEAST, Reference, measured, rank, reference
from accel.scenes import HELD_OUT, TRAINING, Scene, scene

PLANS = {
    "EasyCache": accel.Plan(cache.EasyCache(threshold=0.3)),
    "Adaptive + EasyCache": accel.Plan(
        guidance.Adaptive(threshold=0.9), cache.EasyCache(threshold=0.3)
    ),
}
"""Bold ones: what holds them back is the guard."""

BUDGETS = (0.005, 0.02, 0.08)
"""Estimated errors that a calibration runs at."""

PROMISES = (0.02, 0.05, 0.1, 0.2)
FIRST_TRAINING = TRAINING[500_000]
"""Training seeds from here on are those of a calibration."""

Guards = list[accel.Guard]
Points = list[dict[str, Any]]
"""The runs of one caption, one a guard."""

Runs = list[Points]


@dataclass
class Bench:
    """A pipeline, what was drawn with it, and its runs without approximations by seed."""

    pipe: Any
    call: dict[str, Any]
    lines: Lines
    exact: dict[int, Reference] = field(default_factory=dict)

    def fill(self, part: str, name: str, scenes: Iterable[Scene], guards: Guards) -> Runs:
        """The runs of some captions with some guards; what is not in the file yet is drawn."""
        found = []
        for subject in scenes:
            runs = self._found(part, name, subject.seed, guards)
            found.append(self._draw(part, name, subject, guards) if runs is None else runs)
        return found

    def _found(self, part: str, name: str, seed: int, guards: Guards) -> Points | None:
        wanted = {"part": part, "plan": name, "seed": seed, "guards": told(guards)}
        lines = (one for one in self.lines.found if wanted.items() <= one.items())
        return next((one["runs"] for one in lines), None)

    def _draw(self, part: str, name: str, subject: Scene, guards: Guards) -> Points:
        generator = torch.Generator().manual_seed(subject.seed)
        call = {**self.call, "prompt": subject.caption, "generator": generator}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            if subject.seed not in self.exact:
                self.exact[subject.seed] = reference(self.pipe, call, PLANS[name])
            runs = measured(self.pipe, call, PLANS[name], guards, self.exact[subject.seed])
        points = [asdict(one) for one in runs]
        key = {"part": part, "plan": name, "seed": subject.seed, "guards": told(guards)}
        self.lines.add({**key, "runs": points})
        print(f"{name}, {part}: {subject.seed}", end="\r", flush=True)
        return points


def told(guards: Guards) -> list[list[float | None]]:
    """Guards as a line of the file has them."""
    return [[guard.max_error, guard.scale] for guard in guards]


def bounds_of(runs: Runs) -> list[float]:
    """The real error that 95 % of pictures stay within under each budget of a calibration."""
    place = rank(len(runs)) - 1
    errors = zip(*([run["real"] for run in one] for one in runs), strict=True)
    return list(accumulate((sorted(one)[place] for one in errors), max))


def guards_of(bounds: list[float]) -> list[accel.Guard]:
    """The guard of each promise, as its file would make it."""
    rest = {"coverage": COVERAGE, "captions": LEAST, "steps": 1, "model": "", "plan": {}}
    basis = Basis(budgets=BUDGETS, bounds=tuple(bounds), errors=(), **rest)
    scales = {one: basis.spending(one) for one in PROMISES}
    return [accel.Guard(max_error=one, scale=one / b if b else 1e9) for one, b in scales.items()]


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
            f"Calibrated on {row['calibrated_on']} captions of training seeds: 95 % stay within "
            + ", ".join(
                f"{bound:.3g} at an estimate of {budget:g}"
                for budget, bound in zip(row["budgets"], row["bounds"], strict=True)
            )
            + ". "
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
    save_plot(figure, path, dpi=110)


def arguments() -> argparse.Namespace:
    """What was typed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="scenes-flux")
    parser.add_argument("--captions", type=int, default=16, help="held-out captions")
    parser.add_argument("--calibration", type=int, default=39, help=f"at least {LEAST}")
    parser.add_argument("--steps", type=int, default=14)
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
    bench = Bench(pipe, call, lines)
    rows: dict[str, Any] = {}
    points: dict[str, Runs] = {}
    for name in PLANS:
        budgets = [accel.Guard(max_error=budget, scale=1.0) for budget in BUDGETS]
        bounds = bounds_of(bench.fill("calibration", name, trained, budgets))
        points[name] = bench.fill("held-out", name, held_out, guards_of(bounds))
        by_promise = zip(PROMISES, zip(*points[name], strict=True), strict=True)
        promises = [summary(promise, list(runs)) for promise, runs in by_promise]
        rows[name] = {
            "budgets": BUDGETS,
            "bounds": bounds,
            "calibrated_on": len(trained),
            "pictures": len(points[name]) * len(PROMISES),
            "coverage": float(np.mean([one["coverage"] for one in promises])),
            "promises": promises,
        }
    result = {"model": asked.model, "steps": asked.steps, "asked": COVERAGE, "plans": rows}
    save(stem.name, {**result, "captions": [one.seed for one in held_out]}, asked.folder)
    text = f"# Guarded runs on {asked.model}\n\n{signature()}\n\n{table(rows)}"
    stem.with_suffix(".md").write_text(text)
    diagram(rows, points, stem.with_suffix(".png"))
    print(text)


if __name__ == "__main__":
    main()
