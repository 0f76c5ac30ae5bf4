"""The fastest of the honest table on more captions: fidelity alone, on any machine, on all cores.

    python benchmarks/further.py [--model scenes-wan] [--held-out 128] [--workers N]

Who holds a level of fidelity is said by pictures, how fast it is by seconds. Seconds are of one
machine with nothing else running; pictures are not. So whoever has drawn all captions of the second
stage of ``results/table-MODEL.jsonl.gz``, and may hold a level on more, draws those that come next,
several at once and untimed, into ``further-MODEL.jsonl``, packed beside it (`compact`). A run that
was cut off goes on there. ``.json`` and ``.md`` then say who holds each level on all captions, the
table's and these, as fast as the table measured; both machines stand in them.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import contest
import peers
import table
import torch
import winners
from compact import Compact
from contest import STOCK, Benches, Contestant, line_of
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
        timed: Its lines in the table's second stage.
        more: Its lines of further captions, without seconds.
    """

    who: Contestant
    timed: Sequence[Line]
    more: Sequence[Line] = ()

    def with_more(self, lines: Sequence[Line]) -> Drawn:
        """With those of further captions that are its own."""
        return replace(self, more=[line for line in lines if self.who.wrote(line)])

    def row(self) -> dict[str, Any]:
        """Seconds as they were timed, fidelity of all captions."""
        lines = [*self.timed, *self.more]
        timed = contest.summary(self.who, [*self.timed])
        return timed | contest.fidelity(lines) | table.described(self.who) | {"seeds": len(lines)}

    def may_hold(self, captions: int) -> bool:
        """Whether it may hold a level on so many captions."""
        row = self.row()
        known = {contest.label(row): row}
        return any(not winners.failed(known, row, level, captions) for level in contest.MEETS)


@dataclass(frozen=True)
class Table:
    """What a table holds of its second stage.

    Attributes:
        sums: The table itself.
        benches: Pipelines that draw as it did.
        drawn: Who drew all captions.
    """

    sums: Line
    benches: Benches
    drawn: Sequence[Drawn]

    @property
    def captions(self) -> int:
        """How many captions these are."""
        found: int = self.sums["stock"][table.HELD]["captions"]
        return found

    @classmethod
    def read(cls, path: Path) -> Table:
        """That of a file of lines, and of the sums beside it.

        Raises:
            SystemExit: If it is of other weights, or a peer that is in it is not installed here.
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
        rows = sums["rows"][table.HELD]
        most = max(row["seeds"] for row in rows)
        theirs = peers.every(benches.get("diffusers")[0], benches.call)
        whole = [row for row in rows if row["seeds"] == most]
        held = [line for line in lines if line.get("stage") == table.HELD and "seed" in line]
        return cls(sums, benches, [drawn_by(row, held, theirs) for row in whole])


def drawn_by(row: Line, lines: Sequence[Line], theirs: Sequence[peers.Peer]) -> Drawn:
    """Who a row of the table is of, with the plan that it had in the end, and what it drew.

    Args:
        row: Of the table.
        lines: Of its second stage, in the order in which they were written.
        theirs: Peers that are installed here.

    Raises:
        SystemExit: If the peer is not.
    """
    key = row["package"], row["method"], row["knob"]
    own = [line for line in lines if (line["package"], line["method"], line["knob"]) == key]
    plan, call = own[-1].get("plan"), own[-1].get("call", {})
    peer = next((one for one in theirs if (one.package, one.method, one.knob) == key), None)
    if plan is None and peer is None and key[0] != STOCK:
        raise SystemExit(f"{contest.label(row)} is not here: install the extra `bench`.")
    who = Contestant(*key, None if plan is None else Plan.from_dict(plan), peer, call)
    return Drawn(who, [line for line in own if line.get("plan") == plan])


# drawing


def caption(path: Path, names: Sequence[str], seed: int) -> list[Line]:
    """The lines of one caption, drawn by stock and by those of the table who have these names."""
    benches, known = _kept(path)
    subject = (clip_scene if "num_frames" in benches.call else scene)(seed)
    stock = contest.draw(benches, table.REFERENCE, subject)
    found = []
    for name in names:
        who = known[name]
        drawn = stock if who.key == table.REFERENCE.key else contest.draw(benches, who, subject)
        line = line_of(who, subject, stock, drawn)
        found.append({key: one for key, one in line.items() if key not in UNTIMED})
    return found


@cache
def _kept(path: Path) -> tuple[Benches, dict[str, Contestant]]:
    """What a worker keeps from caption to caption: pipelines, and who draws."""
    quiet()
    found = Table.read(path)
    return found.benches, {one.who.label: one.who for one in found.drawn}


def quiet() -> None:
    """A thread to each worker; what a method warns of stands in the table."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", UserWarning)


def draw_missing(
    lines: Compact, seeds: Sequence[int], workers: int, drawing: Callable[[int], list[Line]]
) -> None:
    """Draw the captions that have no lines yet; each is written down whole.

    Args:
        lines: The file.
        seeds: The captions.
        workers: So many at once.
        drawing: Draws one.
    """
    done = {line["seed"] for line in lines.found}
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        waiting = [pool.submit(drawing, seed) for seed in seeds if seed not in done]
        for number, one in enumerate(as_completed(waiting), 1):
            for line in one.result():
                lines.add(line)
            print(f"{number}/{len(waiting)}", end="\r", flush=True)


# summing up


def summed(drawn: Sequence[Drawn], more: Sequence[Line], before: Line) -> dict[str, Any]:
    """Who holds each level on all captions.

    Args:
        drawn: Those of the table.
        more: Lines of further captions.
        before: The table's sums, which know whose sweep ends too early.
    """
    rows = [one.with_more(more).row() for one in drawn]
    censored = {one["level"]: one["censored"] for one in before["levels"]}
    levels = [one | {"censored": censored[one["level"]]} for one in winners.levels([], rows)]
    return table.plain({"levels": levels, "rows": {table.HELD: rows}})


def notes(result: dict[str, Any]) -> list[str]:
    """What a reader must know besides."""
    timed, pictures = result["timed_on"], result["machine"]
    fallen = [
        f"{contest.label(row)} missed too many to hold a level on all of them."
        for row in result["rows"][table.HELD]
        if row["seeds"] == result["captions"]["timed"]
    ]
    return [
        f"Seconds are of the table: {timed['date']}, {timed['processor']}.",
        f"Fidelity is of all captions, the further ones drawn {pictures['date']} on "
        f"{pictures['processor']}, untimed.",
        *fallen,
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
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    return parser


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """Draw what is missing, and sum it up."""
    path = options.out / f"table-{options.model}.jsonl"
    known = Table.read(path)
    held = HELD_OUT[table.UNSEEN : table.UNSEEN + options.held_out]
    names = [one.who.label for one in known.drawn if one.may_hold(options.held_out)]
    stock, call = known.benches.get(STOCK)[0], known.benches.call
    head = {"model": options.model, "call": call, "weights": digest(stock), **here()}
    lines = Compact(options.out / f"further-{options.model}.jsonl", head)
    drawing = partial(caption, path, names)
    draw_missing(lines, held[known.captions :], options.workers, drawing)
    return {
        "model": options.model,
        "machine": machine(),
        "timed_on": known.sums["machine"],
        "captions": {"timed": known.captions, "further": len(held) - known.captions},
        "packed": lines.pack().name,
        **summed(known.drawn, lines.found, known.sums),
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
