"""The service: what pages and REST routes call. Safe to call from many threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from app.request import Source
from app.serve.fitting import Fits
from app.serve.jobs import Figure, Job, ModelInfo, Progress, Spec
from app.serve.limits import Limits
from app.session import Session

Opener = Callable[[Source], Session]
"""Loads a source. Importable by name, because the worker process imports it."""


class Service:
    """Jobs of owners: admitted, run by a worker process a device, kept with their files.

    Args:
        folder: Where the database, the outputs and the uploads lie; made if it is not there.
        limits: What is admitted.
        devices: A worker each; none: one worker on the device that torch takes by default.
        opener: What loads a model, in the worker process.

    Attributes:
        folder: ``folder/outputs/OWNER/JOB/…`` hold the results: all that may be served as files.
        limits: As given.
    """

    def __init__(
        self,
        folder: Path,
        *,
        limits: Limits = Limits(),  # noqa: B008 - frozen
        devices: tuple[str, ...] = (),
        opener: Opener = Session.open,
    ) -> None:
        self.folder = folder
        self.limits = limits

    @property
    def paused(self) -> str | None:
        """Why the queue stands still (the disk is full), in a sentence, or ``None``."""
        raise NotImplementedError

    @property
    def outputs(self) -> Path:
        """The folder below which every file that ``file`` gives lies."""
        raise NotImplementedError

    def start(self) -> None:
        """Start the workers. What a crash left running is queued once more, then quarantined.

        Raises:
            BadInput: If another server runs on the same folder.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Stop the workers. A running job is queued again, and the attempt does not count."""
        raise NotImplementedError

    def submit(self, owner: str, specs: Sequence[Spec], group: str | None = None) -> list[Job]:
        """Admit jobs: all of them, or none.

        Args:
            owner: The login name; ``local`` where there is no login.
            specs: What to do. Seeds that are not given are drawn.
            group: What the jobs belong to, if to anything.

        Raises:
            BadInput: If a request is beyond the limits, or has fields that are not known.
            PlanError: If a plan is none; ``Conflict`` if its methods do not go together.
            UnsupportedModel: If a method of a plan does not fit the model.
            NoSuchJob: If ``against`` is no job of the owner.
            Busy: If the queue is full.
            NotWritten: If the disk is full.
        """
        raise NotImplementedError

    def job(self, owner: str, id: str) -> Job:
        """A job as it is now.

        Raises:
            NoSuchJob: If the owner has none of that id.
        """
        raise NotImplementedError

    def watch(self, owner: str, id: str) -> Iterator[Job | Progress]:
        """Follow a job: first the job, then changes as they come, at last the job as it ended.

        At most 10 items a second. Ends by itself; may be entered again at any time, by many.

        Raises:
            NoSuchJob: If the owner has none of that id (when first asked for an item).
        """
        raise NotImplementedError

    def cancel(self, owner: str, id: str) -> Job:
        """Stop a job: a queued one at once, a running one within a step; an ended one stays.

        Raises:
            NoSuchJob: If the owner has none of that id.
        """
        raise NotImplementedError

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
            search: Words that all occur in prompt, title, model or methods, in any case.
            deleted: Those in the trash, instead of the others.
            limit: At most so many, 1 to 500.
            before: Only those created before this moment (unix seconds).
        """
        raise NotImplementedError

    def delete(self, owner: str, id: str) -> None:
        """Put a job into the trash; one that has not ended is stopped.

        Raises:
            NoSuchJob: If the owner has none of that id.
        """
        raise NotImplementedError

    def restore(self, owner: str, id: str) -> None:
        """Take a job out of the trash.

        Raises:
            NoSuchJob: If the owner has none of that id.
        """
        raise NotImplementedError

    def purge(self, owner: str) -> int:
        """Empty the trash of an owner, files included; returns how many jobs are gone."""
        raise NotImplementedError

    def file(self, owner: str, id: str, role: str) -> Path:
        """A file of a result, by its role (``Result.files``); lies below ``outputs``.

        Raises:
            NoSuchJob: If the owner has none of that id, or it has no such file.
        """
        raise NotImplementedError

    def upload(self, owner: str, name: str, content: bytes | Path) -> Path:
        """Check a file that came from outside, and keep it under a name of our own.

        Args:
            owner: Whose requests may refer to it.
            name: What its sender calls it; only for error messages.
            content: Its bytes, or the path where the web framework has put it.

        Returns:
            The path for ``image``, ``mask``, ``control`` or ``lora`` of a request.

        Raises:
            BadInput: If it is too large, or neither a picture (PNG, JPEG, WebP) nor safetensors.
            NotWritten: If the disk is full.
        """
        raise NotImplementedError

    def models(self) -> list[ModelInfo]:
        """The models that may be named in a request."""
        raise NotImplementedError

    def fits(self, model: str) -> Fits:
        """Which methods fit a model, and which go together. Waits where it is not known yet.

        Raises:
            BadInput: If the model is not offered.
            BadModel: If it cannot be loaded.
        """
        raise NotImplementedError

    def figures(self, model: str) -> dict[str, Figure]:
        """By preset, what was measured on this machine; empty before that.

        Raises:
            BadInput: If the model is not offered.
        """
        raise NotImplementedError

    def measure(self, owner: str, model: str) -> Job:
        """Queue the measurement of the presets; it goes after, and gives way to, all other jobs.

        Raises:
            BadInput: If the model is not offered.
            Busy: If the queue is full.
        """
        raise NotImplementedError
