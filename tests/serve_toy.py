"""A toy model for tests of the server: pictures of a few pixels, no weights, no torch.

Everything around it is real: store, supervisor, worker process, files. The prompt says what
happens: ``die`` kills the process, ``die once`` does so the first time, ``fail`` and ``bug`` raise,
``slow`` takes a second or until it is stopped, ``hold`` until a file ``go`` lies beside the log,
everything else takes some milliseconds.
"""

import errno
import multiprocessing
import os
import signal
import socket
import time
from functools import partial
from pathlib import Path

import uvicorn
from PIL import Image

from accel.errors import BadModel, BadOutput
from accel.report import Report
from app import files, launch, metadata
from app.models import Model
from app.request import Serving
from app.serve.jobs import Spec
from app.serve.limits import Limits
from app.serve.service import Service
from app.session import Outcome

STEPS = 4
FINGERPRINT = metadata.Fingerprint(
    model="toy", versions={"toy": "1"}, device="cpu", processor="toy", threads=1, dtype="float32"
)


class Toy:
    """A session on no model.

    Args:
        source: What was asked for.
        log: Gets the seed of every run, a line each, when it begins.
        seconds: Of a run.
    """

    def __init__(self, source, log, seconds):
        self.model = Model(source, None, {}, "toy")
        self._log = log
        self._seconds = seconds

    def run(self, request, plan, watch=None, *, memory=False):
        first = str(request.seed) not in self._lines()
        with self._log.open("a") as file:
            file.write(f"{request.seed}\n")
        _act(request.prompt, first)
        while request.prompt == "hold" and not self._log.with_name("go").exists():
            time.sleep(0.01)
        time.sleep(self._seconds)
        colour = tuple(request.seed >> shift & 255 for shift in (0, 8, 16))
        call = {"num_inference_steps": STEPS, "width": 4, "height": 4}
        report = Report("Toy", [], steps=STEPS, calls=STEPS, rows=STEPS)
        return Outcome([Image.new("RGB", (4, 4), colour)], False, call, self._seconds, report)

    def warm(self):
        """It takes no longer at first."""

    def bare(self, request):
        return self.run(request, None)

    def _lines(self):
        return self._log.read_text().splitlines() if self._log.exists() else []


def _act(prompt, first):
    if prompt == "die" or (prompt == "die once" and first):
        os.kill(os.getpid(), signal.SIGKILL)
    if prompt == "fail":
        raise BadOutput("The run holds NaN: try another dtype.")
    if prompt == "bug":
        raise RuntimeError("a bug of ours")
    if prompt == "slow":
        time.sleep(1)


def opened(source, log, seconds=0.01):
    """What the worker process loads; the machine's fingerprint would need torch."""
    metadata.fingerprint = lambda model: FINGERPRINT
    return Toy(source, log, seconds)


def full(source, log, full):
    """In a worker process: while a file is there, the disk is full. A run takes half a second."""

    def fsync(descriptor):
        if full.exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    files.os.fsync = fsync
    return opened(source, log, 0.5)


def opener(folder: Path, seconds: float = 0.01):
    """An opener whose runs are logged in a folder."""
    return partial(opened, log=folder / "runs.log", seconds=seconds)


def runs(folder: Path) -> list[int]:
    """The seeds of the runs that have begun, in order."""
    log = folder / "runs.log"
    return [int(line) for line in log.read_text().splitlines()] if log.exists() else []


def spec(seed=1, prompt="a red fox", **more) -> Spec:
    """A job for the toy."""
    return Spec(request={"prompt": prompt, "seed": seed}, **more)


def dies(source):
    """A model whose loading kills the process."""
    os._exit(9)


def damaged(source):
    """A model that cannot be loaded."""
    raise BadModel("It is truncated: restore the file.")


def serve(folder: Path, log: Path) -> None:
    """A server process that tests kill, it or its worker."""
    started(folder, log)
    while True:
        time.sleep(60)


def started(folder: Path, log: Path, **options) -> Service:
    """A service with its worker, in this process."""
    forked = multiprocessing.get_context("fork")
    multiprocessing.get_context = lambda method: forked
    service = Service(folder, opener=opener(log), **options)
    service.start()
    return service


def answer(folder: Path, log: Path, listener: socket.socket, jobs: int) -> None:
    """A server process that answers at the REST interface, and lets that many jobs wait."""
    service = started(folder, log, limits=Limits(jobs=jobs, jobs_of_owner=jobs))
    asked = Serving()
    server = uvicorn.Server(launch._config(launch.build(service, None, asked, None), asked))
    server.run(sockets=[listener])
