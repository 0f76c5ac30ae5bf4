"""`accel batch` under `kill -9`: what is there at the end, beside an undisturbed run.

    python benchmarks/batch_faults.py [--rows 500] [--kills 30] [--forms …]  # others stay

Workers and the parent are killed in turns, each time after a few more rows were entered; a killed
parent is started again by the same command. At the end every row has to be there once, its file
with the hash that was entered, its picture that of the undisturbed run, bit for bit; with one row
in a call, that of `accel generate`. Nothing is timed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measure import RESULTS, save, signature

from accel.scenes import HELD_OUT, scene
from app.batch import manifest
from app.batch.storage import Folder, digest

FORMS = {
    "one worker, eight in a call": ["--batch", "8"],
    "two workers, eight in a call": ["--batch", "8", "--workers", "2"],
    "a row in a call": ["--batch", "1"],
    "Ray, two actors": ["--batch", "8", "--engine", "ray", "--workers", "2"],
}
QUIET = 600.0
"""Seconds without a new row after which a job is taken to hang."""


def main() -> None:
    """Run all forms and write down what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=500)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--forms", nargs="*", default=list(FORMS))
    given = parser.parse_args()
    found = earlier(given.rows)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        source = folder / "rows.txt"
        source.write_text("".join(scene(seed).caption + "\n" for seed in HELD_OUT[: given.rows]))
        calm: dict[str, dict[str, str]] = {}
        for form in given.forms:
            size = FORMS[form][1]
            if size not in calm:
                whole(command(source, folder / f"calm-{size}", ["--batch", size]))
                calm[size] = pixels(folder / f"calm-{size}")
            out = folder / "disturbed"
            shutil.rmtree(out, ignore_errors=True)
            kills = 1 if "ray" in FORMS[form] else given.kills
            done = disturbed(command(source, out, FORMS[form]), out, kills, given.rows)
            found[form] = done | judged(out, calm[size], given.rows)
            if size == "1":
                found[form]["as_generate"] = as_generate(out)
            print(form, found[form], flush=True)
    save("batch-faults", {"rows": given.rows, "forms": found})
    (RESULTS / "batch-faults.md").write_text(page(found, given.rows))


def earlier(rows: int) -> dict[str, dict[str, Any]]:
    """What an earlier run found, of as many rows."""
    path = RESULTS / "batch-faults.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    return dict(known["forms"]) if known.get("rows") == rows else {}


def command(source: Path, out: Path, more: list[str]) -> list[str]:
    """The command of a job: four steps at 64 px on one thread."""
    accel = str(Path(sys.executable).with_name("accel"))
    return [accel, "batch", str(source), "--out", str(out), "--steps", "4", "--width", "64",
            "--height", "64", "--threads", "1", "--retries", "60", *more]  # fmt: skip


def whole(asked: list[str]) -> None:
    """Run a job to its end."""
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(asked)}\n{done.stderr}")


def disturbed(asked: list[str], out: Path, kills: int, rows: int) -> dict[str, int]:
    """Run a job, killing workers and parent in turns, until it ends."""
    luck, count = random.Random(0), {"workers_killed": 0, "parents_killed": 0}
    process = started(asked)
    for turn in range(kills):
        goal = entered(out) + luck.randint(1, max(1, rows // (kills + 2)))
        until(lambda goal=goal, it=process: entered(out) >= goal or it.poll() is not None)
        if process.poll() is not None:
            break
        of_worker = "ray" in asked or turn % 2 == 0
        victim = worker(process.pid, luck, "ray" in asked) if of_worker else process.pid
        if victim is None:
            continue
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)
            count["workers_killed" if of_worker else "parents_killed"] += 1
        if not of_worker:
            process.communicate()
            process = started(asked)
    process.communicate()
    whole(asked)
    return count


def started(asked: list[str]) -> subprocess.Popen[bytes]:
    """The job, in a process."""
    return subprocess.Popen(asked, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def until(check: Any) -> None:
    """Wait for something."""
    end = time.monotonic() + QUIET
    while not check():
        if time.monotonic() > end:
            raise SystemExit("no row was entered for ten minutes")
        time.sleep(0.01)


def entered(out: Path) -> int:
    """Rows in the manifest."""
    path = out / "manifest.jsonl"
    return path.read_bytes().count(b'"kind":"made"') if path.is_file() else 0


def worker(parent: int, luck: random.Random, ray: bool) -> int | None:
    """One of a job's workers that has loaded torch; of Ray, one of its actors."""
    import psutil

    with contextlib.suppress(psutil.Error):
        below = psutil.Process(parent).children(recursive=True)
        if ray:
            known = [one for one in below if one.name().startswith("ray::")]
            known = [one for one in known if "IDLE" not in one.name()]
        else:
            known = [one for one in below if one.memory_info().rss > 150 * 2**20]
        return luck.choice(known).pid if known else None
    return None


def pixels(out: Path) -> dict[str, str]:
    """What was entered of every row's picture."""
    return {id: one.pixels for id, one in manifest.read(Folder(out)).made.items()}


def judged(out: Path, calm: dict[str, str], rows: int) -> dict[str, Any]:
    """What is there at the end."""
    from PIL import Image

    from app import metadata

    state, storage = manifest.read(Folder(out)), Folder(out)
    shown = {}
    for id, one in state.made.items():
        with Image.open(out / one.file) as picture:
            shown[id] = metadata.pixels([picture])
    files = list(out.glob("*.png"))
    return {
        "rows_there": len(state.made),
        "files": len(files),
        "failed": len(state.failed),
        "hashes_right": sum(digest(storage, m.file) == m.sha256 for m in state.made.values()),
        "same_pixels": sum(shown[id] == calm[id] for id in calm),
        "left_over": len(list(out.rglob(".*.part"))),
        "calls_of_the_command": len(state.begun),
        "whole": len(state.made) == len(files) == rows and not state.failed and shown == calm,
    }


def as_generate(out: Path) -> int:
    """Rows whose picture is the one that `accel generate` makes."""
    import torch

    from accel.plan import Plan
    from app import metadata
    from app.session import Session

    torch.set_num_threads(1)
    session, equal = None, 0
    for one in manifest.read(Folder(out)).made.values():
        asked = metadata.record_of(out / one.file).asked
        session = session or Session.open(asked.source)
        equal += metadata.pixels(session.run(asked, Plan()).pictures) == one.pixels
    return equal


def page(found: dict[str, dict[str, Any]], rows: int) -> str:
    """The table."""
    lines = [
        "# `accel batch` under `kill -9`",
        "",
        f"{rows} rows of scenes-flux, 4 steps at 64 px. {signature()}",
        "",
        "| Form | Workers killed | Parents killed | Rows there | Files | Hashes right | Pictures "
        "as undisturbed | Left over |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for form, one in found.items():
        lines.append(
            f"| {form} | {one['workers_killed']} | {one['parents_killed']} | {one['rows_there']} | "
            f"{one['files']} | {one['hashes_right']} | {one['same_pixels']} | {one['left_over']} |"
        )
    equal = [one["as_generate"] for one in found.values() if "as_generate" in one]
    if equal:
        lines += ["", f"A row in a call: {equal[0]} pictures are bit for bit what `accel generate` "
                  "makes."]  # fmt: skip
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
