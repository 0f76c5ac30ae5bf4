"""Rows per second of `accel batch`, beside a plain loop and accelerate's split between processes.

    python benchmarks/batch.py [--rows 96] [--repeats 3] [--size 128]   # all of it, alone
    python benchmarks/batch.py --part planning                          # 100,000 rows
    python benchmarks/batch.py --part layer                             # what durability costs

Every contender is a process of its own (with its workers) that writes a PNG a row, on the same
captions and seeds; they take turns, there and back. Its rate is that between its first and its last
file, loading left out; the whole time stands beside it. The loop and accelerate's processes run the
stock pipeline, a row in a call. Fidelity is the distance to the loop's pictures.

The durable layer is timed in one process: calls of the pipeline with files that are simply saved
against the same calls with record, hashes, fsync and manifest, in turns.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from measure import RESULTS, ratio, rounds, save, signature, spread

from accel.scenes import HELD_OUT, scene

LOOP, SPLIT = "for loop", "accelerate, 2 processes"
PLANNED = 100_000


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="scenes-flux")
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--part", choices=("rates", "planning", "layer"))
    parser.add_argument("--plain", nargs=4, metavar=("ROWS", "OUT", "THREADS", "SPLIT"))
    given = parser.parse_args()
    if given.plain:
        plain(given, *given.plain)
        return
    parts: dict[str, Callable[[Any], Any]] = {"planning": planning, "layer": layer, "rates": rates}
    name = ("batch" if given.part is None else f"batch-{given.part}") + f"-{given.model}"
    found = {name: part(given) for name, part in parts.items() if given.part in (None, name)}
    save(name, {"arguments": vars(given), **found})
    (RESULTS / f"{name}.md").write_text("\n".join(page(given, found)) + "\n")


def page(given: Any, found: dict[str, Any]) -> Iterator[str]:
    """The results as a page."""
    yield f"# `accel batch` on {given.model}"
    yield f"\n{signature()}"
    if "rates" in found:
        yield (
            f"\n## Rows per second\n\n{given.rows} held-out captions at {given.size} px and the "
            "model's own steps; time from a contender's first file to its last, without loading, "
            "median and quartiles of rounds in turns. SSIM: to the loop's pictures, accuracy that "
            "of captions.\n\n"
            "| Contender | s a row | rows a second | × the loop | × accelerate | whole s | SSIM "
            "median (lowest) | accuracy |\n|---|---:|---:|---:|---:|---:|---:|---:|"
        )
        for name, one in found["rates"].items():
            loop, split = one["times_the_loop"], one["times_the_split"]
            yield (
                f"| {name} | {one['seconds_a_row']['median']:.3f} | {one['rows_a_second']:.2f} | "
                f"{loop['median']:.2f} ({loop['low']:.2f}–{loop['high']:.2f}) | "
                f"{split['median']:.2f} | {one['whole_seconds']['median']:.1f} | "
                f"{one['ssim_median']:.3f} ({one['ssim_lowest']:.3f}) | {one['accuracy']:.3f} |"
            )
    if "layer" in found:
        yield (
            "\n## What the durable layer adds\n\nCalls whose pictures are saved by Pillow against "
            "the same with record, hashes, fsync and manifest, in turns in one process, nothing "
            "beside the next call.\n\n| Calls | added ms a row | time |\n|---|---:|---:|"
        )
        for name, one in found["layer"].items():
            share = one["share"]
            yield (
                f"| {name} | {one['added_ms_a_row']:.2f} | × {share['median']:.3f} "
                f"({share['low']:.3f}–{share['high']:.3f}) |"
            )
    if "planning" in found:
        one = found["planning"]
        yield (
            f"\n## Planning\n\n`accel batch --dry-run` of {one['rows']:,} rows: "
            f"{one['seconds']['median']:.1f} s ({one['seconds']['low']:.1f}–"
            f"{one['seconds']['high']:.1f}), {one['peak_mib']:.0f} MiB at the most in the process "
            "that was typed; the process that asks the pipeline has torch in it."
        )


def rows_of(given: Any) -> list[dict[str, Any]]:
    """Held-out captions with their seeds."""
    shown = [scene(seed) for seed in HELD_OUT[: given.rows]]
    return [
        {"prompt": one.caption, "seed": one.seed, "size": given.size, "id": str(one.seed)}
        for one in shown
    ]


def plain(given: Any, source: str, out: str, threads: str, split: str) -> None:
    """The stock pipeline in a loop, as the documentation of diffusers has it."""
    import torch

    import accel

    torch.set_num_threads(int(threads))
    rows = [json.loads(line) for line in Path(source).read_text().splitlines()]
    pipe, call = accel.load(given.model)
    pipe.set_progress_bar_config(disable=True)
    for row in _shares(rows) if split == "yes" else rows:
        made = pipe(
            row["prompt"],
            **call | {"height": row["size"], "width": row["size"]},
            generator=torch.Generator().manual_seed(row["seed"]),
        )
        made.images[0].save(Path(out) / f"{row['id']}.png")


def _shares(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    from accelerate import PartialState

    with PartialState(cpu=True).split_between_processes(rows) as share:
        yield from share


def contenders(given: Any, source: Path, out: Path) -> dict[str, list[str]]:
    """The command of each."""
    here = str(Path(__file__).resolve())
    own = [here, "--model", given.model, "--plain", str(source), str(out)]
    accel = [str(Path(sys.executable).with_name("accel")), "batch", str(source), "--out", str(out),
             "--model", given.model, "--name", "{id}"]  # fmt: skip
    spread_out = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    two, one = ["--workers", "2", "--threads", "1"], ["--threads", "2"]
    return {
        LOOP: [sys.executable, *own, "2", "no"],
        SPLIT: [*spread_out, *own, "1", "yes"],
        "accel batch, a row in a call": [*accel, "--batch", "1", *one],
        "accel batch": [*accel, *one],
        "accel batch, 1 worker of 1 thread": [*accel, "--threads", "1"],
        "accel batch, 2 workers of 1 thread": [*accel, *two],
        "accel batch --preset balanced": [*accel, "--preset", "balanced", *one],
        "accel batch --preset balanced, 2 workers": [*accel, "--preset", "balanced", *two],
        "accel batch --preset fast, 2 workers": [*accel, "--preset", "fast", *two],
    }


def rates(given: Any) -> dict[str, Any]:
    """Rows per second of all contenders, and how near their pictures are to the loop's."""
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder) / "rows.jsonl", Path(folder) / "out"
        source.write_text("".join(json.dumps(row) + "\n" for row in rows_of(given)))
        commands = contenders(given, source, out)
        kept: dict[str, Path] = {}
        whole: dict[str, list[float]] = {name: [] for name in commands}

        def visit(name: str) -> float:
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir()
            begin = time.perf_counter()
            subprocess.run(commands[name], check=True, capture_output=True, env=_quiet())
            whole[name].append(time.perf_counter() - begin)
            if name not in kept:
                kept[name] = Path(shutil.copytree(out, Path(folder) / f"kept-{len(kept)}"))
            return _seconds(out)

        each = {name: (lambda name=name: visit(name)) for name in commands}
        found = rounds(each, given.repeats)
        near = {name: _nearness(kept[LOOP], path, given) for name, path in kept.items()}
    return {
        name: {
            "seconds_a_row": spread(seconds),
            "rows_a_second": 1 / spread(seconds)["median"],
            "whole_seconds": spread(whole[name]),
            "times_the_loop": ratio(found[LOOP], seconds),
            "times_the_split": ratio(found[SPLIT], seconds),
            **near[name],
        }
        for name, seconds in found.items()
    }


def _quiet() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"}


def _seconds(out: Path) -> float:
    """Seconds a row between the first file and the last.

    Files of one call appear together: those of the first moment are where the clock begins.
    """
    moments = sorted(path.stat().st_mtime for path in out.glob("*.png"))
    first = [moment for moment in moments if moment - moments[0] < 0.05]
    return (moments[-1] - moments[0]) / max(1, len(moments) - len(first))


def _nearness(stock: Path, other: Path, given: Any) -> dict[str, float]:
    """SSIM to the loop's pictures, and caption accuracy."""
    import numpy as np
    from PIL import Image

    from accel import quality
    from accel.scenes import oracle

    scenes = [scene(seed) for seed in HELD_OUT[: given.rows]]

    def pictures(folder: Path) -> np.ndarray:
        return np.stack([np.asarray(Image.open(folder / f"{one.seed}.png")) for one in scenes])

    one, two = pictures(stock), pictures(other)
    each = [quality.ssim(a[None], b[None]) for a, b in zip(one, two, strict=True)]
    return {
        "ssim_median": float(np.median(each)),
        "ssim_lowest": float(min(each)),
        "accuracy": oracle.caption_accuracy(two, scenes).mean,
    }


def planning(_given: Any) -> dict[str, Any]:
    """A dry run of 100,000 rows: seconds, and the memory of the process that was typed."""
    accel = Path(sys.executable).with_name("accel")
    found = []
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "rows.jsonl"
        with source.open("w") as file:
            for index in range(PLANNED):
                row = {"prompt": f"a fox number {index} in the snow", "steps": 4 + index % 3}
                file.write(json.dumps(row) + "\n")
        command = [str(accel), "batch", str(source), "--out", f"{folder}/out", "--dry-run"]
        for _ in range(3):
            begin = time.perf_counter()
            process = subprocess.Popen(
                command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            peak = 0
            while process.poll() is None:
                peak = max(peak, _peak(process.pid))
                time.sleep(0.02)
            assert process.returncode == 0
            found.append((time.perf_counter() - begin, peak))
    return {
        "rows": PLANNED,
        "seconds": spread([seconds for seconds, _ in found]),
        "peak_mib": max(peak for _, peak in found) / 1024,
    }


def _peak(pid: int) -> int:
    """The most memory that a process has had, in KiB."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0)


def layer(given: Any) -> dict[str, Any]:
    """What record, hashes, fsync and manifest add to a call whose pictures are saved anyway."""
    return {
        f"{size} px, {steps} steps, {together} in a call": _layer(given, size, steps, together)
        for size, steps, together in ((64, 4, 8), (128, 28, 1), (128, 28, 8))
    }


def _layer(given: Any, size: int, steps: int, together: int) -> dict[str, Any]:
    """Both ways in turns; the files of a call are written while the next one runs, as in a job."""
    import torch

    from accel.plan import Plan
    from app.batch import job
    from app.batch.manifest import Manifest
    from app.batch.rows import Found
    from app.batch.storage import Folder
    from app.batch.tasks import Make
    from app.batch.worker import Station, Worker, opened
    from app.request import Batch, Choice

    torch.set_num_threads(2)
    values = [row | {"width": size, "height": size, "steps": steps, "model": given.model} for row in
              rows_of(argparse.Namespace(rows=together, size=size))]  # fmt: skip
    for one in values:
        del one["size"]
    ways = job.Ways(Batch(), {}, Choice(), 0)
    rows, problems = job.rows([Found("", one) for one in values], ways)
    assert not problems, problems
    rows = job.named(rows, {row.form.group: ".png" for row in rows}, "{id}")
    with tempfile.TemporaryDirectory(dir=Path(__file__).parent) as place:
        storage = Folder(Path(place) / "out")
        storage.prepare()
        worker = Worker(Station("w", storage.where), opened)
        ledger = Manifest(storage, "manifest.jsonl")
        task = Make("k", tuple(rows), frozenset(row.id for row in rows))
        session = worker._ready(rows[0].request.source)
        requests = [row.request for row in rows]

        def saved() -> float:
            begin = time.perf_counter()
            for one, row in zip(session.together(requests, Plan()), rows, strict=True):
                one.pictures[0].save(Path(place) / f"plain-{row.id}.png")
            return time.perf_counter() - begin

        def durable() -> float:
            begin = time.perf_counter()
            drawn = worker.draw(task)
            answer = worker.write(task, drawn)
            ledger.write(answer.made)
            return time.perf_counter() - begin

        calls = 6 if steps > 4 else 40
        found = rounds({"saved": saved, "durable": durable}, 2 + calls)
    added = [a - b for a, b in zip(found["durable"][2:], found["saved"][2:], strict=True)]
    return {
        "saved": spread(found["saved"][2:]),
        "durable": spread(found["durable"][2:]),
        "added_ms_a_row": 1000 * spread(added)["median"] / together,
        "share": ratio(found["durable"][2:], found["saved"][2:]),
    }


if __name__ == "__main__":
    main()
