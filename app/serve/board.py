"""What is known of running jobs at this moment, for those who watch: kept in memory only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from threading import Condition

from app.serve.jobs import Progress


class Board:
    """Latest progress of each job, who watches, who is to stop, why the queue is paused.

    And what the workers run on: this is not kept, because the folder may move to another machine.
    """

    def __init__(self) -> None:
        self._changed = Condition()
        self._latest: dict[str, Progress] = {}
        self._watchers: Counter[str] = Counter()
        self._stops: Counter[str] = Counter()
        self._pauses: dict[str, str] = {}
        self._machines: dict[str, str] = {}

    def wake(self) -> None:
        """Something in the store changed."""
        with self._changed:
            self._changed.notify_all()

    def wait(self, seconds: float) -> None:
        """Wait for any change, at most so long."""
        with self._changed:
            self._changed.wait(seconds)

    def post(self, progress: Progress) -> None:
        """Say where a job is; a preview stays until there is another."""
        with self._changed:
            before = self._latest.get(progress.job)
            if progress.preview is None and before is not None:
                progress = replace(progress, preview=before.preview)
            self._latest[progress.job] = progress
            self._changed.notify_all()

    def forget(self, job: str) -> bool:
        """A job is not running any more; whether it was asked to stop."""
        with self._changed:
            self._latest.pop(job, None)
            self._changed.notify_all()
            return self._stops.pop(job, 0) > 0

    def next(self, job: str, after: Progress | None, seconds: float) -> Progress | None:
        """The latest progress of a job, if it is another than one; waits at most so long for it."""
        with self._changed:
            if self._latest.get(job) is after:
                self._changed.wait(seconds)
            latest = self._latest.get(job)
            return None if latest is after else latest

    @contextmanager
    def watching(self, job: str) -> Iterator[None]:
        """Inside, somebody watches a job."""
        with self._changed:
            self._watchers[job] += 1
        try:
            yield
        finally:
            with self._changed:
                self._watchers[job] -= 1
                if not self._watchers[job]:
                    del self._watchers[job]

    def watched(self, job: str) -> bool:
        """Whether somebody watches a job."""
        with self._changed:
            return job in self._watchers

    def stop(self, job: str) -> None:
        """A running job is to stop."""
        with self._changed:
            self._stops[job] += 1
            self._changed.notify_all()

    def stops(self, job: str) -> int:
        """How often a job was asked to stop."""
        with self._changed:
            return self._stops.get(job, 0)

    def pause(self, who: str, reason: str | None) -> None:
        """A worker cannot go on, and why; ``None``: it can."""
        with self._changed:
            before = self._pauses.get(who)
            if reason is None:
                self._pauses.pop(who, None)
            else:
                self._pauses[who] = reason
            if reason != before:
                self._changed.notify_all()

    def place(self, who: str, machine: str) -> None:
        """A worker says what machine it runs on."""
        with self._changed:
            self._machines[who] = machine

    @property
    def machines(self) -> tuple[str, ...]:
        """What the workers run on, as far as they have said it: they do when they load a model."""
        with self._changed:
            return tuple(dict.fromkeys(self._machines.values()))

    @property
    def paused(self) -> str | None:
        """Why the queue stands still, or ``None``."""
        with self._changed:
            return next(iter(self._pauses.values()), None)
