"""A worker: a process with one loaded model, which makes one call after another.

Files are encoded and written beside the next call, so that disks are waited for by nobody.
"""

from __future__ import annotations

import hashlib
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from threading import Lock, Thread
from typing import TYPE_CHECKING

from accel.errors import AccelError, NotWritten
from app import clips, metadata, models
from app.batch import checking, sizing
from app.batch.job import Row
from app.batch.manifest import Made
from app.batch.storage import open_storage
from app.batch.tasks import (
    Answer,
    Beat,
    Began,
    Check,
    Checked,
    Make,
    Measure,
    Measured,
    Message,
    Task,
)
from app.memory import WAYS, free, out_of_memory
from app.request import Request, Source
from app.serve.child import die_with_parent
from app.session import Outcome, Session

if TYPE_CHECKING:
    from accel.plan import Plan
    from parallel.launch import Place

Opener = Callable[[Source], Session]
"""Loads a source. Importable by name, because the worker process imports it."""

Say = Callable[[Message], None]

PULSE = 5.0
"""Seconds between two signs of life."""


@dataclass(frozen=True)
class Station:
    """Where a worker stands.

    Attributes:
        name: What it is called in the manifest.
        place: Of the output.
        device: Where requests run that name none, or only its kind; ``None``: torch's default.
        threads: Threads on a CPU; ``None``: torch's default.
    """

    name: str
    place: str
    device: str | None = None
    threads: int | None = None

    def of(self, place: Place | None) -> Station:
        """Where one of several processes stands that make a row together: a GPU each."""
        kind, colon, index = (self.device or "").partition(":")
        if place is None or not colon:
            return self
        return replace(self, device=f"{kind}:{int(index) + place.rank}")


class ModelFailed(Exception):
    """A model cannot be loaded: it is no fault of the rows."""


@dataclass(frozen=True)
class Drawn:
    """A row's result, before it is a file."""

    row: Row
    outcome: Outcome
    record: metadata.Record
    notes: tuple[str, ...]


class Worker:
    """Performs tasks, one at a time.

    Args:
        station: Where it stands.
        opener: What loads a model.
    """

    def __init__(self, station: Station, opener: Opener) -> None:
        self._station = station
        self._opener = opener
        self._storage = open_storage(station.place)
        self._session: Session | None = None
        self._mark: metadata.Fingerprint | None = None
        if station.threads is not None:
            import torch

            torch.set_num_threads(station.threads)

    def check(self, task: Check) -> Checked:
        """Say of forms whether they can be made."""
        return Checked(checking.fits(task.forms))

    def measure(self, task: Measure) -> Measured:
        """Find the size of a group's calls; what goes wrong, its rows will say."""
        requests = [self._request(row) for row in task.rows]
        try:
            session = self._ready(requests[0].source)
            found = sizing.measured(session, requests)
            whole = self._whole(session, requests[: found.size], task)
        except Exception as error:
            self._close()
            return Measured(task.group, 1, note=f"not measured: {_said(error)}")
        return Measured(task.group, found.size, found.seconds, found.note, *whole)

    def _whole(
        self, session: Session, requests: Sequence[Request], task: Measure
    ) -> tuple[float | None, int | None]:
        """Seconds and bytes of a row as it will be made, in a call of several."""
        if not task.whole:
            return None, None
        one = session.together(requests, task.rows[0].form.plan, memory=True)[0]
        return one.seconds, _peak(one)

    def draw(self, task: Make) -> list[Drawn] | Answer:
        """Make the rows of a call; nothing is written yet."""
        try:
            return self._drawn(task.rows, task.notes)
        except ModelFailed as error:
            return Answer(task.key, "model", error=str(error))
        except Exception as error:
            if not isinstance(error, AccelError):
                self._close()
            return Answer(task.key, "failed", error=_said(error))

    def write(self, task: Make, drawn: Sequence[Drawn]) -> Answer:
        """Write the rows that are wanted."""
        try:
            made = tuple(self._written(one, task) for one in drawn if one.row.id in task.wanted)
        except NotWritten as error:
            return Answer(task.key, "unwritten", error=str(error))
        except Exception as error:
            return Answer(task.key, "failed", error=_said(error))
        return Answer(task.key, "made", made)

    def _drawn(self, rows: Sequence[Row], notes: tuple[str, ...]) -> list[Drawn]:
        """Rows in one call; where memory does not suffice, in two, then in ways that take less."""
        requests = [self._request(row) for row in rows]
        session = self._ready(requests[0].source)
        plan = rows[0].form.plan
        outcomes = self._attempt(session, requests, plan)
        if outcomes is not None:
            each = zip(rows, requests, outcomes, strict=True)
            return [
                Drawn(row, outcome, self._record(request, plan, outcome), notes)
                for row, request, outcome in each
            ]
        free()
        if len(rows) > 1:
            half = len(rows) // 2
            more = (*notes, f"out of memory with {len(rows)} in a call: made in two")
            return [*self._drawn(rows[:half], more), *self._drawn(rows[half:], more)]
        way = next(filter(None, (change(session.model.pipe) for change in WAYS)), None)
        if way is None:
            self._close()
            raise AccelError(
                "Out of memory for a single row: ask for fewer pixels, frames or methods that keep "
                "something between steps."
            )
        try:
            return self._drawn(rows, (*notes, f"out of memory: made {way}"))
        finally:
            self._close()

    def _attempt(
        self, session: Session, requests: Sequence[Request], plan: Plan
    ) -> list[Outcome] | None:
        """What a call gives, or ``None`` if there was not enough memory."""
        try:
            return session.together(requests, plan)
        except Exception as error:
            if not out_of_memory(error):
                raise
        return None

    def _record(self, request: Request, plan: Plan, outcome: Outcome) -> metadata.Record:
        assert self._session is not None and self._mark is not None
        model = self._session.model
        savings = tuple(metadata.savings(model.pipe))
        mark = self._mark.model_copy(update={"savings": savings})
        return metadata.record(request, plan, model, outcome, mark=mark)

    def _written(self, drawn: Drawn, task: Make) -> Made:
        row, outcome, record = drawn.row, drawn.outcome, drawn.record
        fps = row.form.request.fps
        contents = clips.files(Path(row.file), outcome.pictures, record, fps)
        files = {path.as_posix(): content for path, content in contents.items()}
        self._storage.put(files)
        content = files[row.file]
        return Made(
            id=row.id,
            hash=row.hash,
            index=row.index,
            file=row.file,
            sha256=hashlib.sha256(content).hexdigest(),
            bytes=len(content),
            pixels=record.pixels,
            group=row.form.group,
            batch=tuple(one.id for one in task.rows),
            seed=row.seed,
            prompt=row.prompt,
            seconds=outcome.seconds,
            steps=record.result.steps,
            nfe=record.result.nfe,
            verdicts=record.result.verdicts,
            saved=_saved(outcome),
            notes=drawn.notes,
            worker=self._station.name,
            moment=time.time(),
        )

    def _request(self, row: Row) -> Request:
        request, device = row.request, self._station.device
        kind = None if device is None else device.partition(":")[0]
        if device is None or request.device not in (None, kind):
            return request
        return replace(request, device=device)

    def _ready(self, source: Source) -> Session:
        if self._session is None or self._session.model.source != source:
            self._close()
            try:
                self._session = self._opener(source)
            except Exception as error:
                raise ModelFailed(_said(error)) from error
            self._mark = metadata.fingerprint(self._session.model)
        return self._session

    def _close(self) -> None:
        self._session = None
        free()


def _peak(outcome: Outcome) -> int | None:
    report = outcome.report
    return None if report is None or report.peak is None else report.peak.bytes


def _saved(outcome: Outcome) -> dict[str, float]:
    """By method the share of a row's steps that were not computed."""
    assert outcome.report is not None
    found = {}
    for tally in outcome.report.tallies:
        steps = {event.step for event in tally.events if event.sample == outcome.place}
        spared = {
            event.step
            for event in tally.events
            if event.sample == outcome.place and event.state != "computed"
        }
        if steps:
            found[tally.method] = len(spared) / len(steps)
    return found


def _said(error: Exception) -> str:
    """An error in one sentence; one that is not ours, with where it was raised."""
    if isinstance(error, AccelError):
        return str(error)
    if out_of_memory(error):
        return "Out of memory while the model was loaded: choose a smaller one, or dtype bfloat16."
    first = (str(error).strip().splitlines() or ["no message"])[0]
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {first} ({Path(last.filename).name}:{last.lineno})"


def perform(worker: Worker, task: Task, say: Say) -> None:
    """Perform a task and say what it gave, all in this thread."""
    match task:
        case Check():
            say(worker.check(task))
        case Measure():
            say(worker.measure(task))
        case Make():
            say(Began(task.key))
            drawn = worker.draw(task)
            say(drawn if isinstance(drawn, Answer) else worker.write(task, drawn))


def main(
    link: Connection,
    station: Station,
    opener: Opener,
    place: Place | None = None,
    meeting: str = "",
) -> None:
    """The life of a worker process: one task after another, until the pipe ends.

    Args:
        link: The pipe to the parent.
        station: Where it stands.
        opener: What loads a model.
        place: Which of several processes that make a row together it is; only the first writes.
        meeting: The file through which these meet.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    die_with_parent()
    tasks: SimpleQueue[Task] = SimpleQueue()
    Thread(target=_listen, args=(link, tasks), daemon=True).start()
    lock = Lock()

    def say(message: Message) -> None:
        with lock:
            link.send(message)

    Thread(target=_live, args=(say,), daemon=True).start()

    with _together(place, meeting), ThreadPoolExecutor(1) as writing:
        worker = Worker(station.of(place), opener)
        first = place is None or place.rank == 0
        while True:
            task = tasks.get()
            if not isinstance(task, Make):
                perform(worker, task, say)
                continue
            say(Began(task.key))
            drawn = worker.draw(task)
            if isinstance(drawn, Answer):
                say(drawn)
            elif first:
                writing.submit(_write, worker, task, drawn, say)


def _write(worker: Worker, task: Make, drawn: Sequence[Drawn], say: Say) -> None:
    say(worker.write(task, drawn))


@contextmanager
def _together(place: Place | None, meeting: str) -> Iterator[None]:
    """Inside, this process has joined those that it works with, if there are any."""
    with ExitStack() as stack:
        if place is not None:
            from torch.distributed import FileStore  # type: ignore[attr-defined]

            from parallel import launch

            stack.enter_context(launch.joined(place, FileStore(meeting, place.size)))
        yield


def _live(say: Say) -> None:
    """Give signs of life; a process that hangs with Python's lock gives none."""
    while True:
        time.sleep(PULSE)
        try:
            say(Beat())
        except OSError:
            return


def _listen(link: Connection, tasks: SimpleQueue[Task]) -> None:
    """Take what the parent sends; end the process when there is no parent any more."""
    while True:
        try:
            tasks.put(link.recv())
        except (EOFError, OSError):
            os._exit(1)


def opened(source: Source) -> Session:
    """The usual opener."""
    return Session(models.load(source))
