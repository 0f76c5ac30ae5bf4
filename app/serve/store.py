"""The queue and the history on disk: SQLite in WAL mode, every change one transaction.

Order: first in, first out, in rounds over owners, so that one person with sixty jobs holds up
nobody for longer than one of them; measurements of presets go last. A transaction that a crash cut
off never happened; what it left running is queued once more, and quarantined the second time.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from statistics import median, quantiles
from threading import RLock
from uuid import uuid4

from accel.errors import BadInput, NotWritten
from app.serve.jobs import ENDED, FIRST, Busy, Job, NoSuchJob, Result, Spec, Speedup, State
from app.serve.limits import Limits
from app.serve.waiting import Load, ends

ATTEMPTS = 2
"""How often a job is started: once more after a crash."""

FORMAT = 1
LATEST = 9
"""How many measured runs an estimate is the median of."""

FACTS = 2000
"""How many facts of a kind are kept."""

PATIENCE = 10.0
"""Seconds between two tries where nothing has been measured."""

SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    owner TEXT NOT NULL,
    party TEXT,
    kind TEXT NOT NULL,
    model TEXT NOT NULL,
    device TEXT,
    spec TEXT NOT NULL,
    words TEXT NOT NULL,
    workload TEXT NOT NULL,
    state TEXT NOT NULL DEFAULT 'queued',
    attempts INTEGER NOT NULL DEFAULT 0,
    created REAL NOT NULL,
    started REAL,
    ended REAL,
    result TEXT,
    configuration TEXT,
    error TEXT,
    deleted REAL
) STRICT;
CREATE INDEX IF NOT EXISTS waiting ON jobs (state) WHERE state IN ('queued', 'running');
CREATE INDEX IF NOT EXISTS histories ON jobs (owner, created);
CREATE INDEX IF NOT EXISTS workloads ON jobs (workload, ended);
CREATE INDEX IF NOT EXISTS models ON jobs (model, kind, ended);
CREATE TABLE IF NOT EXISTS rounds (owner TEXT PRIMARY KEY, turn INTEGER NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS stock (
    configuration TEXT NOT NULL,
    seconds REAL NOT NULL,
    at REAL NOT NULL
) STRICT;
CREATE INDEX IF NOT EXISTS times ON stock (configuration, at);
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
"""

QUEUE = """
SELECT jobs.*, ROW_NUMBER() OVER (
    ORDER BY jobs.kind = 'measure', round, COALESCE(rounds.turn, 0), jobs.seq) - 1 AS place
FROM (SELECT *, ROW_NUMBER() OVER (PARTITION BY owner, kind = 'measure' ORDER BY seq) AS round
      FROM jobs WHERE state = 'queued') AS jobs
LEFT JOIN rounds USING (owner)
ORDER BY place
"""
"""The waiting jobs in the order in which they will be claimed."""

MATCHES = "instr(words, ?) > 0"


@dataclass(frozen=True)
class Draft:
    """A job that is about to be admitted.

    Attributes:
        spec: With its seed.
        model: What its request names.
        device: Where it has to run; ``None``: on any.
        workload: Equal for jobs that take equally long.
        words: Text that the history is searched in.
    """

    spec: Spec
    model: str
    device: str | None
    workload: str
    words: str


def _resolved(spec: Spec, first: str) -> Spec:
    """A job that names the first of those it came with by its id."""
    return spec.model_copy(update={"against": first}) if spec.against == FIRST else spec


class Store:
    """Jobs on disk. Safe to use from many threads of one process.

    Args:
        path: The database; made if it is not there.
        devices: Those that jobs run on, one at a time on each; ``None`` is the default one.

    Raises:
        BadInput: If the file is none of ours, or of another version.
    """

    def __init__(self, path: Path, devices: Sequence[str | None] = (None,)) -> None:
        self._lock = RLock()
        self._devices = tuple(devices)
        self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=30)
        self._db.row_factory = sqlite3.Row
        try:
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
            version = int(self._db.execute("PRAGMA user_version").fetchone()[0])
            if version not in (0, FORMAT):
                raise BadInput(
                    f"{path} has format {version}, this version reads {FORMAT}: install the "
                    "version that wrote it, or give another folder."
                )
            self._db.executescript(f"{SCHEMA} PRAGMA user_version = {FORMAT};")
        except sqlite3.DatabaseError as error:
            self._db.close()
            raise BadInput(f"{path} is no database of ours ({error}): move it away.") from error

    def close(self) -> None:
        """Let go of the file."""
        with self._lock:
            self._db.close()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """All or nothing.

        Raises:
            NotWritten: If the disk is full or refuses.
        """
        with self._lock:
            try:
                self._db.execute("BEGIN IMMEDIATE")
                yield self._db
                self._db.execute("COMMIT")
            except BaseException as error:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                if isinstance(error, sqlite3.OperationalError):
                    raise NotWritten(
                        f"The queue could not be written ({error}): free some space on its disk, "
                        "then try again. Nothing was changed."
                    ) from error
                raise

    def _rows(self, query: str, *values: object) -> list[sqlite3.Row]:
        with self._lock:
            return self._db.execute(query, values).fetchall()

    # Coming in

    def admit(
        self, owner: str, drafts: Sequence[Draft], group: str | None, limits: Limits
    ) -> list[str]:
        """Queue jobs: all of them, or none; returns their ids.

        Raises:
            Busy: If there is no room for all of them.
            NotWritten: If the disk is full.
        """
        now, ids = time.time(), [uuid4().hex for _ in drafts]
        rows = [
            (
                id,
                owner,
                group,
                draft.spec.kind,
                draft.model,
                draft.device,
                _resolved(draft.spec, ids[0]).model_dump_json(),
                draft.words.lower(),
                draft.workload,
                now,
            )
            for id, draft in zip(ids, drafts, strict=True)
        ]
        with self._transaction() as db:
            self._check_room(owner, len(rows), limits)
            db.executemany(
                "INSERT INTO jobs (id, owner, party, kind, model, device, spec, words, workload, "
                "created) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                rows,
            )
        return ids

    def _check_room(self, owner: str, more: int, limits: Limits) -> None:
        counts = self._rows(
            "SELECT COUNT(*) AS everyone, COALESCE(SUM(owner = ?), 0) AS own FROM jobs "
            "WHERE state = 'queued'",
            owner,
        )[0]
        for whose, waiting, limit in (
            ("of yours", counts["own"], limits.jobs_of_owner),
            ("of all users", counts["everyone"], limits.jobs),
        ):
            if waiting + more > limit:
                seconds = max(1.0, (waiting + more - limit) * self._pace())
                raise Busy(
                    f"The queue is full: {waiting} jobs {whose} are waiting, at most {limit} may, "
                    f"and this would add {more}. Try again in about {seconds:.0f} s; nothing was "
                    "queued.",
                    seconds,
                )

    def _pace(self) -> float:
        """Seconds that a job took lately."""
        rows = self._rows(
            "SELECT ended - started AS seconds FROM jobs WHERE state = 'done' "
            "ORDER BY seq DESC LIMIT ?",
            LATEST,
        )
        return median(row["seconds"] for row in rows) if rows else PATIENCE

    # Running

    def claim(self, device: str | None) -> Job | None:
        """Take the next job that may run on a device: it is running then.

        Raises:
            NotWritten: If the disk is full.
        """
        if not self._rows("SELECT 1 FROM jobs WHERE state = 'queued' LIMIT 1"):
            return None
        with self._transaction() as db:
            rows = db.execute(QUEUE).fetchall()
            row = next(
                (row for row in rows if row["device"] in (None, device) and self._ready(row)), None
            )
            if row is None:
                return None
            db.execute(
                "UPDATE jobs SET state = 'running', attempts = attempts + 1, started = ? "
                "WHERE id = ?",
                (time.time(), row["id"]),
            )
            db.execute(
                "INSERT OR REPLACE INTO rounds SELECT ?, COALESCE(MAX(turn), 0) + 1 FROM rounds",
                (row["owner"],),
            )
        return self.job(row["owner"], row["id"])

    def _ready(self, row: sqlite3.Row) -> bool:
        """Whether the job that it is measured against has ended, if there is one."""
        against = Spec.model_validate_json(row["spec"]).against
        waiting = "SELECT 1 FROM jobs WHERE id = ? AND state IN ('queued', 'running')"
        return against is None or not self._rows(waiting, against)

    def waits(self) -> bool:
        """Whether a job waits that is no measurement."""
        return bool(
            self._rows("SELECT 1 FROM jobs WHERE state = 'queued' AND kind != 'measure' LIMIT 1")
        )

    def measuring(self, owner: str, model: str) -> Job | None:
        """The measurement of a model that an owner has waiting or running."""
        rows = self._rows(
            "SELECT * FROM jobs WHERE state IN ('queued', 'running') AND kind = 'measure' "
            "AND owner = ? AND model = ?",
            owner,
            model,
        )
        return self._placed([_job(rows[0])])[0] if rows else None

    def finish(
        self,
        id: str,
        state: State,
        result: Result | None = None,
        error: str | None = None,
        configuration: str | None = None,
    ) -> None:
        """A running job has ended; nothing happens to one that is not running.

        Raises:
            NotWritten: If the disk is full.
        """
        with self._transaction() as db:
            db.execute(
                "UPDATE jobs SET state = ?, ended = ?, result = ?, error = ?, configuration = ? "
                "WHERE id = ? AND state = 'running'",
                (
                    state,
                    time.time(),
                    result and result.model_dump_json(),
                    error,
                    configuration,
                    id,
                ),
            )

    def crashed(self, id: str, reason: str) -> None:
        """What ran a job is dead: queue it again, or quarantine it if that was its last attempt.

        Args:
            id: Of a running job.
            reason: What happened, in words.

        Raises:
            NotWritten: If the disk is full.
        """
        told = (
            f"{reason}, {ATTEMPTS} times in a row, so it is not tried again: ask for a smaller "
            "picture or fewer methods, and look into the server's log."
        )
        with self._transaction() as db:
            db.execute(
                "UPDATE jobs SET state = 'queued' WHERE id = ? AND state = 'running' "
                "AND attempts < ?",
                (id, ATTEMPTS),
            )
            db.execute(
                "UPDATE jobs SET state = 'quarantined', ended = ?, error = ? "
                "WHERE id = ? AND state = 'running'",
                (time.time(), told, id),
            )

    def give_back(self, id: str) -> None:
        """Queue a running job again as if it had not been started.

        Raises:
            NotWritten: If the disk is full.
        """
        with self._transaction() as db:
            db.execute(
                "UPDATE jobs SET state = 'queued', attempts = attempts - 1, started = NULL "
                "WHERE id = ? AND state = 'running'",
                (id,),
            )

    def running(self) -> list[Job]:
        """The jobs that are marked as running: after a start, those that a crash left."""
        return [_job(row) for row in self._rows("SELECT * FROM jobs WHERE state = 'running'")]

    def stop_waiting(self, owner: str, id: str) -> bool:
        """Stop a job that has not begun; whether it was one.

        Raises:
            NotWritten: If the disk is full.
        """
        with self._transaction() as db:
            changed = db.execute(
                "UPDATE jobs SET state = 'stopped', ended = ?, error = ? "
                "WHERE owner = ? AND id = ? AND state = 'queued'",
                (time.time(), "It was stopped before it began.", owner, id),
            )
            return changed.rowcount > 0

    def ended(self, id: str) -> bool:
        """Whether a job neither waits nor runs."""
        return not self._rows(
            "SELECT 1 FROM jobs WHERE id = ? AND state IN ('queued', 'running')", id
        )

    def specs(self, owner: str) -> list[str]:
        """What the jobs of an owner are to do, as JSON: of all of them, the trash included."""
        return [row["spec"] for row in self._rows("SELECT spec FROM jobs WHERE owner = ?", owner)]

    # Looking

    def job(self, owner: str, id: str) -> Job:
        """A job, with its position and the time that it still takes.

        Raises:
            NoSuchJob: If the owner has none of that id.
        """
        rows = self._rows("SELECT * FROM jobs WHERE owner = ? AND id = ?", owner, id)
        if not rows:
            raise NoSuchJob(f"There is no job {id[:40]!r} of yours: `history` lists those.")
        return self._placed([self._shown(rows[0])])[0]

    def history(
        self, owner: str, words: Sequence[str], deleted: bool, limit: int, before: float | None
    ) -> list[Job]:
        """Jobs of an owner, the newest first; all words occur in what is searched."""
        where = ["owner = ?", f"deleted IS {'NOT ' * deleted}NULL", *[MATCHES] * len(words)]
        values: list[object] = [owner, *(word.lower() for word in words)]
        if before is not None:
            where.append("created < ?")
            values.append(before)
        rows = self._rows(
            f"SELECT * FROM jobs WHERE {' AND '.join(where)} ORDER BY created DESC, seq DESC "
            "LIMIT ?",
            *values,
            limit,
        )
        return self._placed([self._shown(row) for row in rows])

    def _shown(self, row: sqlite3.Row) -> Job:
        """A job with the speed-up that is known by now, where its plan has methods."""
        job = _job(row)
        if job.result is None or row["configuration"] is None or len(job.spec.plan) < 2:
            return job
        found = speedup(job.result.seconds, self.stock(row["configuration"]))
        return replace(job, result=job.result.model_copy(update={"speedup": found}))

    def _placed(self, jobs: list[Job]) -> list[Job]:
        if all(job.state in ENDED for job in jobs):
            return jobs
        places = self._places()
        return [
            replace(job, position=places[job.id][0], eta=places[job.id][1])
            if job.id in places
            else job
            for job in jobs
        ]

    def _places(self) -> dict[str, tuple[int | None, float | None]]:
        """Position and seconds to go of every job that has not ended."""
        known: dict[str, float | None] = {}
        running = self._rows("SELECT * FROM jobs WHERE state = 'running'")
        waiting = self._rows(QUEUE)
        eta = ends(
            [self._load(row, known, time.time() - row["started"]) for row in running],
            [self._load(row, known) for row in waiting],
            self._devices,
        )
        places = {row["id"]: row["place"] for row in waiting}
        return {id: (places.get(id), seconds) for id, seconds in eta.items()}

    def _load(self, row: sqlite3.Row, known: dict[str, float | None], spent: float = 0.0) -> Load:
        """A job as the devices see it, after so many seconds of its run."""
        whole = self._estimate(row, known)
        left = None if whole is None else max(0.0, whole - spent)
        return Load(row["id"], row["device"], left, row["kind"] == "measure")

    def _estimate(self, row: sqlite3.Row, known: dict[str, float | None]) -> float | None:
        """Seconds that a job takes: as equal ones took, else as those of its model and kind."""
        workload = row["workload"]
        if workload not in known:
            seconds = self._measured("workload = ?", workload) or self._measured(
                "model = ? AND kind = ?", row["model"], row["kind"]
            )
            known[workload] = median(seconds) if seconds else None
        return known[workload]

    def _measured(self, where: str, *values: str) -> list[float]:
        rows = self._rows(
            f"SELECT ended - started AS seconds FROM jobs WHERE {where} AND state = 'done' "
            "ORDER BY ended DESC LIMIT ?",
            *values,
            LATEST,
        )
        return [row["seconds"] for row in rows]

    # The trash

    def set_deleted(self, owner: str, id: str, deleted: bool) -> None:
        """Put a job into the trash, or take it out.

        Raises:
            NoSuchJob: If the owner has none of that id.
            NotWritten: If the disk is full.
        """
        with self._transaction() as db:
            changed = db.execute(
                "UPDATE jobs SET deleted = ? WHERE owner = ? AND id = ?",
                (time.time() if deleted else None, owner, id),
            )
        if not changed.rowcount:
            raise NoSuchJob(f"There is no job {id[:40]!r} of yours: `history` lists those.")

    def purge(self, owner: str, remove: Callable[[str], None]) -> int:
        """Forget the jobs in the trash of an owner that have ended; returns how many.

        Args:
            owner: Whose trash.
            remove: Called with each id, before the job is forgotten: removes its files.

        Raises:
            NotWritten: If the disk is full.
        """
        where = f"owner = ? AND deleted IS NOT NULL AND state IN {ENDED}"
        ids = [row["id"] for row in self._rows(f"SELECT id FROM jobs WHERE {where}", owner)]
        for id in ids:
            remove(id)
            with self._transaction() as db:
                db.execute("DELETE FROM jobs WHERE id = ?", (id,))
        return len(ids)

    # What was measured

    def add_stock(self, configuration: str, seconds: Sequence[float]) -> None:
        """Keep the seconds of stock runs of a configuration.

        Raises:
            NotWritten: If the disk is full.
        """
        now = time.time()
        with self._transaction() as db:
            db.executemany(
                "INSERT INTO stock VALUES (?, ?, ?)", [(configuration, one, now) for one in seconds]
            )

    def stock(self, configuration: str) -> list[tuple[float, float]]:
        """The latest stock runs of a configuration: (seconds, when)."""
        rows = self._rows(
            "SELECT seconds, at FROM stock WHERE configuration = ? ORDER BY at DESC LIMIT ?",
            configuration,
            3 * LATEST,
        )
        return [(row["seconds"], row["at"]) for row in rows]

    def fact(self, name: str) -> str | None:
        """What was kept under a name."""
        rows = self._rows("SELECT value FROM facts WHERE name = ?", name)
        return rows[0]["value"] if rows else None

    def keep(self, name: str, value: str) -> None:
        """Keep something under a name, and of its kind no more than the newest ``FACTS``.

        Args:
            name: Its first word is the kind.
            value: What is kept.

        Raises:
            NotWritten: If the disk is full.
        """
        kind = name.partition(" ")[0]
        with self._transaction() as db:
            db.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (name, value))
            db.execute(
                "DELETE FROM facts WHERE rowid IN (SELECT rowid FROM facts "
                "WHERE name >= ? AND name < ? ORDER BY rowid DESC LIMIT -1 OFFSET ?)",
                (f"{kind} ", f"{kind}!", FACTS),
            )


def speedup(seconds: float, stock: Sequence[tuple[float, float]]) -> Speedup | None:
    """How many times faster than the stock runs (seconds, when): by their median and quartiles."""
    if not stock:
        return None
    times = sorted(one for one, _ in stock)
    low, middle, high = quantiles(times, n=4, method="inclusive") if len(times) > 1 else times * 3
    return Speedup(
        ratio=middle / seconds,
        low=low / seconds,
        high=high / seconds,
        baseline_seconds=middle,
        measured=datetime.fromtimestamp(max(at for _, at in stock)).date().isoformat(),
    )


def _job(row: sqlite3.Row) -> Job:
    result = row["result"]
    return Job(
        id=row["id"],
        owner=row["owner"],
        group=row["party"],
        spec=Spec.model_validate_json(row["spec"]),
        state=row["state"],
        attempts=row["attempts"],
        created=row["created"],
        started=row["started"],
        ended=row["ended"],
        result=None if result is None else Result.model_validate_json(result),
        error=row["error"],
        deleted=row["deleted"],
    )
