"""Processes that start at once: forks of one that has no threads, and torch and diffusers loaded.

A process that loads them anew takes ten seconds, nearly all that most tests of workers and of
commands would take. What starts as users start it: `accel batch` and `accel generate --devices`
(`test_batch_cli`, `test_parallel_launch`), `accel ui`, torchrun, and what the pages copy.
"""

import multiprocessing
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

LOADED = (
    "pytest",
    "app.cli",
    "app.session",
    "app.batch.worker",
    "app.serve.worker",
    "parallel.launch",
    "torch.distributed",
    "transformers.models.clip.modeling_clip",
    "transformers.models.t5.modeling_t5",
    "diffusers.pipelines.flux.pipeline_flux",
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
    "diffusers.pipelines.wan.pipeline_wan",
)
"""What every fork finds loaded."""


def context() -> multiprocessing.context.BaseContext:
    """What `multiprocessing.get_context` is to give instead of that of ``spawn``."""
    forks = multiprocessing.context.ForkServerContext()
    forks.set_forkserver_preload([*LOADED])
    return forks


class Command:
    """The command line in a process of its own, with one thread for torch; waited for like a Popen.

    Args:
        words: What is typed behind ``accel``.
        folder: Where; ``None``: here.
    """

    def __init__(self, words: Iterable[object], folder: Path | None = None) -> None:
        self._words = [str(word) for word in words]
        self._said = tempfile.TemporaryDirectory(prefix="command-")
        out, err = (Path(self._said.name) / name for name in ("out", "err"))
        self._files = out, err
        self._process = context().Process(
            target=_typed, args=(self._words, folder or Path.cwd(), out, err)
        )
        self._process.start()

    @property
    def pid(self) -> int:
        """Its process id."""
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """How it ended, if it did."""
        return self._process.exitcode

    def send_signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for its end; what it wrote to stdout and stderr. To be asked once.

        Raises:
            subprocess.TimeoutExpired: If it does not end.
        """
        self._process.join(timeout)
        if self._process.exitcode is None:
            self.kill()
            raise subprocess.TimeoutExpired(shlex.join(["accel", *self._words]), timeout or 0.0)
        out, err = (file.read_text() if file.exists() else "" for file in self._files)
        self._said.cleanup()
        return out, err


def accel(words: Iterable[object], folder: Path | None = None) -> str:
    """Run a command, which has to succeed; what it wrote to stdout."""
    words = [*words]
    command = Command(words, folder)
    out, err = command.communicate(timeout=280)
    assert command.returncode == 0, f"accel {shlex.join(map(str, words))}\n{out}\n{err}"
    return out


def _typed(words: list[str], folder: Path, out: Path, err: Path) -> None:
    """The life of the process; its workers are forks of it, which has no threads of torch yet."""
    import torch

    import app.cli

    os.chdir(folder)
    for file, stream in ((out, 1), (err, 2)):
        opened = os.open(file, os.O_WRONLY | os.O_CREAT)
        os.dup2(opened, stream)
        os.close(opened)
    torch.set_num_threads(1)
    forks = multiprocessing.get_context("fork")
    multiprocessing.get_context = lambda method=None: forks
    sys.argv = ["accel", *words]
    app.cli.main()
