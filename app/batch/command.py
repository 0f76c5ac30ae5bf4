"""``accel batch``: what was typed, checked and handed on."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from pathlib import Path

import typer

from accel.errors import BadInput
from app.batch import job, naming, planning
from app.batch import rows as inputs
from app.batch.engine import Engine, Local
from app.batch.forecast import forecast, lacking, shown
from app.batch.job import Row, Ways
from app.batch.manifest import Manifest
from app.batch.planning import Plans
from app.batch.running import Running
from app.batch.storage import Folder, Storage, open_storage
from app.batch.worker import Opener, Station, opened
from app.flags import Given
from app.request import Batch, Choice, Printing, Settings, make


def batch(given: Given, opener: Opener = opened) -> None:
    """Make the rows of an input.

    Args:
        given: The options that were typed.
        opener: What loads a model, in the workers.

    Raises:
        AccelError: What was typed cannot be done; nothing was made then.
        typer.Exit: With 1, 3 or 130, after what could be made was made.
    """
    started = time.monotonic()
    options = make(Batch, given)
    _check(options)
    ways, style = _ways(options, given), make(Printing, given).format
    storage = open_storage(options.out)
    if not options.dry_run:
        storage.prepare()
    with ExitStack() as stack:
        if not options.dry_run:
            stack.enter_context(_alone(storage, _writer(options)))
        engine = stack.enter_context(_engine(options, ways, storage, opener))
        engine.start()
        made, total = _rows(options, ways)
        plans = planning.plan(options, storage, made, total, engine)
        if options.dry_run:
            _show(options, storage, plans, engine, style)
        else:
            ledger = Manifest(storage, _writer(options))
            Running(ways, storage, plans, engine, ledger, started).run(style)


def _check(options: Batch) -> None:
    """Refuse options that say nothing, or contradict each other.

    Raises:
        BadInput: If they do.
    """
    for wrong, told in {
        not options.input: "INPUT is missing: give a file of rows, or - for stdin.",
        not options.out: "--out is missing: give the folder that the results go to.",
    }.items():
        if wrong:
            raise BadInput(told)
    if options.overwrite and options.resume:
        raise BadInput("--overwrite makes all rows again, --resume does not: leave one out.")
    if options.measure and not options.dry_run:
        raise BadInput("--measure goes with --dry-run: without it, rows are made anyway.")
    naming.check_template(options.name)
    planning.size(options)
    _shard(options)


def _shard(options: Batch) -> tuple[int, int]:
    """Which part of the rows, from 0, and of how many.

    Raises:
        BadInput: If it is none.
    """
    if options.shard is None:
        return 0, 1
    part, _, parts = options.shard.partition("/")
    if not (part.isdigit() and parts.isdigit() and 1 <= int(part) <= int(parts)):
        raise BadInput(f"--shard {options.shard}: give I/N with I from 1 to N, such as 2/8.")
    return int(part) - 1, int(parts)


def _writer(options: Batch) -> str:
    """The name of this writer's manifest."""
    part, parts = _shard(options)
    return "manifest.jsonl" if parts == 1 else f"manifest-{part + 1}of{parts}.jsonl"


def _ways(options: Batch, given: Given) -> Ways:
    known = {one.name for one in fields(Settings)} - {"seed"}
    defaults = {name: value for name, value in given.items() if name in known}
    return Ways(options, defaults, make(Choice, given), make(Settings, given).seed or 0)


def _rows(options: Batch, ways: Ways) -> tuple[list[Row], int]:
    """The rows of this shard, and how many there are in all."""
    made, problems = job.rows(inputs.read(options.input), ways)
    job.refuse(problems)
    if not made:
        raise BadInput(f"{options.input} holds no row: give a prompt a line, or see the docs.")
    part, parts = _shard(options)
    return [row for row in made if row.index % parts == part], len(made)


@contextmanager
def _alone(storage: Storage, writer: str) -> Iterator[None]:
    """Inside, no other call of this command writes the same manifest; the kernel sees to it."""
    from filelock import FileLock, Timeout

    if not isinstance(storage, Folder):
        yield
        return
    lock = FileLock(Path(storage.where) / f".{writer}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise BadInput(
            f"Another `accel batch` is at work in {storage.where}: wait for it, give another "
            "--out, or share the rows out with --shard."
        ) from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _engine(options: Batch, ways: Ways, storage: Storage, opener: Opener) -> Iterator[Engine]:
    """The workers; none is started yet."""
    device = ways.defaults.get("device")
    if options.engine == "ray":
        from app.batch.cluster import Cluster

        with Cluster(options, storage.where, opener, device) as cluster:
            yield cluster
        return
    with Local(_stations(options, storage.where, device), opener, options.devices) as local:
        yield local


def _stations(options: Batch, place: str, device: str | None) -> list[Station]:
    """A station for each worker of this machine: a GPU each, or a share of the cores."""
    gpus = _gpus() if device in (None, "cuda") else 0
    count = options.workers or max(1, gpus // options.devices)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    share = max(1, (cores or 1) // (count * options.devices))
    return [
        Station(
            f"worker-{number}",
            place,
            f"cuda:{number * options.devices % gpus}" if gpus else device or "cpu",
            None if gpus else options.threads or share,
        )
        for number in range(count)
    ]


def _gpus() -> int:
    """CUDA devices here; torch is not imported where there is no driver for them."""
    if os.name == "posix" and not any(Path("/dev").glob("nvidia[0-9]*")):
        return 0
    import torch

    return int(torch.cuda.device_count())


def _show(options: Batch, storage: Storage, plans: Plans, engine: Engine, style: str) -> None:
    """What would be done."""
    sizes = planning.sizes(options, plans)
    tasks = lacking(sizes, plans.rows) if options.measure else []
    measured = {one.group: one for one in planning.measured(engine, tasks)}
    found = forecast(plans, engine, sizes, measured, storage.free())
    if style == "json":
        typer.echo(json.dumps(found.to_dict()))
    else:
        shown(found)
