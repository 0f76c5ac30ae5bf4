"""The worker: a process with one loaded model, which makes one job after another.

It lives no longer than the server: it ends when the pipe to the server does, and on Linux the
kernel ends it at once. What it finished lies in the job's folder, with `DONE` beside it, before
the server hears of it; so a result is not lost with the server.
"""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from queue import SimpleQueue
from threading import Event, Thread

from accel.errors import AccelError, BadInput, NotWritten
from app import files, metadata, models
from app.exits import say
from app.memory import WAYS, free, out_of_memory
from app.metadata import Entry
from app.request import Source
from app.serve.child import die_with_parent
from app.serve.following import Control, Follower
from app.serve.jobs import Result, State
from app.serve.performing import KINDS, Measured, Product, Task
from app.serve.preview import Painter
from app.serve.stopping import Stopped
from app.session import Session

Opener = Callable[[Source], Session]
"""Loads a source. Importable by name, because the worker process imports it."""

DONE = "result.json"
"""In a job's folder: how the job ended. It gets its name after all other files."""

AGAIN = 1.0
"""Seconds between two tries to write what a full disk refused."""


class Ended(Entry):
    """How a job ended."""

    job: str
    state: State
    result: Result | None = None
    error: str | None = None
    measured: Measured = Measured()


@dataclass(frozen=True)
class Blocked:
    """A finished job cannot be written; it is tried again."""

    job: str
    reason: str


@dataclass(frozen=True)
class Loaded:
    """A model was loaded, on this machine (``Fingerprint.machine``)."""

    machine: str


@dataclass(frozen=True)
class Preload:
    """Load this source while nothing else is to do."""

    source: Source


@dataclass(frozen=True)
class Asked:
    """What is wanted of the running job, from now on.

    Attributes:
        stops: How often it was asked to stop.
        watched: Whether somebody watches.
    """

    stops: int
    watched: bool


WARM = "warm"
"""Stands for a configuration, where a model was warmed up."""


class Worker:
    """Makes jobs, one at a time, with the last model kept loaded.

    Args:
        opener: What loads a model.
        again: Seconds between two tries to write what a full disk refused.
    """

    def __init__(self, opener: Opener, again: float = AGAIN) -> None:
        self._opener = opener
        self._again = again
        self._session: Session | None = None
        self._painter: Painter | None = None
        self._runs: set[str | None] = set()

    def perform(self, task: Task, control: Control) -> Ended:
        """Make a job and write its files; whatever goes wrong is said in the answer."""
        try:
            product = self._made(task, control)
            ended = Ended(
                job=task.job,
                state="stopped" if product.result.partial else "done",
                result=product.result,
                measured=product.measured,
            )
            self._write(task, product.contents, ended, control)
        except Stopped as stopped:
            told = str(stopped) or "It was stopped before there was anything to keep."
            return Ended(job=task.job, state="stopped", error=told)
        except Exception as error:
            return Ended(job=task.job, state="failed", error=_said(error))
        return ended

    def preload(self, source: Source, control: Control) -> None:
        """Load a model ahead and warm it up, so that the first job takes as long as all others.

        What is wrong with it, the first job that needs it says.
        """
        try:
            self._open(source, control).warm()
            self._runs.add(WARM)
        except Exception as error:
            say(f"{source.model} was not loaded ahead: {_said(error)}")

    def _made(self, task: Task, control: Control) -> Product:
        """What a job makes; out of memory, it is made again in ways that take less, then refused.

        A session that ran out of memory, or was changed, is closed: the next job finds a fresh one.
        """
        ways, notes = iter(WAYS), list[str]()
        while True:
            follower = Follower(task.job, control, keeps=task.spec.kind == "generate")
            session = self._ready(task.request.source, follower, control)
            try:
                product = self._attempt(session, task, follower)
            except BaseException:
                if notes:
                    self._close()
                raise
            if product is not None:
                return self._told(task, product, notes)
            free()
            way = next(filter(None, (change(session.model.pipe) for change in ways)), None)
            if way is None:
                self._close()
                raise BadInput(
                    f"Out of memory after {follower.step} steps"
                    f"{', though it was tried ' * bool(notes)}{' and '.join(notes)}: ask for fewer "
                    "pixels, frames or methods that keep something between steps."
                )
            notes.append(way)
            follower.say("encoding", f"out of memory after {follower.step} steps: again {way}")

    def _attempt(self, session: Session, task: Task, follower: Follower) -> Product | None:
        """What the job makes, or ``None`` if there was not enough memory."""
        try:
            with follower.guarding(session.model.pipe):
                return KINDS[task.spec.kind](session, task, follower)
        except Exception as error:
            if not out_of_memory(error):
                raise
        return None

    def _told(self, task: Task, product: Product, notes: list[str]) -> Product:
        """The product with what was changed for it; its times count only where nothing was.

        Nor do those of the first run after loading, or the first one of a compiled configuration.
        """
        measured = product.measured
        seen = {measured.configuration} <= self._runs if task.request.compile else self._runs
        typical = task.spec.kind != "generate" or bool(seen)
        self._runs.add(measured.configuration)
        if notes:
            self._close()
            told = [f"out of memory: it was made again {' and '.join(notes)}"]
            result = product.result
            changed = result.model_copy(update={"notes": [*result.notes, *told]})
            return Product(product.contents, changed)
        return product if typical else Product(product.contents, product.result)

    def _ready(self, source: Source, follower: Follower, control: Control) -> Session:
        session = self._session
        if session is None or session.model.source != source:
            follower.say("loading")
            session = self._open(source, control)
        follower.painter = self._painter
        return session

    def _open(self, source: Source, control: Control) -> Session:
        """Load a model in the place of the present one, which stays if the files are damaged."""
        models.check(source)
        self._close()
        self._session = session = self._opener(source)
        self._painter = _painter(session)
        control.send(Loaded(metadata.fingerprint(session.model).machine))
        return session

    def _close(self) -> None:
        self._session = self._painter = None
        self._runs.clear()
        free()

    def _write(
        self, task: Task, contents: dict[str, bytes], ended: Ended, control: Control
    ) -> None:
        """Write the files of a job, `DONE` last; waits for as long as the disk refuses them.

        A stop from before that does not count: what was made until then is to be kept.

        Raises:
            Stopped: If the job is stopped while it waits.
        """
        named = {**contents, DONE: ended.model_dump_json().encode()}
        waits = False
        while True:
            try:
                task.folder.mkdir(parents=True, exist_ok=True)
                files.write({task.folder / name: content for name, content in named.items()})
                return
            except (NotWritten, OSError) as error:
                if not waits:
                    control.stop.clear()
                elif control.stop.is_set():
                    raise Stopped(f"It was stopped before it could be written. {error}") from error
                waits = True
                control.send(Blocked(task.job, str(error)))
            control.stop.wait(self._again)


def _painter(session: Session) -> Painter | None:
    """What draws previews of a model; a decoder that it cannot be fitted to fails no job."""
    try:
        return Painter.fit(session.model.pipe)
    except Exception as error:
        traceback.print_exception(error)
        return None


def _said(error: Exception) -> str:
    """An error in one sentence; one that is not ours goes to the log in full."""
    if isinstance(error, AccelError):
        return str(error)
    if out_of_memory(error):
        return "Out of memory while the model was loaded: choose a smaller one, or dtype bfloat16."
    traceback.print_exception(error)
    first = (str(error).strip().splitlines() or ["no message"])[0]
    return f"{type(error).__name__}: {first} (a bug; the server's log shows where)."


def main(link: Connection, opener: Opener) -> None:
    """The life of the process: preloads, then one task after another, until the pipe ends.

    Args:
        link: The pipe to the server.
        opener: What loads a model.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the server's
    die_with_parent()
    tasks: SimpleQueue[Task | Preload] = SimpleQueue()
    control = Control(Event(), Event(), link.send)
    Thread(target=_listen, args=(link, control, tasks), daemon=True).start()
    worker = Worker(opener)
    while True:
        task = tasks.get()
        if isinstance(task, Preload):
            worker.preload(task.source, control)
        else:
            link.send(worker.perform(task, control))


def _listen(link: Connection, control: Control, tasks: SimpleQueue[Task | Preload]) -> None:
    """Take what the server sends; end the process when there is no server any more."""
    stops = 0
    while True:
        try:
            message = link.recv()
        except (EOFError, OSError):
            os._exit(1)
        if isinstance(message, Asked):
            obey(control, message, stops)
            stops = message.stops
        else:
            obey(control, Asked(stops=0, watched=False), stops)
            stops = 0
            tasks.put(message)


def obey(control: Control, asked: Asked, stops: int) -> None:
    """Pass on what is wanted.

    Args:
        control: Of the running job.
        asked: What is wanted.
        stops: How often it was asked to stop before: only once more sets it again.
    """
    if asked.stops > stops:
        control.stop.set()
    elif not asked.stops:
        control.stop.clear()
    control.watched.set() if asked.watched else control.watched.clear()
