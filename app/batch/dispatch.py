"""The dispatcher: hands calls to workers, and sees to it that every row comes to an end, once.

A call that fails or ends its worker is not given up as a whole. Its rows are tried alone, with
nothing written, to find those that are to blame; these are entered as failed, and the others are
made in one call. So what a row looks like never depends on which worker died when.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from app.batch.engine import Died, Engine
from app.batch.grouping import Call
from app.batch.job import Row
from app.batch.manifest import Failed, Line, Made
from app.batch.tasks import Answer, Began, Make, Message

LISTEN = 0.2
"""Seconds between two looks at clocks while no worker says anything."""


@dataclass
class Work:
    """A call that is to be made.

    Attributes:
        call: The rows.
        wanted: Ids of those that are written.
        notes: What was changed for it.
        deaths: Why workers ended that were at it.
        trial: The call that this row is tried alone for, if it is.
    """

    call: Call
    wanted: frozenset[str]
    notes: tuple[str, ...] = ()
    deaths: list[str] = field(default_factory=list)
    trial: Trial | None = None

    @property
    def model(self) -> str:
        """The model that it needs."""
        return self.call.rows[0].form.model

    @property
    def task(self) -> Make:
        """What a worker is asked."""
        wanted = frozenset() if self.trial else self.wanted
        return Make(self.call.key, self.call.rows, wanted, self.notes)


@dataclass
class Trial:
    """The rows of a call, tried alone.

    Attributes:
        work: The call.
        reason: What went wrong with it.
        left: Rows that were not tried yet.
        bad: Of those that failed, why, and whether they ended their worker.
    """

    work: Work
    reason: str
    left: int
    bad: dict[str, tuple[str, bool]] = field(default_factory=dict)


class Fatal(Exception):
    """The job cannot go on: its output refuses files."""


@dataclass(frozen=True)
class Rules:
    """How hard it is tried.

    Attributes:
        retries: How often a call is made again that ended its worker.
        timeout: Seconds for a row; ``None``: no limit.
        stop: Whether nothing more is begun once a row has failed.
    """

    retries: int = 2
    timeout: float | None = None
    stop: bool = False


@dataclass
class _Desk:
    """What one worker has to do: the first is what it is at, or will begin."""

    works: list[Work] = field(default_factory=list)
    model: str = ""
    began: float | None = None
    at: str = ""


class Dispatcher:
    """Runs calls on an engine's workers.

    Args:
        engine: The workers.
        rules: How hard it is tried.
        enter: Takes lines for the manifest; they are on the disk when it returns.
        tell: Takes what a person should know.
    """

    def __init__(
        self,
        engine: Engine,
        rules: Rules,
        enter: Callable[[list[Line]], None],
        tell: Callable[[str], None],
    ) -> None:
        self._engine = engine
        self._rules = rules
        self._enter = enter
        self._tell = tell
        self._queue: deque[Work] = deque()
        self._desks = [_Desk() for _ in range(engine.count)]
        self._refused: dict[str, str] = {}
        self.stopping = self.interrupted = False

    def interrupt(self) -> None:
        """Finish what has begun, begin nothing more."""
        self.stopping = self.interrupted = True

    def run(self, calls: Iterable[Call], wanted: Mapping[str, object]) -> None:
        """Make the rows that are wanted.

        Args:
            calls: All calls that hold one of them; each is made whole.
            wanted: By id.

        Raises:
            Fatal: If the output refuses files.
            NotWritten: If the manifest does.
        """
        for call in calls:
            ids = frozenset(id for id in call.ids if id in wanted)
            if ids:
                self._queue.append(Work(call, ids))
        while self._hand_out():
            for number, event in self._engine.events(LISTEN):
                self._hear(number, event)
            self._watch()

    def _hand_out(self) -> bool:
        """Give every worker enough to do; says whether anything is left to wait for."""
        for depth in range(self._engine.ahead):
            for number, desk in enumerate(self._desks):
                free = len(desk.works) <= depth and not self.stopping
                if free and (work := self._next(desk.model)):
                    desk.works.append(work)
                    desk.model = work.model
                    self._engine.send(number, work.task)
        return any(desk.works for desk in self._desks)

    def _next(self, model: str) -> Work | None:
        """The next call, of the model that is loaded if there is one; else of another."""
        for place, work in enumerate(self._queue):
            if work.model == model or not model:
                del self._queue[place]
                return work
        return self._queue.popleft() if self._queue else None

    def _hear(self, number: int, event: Message | Died) -> None:
        desk = self._desks[number]
        match event:
            case Began():
                desk.at, desk.began = event.key, time.monotonic()
            case Died():
                self._died(desk, event.reason)
            case Answer():
                work = next((one for one in desk.works if one.call.key == event.key), None)
                if work is not None:  # else it answers what was given to another since
                    desk.works.remove(work)
                    desk.began = None if desk.at == event.key else desk.began
                    self._answered(work, event)

    def _watch(self) -> None:
        """End workers that take too long for a row."""
        if self._rules.timeout is None:
            return
        now = time.monotonic()
        for number, desk in enumerate(self._desks):
            rows = next((len(w.call.rows) for w in desk.works if w.call.key == desk.at), 0)
            limit = self._rules.timeout * rows
            if desk.began is not None and rows and now - desk.began > limit:
                desk.began = None
                self._engine.kill(number, f"it took longer than {limit:g} s (--timeout)")

    def _died(self, desk: _Desk, reason: str) -> None:
        """What the worker was at counts it; what it had not begun does not."""
        works, began = desk.works, desk.at
        desk.works, desk.model, desk.at, desk.began = [], "", "", None
        blamed = next((work for work in works if work.call.key == began), None)
        blamed = blamed or (works[0] if works else None)
        for work in reversed(works):
            if work is not blamed:
                self._queue.appendleft(work)
        if blamed is not None:
            self._tell(f"a worker died ({reason}); its {len(blamed.call.rows)} rows are made again")
            blamed.deaths.append(reason)
            self._after_death(blamed, reason)

    def _after_death(self, work: Work, reason: str) -> None:
        if len(work.deaths) <= self._rules.retries:
            self._queue.appendleft(work)
        elif work.trial is not None:
            self._tried(work, f"it ended its process {len(work.deaths)} times: {reason}", True)
        elif len(work.call.rows) == 1:
            told = f"It ended its process {len(work.deaths)} times, at last: {reason}."
            self._fail(work, told, quarantined=True)
        else:
            self._try_alone(work, reason)

    def _answered(self, work: Work, answer: Answer) -> None:
        match answer.how:
            case "made":
                if work.trial is not None:
                    self._tried(work)
                else:
                    self._made(work, answer.made)
            case "unwritten":
                raise Fatal(answer.error)
            case "model":
                self._refuse(work, answer.error)
            case "failed":
                if work.trial is not None:
                    self._tried(work, answer.error)
                elif len(work.call.rows) == 1:
                    self._fail(work, answer.error)
                else:
                    self._try_alone(work, answer.error)

    def _made(self, work: Work, made: Iterable[Made]) -> None:
        again = (f"made again: a worker died ({work.deaths[-1]})",) if work.deaths else ()
        self._enter([one.model_copy(update={"notes": (*one.notes, *again)}) for one in made])

    def _fail(self, work: Work, reason: str, *, quarantined: bool = False) -> None:
        rows = [row for row in work.call.rows if row.id in work.wanted]
        self._enter([_failed(row, reason, quarantined) for row in rows])
        if self._rules.stop and not self.stopping:
            self._tell(f"a row failed ({reason}); nothing more is begun (--on-error stop)")
            self.stopping = True

    def _refuse(self, work: Work, reason: str) -> None:
        """No row of this model can be made."""
        others = [one for one in self._queue if one.model == work.model]
        self._queue = deque(one for one in self._queue if one.model != work.model)
        whole = [one if one.trial is None else one.trial.work for one in (work, *others)]
        for one in {one.call.key: one for one in whole}.values():
            self._fail(one, reason)

    def _try_alone(self, work: Work, reason: str) -> None:
        trial = Trial(work, reason, len(work.call.rows))
        self._tell(f"{len(work.call.rows)} rows failed together ({reason}): each is tried alone")
        for row in reversed(work.call.rows):
            alone = Work(Call((row,)), frozenset({row.id}), trial=trial)
            self._queue.appendleft(alone)

    def _tried(self, work: Work, reason: str | None = None, died: bool = False) -> None:
        """A row was tried alone; after the last of them, the others are made."""
        trial = work.trial
        assert trial is not None
        trial.left -= 1
        if reason is not None:
            trial.bad[work.call.rows[0].id] = (reason, died)
        if trial.left:
            return
        whole = trial.work
        for row in whole.call.rows:
            if row.id in trial.bad and row.id in whole.wanted:
                told, ended = trial.bad[row.id]
                self._fail(Work(Call((row,)), frozenset({row.id})), told, quarantined=ended)
        good = tuple(row for row in whole.call.rows if row.id not in trial.bad)
        self._queue.extendleft(reversed(self._rest(trial, good)))

    def _rest(self, trial: Trial, good: tuple[Row, ...]) -> list[Work]:
        """Those that are not to blame, in one call; in halves where nobody was."""
        notes = trial.work.notes
        if len(good) == len(trial.work.call.rows):
            half = len(good) // 2
            parts = [good[:half], good[half:]]
            notes = (*notes, f"made in two calls, because in one they failed: {trial.reason}")
        else:
            parts = [good]
        return [
            Work(Call(part), trial.work.wanted & {row.id for row in part}, notes)
            for part in parts
            if any(row.id in trial.work.wanted for row in part)
        ]


def _failed(row: Row, reason: str, quarantined: bool) -> Failed:
    return Failed(
        id=row.id,
        hash=row.hash,
        index=row.index,
        prompt=row.prompt,
        reason=reason,
        quarantined=quarantined,
        moment=time.time(),
    )
