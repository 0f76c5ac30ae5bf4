"""The service: what pages and REST routes call. Safe to call from many threads."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from threading import Lock

from filelock import FileLock, Timeout
from pydantic import TypeAdapter

from accel.bundled import asset
from accel.errors import BadInput, BadModel
from accel.plan import Plan
from app.request import FILES, Request, Source, make
from app.serve import catalogue, downloads, limits, uploads
from app.serve.board import Board
from app.serve.fitting import Examiner, Fits
from app.serve.folders import Folders
from app.serve.jobs import ENDED, FIRST, Figure, Job, ModelInfo, NoSuchJob, Progress, Spec
from app.serve.limits import Limits
from app.serve.store import Draft, Store
from app.serve.supervisor import Room, Supervisor, recover, stop
from app.serve.worker import Opener
from app.session import Session

PAUSE, LOOK = 0.1, 0.25
"""Seconds: least between two items of a watcher, and most between two of its looks."""

MOVED = 1.0
"""Seconds by which the time that a job waits has to change before that is said."""

MOST = 500
"""Jobs in one answer of the history."""

LONGEST = 100
"""Characters of a group, and of a search."""

KNOWN = frozenset(field.name for field in fields(Request))

UNTIMED = ("prompt", "negative", "seed", "fps")
"""What of a request its time does not depend on."""

ID = re.compile("[0-9a-f]{32}")


class Service:
    """Jobs of owners: admitted, run by a worker process a device, kept with their files.

    Args:
        folder: Where the database, the outputs and the uploads lie; made if it is not there.
        limits: What is admitted.
        devices: A worker each; none: one worker on the device that torch takes by default.
        opener: What loads a model, in the worker process.
        room: What has to be free on the disk before a job is begun.
        tuned: Folder of plans that `accel tune` wrote; it is read once, here.

    Attributes:
        folder: ``folder/outputs/OWNER/JOB/…`` hold the results.
        limits: As given.
        plans: The tuned plans, for whichever model, by their files.

    Raises:
        BadInput: If the folder holds something else, or there is none of tuned plans.
        PlanError: If a file among the tuned plans is no plan.
    """

    def __init__(
        self,
        folder: Path,
        *,
        limits: Limits = Limits(),  # noqa: B008 - frozen
        devices: tuple[str, ...] = (),
        opener: Opener = Session.open,
        room: Room = Room(),  # noqa: B008 - frozen
        tuned: Path | None = None,
    ) -> None:
        self.plans = {} if tuned is None else _tuned(tuned)
        self.folder = folder.resolve()
        self.limits = limits
        self.folder.mkdir(parents=True, exist_ok=True)
        self._folders = Folders(self.folder)
        self._store = Store(self._folders.database, devices or (None,))
        self._board = Board()
        self._lock = FileLock(self._folders.lock)
        self._uploading = Lock()
        self._devices = devices
        self._examiner = Examiner(self._store, opener, next(iter(devices), None))
        self._downloads = downloads.Downloads(limits.models, self._store.keep)
        self._supervisors = [
            Supervisor(
                self._store, self._board, self._folders, opener, device, self._ahead(device), room
            )
            for device in devices or (None,)
        ]

    def _ahead(self, device: str | None) -> Source | None:
        """What a worker loads before there is a job: the model that is asked for by default."""
        source = Source(device=device)
        return source if source.model in self.limits.models else None

    @property
    def paused(self) -> str | None:
        """Why the queue stands still (the disk is full), in a sentence, or ``None``."""
        return self._board.paused

    @property
    def outputs(self) -> Path:
        """The folder below which every file that ``file`` gives lies."""
        return self._folders.outputs

    @property
    def processes(self) -> list[int]:
        """The ids of the worker processes that are alive."""
        found = (supervisor.process for supervisor in self._supervisors)
        return [process for process in found if process is not None]

    def start(self) -> None:
        """Start the workers. What a crash left running is queued once more, then quarantined.

        Raises:
            BadInput: If another server runs on the same folder.
            NotWritten: If the disk is full.
        """
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise BadInput(
                f"Another server runs on {self.folder}: stop that one, or give another folder."
            ) from error
        recover(self._store, self._folders)
        self._downloads.start()
        for supervisor in self._supervisors:
            supervisor.start()

    def close(self) -> None:
        """Stop the workers. A running job is queued again, and the attempt does not count."""
        for supervisor in self._supervisors:
            supervisor.close()
        self._downloads.close()
        self._examiner.close()
        self._store.close()
        self._lock.release()

    # Jobs

    def submit(self, owner: str, specs: Sequence[Spec], group: str | None = None) -> list[Job]:
        """Admit jobs: all of them, or none.

        Args:
            owner: The login name; ``local`` where there is no login.
            specs: What to do. Seeds that are not given are drawn.
            group: What the jobs belong to, if to anything; at most 100 characters.

        Raises:
            BadInput: If a request is beyond the limits, or has fields that are not known.
            PlanError: If a plan is none; ``Conflict`` if its methods do not go together.
            UnsupportedModel: If a method of a plan does not fit the model.
            NoSuchJob: If ``against`` is no job of the owner.
            Busy: If the queue is full.
            NotWritten: If the disk is full.
        """
        if len(specs) > self.limits.group:
            raise BadInput(
                f"{len(specs)} jobs at once, and this server takes at most {self.limits.group}: "
                "ask for fewer, and for the others later."
            )
        if group is not None and (len(group) > LONGEST or not _is_text(group)):
            raise BadInput(f"The group is no text of at most {LONGEST} characters.")
        if specs and specs[0].against == FIRST:
            raise BadInput(f"against {FIRST!r}: the first job cannot be measured against itself.")
        drafts = [self._draft(owner, spec) for spec in specs]
        ids = self._store.admit(owner, drafts, group, self.limits)
        self._board.wake()
        return [self._store.job(owner, id) for id in ids]

    def _draft(self, owner: str, spec: Spec) -> Draft:
        """A job as it is admitted: checked, with its seed and every field written out."""
        if not _is_text(spec.model_dump()):
            raise BadInput("The job holds text that is no Unicode, or nothing that JSON can hold.")
        request, plan = self._asked(owner, spec)
        if spec.against not in (None, FIRST):
            self.job(owner, spec.against)
        admitted = spec.model_copy(update={"request": request.to_dict(), "plan": plan.to_dict()})
        said = (request.prompt, request.negative, spec.title, request.model, spec.kind)
        methods = (method.name for method in plan)
        return Draft(
            admitted,
            request.model,
            request.device if self._devices else None,
            _workload(admitted),
            " ".join(filter(None, (*said, *methods, str(request.seed)))),
        )

    def _asked(self, owner: str, spec: Spec) -> tuple[Request, Plan]:
        """Request and plan, within the limits and fit for each other."""
        unknown = sorted(spec.request.keys() - KNOWN)
        if unknown:
            raise BadInput(
                f"A request has no field {unknown[0][:40]!r}: it has {', '.join(sorted(KNOWN))}."
            )
        request = make(Request, spec.request, where="").seeded()
        folder = self._folders.uploads(owner)
        with self._uploading:  # from here on, emptying the trash leaves them be
            uploads.renew(folder, uploads.named(spec.model_dump_json()))
        offered = request.model in self.limits.models
        call = catalogue.call(request.model) if offered else {}
        limits.check(request, self.limits, call, folder)
        if spec.repeats > self.limits.repeats:
            raise BadInput(f"repeats {spec.repeats}: at most {self.limits.repeats} are admitted.")
        if self._devices and request.device not in (None, *self._devices):
            raise BadInput(
                f"device {request.device!r}: this server has {', '.join(self._devices)}."
            )
        plan = Plan.from_dict(spec.plan)
        limits.check_plan(plan, self.limits, folder)
        self._examiner.check(request.model, plan)
        return request, plan

    def job(self, owner: str, id: str) -> Job:
        """A job as it is now.

        Raises:
            NoSuchJob: If the owner has none of that id.
        """
        if not ID.fullmatch(id):
            raise NoSuchJob("There is no such job: its id has 32 hexadecimal digits.")
        return self._store.job(owner, id)

    def watch(self, owner: str, id: str) -> Iterator[Job | Progress]:
        """Follow a job: first the job, then changes as they come, at last the job as it ended.

        A job comes again when its state, its position, the time that it waits (by more than a
        second) or the reason why the queue stands still has changed.

        At most 10 items a second. Ends by itself; may be entered again at any time, by many.

        Raises:
            NoSuchJob: If the owner has none of that id (when first asked for an item).
        """
        shown: tuple[Job, str | None] | None = None
        progress: Progress | None = None
        with self._board.watching(id):
            while True:
                job, paused = self.job(owner, id), self.paused
                if shown is None or paused != shown[1] or _differs(job, shown[0]):
                    shown = job, paused
                    yield job
                    time.sleep(PAUSE if job.state not in ENDED else 0.0)
                if job.state in ENDED:
                    return
                latest = self._board.next(id, progress, LOOK)
                if latest is not None:
                    progress = latest
                    yield latest
                    time.sleep(PAUSE)

    def cancel(self, owner: str, id: str) -> Job:
        """Stop a job: a queued one at once, a running one within a step; an ended one stays.

        Raises:
            NoSuchJob: If the owner has none of that id.
            NotWritten: If the disk is full.
        """
        self.job(owner, id)
        stop(self._store, self._board, owner, id)
        return self.job(owner, id)

    # The history

    def history(
        self,
        owner: str,
        *,
        search: str = "",
        deleted: bool = False,
        limit: int = 60,
        before: float | None = None,
    ) -> list[Job]:
        """Jobs of an owner, the newest first.

        Args:
            owner: Whose.
            search: Words that all occur in prompts, title, model, methods, kind or seed, in any
                case; the first 100 characters count.
            deleted: Those in the trash, instead of the others.
            limit: At most so many, 1 to 500.
            before: Only those created before this moment (unix seconds).
        """
        words = search[:LONGEST].encode(errors="replace").decode().split()
        return self._store.history(owner, words, deleted, min(max(limit, 1), MOST), before)

    def delete(self, owner: str, id: str) -> None:
        """Put a job into the trash; one that has not ended is stopped.

        Raises:
            NoSuchJob: If the owner has none of that id.
            NotWritten: If the disk is full.
        """
        self.cancel(owner, id)
        self._store.set_deleted(owner, id, True)

    def restore(self, owner: str, id: str) -> None:
        """Take a job out of the trash.

        Raises:
            NoSuchJob: If the owner has none of that id.
            NotWritten: If the disk is full.
        """
        self.job(owner, id)
        self._store.set_deleted(owner, id, False)

    def purge(self, owner: str) -> int:
        """Empty the trash of an owner, files included; returns how many jobs are gone.

        Uploads go too that no job of the owner names any more and that are older than an hour.

        Raises:
            NotWritten: If the disk refuses.
        """

        def remove(id: str) -> None:
            folder = self._folders.job(owner, id)
            if folder.is_dir():
                shutil.rmtree(folder)

        gone = self._store.purge(owner, remove)
        with self._uploading:
            named = {name for spec in self._store.specs(owner) for name in uploads.named(spec)}
            uploads.remove(self._folders.uploads(owner), named)
        return gone

    def file(self, owner: str, id: str, role: str) -> Path:
        """A file of a result, by its role (``Result.files``); lies below ``outputs``.

        Raises:
            NoSuchJob: If the owner has none of that id, or it has no such file.
        """
        job = self.job(owner, id)
        name = None if job.result is None else job.result.files.get(role)
        path = self._folders.job(owner, id) / (name or "")
        if name is None or not path.is_file():
            raise NoSuchJob(f"This job has no file {role[:40]!r}: see its `files`.")
        return path

    def upload(self, owner: str, name: str, content: uploads.Content) -> Path:
        """Check a file that came from outside, and keep it under a name of our own.

        Args:
            owner: Whose requests may refer to it.
            name: What its sender calls it; only for error messages.
            content: Its bytes, the path where the web framework has put it, or the open file.

        Returns:
            The path for ``image``, ``last``, ``mask``, ``control`` or ``lora`` of a request.

        Raises:
            BadInput: If it is too large, alone or with the owner's other uploads, or neither a
                picture (PNG, JPEG, WebP) nor safetensors.
            NotWritten: If the disk is full.
        """
        with self._uploading:
            return uploads.keep(self._folders.uploads(owner), name, content, self.limits)

    # Models

    def models(self) -> list[ModelInfo]:
        """The models that may be named in a request."""
        return [self._model(name) for name in catalogue.offered(self.limits)]

    def _model(self, name: str) -> ModelInfo:
        adapter = TypeAdapter(ModelInfo)
        fact = f"model {catalogue.signature(name)} {catalogue.controls(self.limits)}"
        known = self._store.fact(fact)
        if known is not None:
            return self._sized(adapter.validate_json(known))
        found = catalogue.info(name, self.limits)
        self._store.keep(fact, adapter.dump_json(found).decode())
        return self._sized(found)

    def _sized(self, info: ModelInfo) -> ModelInfo:
        """With the size of the download, where it is one and the hub has told it."""
        told = None if info.here else self._store.fact(downloads.fact(info.name))
        return info if told is None else replace(info, bytes=int(told))

    def fits(self, model: str) -> Fits:
        """Which methods fit a model, and which go together. Waits where it is not known yet.

        Raises:
            BadInput: If the model is not offered.
            BadModel: If it is not here, or cannot be loaded.
        """
        limits.check_offered(model, self.limits)
        return self._examiner.fits(model)

    def tuned(self, model: str) -> dict[Path, Plan]:
        """The tuned plans that are for a model, by their files. Waits where it is not known yet.

        Raises:
            BadInput: If the model is not offered.
        """
        limits.check_offered(model, self.limits)
        found = {path: self.refusal(model, plan) for path, plan in self.plans.items()}
        return {path: plan for path, plan in self.plans.items() if found[path] is None}

    def for_goal(self, model: str, goal: Sequence[str]) -> Plan:
        """The fastest of a model's tuned plans that was proven to hold a goal.

        Waits where it is not known yet what the model is.

        Args:
            model: The model.
            goal: Targets, such as ``ssim>=0.95``.

        Raises:
            BadInput: If the model is not offered, the goal is none, or no plan holds it.
        """
        from accel.tuning.library import fastest
        from accel.tuning.targets import Targets

        targets = Targets.parse(goal)
        where = f"this server's folder of plans (accel ui --tuned FOLDER) for {model}"
        return fastest(self.tuned(model), targets, where)[1]

    def refusal(self, model: str, plan: Plan) -> str | None:
        """Why what a tuned plan promises is not promised for a model; ``None``: it is.

        Waits where it is not known yet what the model is. Plans without evidence promise nothing.

        Raises:
            BadInput: If the model is not offered.
        """
        limits.check_offered(model, self.limits)
        if plan.tuned is None:
            return None
        try:
            return plan.tuned.misfit(self._examiner.network(model))
        except BadModel as error:
            return str(error)

    def figures(self, model: str) -> dict[str, Figure]:
        """By preset, what was measured on this machine; empty before that.

        Also before a worker has loaded its first model, and thereby said what machine this is.

        Raises:
            BadInput: If the model is not offered.
        """
        limits.check_offered(model, self.limits)
        for machine in self._board.machines:
            known = self._store.fact(catalogue.figures_of(model, machine))
            if known is not None:
                return TypeAdapter(dict[str, Figure]).validate_json(known)
        return {}

    def measure(self, owner: str, model: str) -> Job:
        """Queue the measurement of the presets; it goes after, and gives way to, all other jobs.

        One that the owner has waiting or running is given instead of a second one.

        Raises:
            BadInput: If the model is not offered.
            Busy: If the queue is full.
            NotWritten: If the disk is full.
        """
        limits.check_offered(model, self.limits)
        present = self._store.measuring(owner, model)
        if present is not None:
            return present
        captions = asset("prompts/scenes.txt").read_text(encoding="utf-8").splitlines()
        asked = {"model": model, "prompt": captions[0], "seed": 0}
        return self.submit(owner, [Spec(kind="measure", request=asked, title="presets")])[0]


def _tuned(folder: Path) -> dict[Path, Plan]:
    from accel.tuning.library import tuned_plans

    return tuned_plans(folder)


def _differs(job: Job, shown: Job) -> bool:
    """Whether there is something new to say of a job; while it runs, its progress says the time."""
    if (job.state, job.position) != (shown.state, shown.position):
        return True
    if job.state != "queued" or job.eta is None or shown.eta is None:
        return job.state == "queued" and job.eta != shown.eta
    return abs(job.eta - shown.eta) > MOVED


def _is_text(value: object) -> bool:
    """Whether JSON in UTF-8 can hold it."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except (UnicodeEncodeError, TypeError, ValueError, RecursionError):
        return False
    return True


def _workload(spec: Spec) -> str:
    """A hash that is equal for jobs which take equally long."""
    request = {name: value for name, value in spec.request.items() if name not in UNTIMED}
    request |= {name: True for name in FILES if name in request}  # only whether they are there
    told = [spec.kind, request, spec.plan, spec.repeats if spec.kind != "generate" else 1]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
