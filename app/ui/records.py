"""What the gallery shows of a job: which file, what it says under it, what it was made from."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from accel.plan import GUARD, RESERVED
from app.files import without_folders
from app.request import FILES
from app.serve.jobs import PLACE, NoSuchJob, Result
from app.ui import parts
from app.ui.words import Language, say

if TYPE_CHECKING:
    from app.serve.jobs import Job
    from app.serve.service import Service

SHOWN = ("picture", "film", "sheet", "accelerated", "baseline")
"""Roles of files that stand for a job, the first that it has."""
PAGE = 60
"""Jobs on a page of the gallery."""
READ = 200
"""Jobs that are read at once: more than a group has."""
ANY = ""
"""The value of a filter that lets everything through."""
CAPTION = 90
"""Characters of a prompt under a picture."""


@dataclass(frozen=True)
class Filter:
    """Which jobs are wanted.

    Attributes:
        search: Words that all occur in prompt, title, model or methods.
        kind: ``generate``, ``compare`` or ``ANY``.
        model: Its name, or ``ANY``.
        deleted: Those in the trash instead.
    """

    search: str = ""
    kind: str = ANY
    model: str = ANY
    deleted: bool = False

    def takes(self, job: Job) -> bool:
        """Whether a job is of the wanted kind and model, and something can be shown of it."""
        return (
            job.ended is not None
            and job.spec.kind != "measure"
            and self.kind in (ANY, job.spec.kind)
            and self.model in (ANY, job.spec.request.get("model"))
        )


def page(service: Service, owner: str, wanted: Filter, count: int = PAGE) -> list[Job]:
    """The newest jobs that a filter takes, at most ``count``."""
    return list(islice(_all(service, owner, wanted), count))


def _all(service: Service, owner: str, wanted: Filter) -> Iterator[Job]:
    """All jobs that a filter takes. Jobs of a group were created at the same moment."""
    before, seen = None, set[str]()
    while True:
        jobs = service.history(
            owner, search=wanted.search, deleted=wanted.deleted, limit=READ, before=before
        )
        fresh = [job for job in jobs if job.id not in seen]
        yield from filter(wanted.takes, fresh)
        if len(jobs) < READ or not fresh:
            return
        seen |= {job.id for job in fresh}
        before = math.nextafter(jobs[-1].created, math.inf)


def left(job: Job) -> dict[str, str]:
    """The names of the files that a job left, by role."""
    return {} if job.result is None else job.result.files


def file(service: Service, job: Job, role: str) -> Path | None:
    """A file of a job; ``None`` where it left none of that role, or it is gone."""
    if role not in left(job):
        return None
    try:
        return service.file(job.owner, job.id, role)
    except NoSuchJob:
        return None


def files(service: Service, job: Job) -> dict[str, Path]:
    """The files of a job that are there, by role."""
    found = {role: file(service, job, role) for role in left(job)}
    return {role: path for role, path in found.items() if path is not None}


def gone(service: Service, job: Job) -> list[str]:
    """The names of the files that a job left and that are gone: somebody deleted them."""
    there = files(service, job)
    return [name for role, name in left(job).items() if role not in there]


def role(service: Service, job: Job) -> str | None:
    """Which file stands for a job; ``None`` where none is there."""
    return next((name for name in SHOWN if file(service, job, name) is not None), None)


def address(job: Job, role: str) -> str:
    """Where a browser gets a file of a job, seen from the page: no folder of the server."""
    return f"{PLACE.removeprefix('/')}/jobs/{job.id}/files/{role}"


def card(service: Service, job: Job, language: Language) -> tuple[str, str] | None:
    """The file of a job and what is said under it; ``None`` where there is no picture."""
    paths = (file(service, job, name) for name in SHOWN)
    shown = next(filter(None, paths), None)
    return None if shown is None else (str(shown), caption(job, language))


def why_none(job: Job, language: Language) -> str:
    """Why there is no picture of a job."""
    was_there = any(name in left(job) for name in SHOWN)
    return job.error or say("gallery_gone" if was_there else "gallery_nothing", language)


def told(job: Job) -> Job:
    """A job as others are told of it: its files by name, without the folders of this machine."""
    asked = {
        name: Path(value).name if name in FILES and value else value
        for name, value in job.spec.request.items()
    }
    return replace(
        job,
        spec=job.spec.model_copy(update={"request": asked}),
        result=None if job.result is None else _told(job.result),
        error=None if job.error is None else without_folders(job.error),
    )


def _told(result: Result) -> Result:
    verdicts = {
        method: {name: without_folders(text) for name, text in verdict.items()}
        for method, verdict in result.verdicts.items()
    }
    notes = [without_folders(note) for note in result.notes]
    return result.model_copy(update={"verdicts": verdicts, "notes": notes})


def caption(job: Job, language: Language) -> str:
    """Prompt, what was chosen, and how much faster it was."""
    prompt = str(job.spec.request.get("prompt", ""))
    short = prompt if len(prompt) <= CAPTION else f"{prompt[: CAPTION - 1]}…"
    speedup = job.result.speedup if job.result else None
    told = [short, job.spec.title, parts.speedup(speedup, language) if speedup else ""]
    return " · ".join(filter(None, told))


def details(job: Job, language: Language) -> Markup:
    """A job as HTML: what became of it, how fast it was, and all of its settings."""
    job = told(job)
    result = job.result
    heads = [say("gallery_setting", language), say("gallery_value", language)]
    return Markup("\n").join(
        [
            parts.outcome(job, language),
            parts.badge(result, language),
            parts.guarded(result, language),
            parts.banner(result, language),
            parts.table(say("gallery_settings", language), heads, settings(job, language)),
            parts.quality_table(result, language),
            parts.timeline(result, language),
        ]
    )


def settings(job: Job, language: Language) -> list[tuple[str, str]]:
    """Name and value of everything that a job was made from."""
    made = datetime.fromtimestamp(job.created).astimezone().strftime("%Y-%m-%d %H:%M")
    chosen = [(name, str(value)) for name, value in job.spec.request.items()]
    return [
        (say("gallery_made", language), made),
        (say("gallery_chosen", language), job.spec.title),
        *chosen,
        *_fields(job.spec.plan),
    ]


def _fields(plan: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The methods of a plan as it was kept, though none of them may be installed any more."""
    return [
        (f"{family}.{kind}", ", ".join(f"{field} = {value}" for field, value in fields.items()))
        for family, kinds in _families(plan)
        for kind, fields in kinds.items()
    ] + [
        (GUARD, ", ".join(f"{field} = {value}" for field, value in fields.items()))
        for family, fields in plan.items()
        if family == GUARD
    ]


def _families(plan: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return [item for item in plan.items() if item[0] not in RESERVED]


def without(jobs: list[Job], language: Language) -> Markup:
    """A table of jobs of which there is no picture, and why."""
    rows = [
        (
            caption(job, language),
            say(f"part_state_{job.state}", language),
            why_none(told(job), language),
        )
        for job in jobs
    ]
    heads = [say(f"gallery_{name}", language) for name in ("job", "state", "reason")]
    return parts.table(say("gallery_without", language), heads, rows) if rows else parts.NOTHING
