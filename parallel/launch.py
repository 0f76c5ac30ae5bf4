"""Start processes that work together, or join those that somebody else has started.

`spread` starts them on this machine and ends them all as soon as one fails: nobody waits for a
process that will not answer. Under torchrun, or as a task of Slurm, `joined` finds the others by
what these tell every process. Either way all processes compare their versions first.
"""

from __future__ import annotations

import os
import re
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accel import errors
from accel.errors import AccelError, BadInput

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from multiprocessing.process import BaseProcess

    from torch.distributed.distributed_c10d import Store

PATIENCE = 600.0
"""Seconds that a process waits for the others at one exchange."""

PORTS = 20_000
"""Jobs of Slurm meet at a port from here on, which follows from the job's number."""

GRACE = 1.0
"""Seconds that a failure waits for others, which may have been there before it."""

PACKAGES = ("diffusers-accel", "torch", "diffusers", "transformers")
"""Packages that all processes need in the same version."""


class Lost(AccelError):
    """A process of several has died, or does not answer; the picture could not be made."""


@dataclass(frozen=True)
class Place:
    """Where a process stands among all.

    Attributes:
        rank: Which one it is.
        size: How many there are.
        local: Which one it is on its machine: its device, where there are several.
    """

    rank: int
    size: int
    local: int


def told(told_by: Mapping[str, str]) -> Place | None:
    """What torchrun or Slurm has told this process of its place; ``None``: it is alone.

    Args:
        told_by: The environment that it was started in.
    """
    for rank, size, local in (
        ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
        ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
    ):
        if all(name in told_by for name in (rank, size, local)) and int(told_by[size]) > 1:
            return Place(int(told_by[rank]), int(told_by[size]), int(told_by[local]))
    return None


def meeting(told_by: Mapping[str, str]) -> str:
    """Where processes meet that others have started: torchrun says it; Slurm names its nodes.

    Raises:
        BadInput: If neither has.
    """
    if "MASTER_ADDR" in told_by:
        return "env://"
    nodes, job = told_by.get("SLURM_STEP_NODELIST", ""), told_by.get("SLURM_JOB_ID", "0")
    first = re.match(r"([^\[,]+)(?:\[(\d+))?", nodes)  # "gpu[03-05,9],other": gpu03
    if first is None:
        raise BadInput(
            "Several processes were started, and nobody says where they meet: set MASTER_ADDR and "
            "MASTER_PORT to the first one's machine and a free port."
        )
    return f"tcp://{first[1]}{first[2] or ''}:{PORTS + int(job) % 10_000}"


@contextmanager
def joined(place: Place, store: Store | None = None, patience: float = PATIENCE) -> Iterator[None]:
    """Inside, this process is one of several, which all are there and of the same versions.

    Args:
        place: Which one it is.
        store: Where they meet; ``None``: at the address and port that the environment names.
        patience: Seconds that it waits for the others at one exchange.

    Raises:
        BadInput: If a process has other versions than the first one.
        Lost: If not all of them come.
    """
    import torch

    # Its functions have the group of all for a default: imported once there is one, they would keep
    # it, and its threads, beyond the end, where the interpreter may abort on them.
    import torch.distributed.nn.functional
    from torch import distributed

    if torch.cuda.is_available():
        torch.cuda.set_device(place.local)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    met: dict[str, Any] = {"store": store} if store else {"init_method": meeting(os.environ)}
    try:
        distributed.init_process_group(
            backend,
            rank=place.rank,
            world_size=place.size,
            timeout=timedelta(seconds=patience),
            **met,
        )
    except (RuntimeError, ValueError) as error:
        raise Lost(
            f"Process {place.rank} of {place.size} did not find the others ({_first(error)}): "
            "start as many as were announced, within the time, on machines that reach each other."
        ) from error
    try:
        _compare_versions(place)
        yield
    finally:
        distributed.destroy_process_group()


def agreed(value: Any) -> Any:
    """What the first process has, in all of them: a seed that was drawn, a name that was made."""
    from torch import distributed

    held = [value]
    distributed.broadcast_object_list(held)
    return held[0]


def _compare_versions(place: Place) -> None:
    from torch import distributed

    mine = {name: version(name) for name in PACKAGES}
    found: list[Any] = [None] * place.size
    distributed.all_gather_object(found, mine)
    for rank, theirs in enumerate(found):
        for name in PACKAGES:
            if theirs[name] != found[0][name]:
                raise BadInput(
                    f"Process {rank} has {name} {theirs[name]} and process 0 has {found[0][name]}: "
                    "install the same versions on all machines."
                )


def spread(size: int, function: Callable[..., Any], *args: Any, patience: float = PATIENCE) -> Any:
    """Run a function in several processes of this machine that have joined each other.

    Args:
        size: How many.
        function: Importable; called as ``function(place, *args)``. What all but the first print is
            not shown.
        *args: What it is given; is sent to other processes.
        patience: Seconds that a process waits for the others at one exchange.

    Returns:
        What it returned in the first process.

    Raises:
        AccelError: What one of them raised.
        Lost: If one of them died, or raised something else.
    """
    import multiprocessing

    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="accel-") as folder, ExitStack() as stack:
        members: list[tuple[BaseProcess, Connection]] = []
        stack.callback(_end, members)
        for rank in range(size):
            ours, theirs = context.Pipe(duplex=False)
            place = Place(rank, size, rank)
            process = context.Process(
                target=_member,
                args=(theirs, place, str(Path(folder) / "store"), patience, function, args),
                daemon=True,
            )
            process.start()
            theirs.close()
            members.append((process, ours))
        answers = _heard(members)
    failed = [answer for answer in answers.values() if isinstance(answer, Failure)]
    if failed:
        raise min(failed, key=lambda failure: failure.moment).error
    return answers[0]


@dataclass(frozen=True)
class Failure:
    """How a process ended that did not answer.

    Attributes:
        moment: When, as `time.monotonic` has it on this machine; 0 if it died without a word. The
            first to fail is the one to blame: the others fail because it is gone.
        error: What is to be raised of it.
    """

    moment: float
    error: BaseException


def _heard(members: list[tuple[BaseProcess, Connection]]) -> dict[int, Any]:
    """What the processes answer: all of them, or until a moment after one has failed."""
    from multiprocessing.connection import wait

    answers: dict[int, Any] = {}
    left: float | None = None
    while len(answers) < len(members):
        links = {link: rank for rank, (_, link) in enumerate(members) if rank not in answers}
        ready = wait(list(links), left)
        if not ready:
            break
        for link in ready:
            rank = links[link]  # type: ignore[index]
            answers[rank] = _answer(link, rank, members[rank][0])
            left = GRACE if isinstance(answers[rank], Failure) else left
    return answers


def _answer(link: Any, rank: int, process: BaseProcess) -> Any:
    try:
        kind, value = link.recv()
    except EOFError:
        process.join()
        lost = Lost(
            f"Process {rank} died (exit code {process.exitcode}), so all were ended and nothing "
            "was written: out of memory is the usual reason; ask for less, or for more processes."
        )
        return Failure(0.0, lost)
    if kind == "done":
        return value
    moment, name, text = value
    known = KeyboardInterrupt if name == "KeyboardInterrupt" else getattr(errors, name, Lost)
    return Failure(moment, known(text))


def _end(members: list[tuple[BaseProcess, Connection]]) -> None:
    for process, _ in members:
        process.kill()
    for process, link in members:
        process.join()
        link.close()


def _member(
    link: Connection,
    place: Place,
    store: str,
    patience: float,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    """One process: says how it ended, always."""
    import torch
    from torch.distributed import FileStore  # type: ignore[attr-defined]

    threads = max(1, (os.cpu_count() or 1) // place.size)
    torch.set_num_threads(threads)
    with ExitStack() as stack:
        if place.rank:
            quiet = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(redirect_stdout(quiet))
            stack.enter_context(redirect_stderr(quiet))
        try:
            with joined(place, FileStore(store, place.size), patience):
                try:
                    link.send(("done", function(place, *args)))
                except BaseException as error:  # said before the others lose this process
                    link.send(("failed", _told(error, place)))
        except Exception as error:
            link.send(("failed", _told(error, place)))


def _told(error: BaseException, place: Place) -> tuple[float, str, str]:
    """When, what and why, for the process that has started this one."""
    moment = time.monotonic()
    if isinstance(error, (AccelError, KeyboardInterrupt)):
        return moment, type(error).__name__, str(error)
    where = traceback.format_exception(error)[-2].strip().splitlines()[0]
    text = f"Process {place.rank} failed: {type(error).__name__}: {_first(error)} ({where})"
    return moment, "Lost", f"{text}. All were ended, and nothing was written."


def _first(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]
