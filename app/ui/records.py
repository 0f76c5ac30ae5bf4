"""What the gallery shows of a job: which file, what it says under it, what it was made from."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

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


def role(job: Job) -> str | None:
    """Which file stands for a job; ``None`` where it left none."""
    files = {} if job.result is None else job.result.files
    return next((name for name in SHOWN if name in files), None)


def card(service: Service, job: Job, language: Language) -> tuple[str, str] | None:
    """The file of a job and what is said under it; ``None`` where it left no picture."""
    shown = role(job)
    if shown is None:
        return None
    return str(service.file(job.owner, job.id, shown)), caption(job, language)


def caption(job: Job, language: Language) -> str:
    """Prompt, what was chosen, and how much faster it was."""
    prompt = str(job.spec.request.get("prompt", ""))
    short = prompt if len(prompt) <= CAPTION else f"{prompt[: CAPTION - 1]}…"
    speedup = job.result.speedup if job.result else None
    told = [short, job.spec.title, parts.speedup(speedup, language) if speedup else ""]
    return " · ".join(filter(None, told))


def details(job: Job, language: Language) -> Markup:
    """A job as HTML: what became of it, how fast it was, and all of its settings."""
    result = job.result
    heads = [say("gallery_setting", language), say("gallery_value", language)]
    return Markup("\n").join(
        [
            parts.outcome(job, language),
            parts.badge(result, language),
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
        for family, kinds in plan.items()
        if family != "plan"
        for kind, fields in kinds.items()
    ]


def without(jobs: list[Job], language: Language) -> Markup:
    """A table of the jobs that left no picture, and why."""
    rows = [
        (
            caption(job, language),
            say(f"part_state_{job.state}", language),
            job.error or say("gallery_nothing", language),
        )
        for job in jobs
        if role(job) is None
    ]
    heads = [say(f"gallery_{name}", language) for name in ("job", "state", "reason")]
    return parts.table(say("gallery_without", language), heads, rows) if rows else parts.NOTHING
