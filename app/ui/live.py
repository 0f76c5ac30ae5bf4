"""The page *Live*: a camera or a clip through a stream, with its measured rate."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr
from markupsafe import Markup

from accel.errors import BadInput
from app.live import LEVELS, Live, Shown
from app.request import Streaming, make
from app.ui.browser import refusals, who
from app.ui.events import QUIET, TURNS, Updates
from app.ui.words import Language, labelled, language_for, number, say, t

if TYPE_CHECKING:
    from gradio.components import Component

    from app.serve.service import Service

FULL, NONE = "full", "none"
GUIDANCE = (FULL, "self", "onetime", NONE)
STEPS = 8
"""Of the schedule, at least: at half the strength they are four evaluations."""

EVERY = 0.05
"""Seconds from frame to frame that a browser sends, where the answer before is there."""

_FIGURES = Markup('<p role="status">{text}</p>')


def tab(service: Service) -> None:
    """The page."""
    live = Live(service.limits.models)
    pictures = [info.name for info in service.models() if info.kind == "image"]
    gr.Markdown(t("live_intro"))
    with gr.Row():
        with gr.Column():
            settings = _settings(pictures)
            camera = gr.Image(
                label=t("live_camera"), sources=["webcam"], streaming=True, type="pil"
            )
            gr.Markdown(t("live_camera_help"))
            clip = gr.File(label=t("live_clip"), file_types=["video"], elem_id="live-clip")
            gr.Markdown(t("live_clip_help"))
            with gr.Row():
                run = gr.Button(t("live_run"), variant="primary", elem_id="live-run")
                stop = gr.Button(t("live_stop"), elem_id="live-stop")
        with gr.Column():
            picture = gr.Image(label=t("live_picture"), interactive=False, elem_id="live-picture")
            gr.Markdown(t("live_picture_help"))
            figures = gr.HTML(elem_id="live-figures")
    shown = [picture, figures]

    def watch(frame: Any, request: gr.Request, *values: Any) -> Updates:
        if frame is None:
            return dict.fromkeys(shown, gr.skip())
        with refusals():
            asked = of(values, service.limits.prompt)
            made = live.frame(who(request), asked, frame)
        return _updates(made, picture, figures, language_for(request))

    def draw(path: str | None, request: gr.Request, *values: Any) -> Iterator[Updates]:
        with refusals():
            if path is None:
                raise BadInput("There is no clip: give one.")
            asked = of(values, service.limits.prompt)
            for made in live.film(who(request), asked, Path(path)):
                yield _updates(made, picture, figures, language_for(request))

    def end(request: gr.Request) -> None:
        live.end(who(request))

    camera.stream(watch, [camera, *settings], shown, stream_every=EVERY, **TURNS)
    running = run.click(draw, [clip, *settings], shown, **TURNS)
    stop.click(end, None, None, cancels=[running], **QUIET)


def _settings(models: list[str]) -> list[Component]:
    """The widgets, in the order in which ``of`` reads them."""
    return [
        gr.Dropdown(
            models,
            value=models[0] if models else None,
            **labelled("live_model"),
            elem_id="live-model",
        ),
        gr.Textbox(**labelled("live_prompt"), elem_id="live-prompt"),
        gr.Slider(0.1, 1.0, value=0.5, step=0.05, **labelled("live_strength")),
        gr.Slider(1, LEVELS, value=4, step=1, **labelled("live_levels")),
        gr.Radio(
            [(t(f"live_{name}"), name) for name in GUIDANCE],
            value="self",
            **labelled("live_residual"),
        ),
    ]


def of(values: tuple[Any, ...], longest: int) -> Streaming:
    """The settings of a stream, of the widgets' values.

    Args:
        values: In the order of the widgets.
        longest: Characters that a prompt may have.

    Raises:
        BadInput: If one is out of its range.
    """
    model, prompt, strength, levels, guidance = values
    if len(prompt or "") > longest:
        raise BadInput(f"The prompt has more than {longest} characters: shorten it.")
    given = {
        "model": model,
        "prompt": prompt or "",
        "strength": strength,
        "levels": int(levels),
        "steps": max(STEPS, -(-int(levels) * 10 // max(1, round(strength * 10)))),
        "seed": 0,
    }
    if guidance == NONE:
        given["guidance"] = 1.0
    elif guidance != FULL:
        given["residual"] = guidance
    return make(Streaming, given, where="")


def _updates(made: Shown, picture: Component, figures: Component, language: Language) -> Updates:
    text = say(
        "live_figures",
        language,
        rate=number(made.rate, 1, language),
        frames=made.frames,
        skipped=made.skipped,
    )
    drawn = gr.skip() if made.picture is None else made.picture
    return {picture: drawn, figures: _FIGURES.format(text=text)}
