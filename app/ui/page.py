"""The whole page: its tabs, and what goes between them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import gradio as gr

from accel.errors import AccelError
from app.serve.jobs import Spec
from app.ui import compare, edit, endpoints, explore, gallery, generate, live, look, methods, parts
from app.ui.compare import Asked
from app.ui.events import LIVE, QUIET, Updates, compared, owner_of
from app.ui.words import language_for, say, t

if TYPE_CHECKING:
    from app.serve.service import Service


def build(service: Service) -> gr.Blocks:
    """The pages of a service.

    Theme, CSS, head and translations are arguments of ``launch``: ``look.theme()``, ``look.CSS``,
    ``look.HEAD``, ``words.translator()``.
    """
    with gr.Blocks(title=say("page_title"), analytics_enabled=False) as demo:
        person = gr.HTML(elem_id="person")
        gr.Markdown(f"# {say('page_title')}")
        gr.Markdown(t("page_intro"))
        settings, editing, comparing = gr.State(None), gr.State(None), compare.kept()
        with gr.Tabs(selected="generate", elem_id="tabs") as tabs:
            with _tab("generate"):
                making = generate.tab(service)
            with _tab("compare"):
                measuring = compare.tab(service, making.inputs, _asked(making), comparing)
            with _tab("explore") as exploring:
                explore.tab(service, making, settings, exploring)
            with _tab("edit"):
                changing = edit.tab(service)
            with _tab("live"):
                live.tab(service)
            with _tab("gallery"):
                gallery.tab(service, settings, editing)
            with _tab("methods"):
                methods.tab(service)
        endpoints.add(service)
        _load_settings(making, settings, tabs)
        _edit_chosen(changing, editing, tabs)
        _compare_shown(making, measuring, tabs)
        _when_loaded(demo, making, measuring)
        demo.load(_person, None, person, **QUIET)
        demo.unload(changing.leave)
    return demo


def _person(request: gr.Request) -> str:
    """Who is logged in."""
    return parts.person(request.username, language_for(request))


def _tab(name: str) -> gr.Tab:
    return gr.Tab(t(f"page_{name}"), id=name, elem_id=f"tab-{name}")


def _asked(making: generate.Page) -> Asked:
    """The settings of *Generate* as a comparison."""

    def asked(request: gr.Request, repeats: float, *values: Any) -> Spec:
        return compared(making.spec(owner_of(request), values), int(repeats))

    return asked


def _load_settings(making: generate.Page, settings: gr.State, tabs: gr.Tabs) -> None:
    """What another page puts into ``settings`` goes into the widgets, and is taken out again."""

    def load(found: dict[str, Any] | None, request: gr.Request) -> Updates:
        if found is None:
            return generate.NOTHING
        shown = making.shown["restored"]
        try:
            updates = making.loaded(Spec.model_validate(found), language_for(request))
        except AccelError as error:
            updates = {shown: parts.error(str(error))}
        return {**updates, settings: None, tabs: gr.Tabs(selected="generate")}

    settings.change(load, settings, [*making.settings, settings, tabs], **QUIET)


def _edit_chosen(changing: edit.Page, editing: gr.State, tabs: gr.Tabs) -> None:
    """The job whose id another page puts into ``editing`` is edited, and the id is taken out."""

    def load(id: str | None, request: gr.Request) -> Updates:
        if id is None:
            return generate.NOTHING
        updates = changing.load(id, request)
        return {**updates, editing: None, tabs: gr.Tabs(selected="edit")}

    editing.change(load, editing, [*changing.taken, editing, tabs], **QUIET)


def _compare_shown(making: generate.Page, measuring: compare.Page, tabs: gr.Tabs) -> None:
    """The comparison of the picture that *Generate* shows, in one click."""

    def run(watching: str | None, request: gr.Request) -> Iterator[Updates]:
        turned = {tabs: gr.Tabs(selected="compare")}
        try:
            spec = making.comparison(watching, request)
        except AccelError as error:
            yield {**turned, **measuring.refused(error)}
            return
        for updates in measuring.submitted(spec, request):
            yield {**turned, **updates}
            turned = {}

    making.shown["compare"].click(run, making.watching, [tabs, *measuring.outputs], **LIVE)


def _when_loaded(demo: gr.Blocks, making: generate.Page, measuring: compare.Page) -> None:
    """After a (re)load: what the model takes, what was measured, and what is still running."""
    model = making.fields["model"]
    goal = making.fields["goal"]
    demo.load(fn=None, js=look.JOINS, api_visibility="private")  # before what joins the queue
    demo.load(making.adapt, model, making.adapted, **QUIET)
    demo.load(making.captions, [model, goal], making.measured, **QUIET)
    demo.load(making.offered, making.told, [model, making.told], **QUIET)
    demo.load(making.resume, making.watching, making.settings, **QUIET)
    demo.load(making.reattach, making.watching, making.results, **LIVE)
    demo.load(measuring.reattach, measuring.watching, measuring.outputs, **LIVE)
    demo.load(fn=None, js=compare.TOGETHER, api_visibility="private")
    demo.load(fn=None, js=look.KEYS, api_visibility="private")
    demo.load(fn=None, js=look.NAMES, api_visibility="private")
