"""Cheaper guidance beside full guidance: seconds and fidelity, alone and under a cache.

    python benchmarks/guidance.py [--model scenes-flux] [--captions 16] [--budget SECONDS]

How it is measured: `contest`. The coefficients of LinearAG are calibrated first, on captions of
the training seeds. Each picture's numbers are written at once to ``results/guidance-MODEL.jsonl``;
beside it come ``.json`` (the sums) and ``.png`` (seconds against fidelity).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import contest
import torch
from calibrated import Bench
from contest import OURS, Benches, Contestant
from measure import save
from sampling import Calibration, forget, read

from accel import Plan, cache, guidance
from accel.errors import AccelError

LINEAR_AG = Calibration("LinearAG", ("linear-ag", "--count", "16"))

CURVES: dict[str, tuple[str, dict[str, Any], tuple[float, ...]]] = {
    "Adaptive": ("threshold", {}, (0.9, 0.97, 0.991, 0.997)),
    "Interval, end": ("low", {}, (0.1, 0.28, 0.6)),
    "Interval, start": ("high", {"low": 0.0}, (20.0, 8.0)),
    "CFGCache": ("interval", {}, (2, 3, 5)),
    "CFGCache, plain": ("interval", {"low": 1.0, "high": 1.0}, (2, 3, 5)),
}
"""By curve: the field that is swept, the other fields, and the values."""

CACHED = 0.1
"""Threshold of the cache that each curve is drawn under once more."""


def plans(folder: Path) -> dict[tuple[str, float], Plan]:
    """Every setting by its curve and knob, without a cache."""
    found: dict[tuple[str, float], Plan] = {}
    for curve, (knob, fields, values) in CURVES.items():
        kind = getattr(guidance, curve.split(",")[0])
        found |= {(curve, value): Plan(kind(**fields, **{knob: value})) for value in values}
    for _, name in LINEAR_AG.files():
        found["LinearAG", 2.0] = read(folder / name)
    return found


def field_of(pipe: Any, folder: Path, settings: int | None) -> list[Contestant]:
    """Every setting that serves the pipeline, alone and under the cache."""
    easy = cache.EasyCache(threshold=CACHED)
    found = [Contestant(OURS, "EasyCache alone", CACHED, plan=Plan(easy))]
    for (curve, knob), plan in plans(folder).items():
        both = {curve: plan, f"{curve} + EasyCache": Plan(*plan, easy)}
        for name, one in both.items():
            if settings is not None and sum(who.method == name for who in found) >= settings:
                continue
            try:
                one.attach(pipe).detach()
            except AccelError as error:
                print(f"left out {name}: {error}")
                continue
            found.append(Contestant(OURS, name, knob, plan=one))
    return found


def main() -> None:
    """Measure, and write ``guidance-MODEL`` with its endings."""
    options = contest.options_of(__doc__.splitlines()[0]).parse_args()
    torch.set_num_threads(options.threads)
    benches = Benches(options.model, options.steps)
    pipe = benches.get(OURS)[0]
    bench = Bench.of(options.model, pipe, benches.call)
    if options.fresh:
        forget(bench.folder, [LINEAR_AG])
    bench.calibrate(LINEAR_AG)
    field = field_of(pipe, bench.folder, options.settings)
    found = contest.run("guidance", options, benches, field)
    contest.show(found.rows)
    steps = benches.call["num_inference_steps"]
    title = f"{options.model}, {steps} steps, {len(found.seeds)} captions, cheaper guidance"
    name = f"guidance-{options.model}"
    contest.plot(found.rows, options.out / f"{name}.png", title)
    figures = {"call": benches.call, "captions": found.seeds, "stock": found.stock}
    figures |= {"left_out": found.undrawn, "rows": found.rows}
    print(save(name, figures, options.out))


if __name__ == "__main__":
    main()
