"""Who performs tasks on many machines: actors of a Ray cluster.

A worker is an actor, or several that make a row together; its resources are held by a placement
group of its own, so that one that died starts again where it stood. A worker that has no room in
the cluster yet keeps no row waiting: when another one has nothing to do, it takes over.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self
from uuid import uuid4

from accel.errors import AccelError, BadInput
from app.batch import worker
from app.batch.engine import Died, Event
from app.batch.storage import open_storage
from app.batch.tasks import Answer, Began, Make, Message, Task
from app.batch.worker import Opener, Station, Worker
from app.exits import say
from app.request import Batch
from parallel.launch import Place

ANSWER = 10.0
"""Seconds that a machine is given to take a connection."""

REACH = 60.0
"""Seconds that a cluster is given to let us in: Ray itself tries for minutes."""

SOON = 10.0
"""Seconds after which it is said that a worker waits for room in the cluster."""

LOOK = 1.0
"""Seconds between two looks at workers that wait."""

LOSSES = 3
"""How often in a row actors are started that get lost before they are ready: no row is to blame."""

GRACE = 30.0
"""Seconds that the others of a gang are given once it is known how their task ended."""

KNOCK = "import logging, sys, ray; ray.init(address=sys.argv[1], logging_level=logging.ERROR)"
"""What another process runs to see whether a cluster lets us in."""


class Member:
    """An actor: a worker, or one of several processes that make a row together.

    Args:
        station: Where it stands.
        opener: What loads a model.
        folder: Where the job was started: relative names in rows are meant from there.
    """

    def __init__(self, station: Station, opener: Opener, folder: str) -> None:
        self._station = station
        self._opener = opener
        self._joined = ExitStack()  # left by the end of the process
        self._store: Any = None
        self._first = True
        if Path(folder).is_dir():
            os.chdir(folder)

    def host(self, size: int) -> tuple[str, int]:
        """Open the store through which the others find each other: its machine and its port."""
        import ray
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        machine = ray.util.get_node_ip_address()
        self._store = TCPStore(machine, 0, size, is_master=True, wait_for_workers=False)
        return machine, self._store.port

    def arrive(self, place: Place, meeting: tuple[str, int] | None, probe: str) -> str:
        """Get ready for tasks.

        Args:
            place: Which of the processes of this worker it is.
            meeting: Machine and port of the store, if there are several.
            probe: A file that lies in the output; empty: nobody asks for it.

        Returns:
            The address of this machine if the file is not seen here, else nothing.
        """
        import ray

        if probe and not open_storage(self._station.place).exists(probe):
            return str(ray.util.get_node_ip_address())
        if meeting is not None:
            self._join(place, *meeting)
        self._worker = Worker(self._station, self._opener)
        return ""

    def _join(self, place: Place, machine: str, port: int) -> None:
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        from parallel import launch

        self._first = place.rank == 0
        store = self._store or TCPStore(machine, port, place.size, is_master=False)
        self._joined.enter_context(launch.joined(place, store))

    def perform(self, task: Task) -> list[Message]:
        """Perform a task; only the first of several writes.

        Returns:
            What it gave. That it was begun, whoever sent it has said.
        """
        if isinstance(task, Make) and not self._first:
            task = replace(task, wanted=frozenset())
        said: list[Message] = []
        worker.perform(self._worker, task, said.append)
        return [message for message in said if not isinstance(message, Began)]


@dataclass
class _Gang:
    """Actors that make a row together: one, as a rule.

    Attributes:
        station: Where they stand.
        group: The placement group that holds their resources; ``None``: it was never started.
        members: The actors; none: they are started with the next task.
        arrived: Whether all of them are ready for tasks.
        started: When they were.
        task: What they are at, or will be as soon as they are ready.
        owed: What they have not answered yet: which of them, by Ray's reference.
        answers: What they have said of the task, in this order.
        known: Since when it is known how the task ended, though not all have answered.
        said: What nobody has heard yet.
        reason: Why they are to be ended.
        lost: Whether that is because the cluster lost them before they were ready.
        losses: How often that was so, in a row.
    """

    station: Station
    group: Any = None
    members: list[Any] = field(default_factory=list)
    arrived: bool = False
    started: float = 0.0
    task: Task | None = None
    owed: dict[Any, int] = field(default_factory=dict)
    answers: dict[int, list[Message]] = field(default_factory=dict)
    known: float | None = None
    said: list[Message | Died] = field(default_factory=list)
    reason: str = ""
    lost: bool = False
    losses: int = 0

    @property
    def waits(self) -> bool:
        """Whether the cluster has no room for it yet."""
        return bool(self.members) and not self.arrived and not _has_room(self.group)

    @property
    def idle(self) -> bool:
        """Whether it could begin a task now."""
        return self.arrived and self.task is None and not self.reason

    def begin(self) -> None:
        """Hand the task to all members."""
        assert self.task is not None
        self.answers, self.known = {}, None
        self.owed = {each.perform.remote(self.task): n for n, each in enumerate(self.members)}
        if isinstance(self.task, Make):
            self.said.append(Began(self.task.key))

    @property
    def outcome(self) -> list[Message]:
        """What is known of the task: what the first one says, or a failure of another one."""
        failed = [one for said in self.answers.values() for one in said if _is_failure(one)]
        first = self.answers.get(0, [])
        return failed[:1] if any(map(_is_failure, first)) else first or failed[:1]

    def conclude(self) -> None:
        """Say how the task ended, if it has: once all have answered, or had their time for it."""
        outcome = self.outcome
        if not outcome:
            return
        now = time.monotonic()
        self.known = self.known or now
        if not self.owed or now - self.known > GRACE:
            self.said += outcome
            self.task = None

    def forget(self) -> None:
        """Be as before the first task: the actors are dead."""
        self.members, self.owed, self.answers = [], {}, {}
        self.arrived, self.task, self.reason, self.lost = False, None, "", False


class Cluster:
    """Actors of a Ray cluster. Connected inside ``with``.

    Args:
        options: Of the job.
        place: Of the output.
        opener: What loads a model.
        device: Where rows run that name none; ``None``: a GPU, where the cluster has some.
    """

    def __init__(self, options: Batch, place: str, opener: Opener, device: str | None) -> None:
        self._options = options
        self._place = place if "://" in place else str(Path(place).absolute())
        self._opener = opener
        self._device = device
        self._gangs: list[_Gang] = []
        self._ray: Any = None
        self._actor: Any = None
        self._need: dict[str, float] = {}
        self._probe = ""
        self._connected = ExitStack()
        self._looked = 0.0
        self._told = False

    def __enter__(self) -> Self:
        try:
            self._ray = _imported()
            if not self._ray.is_initialized():
                self._connect(self._options.address)
            self._settle()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def count(self) -> int:
        """How many workers there are."""
        return len(self._gangs)

    @property
    def ahead(self) -> int:
        """One: calls of one actor do not overlap."""
        return 1

    def _connect(self, address: str | None) -> None:
        """Join a cluster, or start one.

        Raises:
            AccelError: If that cannot be done.
        """
        _reach(address)
        self._connected.enter_context(_quiet())
        try:
            self._ray.init(
                address=address,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        except Exception as error:  # whatever Ray makes of it
            raise AccelError(_unreached(address, _line(error))) from error
        self._connected.callback(self._ray.shutdown)

    def _settle(self) -> None:
        """See how many workers there are to be, and what each needs.

        Raises:
            BadInput: If the cluster is too small for them.
        """
        options = self._options
        gpus = int(self._ray.cluster_resources().get("GPU", 0))
        on_gpus = gpus > 0 and self._device in (None, "cuda")
        count = options.workers or max(1, gpus // options.devices if on_gpus else 1)
        threads = options.threads or 1
        self._need = {"GPU": 1} if on_gpus else {"CPU": threads}
        self._check_room(count)
        device = "cuda" if on_gpus else self._device or "cpu"
        stations = (
            Station(f"worker-{number}", self._place, device, None if on_gpus else threads)
            for number in range(count)
        )
        self._gangs = [_Gang(station) for station in stations]
        self._actor = self._ray.remote(Member)
        if "://" not in self._place and not options.dry_run:
            self._probe = f".accel-{uuid4().hex}"
            open_storage(self._place).put({self._probe: b""})

    def _check_room(self, count: int) -> None:
        """Refuse what the machines of the cluster could not hold if nobody else used them."""
        devices = self._options.devices
        ((kind, each),) = self._need.items()
        nodes = (node["Resources"] for node in self._ray.nodes() if node["Alive"])
        room = sum(int(node.get(kind, 0) // each) for node in nodes)
        if room < count * devices:
            asked = f"{count} worker{'s' * (count > 1)}" + f" of {devices}" * (devices > 1)
            raise BadInput(
                f"{asked}: the cluster has room for {room} processes of {self._needed} each: give "
                "fewer --workers, --devices or --threads, or start more nodes first."
            )

    @property
    def _needed(self) -> str:
        """What a process takes, in words."""
        return "".join(f"{n:g} {kind}{'s' * (n > 1)}" for kind, n in self._need.items())

    def start(self) -> None:
        """Ask the cluster for the first worker."""
        self._advance(self._gangs[0])

    def send(self, number: int, task: Task) -> None:
        """Give a worker a task; it is started where it does not run."""
        self._gangs[number].task = task
        self._advance(self._gangs[number])

    def _advance(self, gang: _Gang) -> None:
        """Start a worker that does not run; let one that is ready begin its task."""
        try:
            if not gang.members:
                self._start(gang)
            elif gang.arrived and gang.task is not None:
                gang.begin()
        except Exception as error:  # it cannot be sent, for instance
            gang.reason = _line(error)

    def _start(self, gang: _Gang) -> None:
        """Ask the cluster for a worker; nothing is waited for."""
        from ray.util import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        size = self._options.devices
        gang.started = time.monotonic()
        gang.group = gang.group or placement_group([self._need] * size, strategy="PACK")
        for rank in range(size):
            kept = PlacementGroupSchedulingStrategy(gang.group, placement_group_bundle_index=rank)
            asked = self._actor.options(
                num_cpus=self._need.get("CPU", 0),
                num_gpus=self._need.get("GPU", 0),
                max_restarts=0,
                max_task_retries=0,
                scheduling_strategy=kept,
            )
            gang.members.append(asked.remote(gang.station, self._opener, str(Path.cwd())))
        meeting = gang.members[0].host.remote(size) if size > 1 else None
        gang.owed = {
            each.arrive.remote(Place(rank, size, 0), meeting, self._probe): rank
            for rank, each in enumerate(gang.members)
        }

    def events(self, seconds: float) -> list[Event]:
        """What workers have said, and which have died."""
        self._look_after_waiting()
        ready = self._ready(seconds)
        for number in range(self.count):
            self._hear(number, ready)
        heard = [(n, said) for n, gang in enumerate(self._gangs) for said in gang.said]
        for gang in self._gangs:
            gang.said = []
        return heard

    def _ready(self, seconds: float) -> set[Any]:
        """References that have come true; waits for the first of them if there is nothing else."""
        owed = [one for gang in self._gangs for one in gang.owed]
        if any(gang.said or gang.reason for gang in self._gangs):
            seconds = 0.0
        if not owed:
            time.sleep(seconds)
            return set()
        if self._ray.wait(owed, timeout=seconds)[0]:
            return set(self._ray.wait(owed, num_returns=len(owed), timeout=0)[0])
        return set()

    def _hear(self, number: int, ready: set[Any]) -> None:
        """Take what a worker's actors have answered."""
        gang = self._gangs[number]
        for one in [one for one in gang.owed if one in ready]:
            rank = gang.owed.pop(one)
            try:
                answer = self._ray.get(one)
            except Exception as error:  # it died, or something was raised in it
                gang.lost = gang.lost or (not gang.arrived and self._is_lost(error))
                gang.reason = gang.reason or _line(error)
            else:
                self._take(gang, rank, answer)
        if gang.reason:
            self._bury(number)
        else:
            self._go_on(gang)

    def _take(self, gang: _Gang, rank: int, answer: Any) -> None:
        """Take an answer: to a task, or whether an actor is ready for tasks.

        Raises:
            AccelError: If it is not: it does not see the output.
        """
        if gang.arrived:
            gang.answers[rank] = answer
        elif answer:
            raise AccelError(
                f"{self._place} is not shared with node {answer}: give a folder that all nodes "
                "see, or an address such as s3://…"
            )

    def _is_lost(self, error: Exception) -> bool:
        """Whether it is Ray that lost an actor, and not the actor that could not be made."""
        gone = isinstance(error, self._ray.exceptions.RayActorError)
        return gone and "creation task" not in str(error)

    def _bury(self, number: int) -> None:
        """Take a worker for dead; start it again if no task can have been the reason."""
        gang = self._gangs[number]
        task, reason, again = gang.task, gang.reason, gang.lost and gang.losses < LOSSES
        self._end(gang)
        if again and task is not None:
            gang.losses += 1
            self.send(number, task)
        else:
            gang.losses = 0
            gang.said.append(Died(reason))

    def _go_on(self, gang: _Gang) -> None:
        """Begin what waited for the actors to be ready; conclude what they have answered."""
        if gang.arrived and gang.task is not None:
            gang.conclude()
            if gang.task is None and gang.owed:  # the others are out of step
                self._end(gang)
        elif gang.members and not gang.arrived and not gang.owed:
            gang.arrived, gang.losses = True, 0
            self._advance(gang)

    def _look_after_waiting(self) -> None:
        """Let idle workers take over from those that have no room; say that these wait."""
        now = time.monotonic()
        if now - self._looked < LOOK:
            return
        self._looked = now
        waiting = [n for n, gang in enumerate(self._gangs) if gang.waits]
        idle = [n for n, gang in enumerate(self._gangs) if gang.idle]
        busy = [n for n in waiting if self._gangs[n].task is not None]
        for number, other in zip(busy, idle, strict=False):
            self._change_places(number, other)
        long = any(now - self._gangs[n].started > SOON for n in waiting)
        if long and not self._told:
            say(
                f"the cluster has no room yet for {len(waiting)} of {self.count} workers "
                f"({self._options.devices} × {self._needed}): waiting for it"
            )
        self._told = bool(waiting) and (self._told or long)

    def _change_places(self, number: int, other: int) -> None:
        """An idle worker takes the number of one that waits, and its task."""
        waiting, idle = self._gangs[number], self._gangs[other]
        self._gangs[number], self._gangs[other] = idle, waiting
        task, waiting.task = waiting.task, None
        assert task is not None
        self.send(number, task)

    def kill(self, number: int, reason: str) -> None:
        """End a worker, whatever it is at."""
        self._gangs[number].reason = reason  # heard of in `events`
        self._slay(self._gangs[number])

    def _slay(self, gang: _Gang) -> None:
        for member in gang.members:
            with suppress(Exception):  # it is dead, or Ray is
                self._ray.kill(member, no_restart=True)

    def _end(self, gang: _Gang) -> None:
        self._slay(gang)
        gang.forget()

    def close(self) -> None:
        """End all, and leave the cluster."""
        for gang in self._gangs:
            self._end(gang)
            if gang.group is not None:
                with suppress(Exception):  # Ray is dead
                    self._ray.util.remove_placement_group(gang.group)
                gang.group = None
        if self._probe:
            (Path(self._place) / self._probe).unlink(missing_ok=True)
            self._probe = ""
        self._connected.close()


def _imported() -> Any:
    """Ray.

    Raises:
        BadInput: If it is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise BadInput(
            "--engine ray needs Ray, which is not installed: pip install 'diffusers-accel[cluster]'"
        ) from error
    return ray


def _reach(address: str | None) -> None:
    """See, in time, that a cluster lets us in; none is needed where no address is given.

    Raises:
        AccelError: If it does not.
    """
    if address == "local":
        return
    host, _, port = (address or "").rpartition("://")[2].rpartition(":")
    if host and port.isdigit():
        try:
            socket.create_connection((host, int(port)), ANSWER).close()
        except OSError as error:
            raise AccelError(_unreached(address, str(error))) from error
    knock = [sys.executable, "-P", "-c", KNOCK, address or "auto"]
    try:
        found = subprocess.run(knock, capture_output=True, timeout=REACH, check=False, text=True)
    except subprocess.TimeoutExpired as error:
        raise AccelError(_unreached(address, f"no answer for {REACH:g} s")) from error
    if address is not None and found.returncode:
        raise AccelError(_unreached(address, (found.stderr.strip().splitlines() or [""])[-1]))


def _unreached(address: str | None, reason: str) -> str:
    where = f"at {address}" if address else "that this machine belongs to"
    return (
        f"The Ray cluster {where} cannot be joined ({reason}): see `ray status` on its head, and "
        "give --address HOST:PORT of that, or --address local for this machine alone."
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside, Ray does not print deaths of actors: it would to stdout, and has no option for it."""
    from ray._private import worker as driver

    driver._worker_logs_enabled = False
    try:
        yield
    finally:
        driver._worker_logs_enabled = True


def _has_room(group: Any) -> bool:
    """Whether the cluster holds a placement group's resources; its own `wait` says so late."""
    from ray.util import placement_group_table

    return bool(placement_group_table(group)["state"] == "CREATED")


def _is_failure(message: Message) -> bool:
    return isinstance(message, Answer) and message.how in ("failed", "model")


def _line(error: Exception) -> str:
    """What was raised in an actor, by Ray or here, in one line."""
    text = str(error).strip()
    because = re.search(r"(?:is dead because|is unavailable:) (.+?)\.(?: |$)", text, re.MULTILINE)
    if because:
        return because[1]
    cause = getattr(error, "cause", None)
    if cause is None and "ray::" in text:  # a traceback
        return text.splitlines()[-1]
    cause = cause or error
    first = (str(cause).strip().splitlines() or ["no message"])[0]
    return first if isinstance(cause, AccelError) else f"{type(cause).__name__}: {first}"
