"""One worker process, kept alive: hands it jobs, passes on what it says, survives its death."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from threading import Event, Thread
from typing import TypeVar

from accel.errors import AccelError, NotWritten
from app.call import extent
from app.request import Request, Source
from app.serve import catalogue, worker
from app.serve.board import Board
from app.serve.child import Child
from app.serve.folders import Folders, sweep
from app.serve.jobs import Job, NoSuchJob, Progress
from app.serve.performing import Against, Task
from app.serve.store import Store
from app.serve.worker import DONE, Asked, Blocked, Ended, Loaded, Opener, Preload

T = TypeVar("T")

LISTEN, IDLE, AGAIN = 0.05, 0.5, 1.0
"""Seconds: between two looks at what is wanted of a running job; at an empty queue; at a full
disk."""


@dataclass(frozen=True)
class Room:
    """Bytes that have to be free before a job is begun.

    Attributes:
        least: For the database and small files.
        pixel: For each pixel of each frame.
    """

    least: int = 16 * 2**20
    pixel: int = 8

    def needed(self, request: Request) -> int:
        """For one job. What cannot be read for that, the job itself says."""
        try:
            pixels = extent(request, catalogue.call(request.model)).pixels
        except AccelError:
            pixels = 0
        return self.least + self.pixel * pixels


class WorkerDied(Exception):
    """The process ended by itself, or was killed."""


class Supervisor:
    """Looks after one worker, in a thread of its own.

    Args:
        store: Where jobs come from.
        board: Where progress goes.
        folders: Where files go.
        opener: What loads a model, in the worker.
        device: Where requests run that name none.
        ahead: What to load before there is a job.
        room: What has to be free on the disk.
    """

    def __init__(
        self,
        store: Store,
        board: Board,
        folders: Folders,
        opener: Opener,
        device: str | None = None,
        ahead: Source | None = None,
        room: Room = Room(),
    ) -> None:
        self._store = store
        self._board = board
        self._folders = folders
        self._device = device
        self._ahead = ahead
        self._room = room
        self._name = device or "default device"
        self._closing = Event()
        self._child = Child(worker.main, opener)
        self._thread = Thread(target=self._run, name=f"supervisor of {self._name}", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def close(self) -> None:
        """End the worker; a running job is queued again, and the attempt does not count."""
        self._closing.set()
        self._board.wake()
        if self._thread.ident is not None:
            self._thread.join()

    @property
    def process(self) -> int | None:
        """The worker's process id, while there is one."""
        return self._child.alive

    def _run(self) -> None:
        try:
            if self._ahead is not None:
                self._child.link().send(Preload(self._ahead))
            while not self._closing.is_set():
                job = self._persist(lambda: self._store.claim(self._device))
                if job is None:
                    self._board.pause(self._name, None)
                    self._board.wait(IDLE)
                    self._hear(self._child.said())
                else:
                    self._perform(job)
        except Exception as error:
            self._board.pause(self._name, f"Its supervisor failed ({error!r}): restart the server.")
            raise
        finally:
            self._child.end()

    def _perform(self, job: Job) -> None:
        """Have a job made, however that ends; one that begins again stops if it was asked to."""
        task = self._task(job)
        ended = None
        try:
            if self._has_room(task):
                ended = self._followed(job, task)
        except (EOFError, OSError):
            self._crashed(job)
        else:
            settled = ended or left_by(self._folders, job)
            self._persist(
                lambda: (
                    finish(self._store, job, settled)
                    if settled is not None
                    else self._store.give_back(job.id)
                )
            )
        if self._board.forget(job.id):
            self._persist(lambda: stop(self._store, self._board, job.owner, job.id))

    def _task(self, job: Job) -> Task:
        folder = self._folders.job(job.owner, job.id)
        sweep(folder)
        return Task(
            job.id, job.spec, folder, self._folders.baselines, self._device, self._against(job)
        )

    def _against(self, job: Job) -> Against | None:
        if job.spec.against is None:
            return None
        try:
            other = self._store.job(job.owner, job.spec.against)
        except NoSuchJob:  # purged in the meantime
            return None
        if other.result is None or "picture" not in other.result.files:
            return None
        picture = self._folders.job(other.owner, other.id) / other.result.files["picture"]
        return Against(other.spec, picture)

    def _has_room(self, task: Task) -> bool:
        """Whether the disk has room for what a job may write; if not, the queue is paused."""
        free, needed = self._folders.free(), self._room.needed(task.request)
        if free >= needed:
            self._board.pause(self._name, None)
            return True
        self._board.pause(
            self._name,
            f"The disk is full: {free / 2**20:.0f} MiB are free, and the next job needs "
            f"{needed / 2**20:.0f}. Free some space; the queue goes on by itself.",
        )
        self._closing.wait(AGAIN)
        return False

    def _followed(self, job: Job, task: Task) -> Ended | None:
        """Hand a job to the worker and listen until it ends; ``None``: it has to begin again.

        Raises:
            OSError: If the worker died (EOFError as well).
        """
        link = self._child.link()
        link.send(task)
        asked = Asked(stops=0, watched=False)
        while not self._closing.is_set():
            alive = self._child.alive  # before its pipe is looked at: what it said last is not lost
            if link.poll(LISTEN):
                message = link.recv()
                if isinstance(message, Ended):
                    self._board.pause(self._name, None)
                    gave_way = message.state == "stopped" and not self._board.stops(job.id)
                    return None if gave_way else message
                self._hear(message)
            elif alive is None:  # another process may hold its end of the pipe
                raise EOFError
            stops = self._board.stops(job.id) + self._gives_way(job)
            wanted = Asked(stops=stops, watched=self._board.watched(job.id))
            if wanted != asked:
                asked = wanted
                link.send(asked)
        self._child.end()
        return None

    def _gives_way(self, job: Job) -> bool:
        """Whether a measurement stops because somebody waits."""
        return job.spec.kind == "measure" and self._store.waits()

    def _hear(self, message: Progress | Blocked | Loaded | None) -> None:
        if isinstance(message, Blocked):
            self._board.pause(self._name, f"{message.reason} The queue goes on by itself.")
        elif isinstance(message, Loaded):
            self._board.place(self._name, message.machine)
        elif message is not None:
            self._board.post(message)

    def _crashed(self, job: Job) -> None:
        reason = f"The worker died while it ran this job ({self._child.death()})"
        self._child.end()
        if self._board.stops(job.id):
            told = f"{reason}, after it was asked to stop."
            self._persist(lambda: self._store.finish(job.id, "stopped", error=told))
        else:
            self._persist(lambda: settle(self._store, self._folders, job, reason))

    def _persist(self, change: Callable[[], T]) -> T | None:
        """Change the store; waits while the disk is full."""
        while True:
            try:
                return change()
            except NotWritten as error:
                self._board.pause(self._name, f"{error} The queue goes on by itself.")
            if self._closing.wait(AGAIN):
                return None


def stop(store: Store, board: Board, owner: str, id: str) -> None:
    """Stop a job, whether it waits or runs, or changes between the two at this moment.

    The board is told first: a job that is given back after that is stopped by its supervisor.

    Raises:
        NotWritten: If the disk is full.
    """
    board.stop(id)
    if store.stop_waiting(owner, id) or store.ended(id):
        board.forget(id)


def finish(store: Store, job: Job, ended: Ended) -> None:
    """Enter into the store how a job ended, and what it told about the machine.

    Raises:
        NotWritten: If the disk is full.
    """
    measured = ended.measured
    typical = measured.configuration if job.spec.kind == "generate" else None
    if measured.configuration is not None and measured.stock:
        store.add_stock(measured.configuration, measured.stock)
    if measured.figures:
        told = {name: figure.model_dump() for name, figure in measured.figures.items()}
        name = catalogue.figures_of(job.spec.request["model"], measured.machine)
        store.keep(name, json.dumps(told))
    store.finish(job.id, ended.state, ended.result, ended.error, typical)


def left_by(folders: Folders, job: Job) -> Ended | None:
    """How a job ended, if all its files lie there though nobody has heard of it."""
    done = folders.job(job.owner, job.id) / DONE
    return Ended.model_validate_json(done.read_bytes()) if done.is_file() else None


def settle(store: Store, folders: Folders, job: Job, reason: str) -> None:
    """A running job has lost its worker: it is done if its files are, else it counts as crashed.

    Raises:
        NotWritten: If the disk is full.
    """
    ended = left_by(folders, job)
    if ended is not None:
        finish(store, job, ended)
        return
    store.crashed(job.id, reason)
    sweep(folders.job(job.owner, job.id))


def recover(store: Store, folders: Folders) -> None:
    """After a crash of the server, or of its machine: settle what it left running.

    Raises:
        NotWritten: If the disk is full.
    """
    for job in store.running():
        settle(store, folders, job, "The server went down while it ran this job")
