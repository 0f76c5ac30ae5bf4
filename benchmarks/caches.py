"""Every cache swept over its knob, beside the caches of other projects, in one interleaved run.

    python benchmarks/caches.py [--model scenes-flux] [--captions 16] [--budget SECONDS]

Needs the extra `bench`, which brings the peers. What rests on measured numbers is calibrated first,
by `accel calibrate` on captions of training seeds (`calibrated`). How it is measured: `contest`.

Each picture's numbers are written at once to ``results/caches-MODEL.jsonl``: a run that was cut
off, by ``--budget`` or otherwise, goes on there when it is started again, and sums up the captions
that all settings have drawn. Beside it come ``.json`` (the sums), ``.png`` (seconds against
fidelity) and ``.md``: for each level of fidelity, our fastest cache beside the fastest peer, and
what was left out since it did nothing or was refused.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from typing import Any

import calibrated
import contest
import numpy as np
import peers
import torch
from contest import OURS, STOCK, Benches, Contestant, draw
from counting import Counter
from measure import save

import accel
from accel.errors import AccelError
from accel.scenes import HELD_OUT, Scene, scene

LEVELS = {"ssim": (0.99, 0.98, 0.95, 0.9, 0.8), "perceptual": (0.005, 0.01, 0.02, 0.05, 0.2)}
"""By measure of fidelity, the levels: at least so similar, at most so distant."""

CENSORED = (
    "Censored: at the largest knob that was tried, some peer still is nearer than the level: with "
    "a larger one it might be faster than the best peer here, and hold it."
)

FEW = 4
"""Steps of the pictures by which it is seen whether a cache leaves a trace."""

NETWORK, BLOCKS = {"site": "network"}, {"site": "blocks"}

SWEEPS: dict[str, tuple[str, dict[str, Any], tuple[float, ...]]] = {
    "EasyCache": ("threshold", {}, (0.05, 0.1, 0.15, 0.2, 0.3)),
    "EasyCache, paper": ("threshold", {"predictor": "reuse", "warmup": 5}, (0.05, 0.1, 0.2)),
    "FirstBlock": ("threshold", {"predictor": "newton"}, (0.05, 0.1, 0.2, 0.3)),
    "DBCache": ("threshold", {"predictor": "newton"}, (0.05, 0.1, 0.2, 0.3)),
    "DBCache, front 1 back 1": (
        "threshold",
        {"predictor": "newton", "front": 1, "back": 1},
        (0.1, 0.2, 0.3),
    ),
    "DBCache, front 3": ("threshold", {"predictor": "newton", "front": 3}, (0.1, 0.2, 0.3)),
    "TeaCache": ("threshold", {"coefficients": "identity"}, (0.1, 0.2, 0.4, 0.8)),
    "MagCache": ("threshold", {}, (0.06, 0.12, 0.24)),
    "DeltaDiT": ("interval", {}, (2, 3, 4)),
    "DeepCache": ("interval", {"predictor": "newton"}, (2, 3, 4, 5, 7)),
    "DeepCache, nonuniform": (
        "interval",
        {"predictor": "newton", "schedule": "nonuniform"},
        (2, 3, 4, 5, 7),
    ),
    "FORA": ("interval", {}, (2, 3, 4)),
    "PAB": ("spatial", {}, (2, 4, 6)),
    "TaylorSeer": ("interval", {}, (2, 3, 4, 6)),
    "TaylorSeer, blocks": ("interval", BLOCKS, (2, 3, 4, 6)),
    "TaylorSeer, whole network": ("interval", NETWORK, (2, 3, 4, 6)),
    "HiCache": ("interval", {}, (3, 4, 6)),
    "HiCache, blocks": ("interval", BLOCKS, (3, 4, 6)),
    "FoCa": ("interval", {}, (3, 4, 6)),
    "FoCa, blocks": ("interval", BLOCKS, (3, 4, 6)),
    "DMD": ("interval", {}, (3, 4, 6)),
    "DMD, blocks": ("interval", BLOCKS, (3, 4, 6)),
    "SADA": ("max_skips", {}, (1, 2, 4)),
    "SADA, multi-step": ("every", {"max_skips": 4, "lagrange": 0.48}, (2, 3, 4)),
    "ZEUS": ("interval", {}, (2, 3, 4)),
    "ZEUS, multi-step": ("every", {"lagrange": 0.48}, (2, 3, 4)),
    "TextKV": ("entries", {}, (4,)),
}
"""By curve: the field that is swept, the other fields, and the values."""


def plans() -> dict[tuple[str, float], accel.Plan]:
    """Every setting of every cache of ours by its curve and knob."""
    known, found = accel.methods(), {}
    for curve, (knob, fields, values) in SWEEPS.items():
        kind = known[f"cache.{curve.split(',')[0]}"]
        found |= {(curve, value): accel.Plan(kind(**fields, **{knob: value})) for value in values}
    return found


def ours(pipe: Any, settings: int | None) -> list[Contestant]:
    """Every setting of every cache of ours that serves the pipeline."""
    field, left = contest.serving(plans(), pipe, settings)
    for curve, why in left.items():
        print(f"left out {curve}: {why}")
    return field


def fitted(
    pipe: Any, bench: calibrated.Bench, settings: int | None, only: list[str] | None
) -> Iterator[Contestant]:
    """Every setting that rests on measured numbers, calibrated where it is not yet."""
    for name, curve in calibrated.CURVES.items():
        if only and name not in only:
            continue
        try:
            for value in curve.values[:settings]:
                plan = calibrated.plan_of(name, value, bench)
                plan.attach(pipe).detach()
                yield Contestant(OURS, name, value, plan=plan)
        except (AccelError, RuntimeError) as error:
            print(f"left out {name}: {error}")


def theirs(pipe: Any, call: dict[str, Any], settings: int | None) -> list[Contestant]:
    """Every setting of every peer that runs on the pipeline."""
    curves: dict[tuple[str, str], list[peers.Peer]] = {}
    for peer in peers.of(pipe, call):
        curves.setdefault((peer.package, peer.method), []).append(peer)
    chosen = (peer for points in curves.values() for peer in points[:settings])
    return [Contestant(p.package, p.method, p.knob, peer=p) for p in chosen]


def levels(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each level of fidelity our fastest cache, the fastest peer, and how much faster it is.

    A level is censored where the sweep of any peer ends above it: a larger knob might have been
    faster than the fastest, and near enough. What did nothing does not compete.
    """
    table, rows = [], contest.active(rows)
    curves = peer_curves(rows)
    for measure_, values in LEVELS.items():
        sign = -1 if measure_ == "perceptual" else 1
        for level in values:
            good = [row for row in rows if sign * row[measure_] >= sign * level]
            mine, peer = (_fastest(good, here) for here in (True, False))
            table.append(
                {
                    "measure": measure_,
                    "level": level,
                    "ours": mine and _point(mine),
                    "peer": peer and _point(peer),
                    "censored": any(goes_on(curve, measure_, sign * level) for curve in curves),
                    "ratio": mine
                    and peer
                    and mine["speedup"]["median"] / peer["speedup"]["median"],
                }
            )
    return table


def peer_curves(rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The settings of each curve of the peers, by knob."""
    curves: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["knob"]):
        if row["package"] != OURS:
            curves.setdefault((row["package"], row["method"]), []).append(row)
    return list(curves.values())


def goes_on(curve: list[dict[str, Any]], measure_: str, level: float) -> bool:
    """Whether the last knob of a curve holds a level, which is signed so that more is nearer."""
    sign = -1 if measure_ == "perceptual" else 1
    holds: bool = sign * curve[-1][measure_] >= level
    return holds and not stands_still(curve)


def stands_still(curve: list[dict[str, Any]]) -> bool:
    """Whether the last knob of a curve computed what the one before did: more changes nothing."""
    return len(curve) > 1 and bool(curve[-1]["block_rows"] == curve[-2]["block_rows"])


def _fastest(rows: list[dict[str, Any]], here: bool) -> dict[str, Any] | None:
    side = [row for row in rows if (row["package"] == OURS) == here]
    return max(side, key=lambda row: row["speedup"]["median"], default=None)


def _point(row: dict[str, Any]) -> dict[str, Any]:
    names = ("package", "method", "knob", "ssim", "perceptual", "block_rows")
    return {name: row[name] for name in names} | {
        "seconds": row["seconds"]["median"],
        "speedup": row["speedup"]["median"],
    }


def markdown(table: list[dict[str, Any]], title: str, remarks: Sequence[str] = ()) -> str:
    """The levels as a table to read, and what a reader must know."""
    lines = [
        f"{title}. For each level of fidelity, the fastest cache that holds it (times faster than "
        "stock).",
        "",
        "| fidelity | ours | best peer | ours over peer |",
        "|---|---|---|---|",
    ]
    signs = {"ssim": "SSIM ≥", "perceptual": "perceptual distance ≤"}
    for row in table:
        cells = [f"{signs[row['measure']]} {row['level']:g}"]
        for side in ("ours", "peer"):
            point = row[side]
            name = point and f"{point['method']} {point['knob']:g}"
            who = "" if side == "ours" or not point else f"{point['package']}: "
            cells.append(f"{who}{name} ({point['speedup']:.2f}×)" if point else "none")
        ratio = f"{row['ratio']:.2f}×" if row["ratio"] else "–"
        cells.append(ratio + (" (censored)" if row["censored"] else ""))
        lines.append(f"| {' | '.join(cells)} |")
    if any(row["censored"] for row in table):
        lines += ["", CENSORED]
    lines += ["", *(f"* {one}" for one in remarks)]
    return "\n".join(lines).rstrip() + "\n"


def leaves_a_trace(benches: Benches, who: Contestant, subject: Scene) -> bool:
    """Whether the package's pipeline draws something else than stock after a cache has come off.

    Stock is the pipeline that nothing was ever on: that of the package has had every setting on it
    by then, and would hide what they left.
    """
    untouched, after = (Contestant(package, STOCK, 0) for package in (STOCK, who.package))
    steps = None if who.method in calibrated.CURVES else FEW  # numbers of a run of all its steps
    before = np.asarray(draw(benches, untouched, subject, steps).picture)
    draw(benches, who, subject, steps)
    return not np.array_equal(before, np.asarray(draw(benches, after, subject, steps).picture))


def main() -> None:
    """Measure, and write ``caches-MODEL`` with its endings."""
    options = contest.options_of(__doc__.splitlines()[0]).parse_args()
    torch.set_num_threads(options.threads)
    benches = Benches(options.model, options.steps)
    pipe = benches.get(OURS)[0]
    field = ours(pipe, options.settings)
    bench = calibrated.Bench.of(options.model, pipe, benches.call)
    if options.fresh:
        bench.forget()
    field += fitted(pipe, bench, options.settings, options.only)
    field += theirs(benches.get("diffusers")[0], benches.call, options.settings)
    found = contest.run("caches", options, benches, field)
    lines, subject = found.lines, scene(HELD_OUT[0])
    traced = {(line["package"], line["method"]) for line in lines.found if "leaves_a_trace" in line}
    rows = contest.active(found.rows)
    drawn = {(row["package"], row["method"], row["knob"]) for row in rows}
    last = {(who.package, who.method): who for who in field if who.key in drawn}
    for who in last.values():
        if (who.package, who.method) not in traced and time.monotonic() < found.until:
            trace = leaves_a_trace(benches, who, subject)
            named = {"package": who.package, "method": who.method, "leaves_a_trace": trace}
            lines.add(named)
    result = {
        "call": benches.call,
        "captions": found.seeds,
        "stock": found.stock,
        "levels": levels(found.rows),
        "inactive": contest.idle(found.rows),
        "left_out": found.undrawn,
        "leaves_a_trace": {
            f"{line['package']}: {line['method']}": line["leaves_a_trace"]
            for line in lines.found
            if "leaves_a_trace" in line
        },
        "rows": found.rows,
    }
    report(options, result, benches.get(STOCK)[1])


def report(options: argparse.Namespace, result: dict[str, Any], counter: Counter) -> None:
    """Print the rows, and write sums, plot and table."""
    contest.show(result["rows"])
    name = f"caches-{options.model}"
    steps = result["call"]["num_inference_steps"]
    title = (
        f"{options.model}, {steps} steps, {len(result['captions'])} captions, "
        f"{len(counter.blocks)} blocks, one cache at a time"
    )
    contest.plot(result["rows"], options.out / f"{name}.png", title)
    left = [f"{who} is left out: {why}" for who, why in result["left_out"].items()]
    table = markdown(result["levels"], title, [*result["inactive"], *left])
    (options.out / f"{name}.md").write_text(table)
    print(table)
    print(save(name, result, options.out))


if __name__ == "__main__":
    main()
