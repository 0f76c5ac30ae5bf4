"""Pieces of HTML: what a run did, how far it is, how much faster it was, how near it came.

Every text that comes from a user, a model or an error is filled into a template by ``Markup``,
which escapes it; nothing is joined into HTML in another way.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from accel.report import INACTIVE
from app.files import without_folders
from app.ui.words import Language, number, say

if TYPE_CHECKING:
    from accel.tuned import Tuned
    from app.serve.jobs import Job, Progress, Result, Speedup

NOTHING = Markup()
STATES = ("computed", "reused", "predicted")
MARKS = {"computed": "■", "reused": "↻", "predicted": "∿", "mixed": "◪"}
"""What stands in a cell of the timeline: colour is never the only sign."""

_BADGE = Markup('<p class="accel-badge accel-{kind}"><strong>{head}</strong> {detail}</p>')
_BANNER = Markup('<div class="accel-banner accel-{kind}" role="{role}">{lines}</div>')
_QUIET = Markup('<p class="accel-quiet">{text}</p>')
_LINE = Markup("<p>{text}</p>")
_VERDICT = Markup("<p><strong>{method} {state}:</strong> {reason}</p>")
_SCROLLED = Markup(
    '<div class="accel-scroll" role="region" tabindex="0" aria-label="{name}">{table}</div>'
)
_TABLE = Markup(
    '<table class="accel-table {kind}"><caption>{caption}</caption>'
    "<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
)
_ROW = Markup('<tr><th scope="row">{name}</th>{cells}</tr>')
_COLUMN = Markup('<th scope="col">{text}</th>')
_CELL = Markup("<td>{text}</td>")
_STEP = Markup(
    '<td class="accel-{state}" title="{told}"><span aria-hidden="true">{mark}</span>'
    '<span class="accel-said">{word}</span></td>'
)
_KEY = Markup('<li><span class="accel-{state}" aria-hidden="true">{mark}</span> {word}</li>')
_LEGEND = Markup('<ul class="accel-legend">{keys}</ul>')
_BAR = Markup(
    '<div class="accel-progress"><p>{text}</p>'
    '<progress max="{most}" value="{done}" aria-label="{name}"></progress></div>'
)
_PREVIEW = Markup('<img class="accel-preview" alt="{name}" src="data:image/png;base64,{data}">')
_PERSON = Markup(
    '<form class="accel-person" method="post" action="logout"><span>{told}</span> '
    "<button>{leave}</button></form>"
)
_UNKNOWN = Markup(
    '<div class="accel-progress"><p>{text}</p><progress aria-label="{name}"></progress></div>'
)


def person(name: str | None, language: Language = "en") -> Markup:
    """Who is logged in, with a button to log out; nothing where there is no login."""
    if name is None:
        return NOTHING
    told = say("page_person", language, name=name)
    return _PERSON.format(told=told, leave=say("page_leave", language))


def badge(result: Result | None, language: Language = "en") -> Markup:
    """How many times faster than the stock pipeline, with the spread; or what is known so far."""
    if result is None:
        return NOTHING
    cost = _cost(result, language)
    if result.speedup is None:
        detail = f"{cost}; {say('part_unmeasured', language)}"
        return _BADGE.format(
            kind="unmeasured", head=_seconds(result.seconds, language), detail=detail
        )
    head, detail = speedup(result.speedup, language), _spread(result.speedup, result, language)
    return _BADGE.format(kind=_kind(result.speedup), head=head, detail=f"{detail}; {cost}")


def speedup(found: Speedup, language: Language = "en") -> str:
    """The ratio with its spread, where there is one: ``2.47× (2.21–2.80)``."""
    ratio, low, high = (number(n, 2, language) for n in (found.ratio, found.low, found.high))
    name = "part_ratio_once" if found.low == found.high else "part_ratio"
    return say(name, language, ratio=ratio, low=low, high=high)


def _kind(found: Speedup) -> str:
    """Whether it is faster or slower beyond its spread; ``once`` where there is none."""
    if found.low == found.high:
        return "once"
    if found.low > 1:
        return "faster"
    return "slower" if found.high < 1 else "even"


def _spread(found: Speedup, result: Result, language: Language) -> str:
    return say(
        f"part_{_kind(found)}",
        language,
        seconds=_seconds(result.seconds, language),
        stock=_seconds(found.baseline_seconds, language),
        measured=found.measured[:10],
    )


def _cost(result: Result, language: Language) -> str:
    evaluations = number(result.nfe, 0 if result.nfe == int(result.nfe) else 1, language)
    return say("part_cost", language, steps=result.steps, nfe=evaluations)


def _seconds(seconds: float, language: Language) -> str:
    return say("part_seconds", language, seconds=number(seconds, 2, language))


def guarded(result: Result | None, language: Language = "en") -> Markup:
    """How much of its budget a guard has spent, a line for each sample; nothing without a guard."""
    if result is None or not result.guarded:
        return NOTHING
    lines = [
        say(
            "part_spent",
            language,
            spent=f"{one.spent:.3g}".replace(".", "," if language == "de" else "."),
            budget=f"{one.budget:.3g}".replace(".", "," if language == "de" else "."),
            checks=f"{one.checks:g}",
        )
        for one in result.guarded
    ]
    return _lines("note", "status", _texts([*lines, result.guarded_by]))


def evidence(tuned: Tuned | None, language: Language = "en") -> Markup:
    """What a tuned plan promises, and what it was measured on; nothing without evidence."""
    if tuned is None:
        return NOTHING
    heads = [say(f"part_{name}", language) for name in ("measure", "typical", "interval", "share")]
    rows = [
        (
            figure.measure,
            number(figure.mean, 3, language),
            f"{number(figure.low, 3, language)}–{number(figure.high, 3, language)}",
            "–" if figure.share is None else _percent(figure.share),
        )
        for figure in tuned.figures
    ]
    promised = say(
        "part_tuned", language, targets=" & ".join(tuned.targets), held=held(tuned, language)
    )
    basis = say(
        "part_tuned_on",
        language,
        pipeline=tuned.pipeline,
        call=", ".join(f"{name}={value:g}" for name, value in tuned.call),
        machine=tuned.machine,
        date=tuned.date,
    )
    return table(promised, heads, rows) + _QUIET.format(text=basis)


def held(tuned: Tuned, language: Language = "en") -> str:
    """On how many prompts that the search had not seen a plan was checked, and how many hold it."""
    shares = [figure.share for figure in tuned.figures if figure.share is not None]
    if not shares:
        return say("part_checked", language, count=tuned.held_out)
    return say("part_held", language, share=_percent(min(shares)), count=tuned.held_out)


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def banner(result: Result | None, language: Language = "en") -> Markup:
    """What must not pass unseen: methods that did nothing, a partial picture, warnings."""
    if result is None:
        return NOTHING
    idle = [
        _VERDICT.format(method=method, state=INACTIVE, reason=verdict["detail"])
        for method, verdict in result.verdicts.items()
        if verdict["state"] == INACTIVE
    ]
    partial = [_LINE.format(text=say("part_partial", language))] if result.partial else []
    return _lines("warning", "status", [*partial, *idle, *_texts(_further(result))])


def _further(result: Result) -> list[str]:
    """The notes that do not repeat the verdict of a method."""
    told = [f"{name} did nothing: {verdict['detail']}" for name, verdict in result.verdicts.items()]
    return [note for note in result.notes if note not in told]


def error(text: str | None) -> Markup:
    """What went wrong, in the words of the error, which name the fix; files without folders."""
    return _lines("error", "alert", _texts([without_folders(text)] if text else []))


def gone(names: Sequence[str], language: Language = "en") -> Markup:
    """The files of a job that are not there any more."""
    return error(say("part_gone", language, names=", ".join(names))) if names else NOTHING


def paused(reason: str | None, language: Language = "en") -> Markup:
    """Why the queue stands still, if it does."""
    if reason is None:
        return NOTHING
    return note(say("page_paused", language, reason=without_folders(reason)))


def note(text: str | None) -> Markup:
    """Something to know that is no error."""
    return _lines("note", "status", _texts([text] if text else []))


def _texts(texts: Iterable[str]) -> list[Markup]:
    return [_LINE.format(text=text) for text in texts]


def _lines(kind: str, role: str, lines: Iterable[Markup]) -> Markup:
    joined = Markup().join(lines)
    return _BANNER.format(kind=kind, role=role, lines=joined) if joined else NOTHING


def outcome(job: Job, language: Language = "en") -> Markup:
    """What became of a job that gave no result: why it failed, or that it was stopped."""
    if job.error:
        return error(job.error)
    if job.state == "stopped" and job.result is None:
        return note(say("part_stopped", language))
    return NOTHING


def waiting(job: Job, language: Language = "en") -> Markup:
    """Where a job stands in the queue."""
    if job.position:
        text = say("part_position", language, before=job.position)
    else:
        text = say("part_next", language)
    return _UNKNOWN.format(text=text + _left(job.eta, language), name=say("part_queue", language))


def progress(now: Progress, language: Language = "en") -> Markup:
    """How far a running job is, with the steps that were not computed in full."""
    name = say("part_progress", language)
    text = _phase(now, language) + _left(now.eta, language)
    if now.total and now.phase == "denoising":
        return _BAR.format(text=text, most=now.total, done=min(now.step, now.total), name=name)
    return _UNKNOWN.format(text=text, name=name)


def _phase(now: Progress, language: Language) -> str:
    told = say(f"part_{now.phase}", language)
    if now.phase == "denoising":
        of = "part_step_of" if now.total else "part_step"
        told += say(of, language, step=now.step, total=now.total)
        if now.skipped:
            told += say("part_skipped", language, skipped=now.skipped)
    return f"{told} · {now.note}" if now.note else told


def _left(eta: float | None, language: Language) -> str:
    return "" if eta is None else say("part_left", language, seconds=max(1, round(eta)))


def preview(png: bytes, language: Language = "en") -> Markup:
    """The picture as it is expected to become, from a PNG."""
    return _PREVIEW.format(name=say("part_preview", language), data=b64encode(png).decode())


def timeline(result: Result | None, language: Language = "en") -> Markup:
    """A table of what each method did at each step: a row a method and branch, a column a step."""
    rows = {} if result is None else cells(result.events)
    if not rows:
        return NOTHING
    steps = range(1 + max(max(row) for row in rows.values()))
    head = _COLUMN.format(text=say("part_method", language)) + Markup().join(
        _COLUMN.format(text=step + 1) for step in steps
    )
    body = Markup().join(
        _ROW.format(
            name=name, cells=Markup().join(_step(step, row.get(step), language) for step in steps)
        )
        for name, row in rows.items()
    )
    caption = say("part_timeline", language)
    table = _TABLE.format(kind="accel-timeline", caption=caption, head=head, body=body)
    return _SCROLLED.format(name=caption, table=table) + _legend(rows, language)


def cells(events: Mapping[str, Iterable[list[Any]]]) -> dict[str, dict[int, str]]:
    """By row (method and branch): what happened at each step.

    Args:
        events: As ``Report.to_dict()`` writes them: by method, ``[step, branch, sample, state]``.

    Returns:
        One of ``STATES`` where all samples agree, else ``mixed``.
    """
    rows: dict[str, dict[int, str]] = {}
    for method, each in events.items():
        for step, branch, _sample, state in each:
            row = rows.setdefault(f"{method} · {branch}", {})
            row[step] = state if row.get(step, state) == state else "mixed"
    return rows


def _step(step: int, state: str | None, language: Language) -> Markup:
    if state is None:
        return _CELL.format(text="")
    word = say(f"part_{state}", language)
    told = say("part_at_step", language, step=step + 1, state=word)
    return _STEP.format(state=state, told=told, mark=MARKS[state], word=word)


def _legend(rows: Mapping[str, Mapping[int, str]], language: Language) -> Markup:
    seen = {state for row in rows.values() for state in row.values()}
    return _LEGEND.format(
        keys=Markup().join(
            _KEY.format(state=state, mark=mark, word=say(f"part_{state}", language))
            for state, mark in MARKS.items()
            if state in (*STATES, *seen)
        )
    )


def quality_table(result: Result | None, language: Language = "en") -> Markup:
    """How near the picture is to the stock pipeline's: measure, figure, how to read it."""
    if result is None or not result.quality:
        return NOTHING
    rows = [
        (
            say(f"part_{name}", language),
            figure(value, 1 if name == "psnr" else 3, language),
            say(f"part_{name}_help", language),
        )
        for name, value in result.quality.items()
    ]
    heads = [say(f"part_{name}", language) for name in ("measure", "figure", "reading")]
    return table(say("part_quality", language), heads, rows)


def figure(value: float | str, digits: int, language: Language = "en") -> str:
    """A figure, or why there is none."""
    if isinstance(value, str):
        return say("part_equal", language) if value == "equal" else value
    return say("part_equal", language) if value == float("inf") else number(value, digits, language)


def table(caption: str, heads: Iterable[str], rows: Iterable[Iterable[str]]) -> Markup:
    """A table whose first column names its rows."""
    body = Markup().join(
        _ROW.format(name=name, cells=Markup().join(_CELL.format(text=cell) for cell in others))
        for name, *others in rows
    )
    head = Markup().join(_COLUMN.format(text=text) for text in heads)
    return _SCROLLED.format(
        name=caption, table=_TABLE.format(kind="", caption=caption, head=head, body=body)
    )
