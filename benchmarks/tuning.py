"""Whether `accel.tune` finds in ten minutes what a sweep of 200 plans finds in as long as it takes.

    python benchmarks/tuning.py [--model scenes-unet] [--target "ssim>=0.95"] [--budget 600]
        [--prompts 8] [--choice 20] [--held-out 20] [--threads N]

The sweep is every combination of `AXES`: plans as one writes them by hand. Each is drawn on the
prompts that tuning searches on, one after the other, until one misses the target. Those that hold
on all of them go the way that tuning's own finalists go: the cheapest are timed beside stock, and
the fastest that hold with room on further prompts are checked on held-out ones, until one holds
there. Both are told the same, and
tuning sees nothing of the sweep.

At last stock, what tuning found and the best of the sweep draw the held-out prompts in turns. Both
lie in ``results/tuning-MODEL.json`` and ``.md``; what the sweep drew is kept beside the benchmarks,
out of git, and a run that was cut off goes on there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
from album import KEPT
from measure import RESULTS, here, ratio, save, signature, spread, weights

import accel
from accel import Plan
from accel.errors import AccelError
from accel.plan import build
from accel.tuning import proof
from accel.tuning.bench import Bench, Case, Ledger
from accel.tuning.cases import cases
from accel.tuning.targets import Targets
from accel.tuning.tune import tune

Methods = dict[str, dict[str, Any]]

AXES: tuple[tuple[Methods, ...], ...] = (
    ({}, *({"samplers.Steps": {"share": share}} for share in (0.75, 0.5, 0.36, 0.25))),
    ({}, {"samplers.DPMSolverPP": {"order": 2}}),
    (
        {},
        {"guidance.Adaptive": {"threshold": 0.97}},
        {"guidance.Adaptive": {"threshold": 0.99}},
        {"guidance.Interval": {"low": 0.3}},
    ),
    ({}, *({"cache.EasyCache": {"threshold": value}} for value in (0.05, 0.1, 0.2, 0.4))),
)
"""Steps × sampler × guidance × cache: 200 plans, the empty one among them."""

NEAR = 1.1
"""How many times as long as the best of the sweep a tuned plan may take."""


def grid() -> list[Plan]:
    """Every plan of the sweep."""
    return [
        Plan(*(build(name, fields) for part in parts for name, fields in part.items()))
        for parts in product(*AXES)
    ]


@dataclass(frozen=True)
class Swept:
    """What the sweep found.

    Attributes:
        best: The fastest plan that holds on the held-out prompts.
        holding: Plans that hold on the prompts of the search, the cheapest first.
        refused: Plans that do not serve the pipeline.
        failed: Plans that held on the prompts of the search alone.
        minutes: What it took in this process.
    """

    best: Plan
    holding: tuple[Plan, ...]
    refused: int
    failed: int
    minutes: float


def swept(bench: Bench, some: Sequence[Sequence[Case]], wanted: Targets) -> Swept:
    """The best plan of the grid, found as one finds it by hand.

    Args:
        bench: What draws.
        some: The prompts to search on, those that choose, and those that prove it.
        wanted: What is to be held.
    """
    searched, choosing, proving = some
    began, found, refused = time.monotonic(), dict[Plan, tuple[float, float]](), 0
    for plan in grid():
        try:
            one = _drawn(bench, plan, searched, wanted)
        except AccelError:
            refused += 1
            continue
        if one is not None:
            found[plan] = one
    ranked = sorted(found, key=lambda plan: found[plan])
    holding = {plan: found[plan][1] for plan in ranked}
    measures = [one.measure for one in wanted.fidelity]
    choice = proof.Sample(bench, choosing, wanted)
    held_out = proof.Checks(bench, proving, wanted, measures)
    best = proof.first(proof.finalists(bench, holding, searched), choice, held_out)
    if best is None:
        raise SystemExit("No plan of the sweep holds, not even stock: the target is none.")
    minutes = (time.monotonic() - began) / 60
    failed = len(choice.failed) + len(held_out.failed)
    return Swept(best.plan, tuple(holding), refused, failed, minutes)


def _drawn(
    bench: Bench, plan: Plan, searched: Sequence[Case], wanted: Targets
) -> tuple[float, float] | None:
    """Seconds over stock's in the median of the prompts, and room; ``None`` once one misses."""
    lines = []
    for case in searched:
        lines.append(bench.figures(plan, case))
        if wanted.slack([lines[-1].figures]) < 0:
            return None
    room = wanted.room([line.figures for line in lines])
    return median(line.ratio for line in lines), room


def timed(bench: Bench, plans: dict[str, Plan], proven: Sequence[Case]) -> dict[str, Any]:
    """Plans and stock on the held-out prompts in turns: seconds, and the first over the second."""
    pairs = proof.timed(bench, list(dict.fromkeys(plans.values())), proven)
    found = {}
    for name, plan in plans.items():
        seconds = [pair.fast for pair in pairs[plan]]
        stock = [pair.stock for pair in pairs[plan] if pair.stock is not None]
        found[name] = {"seconds": spread(seconds), "faster": ratio(stock, seconds)}
    tuned, best = ([pair.fast for pair in pairs[plan]] for plan in plans.values())
    return {"plans": found, "over": ratio(tuned, best)}


def markdown(result: dict[str, Any]) -> str:
    """The table, and whether tuning came near enough."""
    heads = ("", "plan", "times as fast", "quartiles", "found in", "plans tried")
    lines = [heads, ("---",) * len(heads)]
    for name, one in result["plans"].items():
        speed = one["faster"]
        quartiles = f"{speed['low']:.2f}–{speed['high']:.2f}"
        minutes = f"{one['minutes']:.1f} min"
        faster = f"{speed['median']:.2f}×"
        lines.append((name, one["told"], faster, quartiles, minutes, str(one["tried"])))
    over = result["over"]["median"]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    reached = "reached" if over <= NEAR else "not reached"
    verdict = (
        f"The tuned plan takes {over:.2f} times as long as the best of the sweep; at most {NEAR:g} "
        f"was asked: {reached}. Of the sweep {result['holding']} plans held on all "
        f"{result['prompts']} prompts, {result['refused']} serve the model not at all, and "
        f"{result['failed']} that were faster than its best failed on other prompts."
    )
    title = f"{result['model']}, {result['target']}: tuning beside a sweep of {len(grid())} plans."
    return f"{title}\n\n{table}\n\n{verdict}\n\n{signature()}\n"


def told(plan: Plan) -> str:
    """A plan in words: its methods, with the fields that are not as they are by default."""
    parts = []
    for method in plan:
        given = ", ".join(
            f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
            for name, value in method
            if value != type(method).model_fields[name].get_default(call_default_factory=True)
        )
        parts.append(f"{method.name} ({given})" if given else method.name)
    return " + ".join(parts) or "stock"


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """The sweep, tuning, and then both of their plans side by side, as data."""
    pipe, call = accel.load(options.model)
    pipe.set_progress_bar_config(disable=True)
    split = (options.prompts, options.choice, options.held_out)
    some = searched, _, proven = cases(None, call, split)
    wanted = Targets.parse(options.target)
    path = options.kept / f"sweep-{options.model}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    mark = hashlib.sha256(json.dumps([here(), weights()], sort_keys=True).encode()).hexdigest()[:12]
    measures = tuple(one.measure for one in wanted.fidelity)
    bench = Bench(pipe, measures, Ledger(path, mark))
    bench.time(Plan(), searched[0])  # the first call of a process takes longer
    sweep = swept(bench, some, wanted)
    tuned = tune(pipe, options.target, options.budget, call=call, split=split)
    plans = {"accel.tune": Plan(*tuned.plan), "sweep": sweep.best}
    result = timed(bench, plans, proven)
    more = {
        "accel.tune": {"minutes": tuned.evidence.minutes, "tried": tuned.tried},
        "sweep": {"minutes": sweep.minutes, "tried": len(grid()) - sweep.refused},
    }
    for name, plan in plans.items():
        result["plans"][name] |= more[name] | {"plan": plan.to_dict(), "told": told(plan)}
    asked = ("model", "target", "budget", "prompts", "choice", "held_out")
    swept_of = {"holding": len(sweep.holding), "refused": sweep.refused, "failed": sweep.failed}
    return result | swept_of | {"asked": NEAR} | {name: getattr(options, name) for name in asked}


def main() -> None:
    """Measure, and write ``results/tuning-MODEL.json`` and ``.md``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="scenes-unet")
    parser.add_argument("--target", default="ssim>=0.95", help="of fidelity")
    parser.add_argument("--budget", type=float, default=600.0, help="seconds to tune for")
    parser.add_argument("--prompts", type=int, default=8, help="to search on")
    parser.add_argument("--choice", type=int, default=20, help="that choose among what was found")
    parser.add_argument("--held-out", type=int, default=20, help="to check on")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--kept", type=Path, default=KEPT, help="folder of what the sweep drew")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    result = measured(options)
    print(save(f"tuning-{options.model}", result, options.out))
    text = markdown(result)
    (options.out / f"tuning-{options.model}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
