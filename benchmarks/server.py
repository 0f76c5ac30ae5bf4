"""What the app costs over the command line, and how soon something is seen after a click.

    python benchmarks/server.py [--model scenes-flux] [--repeats 20] [--steps 28] [--preset exact]

The same picture is made by a session in this process and by ``accel ui`` in its own (from admission
to the files, by the job's own times), in turns, there and back; a round is left out as warm-up.

The session's side is what ``accel generate`` does once its model is loaded: run the session, write
the record, write the files. Left out are its progress bar, which draws nothing without a terminal,
and its look at the peak of memory: both would make the command slower, and so flatter the app. Left
out on purpose is the start of the process as well, which a server has only once; whole commands are
timed for that, and the difference is a figure of its own.

The click is one in Chromium, which shares the machine, and counts until the first preview is in the
page; so does the last figure, until the picture is. Which methods fit is found out before anything
is timed: else the first page that is opened has it examined beside what is timed.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import which
from statistics import median
from typing import Any

import torch
from measure import Visit, clocked, ratio, repeated, save, spread

from accel.plan import Plan
from app import clips, metadata
from app.files import write
from app.request import Request
from app.serve.service import Service
from app.session import Session

OVERHEAD = 0.05
"""What the app is allowed to cost, as a share of the session's time."""
SOON, SELDOM, WHOLE = 0.02, 0.5, 600.0
"""Seconds: between two looks for a server that starts; between two at a job, which would disturb
it; after which something is wrong.
"""
COMMANDS = 5
"""Whole commands that are timed, at most."""
COMMAND = (sys.executable, "-c", "import app.cli; app.cli.main()")
PROMPT = "a red house left of two pine trees, snowy mountains under a starry sky"


@contextmanager
def served(folder: Path, model: str) -> Iterator[str]:
    """`accel ui` on a free port, with nothing left to find out about a model."""
    _prepare(Service(folder / "outputs"), model)
    log = folder / "log"
    with log.open("w") as written:
        server = subprocess.Popen([*COMMAND, "ui", "--port", "0"], cwd=folder, stderr=written)
    try:
        yield _address(server, log)
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(timeout=60)


def _prepare(service: Service, model: str) -> None:
    """The presets count as asked for; what fits is known, also of the model a page opens with."""
    service.cancel("local", service.measure("local", model).id)
    for name in {Request().model, model}:
        service.fits(name)
    service.close()


def _address(server: subprocess.Popen[bytes], log: Path) -> str:
    ends = time.monotonic() + WHOLE
    while time.monotonic() < ends and server.poll() is None:
        found = [line for line in log.read_text().splitlines() if line.startswith("http")]
        if found:
            return found[0].split()[0]
        time.sleep(SOON)
    raise SystemExit(f"accel ui did not start:\n{log.read_text()}")


def alone(session: Session, request: Request, plan: Plan, folder: Path) -> Visit:
    """What a command does with a model that is loaded."""

    def made() -> None:
        outcome = session.run(request, plan)
        record = metadata.record(request, plan, session.model, outcome)
        out = folder / f"alone{clips.suffix(request)}"
        write(clips.files(out, outcome.pictures, record, request.fps))

    return lambda: clocked(made)


def whole(request: Request, preset: str, folder: Path) -> Visit:
    """The whole command, from the start of its process to its end."""
    options = [f"--model={request.model}", f"--seed={request.seed}", f"--steps={request.steps}"]
    out = folder / f"whole{clips.suffix(request)}"
    target = [f"--preset={preset}", f"--out={out}", "--overwrite"]
    command = [*COMMAND, "generate", request.prompt, *options, *target]
    return lambda: clocked(lambda: subprocess.run(command, check=True, capture_output=True))


def by_app(address: str, request: Request, preset: str) -> Visit:
    """The same by the app, from admission to the end of the job."""
    plain = {name: value for name, value in request.to_dict().items() if name != "device"}
    body = json.dumps({"request": plain, "preset": preset}).encode()

    def made() -> float:
        job = _asked(f"{address}/api/v1/generate", body)
        while job["ended"] is None:
            time.sleep(SELDOM)
            job = _asked(f"{address}/api/v1/jobs/{job['id']}")
        if job["state"] != "done":
            raise SystemExit(f"The job is {job['state']}: {job['error']}")
        return float(job["ended"] - job["created"])

    return made


def _asked(url: str, body: bytes | None = None) -> dict[str, Any]:
    asked = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(asked) as answer:
        found: dict[str, Any] = json.load(answer)
    return found


def clicks(address: str, request: Request, preset: str, repeats: int) -> dict[str, list[float]]:
    """Seconds from a click to the first preview, and to the picture; the first is a warm-up."""
    from playwright.sync_api import sync_playwright

    seconds: dict[str, list[float]] = {"preview": [], "picture": []}
    with sync_playwright() as playwright:
        path = which("chromium")
        with playwright.chromium.launch(executable_path=path, args=["--no-sandbox"]) as browser:
            page = browser.new_page()
            page.set_default_timeout(WHOLE * 1000)
            page.goto(address)
            page.locator("#steps :is(input, textarea)[placeholder]").first.wait_for()
            page.locator("#steps :is(input, textarea)").first.fill(str(request.steps))
            page.locator(f'#goal input[value="{preset}"]').check()
            for _ in range(repeats + 1):
                page.locator("#generate:enabled").wait_for()
                begin = time.perf_counter()
                page.locator("#generate").click()
                page.locator("#preview img").wait_for()
                seconds["preview"].append(time.perf_counter() - begin)
                page.locator("#result img").first.wait_for()
                seconds["picture"].append(time.perf_counter() - begin)
    return {name: each[1:] for name, each in seconds.items()}


def main() -> None:
    """Measure and write ``results/server-MODEL.json``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="scenes-flux")
    parser.add_argument("--preset", default="exact")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--steps", type=int, default=28)
    options = parser.parse_args()
    request = Request(options.model, prompt=PROMPT, seed=1, steps=options.steps)
    plan = Plan.preset(options.preset)
    with tempfile.TemporaryDirectory() as name, served(Path(name), options.model) as address:
        session = Session.open(request.source)
        visits = {
            "session": alone(session, request, plan, Path(name)),
            "app": by_app(address, request, options.preset),
        }
        found = repeated(visits, 0.0, options.repeats)
        seen = clicks(address, request, options.preset, options.repeats)
        command = whole(request, options.preset, Path(name))
        commands = [command() for _ in range(min(options.repeats, COMMANDS))]
    start = [each - median(found["session"]) for each in commands]
    over = ratio(found["app"], found["session"])
    result = {
        "request": request.to_dict(),
        "preset": options.preset,
        "threads": torch.get_num_threads(),
        "session_seconds": spread(found["session"]),
        "app_seconds": spread(found["app"]),
        "app_over_session": over,
        "allowed": 1 + OVERHEAD,
        "within": over["median"] <= 1 + OVERHEAD,
        "command_seconds": spread(commands),
        "command_start_seconds": spread(start),
        "click_to_preview_seconds": spread(seen["preview"]),
        "click_to_picture_seconds": spread(seen["picture"]),
    }
    print(f"app / session: {over['median']:.3f} ({over['low']:.3f} to {over['high']:.3f})")
    if not result["within"]:
        print(f"WARNING: the app takes more than {OVERHEAD:.0%} longer than a session alone")
    print("start of a command:", result["command_start_seconds"])
    print("click to preview:", result["click_to_preview_seconds"])
    print(save(f"server-{options.model}", result))


if __name__ == "__main__":
    main()
