"""The page *Compare*: the stock pipeline and a plan with the same seed, side by side, measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import gradio as gr

from accel.errors import AccelError
from app import clips
from app.serve.jobs import Job, Result, Spec
from app.ui import parts, records
from app.ui.events import LIVE, QUIET, Updates, View, Watched
from app.ui.words import Language, labelled, language_for, number, say, t

if TYPE_CHECKING:
    from gradio.components import Component

    from app.serve.service import Service

Asked = Callable[..., Spec]
"""From an event's request, repeats and other inputs: what is to be compared."""

SIDES = ("baseline", "accelerated")
DOWNLOADS = ("sheet", "film", *SIDES, "difference", "timeline", "report")
"""Roles of files, in the order in which they are offered."""
CLEARED: View = {
    "whole": gr.update(visible=False),
    "slider": None,
    "difference": None,
    "files": None,
    "badge": "",
    "banner": "",
    "table": "",
    "timeline": "",
    **dict.fromkeys(SIDES),
}

TOGETHER = """() => {
  const both = () => [...document.querySelectorAll("#compare-clips video")];
  const others = (one) => both().includes(one) ? both().filter((video) => video !== one) : [];
  const on = (name, act) => document.addEventListener(name, (event) => {
    for (const other of others(event.target)) act(event.target, other);
  }, true);
  const align = (one, other) => {
    if (Math.abs(other.currentTime - one.currentTime) > 0.04) other.currentTime = one.currentTime;
  };
  on("play", (one, other) => { align(one, other); if (other.paused) other.play(); });
  on("pause", (one, other) => {
    if (one.ended) return;
    if (!other.paused) other.pause();
    align(one, other);
  });
  on("seeking", align);
  on("ratechange", (one, other) => {
    if (other.playbackRate !== one.playbackRate) other.playbackRate = one.playbackRate;
  });
}"""
"""Two clips as one: what is done to one of them is done to the other, at the same moment of it."""

PLAY = """() => {
  const video = document.querySelector("#compare-clips video");
  if (video) video.paused ? video.play() : video.pause();
}"""


@dataclass(frozen=True, kw_only=True)
class Page(Watched):
    """The page's components, and what its events do."""

    cleared: ClassVar[View] = CLEARED

    @property
    def outputs(self) -> list[Component]:
        """All that an event of this page may change."""
        return [*self.shown.values(), self.watching]

    def refused(self, error: Exception) -> Updates:
        """Show an error, and nothing of an earlier comparison."""
        return {**self.updates(CLEARED, None), **super().refused(error)}

    def result(self, job: Job, request: gr.Request | None) -> Updates:
        """The files of a comparison, and what was measured."""
        files = records.files(self.service, job)
        sides = [files.get(side) for side in SIDES]
        film = all(path is not None and path.suffix == clips.CLIP for path in sides)
        pair = None if film or None in sides else tuple(map(str, sides))
        shown = self.shown
        return {
            shown["whole"]: gr.Column(visible=bool(files)),
            shown["slider"]: gr.ImageSlider(value=pair, visible=not film),
            shown["drag"]: gr.Markdown(visible=not film),
            shown["clips"]: gr.Row(visible=film),
            shown["play"]: gr.Button(visible=film),
            **{
                shown[side]: str(path) if film else None
                for side, path in zip(SIDES, sides, strict=True)
            },
            shown["difference"]: str(files["difference"]) if "difference" in files else None,
            shown["files"]: [str(files[role]) for role in DOWNLOADS if role in files] or None,
            shown["table"]: measured(job.result, language_for(request)),
        }


def measured(result: Result | None, language: Language) -> str:
    """What was measured as HTML: seconds of both sides, and how near their pictures are."""
    if result is None or result.speedup is None:
        return parts.quality_table(result, language)
    seconds = (result.speedup.baseline_seconds, result.seconds)
    rows = [
        (say(f"compare_{side}", language), number(each, 3, language))
        for side, each in zip(SIDES, seconds, strict=True)
    ]
    rows.append((say("compare_ratio", language), parts.speedup(result.speedup, language)))
    heads = [say("compare_side", language), say("compare_seconds", language)]
    times = parts.table(say("compare_table", language), heads, rows)
    return times + parts.quality_table(result, language)


def kept() -> gr.BrowserState:
    """The id of the comparison that is shown, which a browser keeps.

    To be made outside of the tabs: what is in a tab that was not opened is not read after a reload.
    """
    return gr.BrowserState(None, storage_key="accel-comparing", secret="accel")


def tab(
    service: Service, settings: Sequence[Component], asked: Asked, watching: gr.BrowserState
) -> Page:
    """The page; it is drawn inside of the present block.

    Args:
        service: What runs the jobs.
        settings: The components of *Generate* that hold its settings.
        asked: From an event's request, the number of repeats and the values of these: what is to
            be compared; raises what ``Page.refused`` shows.
        watching: What ``kept`` made.
    """
    gr.Markdown(t("compare_intro"))
    repeats, shown = _controls()
    shown |= _shown()
    page = Page(service=service, shown=shown, watching=watching)

    def run(request: gr.Request, count: float, *values: Any) -> Iterator[Updates]:
        try:
            spec = asked(request, count, *values)
        except AccelError as error:
            yield page.refused(error)
            return
        yield from page.submitted(spec, request)

    shown["run"].click(run, [repeats, *settings], page.outputs, **LIVE)
    shown["stop"].click(page.stop, watching, page.outputs, **QUIET)
    return page


def _controls() -> tuple[Component, dict[str, Component]]:
    with gr.Row():
        repeats = gr.Slider(
            1, 20, value=3, step=1, elem_id="compare-repeats", **labelled("compare_repeats")
        )
    with gr.Row():
        run = gr.Button(t("compare_run"), variant="primary", elem_id="compare-run")
        stop = gr.Button(t("compare_stop"), interactive=False, elem_id="compare-stop")
    return repeats, {"run": run, "stop": stop}


def _shown() -> dict[str, Component]:
    shown: dict[str, Any] = {
        "progress": gr.HTML(elem_id="compare-progress"),
        "preview": gr.HTML(elem_id="compare-preview"),
        "badge": gr.HTML(elem_id="compare-badge"),
        "banner": gr.HTML(elem_id="compare-banner"),
    }
    with gr.Column(visible=False) as shown["whole"]:
        shown["slider"] = gr.ImageSlider(
            type="filepath", interactive=False, elem_id="compare-slider", label=t("compare_slider")
        )
        shown["drag"] = gr.Markdown(t("compare_slider_help"))
        with gr.Row(visible=False, elem_id="compare-clips") as shown["clips"]:
            for side in SIDES:
                with gr.Column():
                    shown[side] = gr.Video(
                        interactive=False,
                        loop=True,
                        elem_id=f"compare-{side}",
                        label=t(f"compare_{side}"),
                    )
                    gr.Markdown(t(f"compare_{side}_help"))
        shown["play"] = gr.Button(t("compare_play"), visible=False, elem_id="compare-play")
        shown["play"].click(fn=None, js=PLAY, api_visibility="private")
        shown["table"] = gr.HTML(elem_id="compare-table")
        shown["difference"] = gr.Image(
            type="filepath",
            interactive=False,
            buttons=["download", "fullscreen"],
            elem_id="compare-difference",
            label=t("compare_difference"),
        )
        gr.Markdown(t("compare_difference_help"))
        shown["timeline"] = gr.HTML(elem_id="compare-timeline")
        shown["files"] = gr.File(
            file_count="multiple",
            interactive=False,
            elem_id="compare-files",
            label=t("compare_files"),
        )
        gr.Markdown(t("compare_files_help"))
    return shown
