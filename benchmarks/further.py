"""The fastest of the honest table on more captions: fidelity alone, on any machine, on all cores.

    python benchmarks/further.py [--model scenes-wan] [--held-out 128] [--workers N]
        [--budget SECONDS]

Who holds a level of fidelity is said by pictures, how fast it is by seconds. Seconds are of one
machine with nothing else running; pictures are not. So whoever stands in the second stage of
``results/table-MODEL.jsonl.gz``, and would have to draw on to say who holds each level
(`winners.contending`), draws what is missing, several captions at once and untimed, into
``further-MODEL.jsonl``, packed beside it (`compact`). Where one falls, the next one of the sweep is
drawn on all captions. A run that was cut off goes on there. ``.json`` and ``.md`` then say who
holds each level on all captions, the table's and these, as fast as the table measured.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import contest
import peers
import table
import torch
import winners
from compact import Compact
from contest import STOCK, Benches, Contestant, label, line_of
from measure import RESULTS, digest, here, machine

from accel.plan import Plan
from accel.scenes import HELD_OUT, clip_scene, scene

UNTIMED = ("seconds", "stock_seconds", "compile_seconds", "verdicts")
"""What is not kept of a caption that is drawn beside others."""

Line = dict[str, Any]


@dataclass(frozen=True)
class Drawn:
    """Somebody of the table, and what it has drawn.

    Attributes:
        who: The setting.
        timed: Lines with seconds: of the table's second stage, or of its sweep.
        seen: Lines of captions that the sweep has not seen, of the table and of later.
    """

    who: Contestant
    timed: Sequence[Line]
    seen: Sequence[Line]

    def row(self) -> dict[str, Any]:
        """Seconds as they were timed, fidelity of all captions that the sweep has not seen."""
        found = contest.summary(self.who, [*self.timed]) | table.described(self.who)
        held = contest.fidelity(self.seen) if self.seen else {}
        return found | held | {"seeds": len(self.seen)}

    def lacks(self, seed: int) -> bool:
        """Whether it has not drawn a caption yet."""
        return all(line["seed"] != seed for line in self.seen)


@dataclass(frozen=True)
class Table:
    """What a table holds, with pipelines that draw as it did.

    Attributes:
        sums: The table itself.
        lines: What it is made of, in the order in which they were written.
        benches: The pipelines.
        theirs: Peers that are installed here.
    """

    sums: Line
    lines: Sequence[Line]
    benches: Benches
    theirs: Sequence[peers.Peer]

    @classmethod
    def read(cls, path: Path) -> Table:
        """That of a file of lines, and of the sums beside it.

        Raises:
            SystemExit: If it is of other weights.
        """
        lines = Compact(path, {}).found
        with path.open() as file:
            header = json.loads(file.readline())
        benches = Benches(header["model"], header["call"]["num_inference_steps"])
        weights = digest(benches.get(STOCK)[0])
        if weights != header["weights"]:
            raise SystemExit(
                f"{path} is of other weights, {header['weights']}; here are {weights}. Draw the "
                "table first."
            )
        sums = json.loads(path.with_suffix(".json").read_text())
        theirs = peers.every(benches.get("diffusers")[0], benches.call)
        return cls(sums, [line for line in lines if "seed" in line], benches, theirs)

    @property
    def captions(self) -> int:
        """How many captions its second stage has."""
        found: int = self.sums["stock"][table.HELD]["captions"]
        return found

    def sweep(self) -> list[Line]:
        """Rows of the sweep, with those that did nothing."""
        idle = {one.partition(" is INACTIVE: ")[0] for one in self.sums["idle"]}
        rows = self.sums["rows"][table.SWEEP]
        return [row | {"inactive": {"": ""} if label(row) in idle else {}} for row in rows]

    def drawn(self, more: Sequence[Line]) -> dict[str, Drawn]:
        """Everybody of the second stage, and of later lines, by label."""
        names = {label(row) for row in self.sums["rows"][table.HELD]} | {*map(label, more)}
        return {name: self.of(name, more) for name in sorted(names)}

    def of(self, name: str, more: Sequence[Line] = ()) -> Drawn:
        """Somebody of the table, with the plan that it had in the end.

        Args:
            name: Its label.
            more: Later lines, of whomever.

        Raises:
            SystemExit: If it is a peer that is not installed here.
        """
        own = [line for line in self.lines if label(line) == name]
        plan, call = own[-1].get("plan"), own[-1].get("call", {})
        key = own[-1]["package"], own[-1]["method"], own[-1]["knob"]
        peer = next(
            (one for one in self.theirs if (one.package, one.method, one.knob) == key), None
        )
        if plan is None and peer is None and key[0] != STOCK:
            raise SystemExit(f"{name} is not here: install the extra `bench`.")
        who = Contestant(*key, None if plan is None else Plan.from_dict(plan), peer, call)
        own = [line for line in own if line.get("plan") == plan]
        held = [line for line in own if line["stage"] == table.HELD]
        return Drawn(who, held or own, [*held, *(line for line in more if who.wrote(line))])

    def missing(self, more: Sequence[Line], held: Sequence[int]) -> dict[int, list[str]]:
        """Who must draw which captions next to say who holds each level; nobody if that is said.

        Args:
            more: Later lines.
            held: All captions.
        """
        drawn = self.drawn(more)
        rows = [one.row() for one in drawn.values()]
        open_ = [label(row) for row in winners.contending(self.sweep(), rows, len(held))]
        known = {name: drawn[name] if name in drawn else self.of(name) for name in open_}
        least = min((len(one.seen) for one in known.values()), default=0)
        found = {
            seed: [name for name, one in known.items() if one.lacks(seed)]
            for seed in held[: max(table.BATCH, 2 * least)]
        }
        return {seed: names for seed, names in found.items() if names}


# drawing


def caption(path: Path, seed: int, names: Sequence[str]) -> list[Line]:
    """The lines of one caption, drawn by stock and by those of the table who have these names."""
    known = _kept(path)
    benches = known.benches
    subject = (clip_scene if "num_frames" in benches.call else scene)(seed)
    stock = contest.draw(benches, table.REFERENCE, subject)
    found = []
    for name in names:
        who = known.of(name).who
        drawn = stock if who.key == table.REFERENCE.key else contest.draw(benches, who, subject)
        line = line_of(who, subject, stock, drawn)
        found.append({key: one for key, one in line.items() if key not in UNTIMED})
    return found


@cache
def _kept(path: Path) -> Table:
    """What a worker keeps from caption to caption: the table and its pipelines."""
    quiet()
    return Table.read(path)


def quiet() -> None:
    """A thread to each worker; what a method warns of stands in the table."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", UserWarning)


def draw(
    known: Table, path: Path, lines: Compact, held: Sequence[int], options: argparse.Namespace
) -> None:
    """Draw until it is said who holds each level; each caption is written down when it is done.

    Args:
        known: The table.
        path: Of its lines.
        lines: The file.
        held: All captions.
        options: So many ``workers`` at once; after ``budget`` seconds none begins another batch.
    """
    until = time.monotonic() + options.budget
    with ProcessPoolExecutor(options.workers, multiprocessing.get_context("spawn")) as pool:
        while time.monotonic() < until and (missing := known.missing(lines.found, held)):
            waiting = [pool.submit(caption, path, *one) for one in missing.items()]
            for number, one in enumerate(as_completed(waiting), 1):
                for line in one.result():
                    lines.add(line)
                print(f"{number}/{len(waiting)}", end="\r", flush=True)


# summing up


def summed(known: Table, more: Sequence[Line]) -> dict[str, Any]:
    """Who holds each level on all captions; whose sweep ends too early is as the table says.

    Args:
        known: The table.
        more: Lines of further captions.
    """
    rows = [one.row() for one in known.drawn(more).values()]
    censored = {one["level"]: one["censored"] for one in known.sums["levels"]}
    levels = [one | {"censored": censored[one["level"]]} for one in winners.levels([], rows)]
    return table.plain({"levels": levels, "rows": {table.HELD: rows}})


def notes(result: dict[str, Any]) -> list[str]:
    """What a reader must know besides."""
    timed, pictures = result["timed_on"], result["machine"]
    swept, open_ = result["swept"], result["open"]
    return [
        f"Seconds are of the table: {timed['date']}, {timed['processor']}.",
        f"Fidelity is of all captions, those that the table had not drawn untimed, "
        f"{pictures['date']}, on {pictures['processor']}.",
        *([f"Seconds of the table's sweep have {', '.join(swept)}."] if swept else ()),
        *([f"Not drawn to the end, might hold a level too: {', '.join(open_)}."] if open_ else ()),
    ]


def write(result: dict[str, Any], folder: Path) -> list[Path]:
    """Write sums and table."""
    name, count = f"further-{result['model']}", result["captions"]
    title = (
        f"{result['model']}: who holds each level on {sum(count.values())} held-out captions, "
        f"{count['timed']} of them timed."
    )
    paths = [folder / f"{name}{ending}" for ending in (".json", ".md")]
    paths[0].write_text(json.dumps(result, separators=(",", ":"), default=float) + "\n")
    paths[1].write_text(winners.markdown(result["levels"], title, notes(result)))
    return paths


def options_of() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="scenes-wan")
    parser.add_argument("--held-out", type=int, default=128, help="captions in all")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="drawing at once")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds to draw for")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    return parser


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """Draw what is missing, and sum it up."""
    path = options.out / f"table-{options.model}.jsonl"
    known = Table.read(path)
    held = HELD_OUT[table.UNSEEN : table.UNSEEN + options.held_out]
    stock, call = known.benches.get(STOCK)[0], known.benches.call
    head = {"model": options.model, "call": call, "weights": digest(stock), **here()}
    lines = Compact(options.out / f"further-{options.model}.jsonl", head)
    draw(known, path, lines, held, options)
    swept = {*map(label, lines.found)} - {*map(label, known.sums["rows"][table.HELD])}
    return {
        "model": options.model,
        "machine": machine(),
        "timed_on": known.sums["machine"],
        "captions": {"timed": known.captions, "further": len(held) - known.captions},
        "swept": sorted(swept),
        "open": sorted({name for one in known.missing(lines.found, held).values() for name in one}),
        "packed": lines.pack().name,
        **summed(known, lines.found),
    }


def main() -> None:
    """Draw, and write ``further-MODEL`` with its endings."""
    options = options_of().parse_args()
    quiet()
    result = measured(options)
    contest.show(result["rows"][table.HELD])
    for path in write(result, options.out):
        print(path)


if __name__ == "__main__":
    main()
