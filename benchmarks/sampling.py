"""Samplers at few evaluations: how far from the exact solution, how near to real scenes.

    python benchmarks/sampling.py [--model scenes-flux] [--captions 32] [--budget MINUTES]

Every held-out caption is solved once to 200 steps, and then by every sampler at every number of
evaluations from the same noise: stock schedulers of diffusers, and ours as a plan. Reported are
the distance of the final latents to the 200-step solution (relative root mean square), SSIM to
its picture, Fréchet and kernel distances to real scenes, and caption accuracy. Samplers that rest
on measured numbers are calibrated first, on captions of the training seeds.

Points are written as they are made; a later run of the same command goes on where it stopped.
The file is not called `samplers.py`: beside the other benchmarks it would hide that package.
Nothing is timed: what counts is the number of evaluations, which every point states.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from measure import RESULTS, save
from torch import Tensor

import accel
from accel import quality
from accel.errors import AccelError
from accel.scenes import HELD_OUT, Scene, oracle, picture, scene

EVALUATIONS = (4, 5, 6, 8, 10, 14, 20)
EXACT = 200
BATCH = 8
REAL = 100_000
"""Real scenes to compare with start this far into the held-out seeds."""
STOCK = {
    "flow": ("FlowMatchEuler", "DPMSolverMultistep", "UniPCMultistep", "DEISMultistep"),
    "vp": ("EulerDiscrete", "DDIM", "DPMSolverMultistep", "UniPCMultistep", "DEISMultistep"),
}


@dataclass(frozen=True)
class Entry:
    """One way to solve: attached to a pipeline while a block runs."""

    name: str
    ours: bool
    solve: Callable[[Any, int], contextlib.AbstractContextManager[None]]


@contextlib.contextmanager
def stock(pipe: Any, name: str) -> Iterator[None]:
    """A scheduler of diffusers in the pipeline's place, on the same process."""
    before = pipe.scheduler
    kind = getattr(diffusers, f"{name}Scheduler", None) or getattr(
        diffusers, f"{name}DiscreteScheduler"
    )
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    own = flow if "FlowMatch" in type(before).__name__ and "FlowMatch" not in name else {}
    pipe.scheduler = kind.from_config(before.config, **own)
    try:
        yield
    finally:
        pipe.scheduler = before


@contextlib.contextmanager
def planned(pipe: Any, plan: accel.Plan) -> Iterator[None]:
    """A plan attached."""
    with plan.attach(pipe):
        yield


@torch.no_grad()
def solve(
    pipe: Any, call: dict[str, Any], scenes: list[Scene], steps: int
) -> tuple[Tensor, np.ndarray, int]:
    """Final latents, pictures and evaluations a sample of all captions."""
    latents, pictures, calls = [], [], [0]
    network = getattr(pipe, "transformer", None) or pipe.unet
    handle = network.register_forward_pre_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    try:
        for low in range(0, len(scenes), BATCH):
            part, last = scenes[low : low + BATCH], {}

            def keep(_pipe: Any, _i: int, _t: Any, values: dict[str, Tensor]) -> dict[str, Tensor]:
                last["latents"] = values["latents"].clone()  # noqa: B023
                return {}

            made = pipe(
                [one.caption for one in part],
                generator=[torch.Generator().manual_seed(one.seed) for one in part],
                **call
                | {
                    "negative_prompt": [""] * len(part),
                    "num_inference_steps": steps,
                    "output_type": "np",
                    "callback_on_step_end": keep,
                },
            )
            latents.append(last["latents"].float().flatten(1))
            pictures.append((made.images.clip(0, 1) * 255 + 0.5).astype(np.uint8))
    finally:
        handle.remove()
    batches = -(-len(scenes) // BATCH)
    return torch.cat(latents), np.concatenate(pictures), round(calls[0] / batches)


def distance(found: Tensor, exact: Tensor) -> Tensor:
    """Relative root mean square of the difference, for each sample."""
    apart: Tensor = (found - exact).norm(dim=1) / exact.norm(dim=1)
    return apart


def point(
    found: tuple[Tensor, np.ndarray, int],
    exact: tuple[Tensor, np.ndarray, int],
    real: np.ndarray,
    scenes: list[Scene],
) -> dict[str, float]:
    """The figures of one sampler at one number of steps."""
    latents, pictures, calls = found
    apart = distance(latents, exact[0])
    alike = [quality.ssim(a, b) for a, b in zip(exact[1], pictures, strict=True)]
    told = oracle.caption_accuracy(pictures, scenes)
    return {
        "network_calls": calls,
        "distance": float(apart.median()),
        "distance_worst": float(apart.max()),
        "ssim": float(np.mean(alike)),
        "frechet": float(quality.frechet(list(pictures), list(real))),
        "kernel": float(quality.kernel(list(pictures), list(real))),
        "caption_accuracy": told.mean,
    }


def stock_entries(pipe: Any) -> list[Entry]:
    """The schedulers of diffusers that fit the pipeline's process."""
    process = "flow" if "FlowMatch" in type(pipe.scheduler).__name__ else "vp"

    def swapped(name: str) -> Any:
        return lambda pipe, _steps: stock(pipe, name)

    return [Entry(f"diffusers {name}", False, swapped(name)) for name in STOCK[process]]


PLANS: dict[str, dict[str, dict[str, Any]]] = {
    "DPM++ 2M": {"samplers.DPMSolverPP": {}},
    "DPM++ 3M": {"samplers.DPMSolverPP": {"order": 3}},
    "DPM++ 2S": {"samplers.DPMSolverPPSingle": {}},
    "DPM++ 3S": {"samplers.DPMSolverPPSingle": {"order": 3}},
    "UniPC 2": {"samplers.UniPC": {}},
    "UniPC 3": {"samplers.UniPC": {"order": 3}},
    "SA-Solver, ODE": {"samplers.SASolver": {"tau": 0.0}},
    "DEIS t-AB2": {"samplers.DEIS": {"order": 2}},
    "DEIS t-AB3": {"samplers.DEIS": {"order": 3}},
    "iPNDM 3": {"samplers.DEIS": {"form": "ipndm", "order": 3}},
    "rho-RK Kutta": {"samplers.RhoRK": {}},
    "pseudo-corrector": {"samplers.PseudoCorrector": {}},
    "DPM++ 2M, uniform λ": {
        "samplers.DPMSolverPP": {},
        "samplers.Schedule": {"kind": "uniform_lambda"},
    },
    "DPM++ 2M, arctan": {"samplers.DPMSolverPP": {}, "samplers.Schedule": {"kind": "arctan"}},
    "DPM++ 1 + DualFast": {"samplers.DPMSolverPP": {"order": 1}, "samplers.DualFast": {}},
}
"""Ours that need no measured numbers, for any number of steps."""

SEARCHED = (6, 8)
FITTED = (4, 5, 6, 8, 10)
TRAINING = 32
"""Captions of training seeds that calibrations draw."""


@dataclass(frozen=True)
class Calibration:
    """Numbers that a sampler rests on: how `accel calibrate` measures them, and for which steps."""

    name: str
    what: tuple[str, ...]
    steps: tuple[int, ...] = ()
    beside: tuple[tuple[str, dict[str, Any]], ...] = ()

    def files(self) -> list[tuple[int | None, str]]:
        """A plan for any number of steps, or one for each."""
        return [(count, f"{self.name}-{count}.toml") for count in self.steps] or [
            (None, f"{self.name}.toml")
        ]


CALIBRATIONS = (
    Calibration("DPM-Solver-v3", ("ems", "--steps", "100", "--count", "8")),
    Calibration("OLSS", ("olss", "--count", "16"), FITTED),
    Calibration(
        "DPM++ 2M, GITS",
        ("schedule", "--method", "gits", "--count", "16"),
        SEARCHED,
        (("samplers.DPMSolverPP", {}),),
    ),
)


def calibrate(one: Calibration, model: str, folder: Path, prompts: Path) -> None:
    """Write the plans of a calibration that are not there yet, through the command line."""
    from typer.testing import CliRunner

    from app.cli import app

    for count, name in one.files():
        out = folder / name
        if out.exists():
            continue
        steps = () if count is None else ("--steps", str(count))
        given = ["calibrate", *one.what, *steps, "--model", model, "--prompts", str(prompts)]
        done = CliRunner().invoke(app, [*given, "--out", str(out)])
        if done.exit_code:
            raise RuntimeError(f"accel {' '.join(given)}: {done.output}")


def fitted(folder: Path, one: Calibration) -> Entry:
    """A calibrated sampler, from the files that `calibrate` wrote."""
    known = dict((count, folder / name) for count, name in one.files())

    def solve_one(pipe: Any, steps: int) -> contextlib.AbstractContextManager[None]:
        path = known.get(steps, known.get(None))
        if path is None:
            raise LookupError(f"calibrated for {', '.join(map(str, one.steps))} steps only")
        plan = read(path)
        return planned(pipe, accel.Plan.from_dict(plan.to_dict() | dict(one.beside)))

    return Entry(one.name, True, solve_one)


def our_entries(folder: Path) -> list[Entry]:
    """Every sampler of this package."""

    def plain(document: dict[str, Any]) -> Any:
        return lambda pipe, _steps: planned(pipe, accel.Plan.from_dict(document))

    ready = [Entry(name, True, plain(document)) for name, document in PLANS.items()]
    return ready + [fitted(folder, one) for one in CALIBRATIONS]


def measure(
    entries: list[Entry],
    pipe: Any,
    call: dict[str, Any],
    scenes: list[Scene],
    part: Path,
    budget: float,
) -> dict[str, Any]:
    """All points, those of an earlier run taken over; what is refused says why."""
    done: dict[str, Any] = json.loads(part.read_text()) if part.exists() else {}
    begin = time.monotonic()
    exact = solve_exactly(pipe, call, scenes)
    real = np.stack(
        [picture(scene(HELD_OUT.start + REAL + i), call["height"]) for i in range(len(scenes))]
    )
    stock_exact = solve(pipe, call, scenes, EXACT)
    done["exact"] = {
        "evaluations": EXACT,
        "stock_scheduler_apart": float(distance(stock_exact[0], exact[0]).median()),
    }
    for entry in entries:
        for steps in EVALUATIONS:
            key = f"{entry.name} @ {steps}"
            if key in done:
                continue
            if time.monotonic() - begin > 60 * budget:
                return done
            head = {"sampler": entry.name, "ours": entry.ours, "steps": steps}
            try:
                with entry.solve(pipe, steps):
                    found = solve(pipe, call, scenes, steps)
                done[key] = head | point(found, exact, real, scenes)
            except (AccelError, LookupError, ValueError) as reason:
                done[key] = head | {"refused": str(reason)}
            part.write_text(json.dumps(done, indent=1))
            print(key, done[key].get("distance", done[key].get("refused")), flush=True)
    return done


def solve_exactly(
    pipe: Any, call: dict[str, Any], scenes: list[Scene]
) -> tuple[Tensor, np.ndarray, int]:
    """The solution to compare with: 200 steps of second order, on the stock schedule."""
    with planned(pipe, accel.Plan.from_dict({"samplers.DPMSolverPP": {}})):
        return solve(pipe, call, scenes, EXACT)


def show(points: dict[str, Any]) -> None:
    """The table of distances, the best of each column marked."""
    rows: dict[str, dict[int, float]] = {}
    for one in points.values():
        if "distance" in one:
            rows.setdefault(one["sampler"], {})[one["steps"]] = one["distance"]
    best = {n: min((row[n] for row in rows.values() if n in row), default=0) for n in EVALUATIONS}
    print(f"{'distance at evaluations':<28}" + "".join(f"{n:>9}" for n in EVALUATIONS))
    for name, row in rows.items():
        cells = [
            f"{row[n]:.4f}" + ("*" if row[n] == best[n] else " ") if n in row else "–"
            for n in EVALUATIONS
        ]
        print(f"{name:<28}" + "".join(f"{cell:>9}" for cell in cells))


def main() -> None:
    """Measure and write ``results/samplers-MODEL.json``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="scenes-flux")
    parser.add_argument("--captions", type=int, default=32)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--budget", type=float, default=600.0, help="minutes; the rest is left")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore", UserWarning)
    folder = Path(__file__).parent / "plans" / options.model
    folder.mkdir(parents=True, exist_ok=True)
    prompts = folder / "prompts.txt"
    prompts.write_text("".join(f"{scene(seed).caption}\n" for seed in range(TRAINING)))
    for one in CALIBRATIONS:
        calibrate(one, options.model, folder, prompts)
    pipe, call = accel.load(options.model)
    pipe.set_progress_bar_config(disable=True)
    first = HELD_OUT.start
    scenes = [scene(seed) for seed in range(first, first + options.captions)]
    part = RESULTS / f"samplers-{options.model}.part.json"
    entries = stock_entries(pipe) + our_entries(folder)
    points = measure(entries, pipe, call, scenes, part, options.budget)
    show(points)
    print(
        save(f"samplers-{options.model}", {"call": call, "captions": len(scenes), "points": points})
    )
    part.unlink()


def read(path: Path) -> accel.Plan:
    """A plan from its file."""
    from app.plans import read as read_plan

    return read_plan(path)


if __name__ == "__main__":
    main()
