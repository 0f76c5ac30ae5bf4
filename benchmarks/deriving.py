"""Presets, as tuning finds them: the cheapest plans that hold a fidelity on every bundled model.

    python benchmarks/deriving.py [--only balanced] [--captions 16] [--choice 64] [--held-out 64]
        [--budget 1200] [--kept FOLDER] [--write]

Each preset promises a level of SSIM to stock (`LEVELS`). The search is that of `accel.tune`, with
the prompts of all models at once: a plan holds a level where it does on each of them. Only guidance
and caches are tried that decide by what they see (`TRIED`) and attach to all of the models: a
preset is for any pipeline, with its own sampler and any number of steps. What a plan costs is the
share of multiplications that it computes, in the mean of the models. Knobs have three digits.

Then, the cheapest first, those that hold with room on further prompts of every model are checked on
held-out ones of each, until one holds on all. `--write` puts it into ``assets/plans``; what was
measured is in ``results/presets-derived.json`` and ``.md``. A run that was cut off goes on in
`--kept`. Nothing is timed, so that other work may go on beside it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from album import KEPT
from measure import RESULTS, here, save, signature, weights

import accel
from accel import Plan
from accel.bundled import root
from accel.tuning.bench import Bench, Case, Ledger, Line
from accel.tuning.cases import cases
from accel.tuning.proof import Sample
from accel.tuning.search import Point, Search
from accel.tuning.space import FAMILIES, Space
from accel.tuning.targets import Targets, may_miss

MODELS = ("scenes-flux", "scenes-unet", "scenes-wan")
"""Those first that most plans fail on, and fail on soonest."""

LEVELS = {"balanced": 0.95, "fast": 0.9, "fastest": 0.8}
"""By preset, the SSIM to stock that is to be held; ``exact`` is the empty plan."""

TRIED = ("guidance.Adaptive", "cache.EasyCache", "cache.FirstBlock", "cache.DBCache", "cache.SADA")
"""What decides by what it sees in a run, and leaves nothing out at fixed places."""

DIGITS = 3

MEASURES = ("ssim", "psnr", "accuracy")
"""What is told of held-out prompts."""


@dataclass(frozen=True)
class Model:
    """A bundled model with its prompts.

    Attributes:
        name: Of the model.
        bench: What draws for the search.
        judge: What draws for the check, and measures more.
        cases: The prompts of the search.
        choice: Those that choose among the plans that it found.
        held_out: Those of the check.
    """

    name: str
    bench: Bench
    judge: Bench
    cases: Sequence[Case]
    choice: Sequence[Case]
    held_out: Sequence[Case]


class Together:
    """The benches of some models as one: a case is drawn by the model that it is of."""

    def __init__(self, models: Sequence[Model]) -> None:
        self._of = {case.key: model.bench for model in models for case in model.cases}
        if len(self._of) < sum(len(model.cases) for model in models):
            raise ValueError("Two models have one case.")
        self.mark = " ".join(model.bench.mark for model in models)

    def figures(self, plan: Plan, case: Case) -> Line:
        """What a plan does to a case of any of the models."""
        return self._of[case.key].figures(plan, case)


class Rounded(Space):
    """A space whose plans have knobs of few digits."""

    def plan(self, count: int, methods: Mapping[str, Mapping[str, Any]]) -> Plan:
        """The plan of a trial, with the knobs rounded."""
        few = {
            name: {field: _rounded(value) for field, value in fields.items()}
            for name, fields in methods.items()
        }
        return super().plan(count, few)


def _rounded(value: Any) -> Any:
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def space(models: Sequence[Model]) -> Rounded:
    """What serves each of the models."""
    found = Rounded(
        1,
        {
            family: {name: knobs for name, knobs in kinds.items() if name in TRIED}
            for family, kinds in FAMILIES.items()
        },
    )
    for model in models:
        found = Rounded.of(model.bench.pipe, 1, found.families)
    return found


def search(models: Sequence[Model], level: float, folder: Path) -> Search:
    """A search for plans that hold a level of SSIM on all of the models."""
    prompts = chain.from_iterable(zip(*(model.cases for model in models), strict=True))
    return Search(
        Together(models),
        [*prompts],
        Targets.parse(f"ssim>={level:g}"),
        space(models),
        outside=0.0,
        seconds=1.0,
        folder=folder,
    )


def checked(model: Model, plan: Plan, wanted: Targets) -> dict[str, Any]:
    """What a plan does to the held-out prompts: means, the worst, and the share that holds."""
    (target,), sample = wanted.fidelity, Sample(model.judge, model.held_out, wanted)
    lines = sample.drawn(plan, may_miss(len(model.held_out)))
    values = [line.figures["ssim"] for line in lines]
    means = {name: mean(line.figures[name] for line in lines) for name in MEASURES}
    shown = {"share": target.share(values), "worst": min(values), **means}
    return {"model": model.name, "holds": sample.holds(lines), **shown}


def derived(
    models: Sequence[Model],
    name: str,
    until: float,
    folder: Path,
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, Any]:
    """The cheapest plan that holds a preset's level on every model, with what was measured.

    Args:
        models: The models.
        name: Of the preset.
        until: When the search ends, by the clock.
        folder: Where trials are kept.
        clock: Tells seconds.

    Raises:
        SystemExit: If none does.
    """
    level, failed = LEVELS[name], list[dict[str, Any]]()
    wanted, found = Targets.parse(f"ssim>={level:g}"), search(models, level, folder)
    choosing = {one.name: Sample(one.bench, one.choice, wanted) for one in models}
    found.recall(lambda: clock() > until)
    found.run(lambda: clock() > until)
    for point in found.ranked():
        entry = {"plan": point.plan.to_dict(), "computed": _computed(point, models)}
        missed = next((at for at, one in choosing.items() if not one.chooses(point.plan)), None)
        if missed is not None:
            failed.append({**entry, "chosen_not_by": missed})
            continue
        rows = []
        for model in models:
            rows.append(checked(model, point.plan, wanted))
            if not rows[-1]["holds"]:
                break
        entry["rows"] = rows
        if rows[-1]["holds"]:
            tried = {"tried": len(found.points), "refused": found.refused, "failed": failed}
            return {"preset": name, "level": level, **entry, **tried}
        failed.append(entry)
    raise SystemExit(f"No plan holds {level} on every model, not even stock's.")


def _computed(point: Point, models: Sequence[Model]) -> dict[str, float]:
    """By model, the share of multiplications that a plan computed of the prompts of the search."""
    return {
        model.name: sum(line.products for line in point.lines[at :: len(models)]) / len(model.cases)
        for at, model in enumerate(models)
    }


def markdown(result: Sequence[Mapping[str, Any]], prompts: int) -> str:
    """The table."""
    heads = (
        "preset",
        "SSIM held",
        "plan",
        "model",
        "computed",
        "SSIM",
        "worst",
        "reach it",
        "right",
    )
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for one in result:
        methods = [method.name for method in Plan.from_dict(one["plan"])]
        for row in one["rows"]:
            lines.append(
                f"| {one['preset']} | {one['level']:g} | {' + '.join(methods)} | {row['model']} "
                f"| {one['computed'][row['model']]:.1%} | {row['ssim']:.3f} | {row['worst']:.3f} "
                f"| {row['share']:.0%} | {row['accuracy']:.1%} |"
            )
    about = (
        "Presets: the cheapest plans of guidance and caches that hold a level on every bundled "
        f"model, checked on {prompts} held-out prompts of each. Computed is the share of stock's "
        "multiplications on the prompts of the search."
    )
    return "\n".join([about, "", *lines, "", signature()]) + "\n"


def loaded(name: str, split: tuple[int, int, int], kept: Path) -> Model:
    """A bundled model and its prompts."""
    pipe, call = accel.load(name)
    pipe.set_progress_bar_config(disable=True)
    text = json.dumps([name, here(), weights()], sort_keys=True)
    ledger = Ledger(kept / f"{name}.jsonl", hashlib.sha256(text.encode()).hexdigest()[:12])
    benches = (Bench(pipe, measures, ledger) for measures in (("ssim",), MEASURES))
    return Model(name, *benches, *cases(None, call, split))


def main() -> None:
    """Search, check, and write ``results/presets-derived.json`` and ``.md``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", choices=[*LEVELS], help="presets; all without")
    parser.add_argument("--captions", type=int, default=16, help="to search on, of each model")
    parser.add_argument("--choice", type=int, default=64, help="that choose, of each model")
    parser.add_argument("--held-out", type=int, default=64, help="to check on, of each model")
    parser.add_argument("--budget", type=float, default=1200.0, help="seconds of search, each")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--kept", type=Path, default=KEPT / "presets", help="folder of trials")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--write", action="store_true", help="write assets/plans")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.kept.mkdir(parents=True, exist_ok=True)
    split = (options.captions, options.choice, options.held_out)
    models = [loaded(name, split, options.kept) for name in MODELS]
    result = []
    for name in options.only or LEVELS:
        until = time.monotonic() + options.budget
        result.append(derived(models, name, until, options.kept))
        print(json.dumps(result[-1]), flush=True)
    print(save("presets-derived", {"presets": result, "held_out": options.held_out}, options.out))
    (options.out / "presets-derived.md").write_text(markdown(result, options.held_out))
    for one in result if options.write else ():
        text = Plan.from_dict(one["plan"]).to_toml()
        (root() / "plans" / f"{one['preset']}.toml").write_text(text)


if __name__ == "__main__":
    main()
