"""The page *Gallery*: what was made, found again, restored, deleted, brought back, downloaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr
import typer
from markupsafe import Markup

from app.ui import parts, records
from app.ui.browser import is_here, refusals
from app.ui.events import LIVE, QUIET, owner_of
from app.ui.records import ANY, PAGE, Filter
from app.ui.words import Language, labelled, language_for, say, t

if TYPE_CHECKING:
    from app.serve.service import Service

KINDS = (ANY, "generate", "compare")


@dataclass(frozen=True)
class View:
    """What the page shows.

    Attributes:
        cards: File and caption of each picture that is there.
        ids: The jobs that these stand for.
        rest: The jobs without a picture, as HTML.
        more: Whether there is more to show.
    """

    cards: list[tuple[str, str]]
    ids: list[str]
    rest: Markup
    more: bool


def view(service: Service, owner: str, wanted: Filter, count: int, language: Language) -> View:
    """The newest ``count`` jobs that a filter takes."""
    jobs = records.page(service, owner, wanted, count + 1)
    shown = jobs[:count]
    cards = {job.id: records.card(service, job, language) for job in shown}
    kept = {id: card for id, card in cards.items() if card is not None}
    rest = records.without([job for job in shown if job.id not in kept], language)
    empty = Markup() if shown else parts.note(say("gallery_empty", language))
    return View(list(kept.values()), list(kept), rest + empty, len(jobs) > count)


def open_folder(file: Path, language: Language = "en") -> Markup:
    """Show a file in the file manager of this machine, or say where it lies."""
    if typer.launch(str(file), locate=True) == 0:
        return parts.NOTHING
    return parts.note(say("gallery_not_opened", language, path=file))


class Events:
    """What happens when something on the page is pressed."""

    def __init__(self, service: Service) -> None:
        self.service = service

    def show(
        self,
        search: str | None,
        kind: str | None,
        model: str | None,
        trash: bool | None,
        count: int,
        request: gr.Request,
    ) -> tuple[Any, ...]:
        """Fill the page anew; nothing is chosen then."""
        wanted = Filter(search or "", kind or ANY, model or ANY, bool(trash))
        with refusals():
            found = view(self.service, owner_of(request), wanted, count, language_for(request))
        return (
            gr.update(value=found.cards, selected_index=None, visible=bool(found.cards)),
            found.ids,
            "",
            found.rest,
            gr.update(visible=found.more),
            gr.update(visible=not trash),
            gr.update(visible=trash),
            gr.update(visible=trash),
            gr.update(visible=is_here(request)),
        )

    def choose(self, ids: list[str], event: gr.SelectData, request: gr.Request) -> tuple[Any, ...]:
        """Show how the picture that was clicked was made, and offer it as a download."""
        language = language_for(request)
        with refusals():
            job = self.service.job(owner_of(request), ids[event.index])
        card = records.card(self.service, job, language)
        missing = parts.gone(records.gone(self.service, job), language)
        file = None if card is None else card[0]
        return job.id, missing + records.details(job, language), gr.update(value=file)

    def restore(self, chosen: str, request: gr.Request) -> dict[str, Any]:
        """The settings of the chosen job, for Generate."""
        with refusals():
            return self.service.job(owner_of(request), _one(chosen, request)).spec.model_dump()

    def edit(self, chosen: str, request: gr.Request) -> str:
        """The chosen job, for Edit."""
        with refusals():
            return self.service.job(owner_of(request), _one(chosen, request)).id

    def delete(self, chosen: str, request: gr.Request) -> None:
        """Move the chosen job to the trash."""
        with refusals():
            self.service.delete(owner_of(request), _one(chosen, request))

    def undelete(self, chosen: str, request: gr.Request) -> None:
        """Take the chosen job out of the trash."""
        with refusals():
            self.service.restore(owner_of(request), _one(chosen, request))

    def purge(self, request: gr.Request) -> Markup:
        """Empty the trash."""
        with refusals():
            count = self.service.purge(owner_of(request))
        return parts.note(say("gallery_purged", language_for(request), count=count))

    def open(self, chosen: str, request: gr.Request) -> Markup:
        """Open the folder of the chosen job, for a browser on this machine."""
        language = language_for(request)
        if not is_here(request):
            return parts.note(say("gallery_not_here", language))
        with refusals():
            job = self.service.job(owner_of(request), _one(chosen, request))
        card = records.card(self.service, job, language)
        if card is None:
            return parts.error(records.why_none(records.told(job), language))
        return open_folder(Path(card[0]), language)


def _one(chosen: str, request: gr.Request) -> str:
    """The chosen job."""
    if not chosen:
        raise gr.Error(say("gallery_choose", language_for(request)), print_exception=False)
    return chosen


def tab(service: Service, settings: Any, editing: Any) -> None:
    """The page; it is drawn inside of the present block.

    Args:
        service: Where the jobs are.
        settings: A component that gets a ``Spec`` as a dict, for Generate to show.
        editing: A component that gets the id of a job, for Edit to edit.
    """
    gr.Markdown(t("gallery_intro"))
    filters = _filters(service)
    ids, chosen, count = gr.State([]), gr.State(""), gr.State(PAGE)
    gr.Markdown(t("gallery_grid_help"))
    grid = gr.Gallery(
        label=t("gallery_grid"),
        elem_id="gallery-grid",
        columns=4,
        height=600,
        allow_preview=False,
        buttons=[],
        visible=False,
    )
    more = gr.Button(t("gallery_more"), visible=False, elem_id="gallery-more")
    with gr.Row():
        restore = gr.Button(t("gallery_restore"), variant="primary", elem_id="gallery-restore")
        edit = gr.Button(t("gallery_edit"), elem_id="gallery-edit")
        download = gr.DownloadButton(t("gallery_download"), elem_id="gallery-download")
        folder = gr.Button(t("gallery_open"), visible=False, elem_id="gallery-open")
        delete = gr.Button(t("gallery_delete"), elem_id="gallery-delete")
        undelete = gr.Button(t("gallery_undelete"), visible=False, elem_id="gallery-undelete")
        purge = gr.Button(t("gallery_purge"), visible=False, elem_id="gallery-purge")
        refresh = gr.Button(t("gallery_refresh"), elem_id="gallery-refresh")
    message = gr.HTML(elem_id="gallery-message")
    details = gr.HTML(elem_id="gallery-details")
    rest = gr.HTML(elem_id="gallery-rest")
    events = Events(service)
    shown = [grid, ids, chosen, rest, more, delete, undelete, purge, folder]
    anew: dict[str, Any] = {
        "fn": events.show,
        "inputs": [*filters, count],
        "outputs": shown,
        **QUIET,
    }
    gr.on(None, **anew)
    refresh.click(**anew)
    more.click(lambda count: count + PAGE, count, count, **LIVE)
    grid.select(events.choose, ids, [chosen, details, download], **QUIET)
    restore.click(events.restore, chosen, settings, **LIVE)
    edit.click(events.edit, chosen, editing, **LIVE)
    folder.click(events.open, chosen, message, **QUIET)
    delete.click(events.delete, chosen, None, **QUIET).success(**anew)
    undelete.click(events.undelete, chosen, None, **QUIET).success(**anew)
    purge.click(events.purge, None, message, **QUIET).success(**anew)


def _filters(service: Service) -> list[Any]:
    names = [info.name for info in service.models()]
    with gr.Row():
        search = gr.Textbox(**labelled("gallery_search"), min_width=240, elem_id="gallery-search")
        kind = gr.Dropdown(
            choices=[(t(f"gallery_kind_{kind or 'all'}"), kind) for kind in KINDS],
            value=ANY,
            **labelled("gallery_kind"),
            min_width=240,
            elem_id="gallery-kind",
        )
        model = gr.Dropdown(
            choices=[(t("gallery_kind_all"), ANY), *((name, name) for name in names)],
            value=ANY,
            **labelled("gallery_model"),
            min_width=240,
            elem_id="gallery-model",
        )
    trash = gr.Checkbox(**labelled("gallery_trash"), elem_id="gallery-trash")
    return [search, kind, model, trash]
