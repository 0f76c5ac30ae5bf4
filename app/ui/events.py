"""What the events of all pages share: whose they are, and how a job is followed and shown."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import gradio as gr

from accel.errors import AccelError
from app.accounts import ANYBODY
from app.request import FILES
from app.serve.jobs import ENDED, Job, Progress, Spec
from app.ui import parts, records
from app.ui.words import Language, language_for, say

if TYPE_CHECKING:
    from gradio.components import Component

    from app.serve.service import Service

_PRIVATE: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
"""Of an event that shows its own progress, and is no endpoint."""
QUIET: dict[str, Any] = {**_PRIVATE, "queue": False}
"""Of an event that answers at once.

It stays out of Gradio's queue, whose stream ends with the event before: what joins in that moment
has no stream to answer by, and its button does nothing until the page asks for something else.
"""
LIVE: dict[str, Any] = {**_PRIVATE, "concurrency_limit": None}
"""Of an event that follows a job, or changes a state that others watch.

The service's own queue does the admission; Gradio tells of changed states by its stream alone.
"""
TURNS: dict[str, Any] = {**_PRIVATE, "concurrency_limit": 1}
"""Of an event that computes by itself, one at a time."""

View = dict[str, Any]
"""What a page shows, by the name of its component; what is not in it stays as it is."""

Updates = dict[Any, Any]
"""New values and properties, by component."""


def owner_of(request: gr.Request | None) -> str:
    """The login name of who sent a request."""
    return (request.username if request else None) or ANYBODY


def stored(service: Service, owner: str, values: Mapping[str, Any]) -> dict[str, Path]:
    """Keep the files of a form as uploads of an owner; their new paths by field.

    Raises:
        BadInput: If one is too large, or of a kind that is not taken.
        NotWritten: If the disk is full.
    """
    given = {name: Path(values[name]) for name in FILES if values.get(name)}
    return {name: service.upload(owner, path.name, path) for name, path in given.items()}


def compared(spec: Spec, repeats: int = 3) -> Spec:
    """The comparison of a job's picture with the stock pipeline's."""
    return spec.model_copy(update={"kind": "compare", "repeats": repeats, "against": None})


def follow(service: Service, owner: str, id: str, language: Language) -> Iterator[View]:
    """What to show while a job waits and runs, and once when it has ended.

    A job that comes again while it runs is shown with the progress that is known of it. Ends by
    itself; what is wrong (the job is gone) is shown as well.
    """
    latest: Progress | None = None
    try:
        for now in service.watch(owner, id):
            if isinstance(now, Progress):
                latest = now
            elif now.state != "running" or latest is None:
                latest = None
                missing = records.gone(service, now) if now.state in ENDED else []
                yield of_job(now, language, service.paused, missing)
                continue
            yield of_progress(latest, language, service.paused)
    except AccelError as error:
        yield refused(error)


def refused(error: Exception) -> View:
    """What to show of an error."""
    return {"progress": "", "preview": "", "banner": parts.error(str(error)), "runs": False}


def of_progress(now: Progress, language: Language, paused: str | None = None) -> View:
    """What to show while a job runs, or would run if the queue did not stand still."""
    told = parts.progress(now, language) + parts.paused(paused, language)
    view: View = {"progress": told, "runs": True}
    if now.preview is not None:
        view["preview"] = parts.preview(now.preview, language)
    return view


def of_job(
    job: Job, language: Language, paused: str | None = None, gone: Sequence[str] = ()
) -> View:
    """What to show of a job that waits, starts or has ended.

    Args:
        job: The job.
        language: Of the words.
        paused: Why the queue stands still, if it does.
        gone: Names of its files that are not there any more.
    """
    if job.state == "queued":
        text = parts.waiting(job, language) + parts.paused(paused, language)
        return {"progress": text, "preview": "", "runs": True}
    if job.state not in ENDED:
        return of_progress(Progress(job.id, "loading"), language, paused)
    told = records.told(job)
    result = told.result
    return {
        "progress": "",
        "preview": "",
        "runs": False,
        "badge": parts.badge(result, language),
        "guarded": parts.guarded(result, language),
        "banner": parts.outcome(told, language)
        + parts.gone(gone, language)
        + parts.banner(result, language),
        "timeline": parts.timeline(result, language),
        "job": job,
    }


@dataclass(frozen=True, kw_only=True)
class Watched(ABC):
    """A page that shows one job, from when it is submitted to its end.

    Attributes:
        service: What runs the jobs.
        shown: What is shown of a job, by the names of a ``View``, and the buttons of the page.
        watching: Id of the job that is shown, kept in the browser.
        cleared: The page before there is anything to show of a new job.
    """

    service: Service
    shown: dict[str, Component]
    watching: gr.BrowserState
    cleared: ClassVar[View]

    @abstractmethod
    def result(self, job: Job, request: gr.Request | None) -> Updates:
        """What a job left, on the components of this page."""

    def submitted(self, spec: Spec, request: gr.Request) -> Iterator[Updates]:
        """Submit a job, and show it until it has ended.

        That the plan is checked is said at once: a model which nobody has used yet takes seconds.
        """
        yield {
            self.shown["progress"]: parts.note(say("page_checking", language_for(request))),
            self.shown["run"]: gr.Button(interactive=False),
        }
        try:
            job = self.service.submit(owner_of(request), [spec])[0]
        except AccelError as error:
            yield self.refused(error)
            return
        yield {self.watching: job.id, **self.updates({**self.cleared, "runs": True}, request)}
        yield from self._followed(job.id, request)

    def reattach(self, watching: str | None, request: gr.Request) -> Iterator[Updates]:
        """After a reload: show the latest job again, and go on watching it."""
        try:
            job = self.service.job(owner_of(request), watching or "")
        except AccelError:
            yield {self.watching: None}
            return
        yield from self._followed(job.id, request)

    def _followed(self, id: str, request: gr.Request) -> Iterator[Updates]:
        """Show what has changed: a page draws anew all that it is sent."""
        shown: View = {}
        for view in follow(self.service, owner_of(request), id, language_for(request)):
            new = {name: value for name, value in view.items() if shown.get(name, ...) != value}
            shown |= view
            if new:
                yield self.updates(new, request)

    def stop(self, watching: str | None, request: gr.Request) -> Updates:
        """Stop the job that is watched."""
        try:
            self.service.cancel(owner_of(request), watching or "")
        except AccelError as error:
            return self.refused(error)
        return {self.shown["stop"]: gr.Button(interactive=False)}

    def refused(self, error: Exception) -> Updates:
        """Show an error."""
        return self.updates(refused(error), None)

    def updates(self, view: View, request: gr.Request | None) -> Updates:
        """A view on the components of this page."""
        found: Updates = {
            self.shown[name]: value for name, value in view.items() if name in self.shown
        }
        if "runs" in view:
            found[self.shown["run"]] = gr.Button(interactive=not view["runs"])
            found[self.shown["stop"]] = gr.Button(interactive=view["runs"])
        if "job" in view:
            found |= self.result(view["job"], request)
        return found
