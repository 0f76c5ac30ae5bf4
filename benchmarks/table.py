"""The honest table: every method of ours, tuned plans and every peer, beside the stock pipeline.

    python benchmarks/table.py [--model scenes-flux] [--captions 16] [--held-out 128]
        [--budget SECONDS] [--only NAME …] [--threads N]

One command, two stages. The sweep draws everybody (`table_field`) on a few captions, interleaved as
`contest` says, and then, on the rest of its captions, whoever may still hold a level of fidelity
fastest (`winners.hopeful`: successive halving). Of each class the fastest at each level is then
drawn on other captions, which the sweep has not seen; if it fails there, the next one is
(`winners.contending`). Both are in ``results/table-MODEL.jsonl``, each line with its stage, and
packed beside it (the form: `compact`); a run that was cut off goes on there. Pictures are kept
beside the benchmarks, out of git (`album`).

Beside the lines come ``.json`` (the sums), ``.md`` (who holds each level), ``.png`` and ``.html``
(`table_page`). Needs the extra `bench` for the peers: whoever is missing is named. What is
calibrated first, is calibrated on captions of training seeds; ``--searched`` also searches for
schedules, which takes minutes each. ``--carry`` keeps the numbers of earlier code for those who
draw one caption as before (`carry`). Tuned plans are read from ``benchmarks/tuned/MODEL-*.toml``.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import carry
import contest
import table_page
import torch
import winners
from album import KEPT, Album
from compact import Compact, rounded
from contest import OURS, STOCK, Benches, Contestant, Stage, active, label
from measure import Lines, digest, here, machine, save_plot
from peers import COMPILED
from table_field import TUNED, TUNED_CURVE, Field, Wanted, gather

from accel.scenes import HELD_OUT, Scene, clip_scene, scene

SWEEP, HELD = "sweep", "held-out"

UNSEEN = 1000
"""Captions of the second stage start this far into the held-out seeds: the sweep has none."""

FIRST = 4
"""Captions of the sweep that everybody draws."""

BATCH = 16
"""Captions of the second stage after which it is first seen who has failed; then twice as many."""

SHOWN = 3
"""Captions of which pictures are shown."""

IDLE = "it computed all that stock does, and every picture is stock's to the bit"

REFERENCE = Contestant(STOCK, STOCK, 0)

Row = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """The lines of one stage, as `contest` reads them."""

    found: list[dict[str, Any]]


@dataclass(frozen=True)
class Bench:
    """What both stages share.

    Attributes:
        benches: The pipelines.
        lines: The file.
        album: What was drawn.
        until: When the time is over, on the monotonic clock.
    """

    benches: Benches
    lines: Lines
    album: Album
    until: float

    def scenes(self, first: int, count: int) -> list[Scene]:
        """So many captions from a place in the held-out seeds on."""
        told = clip_scene if "num_frames" in self.benches.call else scene
        return [told(seed) for seed in HELD_OUT[first : first + count]]

    def draw(self, name: str, who: Sequence[Contestant], scenes: list[Scene]) -> list[Row]:
        """Draw what is missing of a stage, and sum it up over the captions that all have drawn."""
        keep = partial(self.album.keep, scenes=scenes)
        stage = Stage({"stage": name}, Exception, keep)
        if scenes:
            contest.measure(
                self.benches, [*who], scenes, self.lines, self.until, warm=True, stage=stage
            )
        return _judged(self.rows(name, who))

    def rows(self, name: str, who: Sequence[Contestant]) -> list[Row]:
        """What some have drawn in a stage, over the captions that all of them have."""
        rows, seeds = contest.rows_of([*who], self.part(name))
        settings = {one.key: one for one in who}
        for row in rows:
            one = settings[row["package"], row["method"], row["knob"]]
            row |= {**described(one), **self.album.frechet(one.named(), REFERENCE.named(), seeds)}
            row["seeds"] = len(seeds)
        return rows

    def sweep(self, who: Sequence[Contestant], scenes: list[Scene]) -> tuple[list[Row], bool]:
        """Draw everybody on the first captions and who may win on all; whether that is done."""
        first = self.draw(SWEEP, who, scenes[:FIRST])
        if not _drawn(first, scenes[:FIRST]):
            return first, False
        named = {label(row) for row in winners.hopeful(first)}
        rest = self.draw(SWEEP, [one for one in who if one.label in named], scenes)
        if not _drawn(rest, scenes):
            return first, False
        again = {label(row): row for row in rest}
        return [again.get(label(row), row) for row in first], True

    def verify(
        self, sweep: list[Row], who: Sequence[Contestant], scenes: list[Scene]
    ) -> tuple[list[Row], bool]:
        """Draw whoever may hold a level on captions of their own; whether all is said."""
        known, rows = {one.label: one for one in who}, list[Row]()
        drawn: dict[str, Contestant] = {}
        while open_ := winners.contending(sweep, rows, len(scenes)):
            named = {one: known[one] for one in map(label, open_)}
            counts = {label(row): row["seeds"] for row in rows}
            least = min(counts.get(name, 0) for name in named)
            self.draw(HELD, [*named.values()], scenes[: max(BATCH, 2 * least)])
            if time.monotonic() > self.until:
                return rows, False
            drawn |= named
            part = self.part(HELD)
            sweep = [row for row in sweep if not _refused(known[label(row)], part)]
            rows = _judged([row for one in drawn.values() for row in self.rows(HELD, [one])])
        return rows, True

    def part(self, name: str) -> Any:
        """The lines of a stage; refusals are of all stages."""
        return Part(
            [one for one in self.lines.found if one.get("stage") == name or "refused" in one]
        )


def described(one: Contestant) -> dict[str, Any]:
    """What a row says of its plan: what it is made of, and the digest of a tuned one."""
    made = [method.name for method in one.plan or () if method.why_off() is None]
    tuned = one.plan.digest if one.plan and one.method.startswith(TUNED_CURVE) else None
    return {"parts": len(made), "made_of": made, "tuned": tuned, "call": dict(one.call)}


def _refused(who: Contestant, part: Any) -> bool:
    return any("refused" in line and who.wrote(line) for line in part.found)


def _judged(rows: list[Row]) -> list[Row]:
    """With a verdict on those of others, which have no report: whether they did anything."""
    stock = next((row for row in rows if row["method"] == STOCK), None)
    for row in rows:
        others = row["package"] not in (OURS, STOCK, COMPILED)
        if stock and others and _same(row, stock):
            row["inactive"] = {row["method"]: IDLE}
    return rows


def _same(row: Row, stock: Row) -> bool:
    return row["psnr"] == stock["psnr"] and row["block_rows"] >= stock["block_rows"]


def measured(options: argparse.Namespace, benches: Benches, field: Field) -> dict[str, Any]:
    """Both stages, as far as the time allows, summed up."""
    weights, code = digest(benches.get(STOCK)[0]), here()
    call = benches.call
    path = options.out / f"table-{options.model}.jsonl"
    if options.fresh:
        path.unlink(missing_ok=True)
    header = {"model": options.model, "call": call, "weights": weights, **code}
    if options.carry:
        carry.carry(path, header, field.who, benches, options.kept / options.model)
    lines = Compact(path, header)
    album = Album(options.kept / options.model / f"{weights}-{code['code']}", SHOWN, call)
    bench = Bench(benches, lines, album, time.monotonic() + options.budget)
    scenes = bench.scenes(0, options.captions)
    sweep, whole = bench.sweep(field.who, scenes)
    if not sweep:
        raise SystemExit(f"No caption is drawn by all yet: start again to go on. {path}")
    unseen = bench.scenes(UNSEEN, options.held_out)
    verified, said = bench.verify(sweep, field.who, unseen) if whole else ([], False)
    stages, levels = {SWEEP: sweep, HELD: verified}, winners.levels(sweep, verified if said else [])
    return {
        "model": options.model,
        "call": call,
        "asked": {SWEEP: options.captions, HELD: options.held_out},
        "blocks": len(benches.get(STOCK)[1].blocks),
        "stock": {name: _stock(bench, name, rows) for name, rows in stages.items() if rows},
        "packed": lines.pack().name,
        "carried": carry.told(path),
        "levels": levels,
        "idle": contest.idle(sweep),
        "left_out": field.left | contest.undrawn(field.who, bench.part(SWEEP)),
        "rows": stages,
        "shown": _shown(bench, field, levels, unseen if said else scenes),
    }


def _drawn(rows: list[Row], scenes: list[Scene]) -> bool:
    """Whether all captions are drawn: before that nobody is known to win or to be beaten."""
    return bool(rows) and min(row["seeds"] for row in rows) == len(scenes)


def _stock(bench: Bench, name: str, rows: list[Row]) -> dict[str, Any]:
    part = bench.part(name)
    seeds = sorted({one["seed"] for one in part.found if "seed" in one})
    return contest.stock_of(part, seeds) | {"captions": max(row["seeds"] for row in rows)}


def _shown(
    bench: Bench, field: Field, levels: list[dict[str, Any]], scenes: list[Scene]
) -> list[dict[str, Any]]:
    """What is shown of the stock pipeline and of each winner: arrays, by caption."""
    best = [one for level in levels for one in level["best"].values()]
    names = {label(one) for one in best if one}
    order = [one for one in field.who if one.key == REFERENCE.key or one.label in names]
    return [
        {
            "name": winners.title({**one.named(), **described(one)}),
            "captions": [subject.caption for subject in scenes[:SHOWN]],
            "pictures": [bench.album.get(one.named(), s.seed) for s in scenes[:SHOWN]],
        }
        for one in order
    ]


def notes(result: dict[str, Any]) -> list[str]:
    """What a reader must know besides."""
    left = [f"Left out: {one}" for one in contest.together(result["left_out"])]
    return [*result["carried"], *result["idle"], *left]


def title_of(result: dict[str, Any]) -> str:
    """The model and what was drawn, in a sentence."""
    rows, asked = result["rows"], result["asked"]
    drawn = {name: max((row["seeds"] for row in one), default=0) for name, one in rows.items()}
    stages = ", ".join(f"{name} {drawn[name]} of {asked[name]} captions" for name in rows)
    steps, blocks = result["call"]["num_inference_steps"], result["blocks"]
    return f"{result['model']}: {steps} steps, {blocks} blocks; {stages}"


def plain(result: dict[str, Any]) -> dict[str, Any]:
    """The sums as a file holds them: plans stand in the lines, verdicts in `idle`."""
    dropped = ("plan", "verdicts", "inactive")
    rows = {
        name: [{key: one for key, one in row.items() if key not in dropped} for row in found]
        for name, found in result["rows"].items()
    }
    short: dict[str, Any] = _short({**result, "shown": None, "rows": rows})
    del short["shown"]
    return short


def _short(found: Any) -> Any:
    """With numbers of few digits."""
    if isinstance(found, dict):
        return {name: _short(one) for name, one in found.items()}
    if isinstance(found, list | tuple):
        return [_short(one) for one in found]
    return rounded(found) if isinstance(found, float) else found


def write(result: dict[str, Any], folder: Path) -> list[Path]:
    """Write sums, table, plot and page."""
    name, title, about = f"table-{result['model']}", title_of(result), machine()
    paths = [folder / f"{name}{ending}" for ending in (".json", ".md", ".png", ".html")]
    text = json.dumps({"machine": about, **plain(result)}, separators=(",", ":"), default=float)
    paths[0].write_text(text + "\n")
    paths[1].write_text(winners.markdown(result["levels"], f"{title}.", notes(result)))
    plot(active(result["rows"][SWEEP]), paths[2], title)
    paths[3].write_text(table_page.draw(result, title, about))
    return paths


def plot(rows: list[Row], path: Path, title: str) -> None:
    """Speed beside stock against lost fidelity: ours in colour, others and fewer steps in greys.

    Not seconds: rows are drawn hours apart, each beside stock, and the machine's pace changes.
    """
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    figure, axes = plt.subplots(figsize=(9, 6), layout="constrained")
    for one, (name, look) in LOOKS.items():
        points = [row for row in rows if winners.side(row) == one]
        speeds = [row["speedup"]["median"] for row in points]
        axes.plot(speeds, [max(1 - row["ssim"], 1e-4) for row in points], look, label=name)
    axes.set(xscale="log", yscale="log", ylabel="1 − SSIM (lower is closer)")
    axes.set(xlabel="times as fast as stock (right is faster)")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3, which="both")
    axes.set_title(title, fontsize=9)
    axes.legend(fontsize=9)
    save_plot(figure, path, dpi=80)


LOOKS = {
    winners.SINGLE: ("ours, one method", "C0o"),
    winners.COMPOSED: ("ours, together", "C1s"),
    winners.PEER: ("peers", "kx"),
    winners.STEPS: ("stock, fewer steps", "C7--D"),
}


def options_of() -> argparse.ArgumentParser:
    """The command line."""
    parser = contest.options_of(__doc__.splitlines()[0])
    parser.add_argument("--held-out", type=int, default=128, help="captions that winners draw")
    parser.add_argument("--searched", action="store_true", help="search for schedules too")
    parser.add_argument("--carry", action="store_true", help="keep what earlier code drew alike")
    parser.add_argument("--tuned", type=Path, default=TUNED, help="folder of tuned plans")
    parser.add_argument("--kept", type=Path, default=KEPT, help="folder that pictures are kept in")
    return parser


def main() -> None:
    """Measure, and write ``table-MODEL`` with its endings."""
    options = options_of().parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore", UserWarning)
    benches = Benches(options.model, options.steps)
    only = tuple(options.only or ())
    wanted = Wanted(options.model, options.settings, only, options.searched, options.tuned)
    result = measured(options, benches, gather(wanted, benches))
    contest.show(active(result["rows"][HELD] or result["rows"][SWEEP]))
    for path in write(result, options.out):
        print(path)


if __name__ == "__main__":
    main()
