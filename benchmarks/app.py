"""What the app costs over a session alone, and how soon something is seen after a click.

    python benchmarks/app.py [--model scenes-flux] [--repeats 20] [--steps 28] [--preset exact]

The same picture is made by a session in this process (run, record, file) and by ``accel ui`` in
its own (from admission to the files, by the job's own times), in turns, there and back; a round is
left out as warm-up. The click is one in Chromium, which shares the machine, and counts until the
first preview is in the page; so does the last figure, until the picture is.
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
SOON, WHOLE = 0.02, 600.0
"""Seconds between two looks at a job; seconds after which something is wrong."""
PROMPT = "a red house left of two pine trees, snowy mountains under a starry sky"


@contextmanager
def served(folder: Path, model: str) -> Iterator[str]:
    """`accel ui` on a free port; the presets count as asked for, so that none are measured."""
    service = Service(folder / "outputs")
    service.cancel("local", service.measure("local", model).id)
    service.close()
    log = folder / "log"
    command = [sys.executable, "-c", "import app.cli; app.cli.main()", "ui", "--port", "0"]
    with log.open("w") as written:
        server = subprocess.Popen(command, cwd=folder, stderr=written)
    try:
        yield _address(server, log)
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(timeout=60)


def _address(server: subprocess.Popen[bytes], log: Path) -> str:
    ends = time.monotonic() + WHOLE
    while time.monotonic() < ends and server.poll() is None:
        found = [line for line in log.read_text().splitlines() if line.startswith("http")]
        if found:
            return found[0].split()[0]
        time.sleep(SOON)
    raise SystemExit(f"accel ui did not start:\n{log.read_text()}")


def alone(session: Session, request: Request, plan: Plan, folder: Path) -> Visit:
    """Run, record and file by a session."""

    def made() -> None:
        outcome = session.run(request, plan)
        record = metadata.record(request, plan, session.model, outcome)
        out = folder / f"alone{clips.suffix(request)}"
        write(clips.files(out, outcome.pictures, record, request.fps))

    return lambda: clocked(made)


def by_app(address: str, request: Request, preset: str) -> Visit:
    """The same by the app, from admission to the end of the job."""
    plain = {name: value for name, value in request.to_dict().items() if name != "device"}
    body = json.dumps({"request": plain, "preset": preset}).encode()

    def made() -> float:
        job = _asked(f"{address}/api/v1/generate", body)
        while job["ended"] is None:
            time.sleep(SOON)
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
    """Measure and write ``results/app-MODEL.json``."""
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
    over = ratio(found["app"], found["session"])
    result = {
        "request": request.to_dict(),
        "preset": options.preset,
        "threads": torch.get_num_threads(),
        "session_seconds": spread(found["session"]),
        "app_seconds": spread(found["app"]),
        "app_over_session": over,
        "allowed": 1 + OVERHEAD,
        "click_to_preview_seconds": spread(seen["preview"]),
        "click_to_picture_seconds": spread(seen["picture"]),
    }
    print(f"app / session: {over['median']:.3f} ({over['low']:.3f} to {over['high']:.3f})")
    print("click to preview:", result["click_to_preview_seconds"])
    print(save(f"app-{options.model}", result))


if __name__ == "__main__":
    main()
