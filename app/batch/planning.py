"""What a job has to do: everything that is known, and refused, before the first row is made."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from accel.errors import AccelError, BadInput
from app.batch import grouping, job, manifest
from app.batch.dispatch import LISTEN
from app.batch.engine import Died, Engine
from app.batch.job import Form, Row
from app.batch.manifest import Line, Sized, State
from app.batch.rows import Problem
from app.batch.storage import Storage, digest
from app.batch.tasks import Check, Checked, Fit, Measure, Measured
from app.exits import say
from app.request import Batch

MOST = 32
"""Rows in a call that are tried at most, where nobody says how many."""

WORTHWHILE = 8
"""Rows of a group from which on it is measured how many of them go into a call; fewer go alone."""

PIXEL = 3
"""Bytes of a pixel of a file, at most."""

Write = Callable[[list[Line]], None]


@dataclass(frozen=True)
class Plans:
    """All that is known before the first row is made.

    Attributes:
        rows: Of this shard.
        total: Rows of the whole input.
        fits: By group.
        state: What the folder holds already.
        pending: The rows that are to be made, by id, in the order of the input.
    """

    rows: list[Row]
    total: int
    fits: dict[str, Fit]
    state: State
    pending: dict[str, Row]

    @property
    def room(self) -> int:
        """Bytes that the files to be made may take."""
        return sum(self.fits[row.form.group].pixels for row in self.pending.values()) * PIXEL


def plan(
    options: Batch, storage: Storage, made: Sequence[Row], total: int, engine: Engine
) -> Plans:
    """Check forms, names, folder and room; find out what is missing.

    Args:
        options: Of the job.
        storage: Its output.
        made: The rows of this shard.
        total: Rows of the whole input.
        engine: Its first worker asks the pipelines.

    Raises:
        AccelError: What is wrong.
    """
    forms = {row.form.group: row.form for row in made}
    fits = _fits(engine, list(forms.values()))
    job.refuse(_unfit(made, fits))
    named = job.named(made, {name: fit.suffix for name, fit in fits.items()}, options.name)
    state = manifest.read(storage)
    _check_folder(options, storage, state, named)
    pending = {row.id: row for row in named if _is_pending(row, options, storage, state)}
    plans = Plans(named, total, fits, state, pending)
    _check_room(storage, plans)
    return plans


def _fits(engine: Engine, forms: Sequence[Form]) -> dict[str, Fit]:
    """What the pipelines say of some forms."""
    engine.send(0, Check(tuple(forms)))
    while True:
        for _, event in engine.events(LISTEN):
            if isinstance(event, Checked):
                return {fit.group: fit for fit in event.fits}
            if isinstance(event, Died):
                raise AccelError(
                    f"The process that checks the models died ({event.reason}): see whether "
                    "`accel explain --model …` works."
                )


def _unfit(made: Iterable[Row], fits: Mapping[str, Fit]) -> list[Problem]:
    """Rows that their pipelines refuse."""
    found = []
    for row in made:
        fit = fits[row.form.group]
        if fit.refusal:
            found.append(Problem(row.where, fit.refusal))
        elif fit.prompted and not row.prompt.strip():
            found.append(Problem(row.where, "the prompt is empty: say what to draw."))
        elif not fit.prompted and row.prompt:
            found.append(Problem(row.where, "this model takes no prompt: leave it out."))
    return found


def _check_folder(options: Batch, storage: Storage, state: State, named: Sequence[Row]) -> None:
    """Refuse a folder that is somebody else's, or that is not to be gone on with.

    Raises:
        BadInput: If it is.
    """
    for line in state.damaged:
        say(f"warning: {storage.where}/{line} is damaged: what it said is made again")
    if options.overwrite:
        return
    if state.begun and options.resume is False:
        raise BadInput(
            f"{storage.where} holds an earlier run: go on with it by --resume, make all again by "
            "--overwrite, or give another --out."
        )
    if not (state.begun or state.damaged or storage.empty()):
        there = next((row.file for row in named if storage.exists(row.file)), None)
        if there is not None:
            raise BadInput(
                f"{storage.where}/{there} is there already, and no run of `accel batch` wrote it: "
                "give another --out, or --overwrite."
            )


def _is_pending(row: Row, options: Batch, storage: Storage, state: State) -> bool:
    """Whether a row has to be made."""
    if options.overwrite:
        return True
    failed = state.failed.get(row.id)
    if failed is not None and failed.hash == row.hash and failed.quarantined:
        return options.requeue
    made = state.made.get(row.id)
    if made is None or made.hash != row.hash or made.file != row.file:
        return True
    return digest(storage, row.file) != made.sha256


def _check_room(storage: Storage, plans: Plans) -> None:
    """Refuse a job that its disk has no room for.

    Raises:
        BadInput: If it has none.
    """
    needed, free = plans.room, storage.free()
    if free is not None and free < needed:
        raise BadInput(
            f"{storage.where} has {free / 2**20:.0f} MiB free, and {len(plans.pending)} rows may "
            f"need {needed / 2**20:.0f}: free some space, or give another --out."
        )


def size(options: Batch) -> int | None:
    """Rows in a call, if somebody says how many.

    Raises:
        BadInput: If it is no number.
    """
    if options.together == "auto":
        return None
    if not options.together.isdigit() or not 1 <= int(options.together) <= 1024:
        raise BadInput(f"--batch {options.together}: give a number from 1 to 1024, or auto.")
    return int(options.together)


def sizes(options: Batch, plans: Plans) -> dict[str, int | None]:
    """Rows in a call, by group: as it was said, as it was before; ``None``: to be measured."""
    asked, found = size(options), dict[str, int | None]()
    for group, rows in grouping.groups(plans.rows).items():
        known = None if options.overwrite else plans.state.sizes.get(group)
        few = len(rows) < WORTHWHILE or options.devices > 1
        idle = not any(row.id in plans.pending for row in rows)
        if asked is not None:
            found[group] = asked
        elif known is not None:
            found[group] = known.size
        else:
            found[group] = 1 if few or idle else None
    return found


def settled(
    plans: Plans, known: Mapping[str, int | None], engine: Engine, write: Write
) -> dict[str, int]:
    """All sizes; what is measured for that is written down before a row is made with it."""
    members = grouping.groups(plans.rows)
    tasks = [Measure(group, tuple(members[group][:MOST])) for group in known if not known[group]]
    found = {group: each for group, each in known.items() if each}
    for one in measured(engine, tasks):
        found[one.group] = one.size
        write([Sized(group=one.group, size=one.size, seconds=one.seconds, note=one.note)])
        say(_told(one, len(members[one.group])))
    return found


def measured(engine: Engine, tasks: Iterable[Measure]) -> Iterator[Measured]:
    """Measure groups, one after another, alone: times beside others' work say nothing."""
    for task in tasks:
        engine.send(0, task)
        answer = None
        while answer is None:
            for _, event in engine.events(LISTEN):
                if isinstance(event, Measured):
                    answer = event
                elif isinstance(event, Died):
                    answer = Measured(task.group, 1, note=f"not measured: {event.reason}")
        yield answer


def _told(found: Measured, rows: int) -> str:
    tried = ", ".join(f"{size}: {1000 * each:.0f}" for size, each in found.seconds.items())
    times = f" (ms a row of a short run, by rows in a call: {tried})" if tried else ""
    note = f"; {found.note}" if found.note else ""
    return f"{rows} rows alike: {found.size} in a call{times}{note}"
