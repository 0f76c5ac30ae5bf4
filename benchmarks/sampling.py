"""Samplers at few evaluations: how far from the exact solution, how near to real scenes.

    python benchmarks/sampling.py [--model scenes-flux] [--captions 32] [--size 64] [--budget MIN]

Every held-out caption is solved once to 200 steps, and then by every sampler at every number of
evaluations from the same noise: stock schedulers of diffusers, and ours as a plan. Reported are
the distance of the final latents to the 200-step solution (relative root mean square), SSIM to
its picture, Fréchet and kernel distances to real scenes, and caption accuracy. Samplers that rest
on measured numbers are calibrated first, on captions of the training seeds.

Points are written as they are made; a later run of the same command goes on where it stopped.
The file is not called `samplers.py`: beside the other benchmarks it would hide that package.
Beside the points come ``.json``, ``.png`` and ``.md``: distances by the number of evaluations, and
where ours are nearer than every stock scheduler; what was to be shown, with yes or no (`verdicts`);
the other figures. Nothing is timed: what counts is the number of evaluations, which every point
states. Samplers of an SDE end elsewhere than the ODE: of theirs, only the other figures count.

Calibrated plans lie in ``benchmarks/plans/MODEL/WEIGHTS``, which git ignores, and are kept in the
``.json`` as well: a run in a fresh checkout takes them from there, so that it goes on with the
numbers that the points were made with. ``--fresh`` calibrates anew.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import hashlib
import json
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from contest import looks
from measure import RESULTS, Lines, digest, here, save, save_plot
from torch import Tensor
from verdicts import SEARCHED, Rows, fidelity, figures, verdicts

import accel
import samplers
from accel import Plan, quality
from accel.errors import AccelError
from accel.scenes import HELD_OUT, Scene, oracle, picture, scene

EVALUATIONS = (4, 5, 6, 8, 10, 14, 20)
EXACT = 200
BATCH = 8
OWN = "the pipeline's own"
REAL = 100_000
"""Real scenes to compare with start this far into the held-out seeds."""
STOCK = {
    "flow": ("FlowMatchEulerDiscrete", "DPMSolverMultistep", "UniPCMultistep", "DEISMultistep"),
    "vp": ("EulerDiscrete", "DDIM", "DPMSolverMultistep", "UniPCMultistep", "DEISMultistep"),
}


def signed(*contents: bytes) -> str:
    """A short hash of a plan, with the tables beside it."""
    return hashlib.sha256(b"\0".join(contents)).hexdigest()[:16]


def planless(_steps: int) -> str | None:
    """The hash of what has no plan."""
    return None


@dataclass(frozen=True)
class Entry:
    """One way to solve.

    Attributes:
        name: Of the sampler.
        ours: Whether it is of this package.
        solve: Attaches it to a pipeline while a block runs.
        plan: The hash of its plan for a number of steps: points of another plan are others.
    """

    name: str
    ours: bool
    solve: Callable[[Any, int], contextlib.AbstractContextManager[None]]
    plan: Callable[[int], str | None] = planless


@contextlib.contextmanager
def stock(pipe: Any, name: str) -> Iterator[None]:
    """A scheduler of diffusers in the pipeline's place, on the same process."""
    before = pipe.scheduler
    kind = getattr(diffusers, f"{name}Scheduler")
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    own = flow if "FlowMatch" in type(before).__name__ and "FlowMatch" not in name else {}
    pipe.scheduler = kind.from_config(before.config, **own)
    try:
        yield
    finally:
        pipe.scheduler = before


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


PLANS = {
    "DPM++ 2M": Plan(samplers.DPMSolverPP()),
    "DPM++ 2M, second start": Plan(samplers.DPMSolverPP(start="second")),
    "DPM++ 3M": Plan(samplers.DPMSolverPP(order=3)),
    "DPM++ 2S": Plan(samplers.DPMSolverPPSingle()),
    "DPM++ 3S": Plan(samplers.DPMSolverPPSingle(order=3)),
    "UniPC 2": Plan(samplers.UniPC()),
    "UniPC 3": Plan(samplers.UniPC(order=3)),
    "SA-Solver, ODE": Plan(samplers.SASolver(tau=0.0)),
    "SA-Solver, SDE": Plan(samplers.SASolver(tau=1.0)),
    "DEIS t-AB2": Plan(samplers.DEIS()),
    "DEIS t-AB3": Plan(samplers.DEIS(order=3)),
    "DEIS t-AB3, √t": Plan(samplers.DEIS(order=3), samplers.Schedule(kind="sqrt_time")),
    "DEIS rho-AB2": Plan(samplers.DEIS(form="rhoAB")),
    "iPNDM 3": Plan(samplers.DEIS(form="iPNDM", order=3)),
    "rho-RK Kutta": Plan(samplers.RhoRK()),
    "pseudo-corrector": Plan(samplers.PseudoCorrector()),
    "DPM++ 2M, uniform λ": Plan(samplers.DPMSolverPP(), samplers.Schedule(kind="uniform_lambda")),
    "DPM++ 2M, arctan": Plan(samplers.DPMSolverPP(), samplers.Schedule(kind="arctan")),
    "DPM++ 2M, logSNR": Plan(samplers.DPMSolverPP(), samplers.Schedule(kind="logsnr")),
    "DPM++ 2M, polynomial": Plan(samplers.DPMSolverPP(), samplers.Schedule(kind="polynomial")),
    "DPM++ 2M, AYS of SD": Plan(samplers.DPMSolverPP(), samplers.Schedule(kind="ays")),
    "DPM++ 1": Plan(samplers.DPMSolverPP(order=1)),
    "DPM++ 1 + DualFast": Plan(samplers.DPMSolverPP(order=1), samplers.DualFast()),
}
"""Ours that need no measured numbers, for any number of steps."""

FITTED = (4, 5, 6, 8, 10)
TRAINING = 32
"""Captions of training seeds that calibrations draw."""


@dataclass(frozen=True)
class Calibration:
    """Numbers that a sampler rests on: how `accel calibrate` measures them, and for which steps."""

    name: str
    what: tuple[str, ...]
    steps: tuple[int, ...] = ()

    def files(self) -> list[tuple[int | None, str]]:
        """A plan for any number of steps, or one for each."""
        return [(count, f"{self.name}-{count}.toml") for count in self.steps] or [
            (None, f"{self.name}.toml")
        ]


def searched(method: str, count: int, **options: int) -> tuple[str, ...]:
    """What `accel calibrate` is told of a search of schedules on so many prompts."""
    given = [part for name, value in options.items() for part in ("--set", f"{name}={value}")]
    return ("schedule", "--method", method, "--count", str(count), *given)


CALIBRATIONS = (
    Calibration("DPM-Solver-v3", ("ems", "--steps", "100", "--count", "8")),
    Calibration("OLSS", ("olss", "--count", "16"), FITTED),
    Calibration("DPM++ 2M, GITS", searched("gits", 16), SEARCHED),
    Calibration("DPM++ 2M, AYS", searched("ays", 12, teacher=40), SEARCHED),
    Calibration("DPM++ 2M, OSS", searched("oss", 3, teacher=40), SEARCHED),
    Calibration(
        "DPM++ 2M, AutoDiffusion",
        searched("autodiffusion", 3, teacher=40, population=10, epochs=4),
        SEARCHED,
    ),
    Calibration(
        "OLSS, refined",
        ("olss", "--count", "4", "--set", "teacher_steps=50", "--set", "refine=10"),
        SEARCHED,
    ),
)
"""The later ones at about 1000 evaluations for a number of steps, some minutes on one core."""


PLANS_KEPT = Path(__file__).parent / "plans"


def plans_of(model: str, weights: str, steps: int | None = None, size: int | None = None) -> Path:
    """The folder of a model's calibrated plans, with the training captions that they draw.

    Args:
        model: A bundled model.
        weights: The digest of its weights: numbers of other weights are others.
        steps: Of the pictures that are drawn, where plans are calibrated for these; without it
            each plan says for how many it is.
        size: Their height and width in pixels, where it is not the model's own.
    """
    folder = PLANS_KEPT / model / weights
    if steps is not None:
        folder /= str(steps)
    if size is not None:
        folder /= f"{size}px"
    folder.mkdir(parents=True, exist_ok=True)
    captions = "".join(f"{scene(seed).caption}\n" for seed in range(TRAINING))
    (folder / "prompts.txt").write_text(captions)
    return folder


def calibrate(
    one: Calibration,
    model: str,
    folder: Path,
    steps: int | None = None,
    size: int | None = None,
) -> None:
    """Write the plans of a calibration that are not there yet, through the command line.

    Args:
        one: The calibration.
        model: A bundled model.
        folder: Where the plans lie (`plans_of`).
        steps: Of the pictures that it draws, where it is not itself for a number of them.
        size: Their height and width in pixels; without it the model's own.

    Raises:
        RuntimeError: If the model cannot be calibrated so; it says why.
    """
    from typer.testing import CliRunner

    from app.cli import app

    prompts = folder / "prompts.txt"
    sized = () if size is None else ("--height", str(size), "--width", str(size))
    for count, name in one.files():
        out = folder / name
        if out.exists():
            continue
        drawn = steps if count is None else count
        of_steps = () if drawn is None else ("--steps", str(drawn))
        given = [
            "calibrate",
            *one.what,
            *of_steps,
            *sized,
            "--model",
            model,
            "--prompts",
            str(prompts),
        ]
        done = CliRunner().invoke(app, [*given, "--out", str(out)])
        if done.exit_code:
            raise RuntimeError(f"accel {' '.join(given)}: {done.output}")


def written(folder: Path, calibrations: Sequence[Calibration]) -> list[Path]:
    """Every file that calibrations have written: plans, and tables of numbers beside them."""
    stems = [Path(name).stem for one in calibrations for _, name in one.files()]
    return sorted({path for stem in stems for path in folder.glob(f"{stem}*")})


def forget(folder: Path, calibrations: Sequence[Calibration]) -> None:
    """Delete what calibrations have written, so that they are made anew."""
    for path in written(folder, calibrations):
        path.unlink()


def embedded(folder: Path) -> dict[str, str]:
    """The bytes of every file of the calibrations in base64, by its name."""
    paths = written(folder, CALIBRATIONS)
    return {path.name: base64.b64encode(path.read_bytes()).decode() for path in paths}


def unpack(result: Path, folder: Path, weights: str) -> None:
    """Write the plans that a result of the same weights holds, where they are not there."""
    if not result.exists():
        return
    document = json.loads(result.read_text())
    if document["header"]["weights"] != weights:
        return
    for name, content in document.get("plans", {}).items():
        if not (folder / name).exists():
            (folder / name).write_bytes(base64.b64decode(content, validate=True))


def fitted(folder: Path, one: Calibration) -> Entry:
    """A calibrated sampler, from the files that `calibrate` wrote."""
    known = {count: folder / name for count, name in one.files()}

    def solve_one(pipe: Any, steps: int) -> contextlib.AbstractContextManager[None]:
        path = known.get(steps, known.get(None))
        if path is None:
            raise LookupError(f"calibrated for {', '.join(map(str, one.steps))} steps only")
        return read(path).attach(pipe)

    def plan(steps: int) -> str | None:
        path = known.get(steps, known.get(None))
        beside = sorted(folder.glob(f"{path.stem}*")) if path else []
        return signed(*(part.read_bytes() for part in beside)) if beside else None

    return Entry(one.name, True, solve_one, plan)


def our_entries(folder: Path) -> list[Entry]:
    """Every sampler of this package."""

    def plain(name: str, plan: Plan) -> Entry:
        content = signed(plan.to_toml().encode())
        return Entry(name, True, lambda pipe, _steps: plan.attach(pipe), lambda _steps: content)

    ready = [plain(name, plan) for name, plan in PLANS.items()]
    return ready + [fitted(folder, one) for one in CALIBRATIONS]


def standing(entries: list[Entry], points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Points that still hold: of samplers that there are, under the plan that they have now."""
    plans = {entry.name: entry.plan for entry in entries} | {OWN: planless}
    return [
        one
        for one in points
        if one["sampler"] in plans and one.get("plan") == plans[one["sampler"]](one["steps"])
    ]


def measure(
    entries: list[Entry],
    pipe: Any,
    call: dict[str, Any],
    scenes: list[Scene],
    lines: Lines,
    budget: float,
) -> None:
    """Write down the points that are not there yet; what is refused says why."""
    begin = time.monotonic()
    known = {(line["sampler"], line["steps"]) for line in standing(entries, lines.found)}
    exact = solve_exactly(pipe, call, scenes)
    others = range(HELD_OUT.start + REAL, HELD_OUT.start + REAL + len(scenes))
    real = np.stack([picture(scene(seed), call["height"]) for seed in others])
    if (OWN, EXACT) not in known:
        stock_exact = solve(pipe, call, scenes, EXACT)
        lines.add({"sampler": OWN, "steps": EXACT} | point(stock_exact, exact, real, scenes))
    for entry, steps in product(entries, EVALUATIONS):
        if (entry.name, steps) in known:
            continue
        if time.monotonic() - begin > 60 * budget:
            return
        line = {"sampler": entry.name, "ours": entry.ours, "steps": steps}
        line |= {"plan": entry.plan(steps)}
        try:
            with entry.solve(pipe, steps):
                line |= point(solve(pipe, call, scenes, steps), exact, real, scenes)
        except (AccelError, LookupError, ValueError) as reason:
            line["refused"] = str(reason)
        lines.add(line)
        print(entry.name, steps, line.get("distance", line.get("refused")), flush=True)


def solve_exactly(
    pipe: Any, call: dict[str, Any], scenes: list[Scene]
) -> tuple[Tensor, np.ndarray, int]:
    """The solution to compare with: 200 steps of second order, on the stock schedule."""
    with Plan(samplers.DPMSolverPP()).attach(pipe):
        return solve(pipe, call, scenes, EXACT)


def distances(points: list[dict[str, Any]]) -> Rows:
    """By sampler and whether it is ours: the distance by the number of steps."""
    return figures(points, "distance", EVALUATIONS)


def markdown(points: list[dict[str, Any]], title: str) -> str:
    """Distances as a table to read; the last column says where ours is nearer than any stock one.

    Bold is the nearest of a column.
    """
    rows = distances(points)
    stocks = [row for (_, mine), row in rows.items() if not mine]
    nearest = {n: min((row[n] for row in stocks if n in row), default=0.0) for n in EVALUATIONS}
    best = {n: min((r[n] for r in rows.values() if n in r), default=0.0) for n in EVALUATIONS}
    lines = [
        f"{title}: distance of the final latents to the 200-step solution of the same seed "
        "(relative root mean square, median of the captions).",
        "",
        f"| sampler | {' | '.join(map(str, EVALUATIONS))} | nearer than every stock scheduler at |",
        f"|---|{'---|' * (len(EVALUATIONS) + 1)}",
    ]
    for (name, mine), row in rows.items():
        cells = [
            "–" if n not in row else f"**{row[n]:.4f}**" if row[n] == best[n] else f"{row[n]:.4f}"
            for n in EVALUATIONS
        ]
        wins = [str(n) for n in EVALUATIONS if mine and n in row and row[n] < nearest[n]]
        verdict = (", ".join(wins) or "none") if mine else ""
        lines.append(f"| {name} | {' | '.join(cells)} | {verdict} |")
    return "\n".join(lines) + "\n"


def report(points: list[dict[str, Any]], title: str) -> str:
    """The table of distances, what was to be shown, and the tables of the other figures."""
    parts = markdown(points, title), verdicts(points, EVALUATIONS), fidelity(points, EVALUATIONS)
    return "\n".join(parts)


def plot(points: list[dict[str, Any]], path: Path, title: str) -> None:
    """Distance by evaluations: stock schedulers dashed in greys, ours in colour."""
    import matplotlib.pyplot as plt

    rows = distances(points)
    figure, axes = plt.subplots(figsize=(11, 8), layout="constrained")
    for row, look in zip(rows.values(), looks(list(rows)), strict=True):
        axes.plot(list(row), list(row.values()), **look)
    axes.set(xscale="log", yscale="log", xlabel="evaluations", xticks=EVALUATIONS)
    axes.set_xticks([], minor=True)
    axes.set(ylabel="distance to the 200-step solution", xticklabels=EVALUATIONS)
    top = 1.3 * max(row[n] for (_, mine), row in rows.items() if not mine for n in row)
    axes.set_ylim(top=top)
    axes.grid(alpha=0.3, which="both")
    axes.set_title(f"{title}. Lower is closer; dashed: diffusers")
    figure.legend(loc="outside lower center", fontsize=9, ncols=4)
    save_plot(figure, path, dpi=130)


def main() -> None:
    """Measure and write ``results/samplers-MODEL[-SIZE].json``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="scenes-flux")
    parser.add_argument("--captions", type=int, default=32)
    parser.add_argument("--size", type=int, help="pixels of a side; default: the model's own")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--budget", type=float, default=600.0, help="minutes; the rest is left")
    parser.add_argument("--fresh", action="store_true", help="drop earlier points and plans")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore", UserWarning)
    name = "-".join(["samplers", options.model, *([str(options.size)] if options.size else [])])
    pipe, call = accel.load(options.model)
    if options.size:
        call |= {"height": options.size, "width": options.size}
    pipe.set_progress_bar_config(disable=True)
    first = HELD_OUT.start
    scenes = [scene(seed) for seed in range(first, first + options.captions)]
    path, weights = RESULTS / f"{name}.jsonl", digest(pipe)
    folder = plans_of(options.model, weights, size=options.size)
    if options.fresh:
        path.unlink(missing_ok=True)
        forget(folder, CALIBRATIONS)
    else:
        unpack(RESULTS / f"{name}.json", folder, weights)
    for one in CALIBRATIONS:
        calibrate(one, options.model, folder, size=options.size)
    header = {"call": call, "captions": len(scenes), "weights": weights, **here()}
    lines = Lines(path, header)
    entries = stock_entries(pipe) + our_entries(folder)
    measure(entries, pipe, call, scenes, lines, options.budget)
    points = standing(entries, lines.found)
    title = f"{options.model}, {call['height']} px, {len(scenes)} captions"
    told = report(points, title)
    (RESULTS / f"{name}.md").write_text(told)
    plot(points, RESULTS / f"{name}.png", title)
    print(told)
    plans = embedded(folder)
    print(save(name, {"header": header, "points": points, "plans": plans}))


def read(path: Path) -> Plan:
    """A plan from its file."""
    from app.plans import read as read_plan

    return read_plan(path)


if __name__ == "__main__":
    main()
