"""Who performs tasks: worker processes of this machine, each looked after."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Protocol, Self

from app.batch import worker
from app.batch.tasks import Beat, Message, Task
from app.batch.worker import Opener, Station
from app.serve.child import Child
from parallel.launch import Place


@dataclass(frozen=True)
class Died:
    """A worker has ended, by itself or by somebody else."""

    reason: str


Event = tuple[int, Message | Died]
"""Which worker, and what it says."""


class Engine(Protocol):
    """Workers, by number. A worker that died is started again by the next task for it."""

    @property
    def count(self) -> int:
        """How many workers there are."""
        ...

    @property
    def ahead(self) -> int:
        """How many tasks a worker takes before it has answered the first."""
        ...

    def start(self) -> None:
        """Begin to start the first worker: that takes seconds, in which rows can be read."""
        ...

    def send(self, number: int, task: Task) -> None:
        """Give a worker a task."""
        ...

    def events(self, seconds: float) -> list[Event]:
        """What workers have said; waits so long for the first of it."""
        ...

    def kill(self, number: int, reason: str) -> None:
        """End a worker, whatever it is at: it is heard of as `Died`."""
        ...

    def close(self) -> None:
        """End all."""
        ...


SILENCE = 120.0
"""Seconds after which a process that says nothing is ended: it sends a sign of life every few."""


@dataclass
class _Gang:
    """Processes that make a row together: one, as a rule."""

    members: list[Child]
    reason: str = ""
    heard: float = 0.0

    @property
    def alive(self) -> bool:
        return all(member.alive is not None for member in self.members)

    def death(self) -> str:
        """How the first that is dead has ended."""
        dead = next((one for one in self.members if one.alive is None), None)
        return "its pipe broke" if dead is None else dead.death()

    def end(self) -> None:
        for member in self.members:
            member.kill()
        for member in self.members:
            member.end()
        self.members, self.reason = [], ""


@dataclass
class Local:
    """Processes of this machine.

    Args:
        stations: A worker each.
        opener: What loads a model.
        devices: Processes that make a row together.
    """

    stations: Sequence[Station]
    opener: Opener
    devices: int = 1
    _gangs: list[_Gang] = field(default_factory=list)
    _folder: tempfile.TemporaryDirectory[str] | None = None
    _meetings: int = 0

    def __post_init__(self) -> None:
        self._gangs = [_Gang([]) for _ in self.stations]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def count(self) -> int:
        """How many workers there are."""
        return len(self.stations)

    @property
    def ahead(self) -> int:
        """Two: while the files of one call are written, the next is made. Gangs take one."""
        return 2 if self.devices == 1 else 1

    @property
    def processes(self) -> list[int | None]:
        """Process ids of the workers that run; of several that work together, the first one's."""
        return [gang.members[0].alive if gang.members else None for gang in self._gangs]

    def start(self) -> None:
        """Start the first worker's processes."""
        self._started(0)

    def _started(self, number: int) -> _Gang:
        """A worker that was started, whatever became of it since."""
        gang = self._gangs[number]
        if not gang.members:
            gang.members = self._members(self.stations[number])
            gang.heard = time.monotonic()
            for member in gang.members:
                member.link()
        return gang

    def send(self, number: int, task: Task) -> None:
        """Give a worker a task; it is started where it does not run."""
        gang = self._started(number)
        try:
            for member in gang.members:
                if member.listening is not None:
                    member.listening.send(task)
        except OSError:
            gang.reason = gang.reason or gang.death()  # heard of in `events`

    def _members(self, station: Station) -> list[Child]:
        if self.devices == 1:
            return [Child(worker.main, station, self.opener)]
        self._folder = self._folder or tempfile.TemporaryDirectory(prefix="accel-")
        self._meetings += 1
        meeting = str(Path(self._folder.name) / str(self._meetings))
        places = [Place(rank, self.devices, rank) for rank in range(self.devices)]
        return [Child(worker.main, station, self.opener, one, meeting) for one in places]

    def events(self, seconds: float) -> list[Event]:
        """What workers have said, and which have died."""
        members = [member for gang in self._gangs for member in gang.members]
        links = [link for member in members if (link := member.listening) is not None]
        if links:
            wait(links, seconds)
        else:
            time.sleep(seconds)
        return [(n, said) for n, gang in enumerate(self._gangs) for said in self._said(gang)]

    def _said(self, gang: _Gang) -> list[Message | Died]:
        """In order; the death last."""
        if not gang.members:
            return []
        alive = gang.alive  # before its pipe is emptied: what it said last is not lost
        heard: list[Message | Died] = []
        for rank, member in enumerate(gang.members):
            while (message := member.said()) is not None:
                gang.heard = time.monotonic()
                if not isinstance(message, Beat) and (rank == 0 or _is_failure(message)):
                    heard.append(message)
        if len(gang.members) > 1 and any(map(_is_failure, heard)):
            gang.end()  # the others may wait for it; nothing else was asked of them
            return [next(filter(_is_failure, heard))]
        silent = time.monotonic() - gang.heard
        if alive and silent > SILENCE:
            gang.reason, alive = f"no sign of life for {silent:.0f} s", False
        if not alive or gang.reason:
            reason = gang.reason or gang.death()
            gang.end()
            heard.append(Died(reason))
        return heard

    def kill(self, number: int, reason: str) -> None:
        """End a worker, whatever it is at."""
        gang = self._gangs[number]
        gang.reason = reason
        for member in gang.members:
            member.kill()

    def close(self) -> None:
        """End all."""
        for gang in self._gangs:
            gang.end()
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None


def _is_failure(message: Any) -> bool:
    """What is heard of the others of several that work together."""
    return getattr(message, "how", "") in ("failed", "model")
