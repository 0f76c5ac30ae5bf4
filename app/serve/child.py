"""A process of ours with a pipe to it: started when it is needed, and again when it has died."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

GRACE = 5.0
"""Seconds that a process is given to end."""

PARENT_DIED = 1
"""PR_SET_PDEATHSIG of prctl(2)."""


class Child:
    """One process. All but ``kill`` is for one thread at a time.

    Args:
        target: Its life, importable by name; called with its end of the pipe, then ``args``.
        args: What it is told.
    """

    def __init__(self, target: Callable[..., None], *args: Any) -> None:
        self._target = target
        self._args = args
        self._process: BaseProcess | None = None
        self._link: Connection | None = None

    @property
    def alive(self) -> int | None:
        """Its process id, or ``None`` if it does not run."""
        process = self._process
        try:
            return process.pid if process is not None and process.is_alive() else None
        except ValueError:  # it was closed in this moment
            return None

    def link(self) -> Connection:
        """The pipe to it; it is started where it does not run.

        On Linux a process may be bound to the thread that started it: ask from one that lasts.
        """
        if self._link is None or self.alive is None:
            self.end()
            context = multiprocessing.get_context("spawn")
            self._link, theirs = context.Pipe()
            self._process = context.Process(
                target=self._target, args=(theirs, *self._args), daemon=True
            )
            self._process.start()
            theirs.close()
        return self._link

    @property
    def listening(self) -> Connection | None:
        """The pipe to it, if it was started; what it said may lie there though it is dead."""
        return self._link

    def said(self) -> Any | None:
        """A message that lies in the pipe; ``None``: there is none, or the process is dead."""
        try:
            return self._link.recv() if self._link is not None and self._link.poll() else None
        except (EOFError, OSError):
            return None

    def death(self) -> str:
        """How it ended, in words; waits a little for it."""
        assert self._process is not None
        self._process.join(GRACE)
        code = self._process.exitcode
        if code is None:
            return "its pipe broke"
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"

    def kill(self) -> None:
        """End it, whatever it is at; from any thread."""
        process = self._process
        if process is not None:
            process.kill()

    def end(self) -> None:
        """End it and its pipe."""
        if self._link is not None:
            self._link.close()
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process.close()
        self._link = self._process = None


def die_with_parent() -> None:
    """End this process when the one that started it ends, or did already.

    On Linux the kernel sees to it, elsewhere whoever reads the pipe. Between the two may stand a
    server of forks, which ends with the one that it serves.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PARENT_DIED, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent is None or not parent.is_alive():
        os._exit(1)
