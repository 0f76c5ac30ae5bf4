"""The page *Explore*: a knob or two at some values, beside stock, as pictures and in a plot."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import gradio as gr
from markupsafe import Markup

from accel.errors import BadModel
from accel.plan import methods
from app import clips
from app.request import Request, make
from app.serve.jobs import ENDED, Job, NoSuchJob, Spec
from app.ui import grid, parts, records, scatter, sweep
from app.ui.browser import refusals
from app.ui.events import LIVE, QUIET, owner_of
from app.ui.sweep import Axis, Mark
from app.ui.words import Language, labelled, language_for, number, say, t

if TYPE_CHECKING:
    from app.serve.service import Service
    from app.ui.generate import Page as Generate

NONE = ""
FIRST = "cache.EasyCache.threshold"
"""The knob that the page begins with: of a method that fits every model."""
PAUSE = 0.5
"""Seconds between two looks at the jobs of a sweep."""


@dataclass(frozen=True)
class View:
    """What the page shows of a sweep.

    Attributes:
        grid: The pictures, as HTML.
        plot: The plot, as HTML.
        table: All runs, as HTML.
        status: How many are done, and what went wrong.
        runs: Whether some have not ended.
    """

    grid: Markup
    plot: Markup
    table: Markup
    status: Markup
    runs: bool


NOTHING = View(Markup(), Markup(), Markup(), Markup(), False)
UNCHANGED = tuple(gr.skip() for _ in range(6))
HELD = """(...given) => {
  for (const id of ["explore-knob", "explore-second"]) document.getElementById(id).inert = %s;
  return given;
}"""
"""Keeps both lists from being chosen from, or lets them: new knobs undo what is typed into them."""


def axes(
    first: str | None, values: str | None, second: str | None, others: str | None
) -> list[Axis]:
    """The knobs of a sweep and their values, from what was typed.

    Raises:
        BadInput: If a knob has no values, or one twice.
    """
    chosen = [(first, values), (second, others)]
    return [Axis(knob, sweep.values(text or "")) for knob, text in chosen if knob]


def submitted(
    service: Service, owner: str, base: Spec, chosen: Sequence[Axis], stock: str
) -> list[Job]:
    """Admit a sweep as one group, the stock run first: all of its runs, or none.

    Raises:
        BadInput: If there is nothing to sweep, or a request or the group is beyond the limits.
        PlanError: If a combination is no plan; it is named.
        UnsupportedModel: If a method does not fit the model.
        Busy: If the queue is full.
    """
    points = sweep.points(base.plan, chosen)
    request = make(Request, base.request, where="").seeded().to_dict()
    return service.submit(owner, sweep.runs(request, points, stock), group=uuid4().hex)


def follow(
    service: Service, owner: str, ids: Sequence[str], pause: float = PAUSE
) -> Iterator[list[Job]]:
    """The jobs of a sweep again and again, until all have ended.

    It always gives them, changed or not, so that a browser that has gone is found out.

    Raises:
        NoSuchJob: If one of them is not there (any more).
    """
    while True:
        jobs = [service.job(owner, id) for id in ids]
        yield jobs
        if all(job.state in ENDED for job in jobs):
            return
        time.sleep(pause)


def view(service: Service, jobs: Sequence[Job], language: Language) -> View:
    """What there is to show of the jobs of a sweep, the stock run first."""
    if not jobs:
        return NOTHING
    marks = sweep.marks(jobs)
    shots = [shot(service, job, mark) for job, mark in zip(jobs, marks, strict=True)]
    return View(
        grid.draw(shots, language),
        scatter.draw(marks, language),
        table(marks, language),
        status(jobs, marks, service.paused, language),
        any(job.state not in ENDED for job in jobs),
    )


def shot(service: Service, job: Job, mark: Mark) -> grid.Shot:
    """What is shown of a run in the grid."""
    role = records.role(service, job)
    if role is None:
        return grid.Shot(mark, gone=bool(records.gone(service, job)))
    film = records.left(job)[role].endswith(clips.CLIP)
    return grid.Shot(mark, records.address(job, role), film)


def status(
    jobs: Sequence[Job], marks: Sequence[Mark], paused: str | None, language: Language
) -> Markup:
    """How many are done, why it does not go on, what went wrong, and why there is no speed-up."""
    done = sum(job.state in ENDED for job in jobs)
    ended = done == len(jobs)
    made = [mark for mark in marks if mark.seconds is not None]
    untimed = ended and made[:1] == marks[:1] and any(mark.ratio is None for mark in made)
    return Markup().join(
        [
            parts.note(say("explore_counted", language, done=done, total=len(jobs))),
            Markup() if ended else parts.paused(paused, language),
            wrong(jobs),
            parts.note(say("explore_cold", language) if untimed else None),
        ]
    )


def wrong(jobs: Sequence[Job]) -> Markup:
    """Each error of the jobs, once."""
    errors = dict.fromkeys(job.error for job in jobs if job.error)
    return Markup().join(parts.error(error) for error in errors)


def table(marks: Sequence[Mark], language: Language) -> Markup:
    """Every run of a sweep: what it was set to, how fast and how near it was."""
    heads = [
        say(f"explore_{name}", language)
        for name in ("number", "settings", "seconds", "ratio", "ssim", "psnr")
    ]
    rows = [_row(index, mark, language) for index, mark in enumerate(marks)]
    return parts.table(say("explore_table", language), heads, rows)


def _row(index: int, mark: Mark, language: Language) -> tuple[str, ...]:
    title = mark.title or say("explore_stock", language)
    if mark.seconds is None:
        return str(index), title, scatter.state(mark, language), "", "", ""
    ratio = _known(mark.ratio, 2, language) or say("explore_untimed", language)
    if mark.ratio is not None and not mark.measured:
        ratio = say("explore_rough", language, ratio=ratio)
    return (
        str(index),
        title,
        number(mark.seconds, 2, language),
        ratio,
        _known(mark.ssim, 3, language),
        _known(mark.psnr, 1, language),
    )


def _known(value: float | None, digits: int, language: Language) -> str:
    return "" if value is None else parts.figure(value, digits, language)


def choices(service: Service, model: str) -> list[str]:
    """The knobs of the methods that fit a model.

    Those of all methods for a model that is not here yet, or cannot be loaded: the job that needs
    it downloads it, or says so.

    Raises:
        BadInput: If the model is not offered.
    """
    try:
        fits = service.fits(model).methods
    except BadModel:
        return sweep.knobs(methods())
    return sweep.knobs(name for name in methods() if fits.get(name, "") is None)


@dataclass(frozen=True)
class Events:
    """What happens when something on the page is pressed."""

    service: Service
    generate: Generate

    def start(
        self,
        first: str | None,
        values: str | None,
        second: str | None,
        others: str | None,
        request: gr.Request,
        *form: Any,
    ) -> Iterator[tuple[Any, Any]]:
        """Admit the sweep of the settings of Generate; gives its status and the ids of its jobs."""
        owner, language = owner_of(request), language_for(request)
        yield parts.note(say("page_checking", language)), gr.skip()
        with refusals():
            base = self.generate.spec(owner, form)
            chosen = axes(first, values, second, others)
            jobs = submitted(self.service, owner, base, chosen, say("explore_stock", language))
        yield gr.skip(), [job.id for job in jobs]

    def watch(self, ids: list[str] | None, request: gr.Request) -> Iterator[tuple[Any, ...]]:
        """Show a sweep as it comes; after a reload too."""
        language, before = language_for(request), None
        try:
            for jobs in follow(self.service, owner_of(request), ids or []):
                now = view(self.service, jobs, language)
                yield UNCHANGED if now == before else _updates(now)
                before = now
        except NoSuchJob:
            yield _updates(NOTHING)

    def stop(self, ids: list[str] | None, request: gr.Request) -> None:
        """Stop what has not ended; what is there stays."""
        with refusals():
            for id in reversed(ids or []):
                self.service.cancel(owner_of(request), id)

    def load(self, ids: list[str], event: gr.EventData, request: gr.Request) -> dict[str, Any]:
        """The settings of the picture or point that was chosen, for Generate."""
        with refusals():
            spec = self.service.job(owner_of(request), ids[event.index]).spec
        return spec.model_copy(update={"against": None}).model_dump()

    def suggest(self, knob: str) -> str:
        """Values to begin with."""
        return sweep.written(sweep.suggested(knob)) if knob else ""

    def offer(self, model: str, request: gr.Request) -> tuple[Any, Any]:
        """The knobs of the methods that fit the model."""
        with refusals():
            found = choices(self.service, model)
        none = (say("explore_none", language_for(request)), NONE)
        return gr.update(choices=found), gr.update(choices=[none, *found])


def _updates(found: View) -> tuple[Any, ...]:
    """A view on the components of the page."""
    return (
        gr.update(visible=bool(found.table)),
        found.grid,
        found.plot,
        found.table,
        found.status,
        gr.update(interactive=found.runs),
    )


def tab(service: Service, generate: Generate, settings: Any, opened: gr.Tab) -> None:
    """The page; it is drawn inside of the present block.

    Args:
        service: What runs the jobs.
        generate: The page whose settings are swept.
        settings: A component that gets a ``Spec`` as a dict, for Generate to show.
        opened: The tab that the page is in: which knobs fit the model is asked when it is chosen,
            since finding out takes a while.
    """
    events = Events(service, generate)
    gr.Markdown(t("explore_intro"))
    knobs = _knobs(events)
    with gr.Row():
        run = gr.Button(t("explore_run"), variant="primary", elem_id="explore-run")
        stop = gr.Button(t("explore_stop"), interactive=False, elem_id="explore-stop")
    status = gr.HTML(elem_id="explore-status")
    with gr.Column(visible=False) as results:
        gr.Markdown(t("explore_plot_help"))
        plot = gr.HTML(elem_id="explore-plot", js_on_load=scatter.PICK)
        gr.Markdown(t("explore_grid_help"))
        pictures = gr.HTML(elem_id="explore-grid", js_on_load=scatter.PICK)
        table = gr.HTML(elem_id="explore-table")
    ids = gr.BrowserState([], storage_key="accel-explore", secret="accel")
    outputs = [results, pictures, plot, table, status, stop]
    watching = gr.on(None, events.watch, ids, outputs, trigger_mode="multiple", **LIVE)
    form = [*knobs, *generate.inputs]
    run.click(None, cancels=[watching], **QUIET)  # by itself and first: else it ends the next one
    started = run.click(events.start, form, [status, ids], **LIVE)
    started.failure(events.watch, ids, outputs, **LIVE)  # the sweep before it goes on
    stop.click(events.stop, ids, None, **QUIET)
    plot.click(events.load, ids, settings, **LIVE)
    pictures.click(events.load, ids, settings, **LIVE)
    model, lists = generate.fields["model"], [knobs[0], knobs[2]]
    offered = opened.select(events.offer, model, lists, js=HELD % "true", **QUIET)
    for ended in (offered.success, offered.failure):
        ended(fn=None, js=HELD % "false", api_visibility="private")


def _knobs(events: Events) -> list[Any]:
    """The widgets of both knobs and their values."""
    found: list[Any] = []
    for name, first in (("knob", FIRST), ("second", NONE)):
        with gr.Row():
            knob = gr.Dropdown(
                choices=[*([] if first else [(t("explore_none"), NONE)]), *sweep.knobs(methods())],
                value=first,
                allow_custom_value=False,
                **labelled(f"explore_{name}"),
                min_width=240,
                elem_id=f"explore-{name}",
            )
            values = "values" if first else "second_values"
            box = gr.Textbox(
                value=events.suggest(first),
                **labelled(f"explore_{values}"),
                min_width=240,
                elem_id=f"explore-{values.replace('_', '-')}",
            )
        knob.change(events.suggest, knob, box, **QUIET)
        found += [knob, box]
    return found
