"""The page *Edit*: paint over a part of a picture, and have that part alone made anew."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr
from markupsafe import Markup

from accel.errors import AccelError, BadInput
from app.edit import region_of
from app.editor import STEPS, STRENGTH, Editor, Made, Stopped, Subject, subject_of
from app.files import slug
from app.request import Request, make
from app.serve import catalogue, limits
from app.serve.folders import Folders
from app.ui import parts, records
from app.ui.browser import who
from app.ui.events import QUIET, TURNS, Updates, owner_of
from app.ui.generate import cached
from app.ui.words import Language, labelled, language_for, number, say, t

if TYPE_CHECKING:
    from gradio.components import Component
    from PIL import Image

    from app.serve.service import Service

ROLES = ("picture", "accelerated", "baseline")
"""Files of a job that can be edited, the first that it has."""

BRUSH = "#ff3b30"
"""Colour of the paint."""

FORMATS = [".png", ".jpg", ".jpeg", ".webp"]

_FIGURES = Markup(
    '<div class="accel-badge accel-{kind}" role="status"><p><strong>{head}</strong></p>'
    "{lines}</div>"
)
_LINE = Markup("<p>{text}</p>")


@dataclass(frozen=True, kw_only=True)
class Page:
    """The page's components, and what its events do.

    Attributes:
        service: Where jobs and uploads are.
        editor: Makes the edits.
        fields: What is asked for, by name, in the order in which events get it.
        shown: What is shown of an edit, and the buttons.
        chosen: Path of the picture that was chosen.
    """

    service: Service
    editor: Editor
    fields: dict[str, Component]
    shown: dict[str, Component]
    chosen: gr.State

    @property
    def taken(self) -> list[Component]:
        """What an event changes that puts a picture into the editor."""
        shown = ("file", "picture", "canvas_help", "progress", "before", "after", "figures")
        return [self.chosen, self.fields["canvas"], *(self.shown[name] for name in shown)]

    @property
    def outputs(self) -> list[Component]:
        """What an event changes that shows an edit."""
        return [self.shown[name] for name in ("progress", "before", "after", "figures", "run")]

    def bring(self, path: str, request: gr.Request) -> Updates:
        """A file of the visitor, put into the editor."""
        try:
            kept = self.service.upload(owner_of(request), Path(path).name, Path(path))
            return self._chosen(kept, request)
        except AccelError as error:
            return self._refused(error)

    def load(self, id: str, request: gr.Request) -> Updates:
        """The picture of a job of the visitor, put into the editor."""
        try:
            job = self.service.job(owner_of(request), id)
            found = (records.file(self.service, job, role) for role in ROLES)
            path = next(filter(None, found), None)
            if path is None:
                raise BadInput("This job has no picture that could be edited: choose another one.")
            return self._chosen(path, request)
        except AccelError as error:
            return self._refused(error)

    def begin(self, chosen: str | None, request: gr.Request, *values: Any) -> Updates:
        """Say at once what is going to happen."""
        language = language_for(request)
        try:
            subject = self._subject(chosen, owner_of(request), self._named(values))
        except AccelError:
            return {self.shown["progress"]: "", self.shown["run"]: gr.Button(interactive=False)}
        name = "edit_editing" if self.editor.holds(who(request), subject) else "edit_recording"
        return {
            self.shown["progress"]: parts.note(say(name, language)),
            self.shown["run"]: gr.Button(interactive=False),
        }

    def run(self, chosen: str | None, request: gr.Request, *values: Any) -> Updates:
        """Edit the chosen picture, and show the edit beside it."""
        language, named = language_for(request), self._named(values)
        try:
            subject = self._subject(chosen, owner_of(request), named)
            made = self.editor.edit(
                who(request), subject, named["prompt"], _where(named["canvas"], named["region"])
            )
        except AccelError as error:
            return self._ended(parts.error(str(error)))
        except Stopped:
            return self._ended(parts.note(say("edit_stopped", language)))
        lost = made.same is False
        return {
            **self._ended(parts.note(say("edit_other_bits", language)) if lost else ""),
            self.shown["before"]: _file(self.shown["before"], made.before),
            self.shown["after"]: _kept(self.shown["after"], made, named["prompt"]),
            self.shown["figures"]: figures(made, language),
        }

    def stop(self, request: gr.Request) -> None:
        """Stop the edit of this page that is under way."""
        self.editor.stop(who(request))

    def leave(self, request: gr.Request) -> None:
        """The page was closed."""
        self.editor.end(who(request))

    def _named(self, values: tuple[Any, ...]) -> dict[str, Any]:
        return dict(zip(self.fields, values, strict=True))

    def _ended(self, told: str) -> Updates:
        return {self.shown["progress"]: told, self.shown["run"]: gr.Button(interactive=True)}

    def _subject(self, chosen: str | None, owner: str, named: dict[str, Any]) -> Subject:
        """What is edited, within the limits of the server.

        Raises:
            BadInput: If nothing is chosen, or it is beyond the limits.
        """
        if chosen is None:
            raise BadInput("There is no picture: give one, or choose one in the gallery.")
        given = {"model": named["model"], "strength": named["strength"], "steps": named["steps"]}
        subject = subject_of(Path(chosen), make(Request, given, where=""))
        folder, most = Folders(self.service.folder).uploads(owner), self.service.limits
        asked = subject.asked(named["prompt"] or "")
        limits.check_offered(asked.model, most)
        limits.check(asked, most, catalogue.call(asked.model), folder)
        limits.check_plan(subject.plan, most, folder)
        return subject

    def _chosen(self, path: Path, request: gr.Request) -> Updates:
        subject = subject_of(path, Request())
        language = language_for(request)
        name = "edit_foreign" if subject.pixels is None else "edit_recorded"
        shown = cached(self.fields["canvas"], str(path))
        told = say(name, language, model=subject.request.model, prompt=subject.request.prompt)
        return {
            self.chosen: str(path),
            self.fields["canvas"]: gr.ImageEditor(
                value={"background": shown, "layers": [], "composite": None}, visible=True
            ),
            self.shown["canvas_help"]: gr.Markdown(visible=True),
            self.shown["file"]: None,
            self.shown["picture"]: parts.note(told),
            self.shown["progress"]: "",
            **dict.fromkeys((self.shown[name] for name in ("before", "after")), None),
            self.shown["figures"]: "",
        }

    def _refused(self, error: Exception) -> Updates:
        return {self.shown["file"]: None, self.shown["picture"]: parts.error(str(error))}


def _where(canvas: dict[str, Any] | None, region: str | None) -> Image.Image | tuple[float, ...]:
    """What was painted, as a mask; or the region that was typed.

    Raises:
        BadInput: If it is neither or both.
    """
    from PIL import Image, ImageChops

    layers = [layer.getchannel("A") for layer in (canvas or {}).get("layers", ()) if layer]
    mask = None
    for layer in layers:
        painted = layer.point(lambda alpha: 255 if alpha else 0)
        mask = painted if mask is None else ImageChops.lighter(mask, painted)
    painted = mask is not None and mask.getbbox() is not None
    if (region or "").strip():
        if painted:
            raise BadInput("There is paint and a region: leave one of them out.")
        return region_of(str(region))
    if not painted:
        raise BadInput(
            "Nothing is painted: paint over what is to change, or type its region. Nothing was "
            "lost."
        )
    assert isinstance(mask, Image.Image)
    return mask


def _file(component: Component, picture: Image.Image) -> str:
    """A picture as a file that Gradio may show."""
    from app.compare import png

    return _cached(component, png(picture), "original.png")


def _kept(component: Component, made: Made, prompt: str) -> str:
    return _cached(component, made.file, f"{slug(prompt)}-edit.png")


def _cached(component: Component, content: bytes, name: str) -> str:
    from gradio.processing_utils import save_bytes_to_cache

    path: str = save_bytes_to_cache(content, name, component.GRADIO_CACHE)
    return path


def figures(made: Made, language: Language) -> Markup:
    """What an edit took, in words."""

    def seconds(value: float) -> str:
        return number(value, 2, language)

    def share(value: float) -> str:
        return number(100 * value, 1, language)

    saved = made.dense - made.seconds
    ratio = number(made.dense / made.seconds, 2, language)
    name = "edit_saved" if saved >= 0 else "edit_longer"
    lines = [
        say("edit_seconds", language, seconds=seconds(made.seconds)),
        say("edit_dense", language, seconds=seconds(made.dense)),
        say("edit_share", language, painted=share(made.painted), computed=share(made.computed)),
        say("edit_first", language, seconds=seconds(made.recording))
        if made.count == 1
        else say("edit_again", language, count=made.count),
    ]
    return _FIGURES.format(
        kind="faster" if saved >= 0 else "slower",
        head=say(name, language, seconds=seconds(abs(saved)), ratio=ratio),
        lines=Markup().join(_LINE.format(text=text) for text in lines),
    )


def tab(service: Service) -> Page:
    """The page; it is drawn inside of the present block."""
    gr.Markdown(t("edit_intro"))
    chosen = gr.State(None)
    with gr.Row():
        with gr.Column(scale=6, min_width=320):
            shown, fields = _asked(service)
        with gr.Column(scale=5, min_width=320):
            shown |= _shown()
    page = Page(service=service, editor=Editor(), fields=fields, shown=shown, chosen=chosen)
    given = [chosen, *fields.values()]
    shown["file"].upload(page.bring, shown["file"], page.taken, **QUIET)
    asked = shown["run"].click(page.begin, given, [shown["progress"], shown["run"]], **QUIET)
    asked.then(page.run, given, page.outputs, **TURNS)
    shown["stop"].click(page.stop, None, None, **QUIET)
    return page


def _asked(service: Service) -> tuple[dict[str, Component], dict[str, Component]]:
    """The left side: the picture, what is to change, and what it is to show."""
    shown: dict[str, Component] = {
        "file": gr.File(file_types=FORMATS, height=150, label=t("edit_file"), elem_id="edit-file")
    }
    gr.Markdown(t("edit_file_help"))
    shown["picture"] = gr.HTML(elem_id="edit-picture")
    fields: dict[str, Component] = {
        "canvas": gr.ImageEditor(
            type="pil",
            sources=(),
            transforms=(),
            layers=False,
            buttons=[],
            brush=gr.Brush(default_size="auto", colors=[BRUSH], color_mode="fixed"),
            label=t("edit_canvas"),
            visible=False,
            elem_id="edit-canvas",
        )
    }
    shown["canvas_help"] = gr.Markdown(t("edit_canvas_help"), visible=False)
    fields["region"] = gr.Textbox(
        max_lines=1,
        placeholder="0.3, 0.3, 0.2, 0.2",
        elem_id="edit-region",
        **labelled("edit_region"),
    )
    fields["prompt"] = gr.Textbox(lines=2, elem_id="edit-prompt", **labelled("edit_prompt"))
    with gr.Row():
        shown["run"] = gr.Button(t("edit_run"), variant="primary", elem_id="edit-run")
        shown["stop"] = gr.Button(t("edit_stop"), elem_id="edit-stop")
    with gr.Accordion(t("edit_more"), open=False, elem_id="edit-more"):
        gr.Markdown(t("edit_more_intro"))
        fields |= _painting(service)
    return shown, fields


def _painting(service: Service) -> dict[str, Component]:
    """How a picture without a record is painted into."""
    models = [info.name for info in service.models() if "mask" in info.inputs]
    return {
        "model": gr.Dropdown(
            models,
            value=models[0] if models else None,
            elem_id="edit-model",
            **labelled("edit_model"),
        ),
        "strength": gr.Slider(
            0.1,
            1.0,
            value=STRENGTH,
            step=0.05,
            elem_id="edit-strength",
            **labelled("edit_strength"),
        ),
        "steps": gr.Slider(
            1,
            service.limits.steps,
            value=STEPS,
            step=1,
            elem_id="edit-steps",
            **labelled("edit_steps"),
        ),
    }


def _shown() -> dict[str, Component]:
    """The right side: what is shown of an edit."""
    shown: dict[str, Component] = {"progress": gr.HTML(elem_id="edit-progress")}
    with gr.Row():
        for name, buttons in {"before": [], "after": ["download", "fullscreen"]}.items():
            with gr.Column(min_width=150):
                shown[name] = gr.Image(
                    type="filepath",
                    interactive=False,
                    format="png",
                    height=220,
                    buttons=buttons,
                    label=t(f"edit_{name}"),
                    elem_id=f"edit-{name}",
                )
                gr.Markdown(t(f"edit_{name}_help"))
    shown["figures"] = gr.HTML(elem_id="edit-figures")
    return shown
