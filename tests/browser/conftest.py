"""The real app on a free port, and Debian's Chromium that looks at it."""

import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from forks import accel
from playwright.sync_api import Browser, sync_playwright

from app.serve.service import Service
from browser.visitor import Visitor

ROOT = Path(__file__).parents[2]
MODELS = ("scenes-flux", "scenes-unet", "scenes-wan")
COMMAND = (sys.executable, "-c", "import app.cli; app.cli.main()")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the server of a file of tests runs: its log lies there, and its folder of results."""
    return tmp_path_factory.mktemp("app")


@pytest.fixture(scope="module")
def address(home: Path) -> Iterator[str]:
    """Where `accel ui` answers, with a folder of results of its own."""
    ask_for_figures(home / "outputs")
    with served(home) as found:
        yield found


@contextmanager
def served(folder: Path, *options: str, env: Mapping[str, str] | None = None) -> Iterator[str]:
    """`accel ui` with options, in a folder; what it said is told at its end."""
    log = folder / "log"
    with log.open("w") as written:
        server = subprocess.Popen(
            [*COMMAND, "ui", "--port", "0", *options], cwd=folder, stderr=written, env=env
        )
    try:
        yield _answering(server, log)
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(timeout=60)
        sys.stderr.write(log.read_text())


def ask_for_figures(folder: Path) -> None:
    """The presets count as asked for: else the first picture has them measured, for minutes."""
    service = Service(folder)
    for name in MODELS:
        service.cancel("local", service.measure("local", name).id)
    service.close()


def _answering(server: subprocess.Popen[bytes], log: Path) -> str:
    ends = time.monotonic() + 120
    while time.monotonic() < ends and server.poll() is None:
        lines = [line for line in log.read_text().splitlines() if line.startswith("http")]
        if lines:
            return lines[0].split()[0]
        time.sleep(0.1)
    raise AssertionError(f"accel ui did not start:\n{log.read_text()}")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One Chromium for all tests of a file: while it is driven, its worker runs an event loop."""
    path = runpy.run_path(str(ROOT / "tools" / "install_browser.py"))["found"]()
    assert path is not None, "No Chromium here: run `make browser`."
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def visit(browser: Browser, address: str, home: Path) -> Iterator[Any]:
    """Opens the app as a new visitor; what went wrong in the browser fails the test.

    Then the server's log, which says why, is told with it.
    """
    visitors: list[Visitor] = []

    def opened(**options: Any) -> Visitor:
        visitors.append(Visitor(browser, address, **options))
        return visitors[-1]

    yield opened
    for visitor in visitors:
        sys.stderr.write(visitor.told())
        if visitor.wrong:
            sys.stderr.write(f"The server's log:\n{(home / 'log').read_text()}")
        visitor.leave()


@pytest.fixture
def fresh(tmp_path: Path) -> Any:
    """Runs the command line in a new process."""

    def run(*arguments: str) -> Path:
        accel(arguments, tmp_path)
        return tmp_path

    return run
