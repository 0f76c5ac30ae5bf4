"""A job runs: rows are made and entered, until all are there or somebody stops it."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import typer

from accel.errors import NotWritten
from app.batch import grouping, job, manifest, planning, report
from app.batch.dispatch import Dispatcher, Fatal, Rules
from app.batch.engine import Engine
from app.batch.grouping import Call
from app.batch.job import Row, Ways
from app.batch.manifest import Begun, Ended, Failed, Line, Made, Manifest
from app.batch.planning import Plans
from app.batch.storage import Storage
from app.exits import FAILED, INTERRUPTED, PARTIAL, say
from app.progress import Bar

ABANDONED = 600.0
"""Seconds after which a half-written file is no other shard's any more."""

ROUNDS = 3
"""How often rows are made again whose files are gone at the end."""


@dataclass
class Running:
    """One call of ``accel batch``, from its first line in the manifest to its exit code.

    Attributes:
        ways: What holds for all rows.
        storage: The output.
        plans: What is to be done.
        engine: Who does it.
        ledger: This writer's manifest.
        started: When the command began, by `time.monotonic`.
        made, failed: Rows so far.
    """

    ways: Ways
    storage: Storage
    plans: Plans
    engine: Engine
    ledger: Manifest
    started: float
    made: int = 0
    failed: int = 0
    _interrupted: bool = field(default=False, init=False)

    def run(self, style: str) -> None:
        """Make what is missing, say how it went, and end with the exit code for that.

        Args:
            style: Of stdout, ``text`` or ``json``.

        Raises:
            typer.Exit: Unless every row is there.
        """
        fatal = False
        try:
            self._make()
            self._conclude()
        except (Fatal, NotWritten) as error:
            say(f"error: {error}")
            fatal = True
        self._tell(style)
        if fatal:
            raise typer.Exit(FAILED)
        if self._interrupted:
            say("interrupted: what was made is kept; the same command goes on from here")
            raise typer.Exit(INTERRUPTED)
        if self._absent:
            raise typer.Exit(PARTIAL)

    def _make(self) -> None:
        options, plans = self.ways.options, self.plans
        self._sweep()
        self._write([self._begun()])
        known = planning.sizes(options, plans)
        sizes = planning.settled(plans, known, self.engine, self._write)
        skipped = len(plans.rows) - len(plans.pending)
        say(f"{len(plans.pending)} rows to make, {skipped} there already or set aside")
        with Bar() as bar:
            advance = bar.count("rows", len(plans.pending))

            def enter(lines: list[Line]) -> None:
                self._write(lines)
                for line in lines:
                    self.made += isinstance(line, Made)
                    self.failed += isinstance(line, Failed)
                    advance()

            rules = Rules(options.retries, options.timeout, options.on_error == "stop")
            dispatcher = Dispatcher(self.engine, rules, enter, say)
            try:
                with _interruptible(dispatcher):
                    self._until_there(dispatcher, grouping.calls(plans.rows, sizes))
                self._interrupted = dispatcher.interrupted
            except KeyboardInterrupt:
                self._interrupted = True
        self.engine.close()
        self._sweep()

    def _sweep(self) -> None:
        """Remove what killed workers have left half-written; other shards may be at work."""
        self.storage.sweep(ABANDONED if self.ways.options.shard else 0.0)

    def _begun(self) -> Begun:
        asked = {name: str(value) for name, value in self.ways.defaults.items()}
        options = self.ways.options
        return Begun(
            rows=self.plans.total,
            seed=self.ways.seed,
            moment=datetime.now().astimezone().isoformat(timespec="seconds"),
            command={"input": options.input, **asked, "batch": options.together},
        )

    def _write(self, lines: list[Line]) -> None:
        self.ledger.write(lines)
        for line in lines:
            self.plans.state.add(line)

    def _until_there(self, dispatcher: Dispatcher, calls: Sequence[Call]) -> None:
        """Make rows, and make those again whose files somebody took away in the meantime."""
        wanted = dict(self.plans.pending)
        for _ in range(ROUNDS):
            dispatcher.run(calls, wanted)
            if dispatcher.stopping:
                return
            made, there = self.plans.state.made, self.storage.exists
            wanted = {id: row for id, row in wanted.items() if id in made and not there(row.file)}
            if not wanted:
                return
            say(f"warning: {len(wanted)} files were removed while the job ran: once more")
        raise Fatal(f"{len(wanted)} files are removed as fast as they are made: see who does that.")

    @property
    def _absent(self) -> int:
        """Rows of this shard that are not there."""
        made = self.plans.state.made
        return sum(row.id not in made for row in self.plans.rows)

    def _conclude(self) -> None:
        """Enter the end, and write what is there beside the pictures."""
        state, options = self.plans.state, self.ways.options
        left = sum(id not in state.made and id not in state.failed for id in self.plans.pending)
        ended = Ended(
            seconds=time.monotonic() - self.started,
            made=self.made,
            failed=self.failed,
            left=left,
            workers=self.engine.count,
        )
        self._write([ended])
        title = Path(options.input).name if options.input != "-" else "stdin"
        everything = manifest.read(self.storage)  # of all shards
        contents = report.files(everything, self.plans.total, self.storage, title)
        again = [_again(row) for row in self.plans.rows if row.id in state.failed]
        contents["failures.jsonl"] = "".join(json.dumps(row) + "\n" for row in again).encode()
        try:
            self.storage.put(contents)
        except NotWritten as error:
            say(f"warning: the report was not written: {error}")

    def _tell(self, style: str) -> None:
        """Say how it went: to a person, and on stdout."""
        rows, state = self.plans.rows, self.plans.state
        seconds = time.monotonic() - self.started
        failed = [row for row in rows if row.id in state.failed]
        there = len(rows) - self._absent
        pace = f", {self.made / seconds:.2f} rows a second" if self.made else ""
        say(f"{there} of {len(rows)} rows are there: {self.made} made in {seconds:.1f} s{pace}")
        for row in failed[: job.SHOWN]:
            one = state.failed[row.id]
            say(f"failed{' (set aside)' * one.quarantined}: {row.where}, {row.id}: {one.reason}")
        page = f"{self.storage.where}/report.html"
        document = {
            "out": self.storage.where,
            "rows": len(rows),
            "there": there,
            "made": self.made,
            "failed": {row.id: state.failed[row.id].reason for row in failed},
            "left": len(rows) - there - len(failed),
            "seconds": seconds,
            "report": page,
        }
        typer.echo(json.dumps(document) if style == "json" else page)


def _again(row: Row) -> dict[str, Any]:
    """A row as an input has it."""
    asked = replace(row.request, device=None).to_dict()
    plan = row.form.plan.to_dict()
    return {"id": row.id, **asked, **({"plan": plan} if len(row.form.plan) else {})}


@contextmanager
def _interruptible(dispatcher: Dispatcher) -> Iterator[None]:
    """Inside, the first Ctrl-C (or SIGTERM) ends what runs, the second one breaks it off."""

    def stop(_signal: int, _frame: Any) -> None:
        if dispatcher.interrupted:
            raise KeyboardInterrupt
        dispatcher.interrupt()
        say("interrupted: what has begun is finished; once more breaks it off")

    before = {sign: signal.signal(sign, stop) for sign in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for sign, handler in before.items():
            signal.signal(sign, handler)
