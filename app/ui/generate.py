"""The page *Generate*: settings, a run with its preview, the picture and what was done for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import gradio as gr

from accel.errors import AccelError, BadInput
from accel.plan import PRESETS, Plan
from app import clips
from app.plans import read
from app.request import FILES, PICTURES, Request
from app.serve.folders import Folders
from app.serve.jobs import ENDED, Job, Kind, ModelInfo, Spec
from app.ui import forms, knobs, parts, records, roundtrip
from app.ui.events import (
    LIVE,
    QUIET,
    Updates,
    View,
    Watched,
    compared,
    follow,
    owner_of,
    stored,
)
from app.ui.words import Language, labelled, language_for, number, say, t

if TYPE_CHECKING:
    from gradio.components import Component

    from accel.tuned import Tuned
    from app.serve.service import Service


NOTHING: Updates = gr.skip()
"""Changes nothing. An event of Gradio that gives nothing at all empties its outputs."""
PLAN = ".toml"
"""Of a file that is a plan."""
PLACES = ("variant", "revision")
"""Fields of a request that are for the command line: the server refuses them."""
WIDGETS = tuple(name for name in forms.NAMES if name not in PLACES)
OWN = {
    "negative": "negative_prompt",
    "steps": "num_inference_steps",
    "width": "width",
    "height": "height",
    "frames": "num_frames",
    "guidance": "guidance_scale",
}
"""The model's own call arguments, which an empty widget leaves as they are."""
NEEDS = {
    "negative": "negative",
    "negative_empty": "negative",
    "guidance": "guidance",
    "frames": "frames",
    "fps": "frames",
    "image": "image",
    "strength": "image",
    "last": "last",
    "mask": "mask",
    "control": "control",
    "controlnet": "control",
    "lora": "lora",
}
"""What a model must take for a widget to be of use."""
CLEARED: View = {
    **dict.fromkeys(("picture", "film"), gr.update(value=None, visible=False)),
    **dict.fromkeys(("picture_help", "film_help"), gr.update(visible=False)),
    **dict.fromkeys(("badge", "guarded", "banner", "timeline"), ""),
}
COPIED = ("copied", "copied_help")
"""Where a job is shown as text: not drawn before it is asked for, so no run may change it."""
BUTTONS = {"compare": "compare-stock", "copy_cli": "copy-cli", "copy_python": "copy-python"}
"""What may be done with a result, with the id of its button."""
Choices = list[tuple[str, str]]
"""What a list shows, and what it means."""
UNPROVEN = "(text, shown) => JSON.parse(text || '{}').tuned ? shown : ''"
"""A plan that was changed has no evidence: what was shown of it goes, in the browser alone."""
CLIPBOARD = "(text) => navigator.clipboard?.writeText(text)"


@dataclass(frozen=True, kw_only=True)
class Page(Watched):
    """The page's components, and what its events do.

    Attributes:
        fields: The settings, by the names in ``WIDGETS`` and in that order.
        redraw: Holds the knobs as they were when a method was last added or taken away.
        told: Holds the models as the page offers them.
    """

    fields: dict[str, Component]
    redraw: Component
    told: Component
    cleared: ClassVar[View] = CLEARED

    @property
    def inputs(self) -> list[Component]:
        """The settings as inputs of an event."""
        return list(self.fields.values())

    @property
    def settings(self) -> list[Component]:
        """What an event changes that puts settings into the widgets."""
        told = ("restored", "drop", "evidence")
        return [*self.fields.values(), self.redraw, *(self.shown[name] for name in told)]

    @property
    def chosen(self) -> list[Component]:
        """What an event changes that puts a goal into the knobs."""
        return [self.fields["knobs"], self.redraw, self.shown["evidence"]]

    @property
    def measured(self) -> list[Component]:
        """What an event changes that says what goals do."""
        return [self.fields["goal"], self.shown["measure"], self.shown["measuring"]]

    @property
    def adapted(self) -> list[Component]:
        """What an event changes that follows the choice of a model."""
        return [self.fields[name] for name in {**NEEDS, **OWN}]

    @property
    def results(self) -> list[Component]:
        """What an event changes that shows a run.

        Nothing that is folded away: Gradio takes the mark for "as before" in a stream for the
        value of a component that it has not drawn yet.
        """
        shown = [one for name, one in self.shown.items() if name not in COPIED]
        return [*shown, self.fields["seed"], self.watching]

    @property
    def copies(self) -> list[Component]:
        """What an event changes that shows a job as text, or says why it cannot be."""
        names = (*COPIED, "progress", "preview", "banner", "run", "stop")
        return [self.shown[name] for name in names]

    def spec(self, owner: str, values: tuple[Any, ...], kind: Kind = "generate") -> Spec:
        """What the settings ask for; files are kept as uploads of the owner."""
        named = dict(zip(WIDGETS, values, strict=True))
        if str(named["goal"]).startswith(forms.TUNED):  # whether the knobs show it by now or not
            named["knobs"] = knobs.shown(self.tuned(named["goal"]))
        return forms.spec_of(named, kind=kind, files=stored(self.service, owner, named))

    def tuned(self, goal: str) -> Plan:
        """The tuned plan that a goal names.

        Raises:
            BadInput: If the server has none of that name.
        """
        for path, plan in self.service.plans.items():
            if named(path) == goal:
                return plan
        raise BadInput(
            f"The server has no tuned plan {goal.removeprefix(forms.TUNED)[:60]!r}: choose another "
            "goal."
        )

    # what events do

    def run(self, request: gr.Request, *values: Any) -> Iterator[Updates]:
        """Submit what the settings say, and show it until it has ended."""
        try:
            spec = self.spec(owner_of(request), values)
        except AccelError as error:
            yield self.refused(error)
            return
        yield from self.submitted(spec, request)

    def resume(self, watching: str | None, request: gr.Request) -> Updates:
        """After a reload: the settings of the latest job again."""
        language = language_for(request)
        try:
            return self.loaded(self.service.job(owner_of(request), watching or "").spec, language)
        except AccelError:
            return {self.shown["restored"]: ""}

    def loaded(self, spec: Spec, language: Language) -> Updates:
        """The settings of a job, put into the widgets; its files are shown from copies.

        Raises:
            BadInput: If its model is not offered here.
        """
        offered = [info.name for info in self.service.models()]
        values = forms.values_of(spec)
        if values["model"] not in offered:
            raise BadInput(
                f"It was made by {values['model']}, which is not offered here: let the server be "
                f"started with --model {values['model']}."
            )
        for name in FILES:
            if values[name] is not None and Path(values[name]).is_file():
                values[name] = cached(self.fields[name], values[name])
        return {
            **{self.fields[name]: values[name] for name in WIDGETS},
            **self._known(Plan.from_dict(spec.plan), values["model"], language),
            self.redraw: values["knobs"],
        }

    def _known(self, plan: Plan, model: str, language: Language) -> Updates:
        """The evidence of a plan, and the goal that it is where the server has that plan, too."""
        evidence = parts.evidence(plan.tuned, language)
        file = next((path for path, one in self.service.plans.items() if one == plan), None)
        if file is None or self.service.refusal(model, plan) is not None:
            return {self.shown["evidence"]: evidence}
        found = gr.Radio(choices=captions(self.service, model, language), value=named(file))
        return {self.shown["evidence"]: evidence, self.fields["goal"]: found}

    def restore(self, path: str, model: str, request: gr.Request) -> Updates:
        """The settings that are in a file, or the plan that it is."""
        owner, language = owner_of(request), language_for(request)
        if Path(path).suffix == PLAN:
            return self._planned(Path(path), model, language)
        try:
            spec, made = roundtrip.from_file(Path(path))
            lost = roundtrip.lost(made, Folders(self.service.folder).uploads(owner))
            left = {name: value for name, value in spec.request.items() if name not in lost}
            updates = self.loaded(spec.model_copy(update={"request": left}), language)
        except AccelError as error:
            return {self.shown["drop"]: None, self.shown["restored"]: parts.error(str(error))}
        names = ", ".join(f"{name} ({Path(made.request[name]).name})" for name in lost)
        told = say("generate_restored", language, name=Path(path).name)
        missing = say("generate_lost", language, names=names) if lost else ""
        said = parts.note(told) + parts.error(missing)
        return {**updates, self.shown["drop"]: None, self.shown["restored"]: said}

    def _planned(self, path: Path, model: str, language: Language) -> Updates:
        """A plan that was dropped; a tuned one shows what it promises, and goes to its model alone.

        Unless the file says ``elsewhere = "warn"``: then what speaks against it is a warning.
        """
        shown, drop = self.shown["restored"], {self.shown["drop"]: None}
        try:
            plan = read(path)
            reason = self.service.refusal(model, plan)
        except AccelError as error:
            return {**drop, shown: parts.error(str(error))}
        name, against = path.name, parts.NOTHING
        if reason is not None and plan.tuned is not None:
            what = "refused" if plan.tuned.elsewhere == "refuse" else "warned"
            against = parts.error(say(f"generate_{what}", language, name=name, why=reason))
            if what == "refused":
                return {**drop, shown: parts.evidence(plan.tuned, language) + against}
        now = knobs.shown(plan)
        guard = plan.guard
        return {
            **drop,
            shown: parts.note(say("generate_planned", language, name=name)) + against,
            self.fields["goal"]: forms.CUSTOM,
            self.fields["budget"]: "" if guard is None else str(guard.max_error),
            self.fields["knobs"]: now,
            self.redraw: now,
            **self._known(plan, model, language),
        }

    def preset(self, goal: str, text: str, request: gr.Request) -> Updates:
        """A goal that was chosen, put into the knobs; a tuned plan with what it promises."""
        if goal == forms.CUSTOM:
            return {self.redraw: text}
        plan = self.tuned(goal) if goal.startswith(forms.TUNED) else Plan.preset(goal)
        now = knobs.shown(plan)
        evidence = parts.evidence(plan.tuned, language_for(request))
        return {self.fields["knobs"]: now, self.redraw: now, self.shown["evidence"]: evidence}

    def adapt(self, model: str) -> Updates:
        """Widgets that a model has no use for are greyed out; empty ones show its own values."""
        info = next((one for one in self.service.models() if one.name == model), None)
        if info is None:
            return NOTHING
        updates: Updates = {}
        for name, wanted in NEEDS.items():
            updates[self.fields[name]] = {"interactive": wanted in info.inputs}
        for name, argument in OWN.items():
            own = info.call.get("true_cfg_scale") if name == "guidance" else None
            own = info.call.get(argument) if own is None else own
            found = updates.setdefault(self.fields[name], {})
            found["placeholder"] = t("generate_own") if own in (None, "") else str(own)
        return {one: gr.update(**changes) for one, changes in updates.items()}

    def offered(self, told: Choices, request: gr.Request) -> Updates:
        """The models, if there is news of them: one may have been downloaded in the meantime.

        Nothing otherwise: new choices undo one that is just being made.
        """
        found = offered(self.service, language_for(request))
        if found == [tuple(one) for one in told]:
            return NOTHING
        return {self.fields["model"]: gr.update(choices=found), self.told: found}

    def emptied(self, model: str) -> Updates:
        """What another model has no use for is emptied when a person chooses that model."""
        takes = next(one for one in self.service.models() if one.name == model).inputs
        empty = {"negative_empty": False, "fps": str(Request().fps)}
        return {
            self.fields[name]: empty.get(name, None if name in FILES else "")
            for name, wanted in NEEDS.items()
            if wanted not in takes
        }

    def captions(self, model: str, goal: str, request: gr.Request) -> Updates:
        """The goals with what was measured of them on this machine.

        A tuned plan that was chosen for another model is one of this one no more: what it was stays
        in the knobs, and is refused by the name of its model.
        """
        updates = self._captions(model, language_for(request))
        radio = self.fields["goal"]
        if goal not in (value for _, value in updates[radio]["choices"]):
            updates[radio]["value"] = forms.CUSTOM
        return updates

    def _captions(self, model: str, language: Language) -> Updates:
        found = captions(self.service, model, language)
        missing = any(goal not in self.service.figures(model) for goal in PRESETS)
        return {
            self.fields["goal"]: gr.update(choices=found),
            self.shown["measure"]: gr.update(visible=missing),
        }

    def measure(self, model: str, request: gr.Request) -> Iterator[Updates]:
        """Measure the presets on a model, and show the figures when they are there."""
        owner, language = owner_of(request), language_for(request)
        button = self.shown["measure"]
        try:
            job = self.service.measure(owner, model)
        except AccelError as error:
            yield {self.shown["measuring"]: parts.error(str(error))}
            return
        yield {button: gr.update(interactive=False)}
        for view in follow(self.service, owner, job.id, language):
            yield {self.shown["measuring"]: view["progress"] + view.get("banner", "")}
        yield {button: gr.update(interactive=True), **self._captions(model, language)}

    def measure_first(self, model: str, request: gr.Request) -> Iterator[Updates]:
        """Measure the presets of a model once, when a first picture of it has been made."""
        jobs = self.service.history(owner_of(request), limit=500)
        asked = any(
            job.spec.kind == "measure" and job.spec.request.get("model") == model for job in jobs
        )
        if asked or self.service.figures(model):
            yield NOTHING
        else:
            yield from self.measure(model, request)

    def refreshed(self, watching: str | None, request: gr.Request) -> Updates:
        """The badge of the job that is shown: its stock time may have been measured by now."""
        try:
            job = self.service.job(owner_of(request), watching or "")
        except AccelError:
            return NOTHING
        if job.state not in ENDED:
            return NOTHING
        return {self.shown["badge"]: parts.badge(job.result, language_for(request))}

    def cli(self, watching: str | None, request: gr.Request, *values: Any) -> Updates:
        """The job that is shown, or else the settings, as a command."""
        write = partial(roundtrip.as_cli, files=self.service.plans)
        return self._copied(write, "shell", watching, request, values)

    def python(self, watching: str | None, request: gr.Request, *values: Any) -> Updates:
        """The job that is shown, or else the settings, as Python."""
        return self._copied(roundtrip.as_python, "python", watching, request, values)

    def _copied(
        self,
        write: Callable[[Spec], str],
        language: Literal["shell", "python"],
        watching: str | None,
        request: gr.Request,
        values: tuple[Any, ...],
    ) -> Updates:
        owner = owner_of(request)
        try:
            spec = self.service.job(owner, watching).spec if watching else self.spec(owner, values)
            text = write(spec)
        except AccelError as error:
            return self.refused(error)
        return {
            self.shown["copied"]: gr.Code(value=text, language=language, visible=True),
            self.shown["copied_help"]: gr.Markdown(visible=True),
        }

    def uncopied(self) -> Updates:
        """The text of the job before is of no use beside another one."""
        return {self.shown[name]: gr.update(visible=False) for name in COPIED}

    def comparison(self, watching: str | None, request: gr.Request) -> Spec:
        """The comparison of the job that is shown with the stock pipeline.

        Raises:
            NoSuchJob: If none is shown.
        """
        return compared(self.service.job(owner_of(request), watching or "").spec)

    def result(self, job: Job, request: gr.Request | None) -> Updates:  # noqa: ARG002
        """The picture or clip of a job, and what can be done with it."""
        path = records.file(self.service, job, "picture")
        film = path is not None and path.suffix == clips.CLIP
        still, whole = path is not None and not film, job.result is not None
        return {
            self.shown["picture"]: gr.Image(value=path if still else None, visible=still),
            self.shown["picture_help"]: gr.Markdown(visible=still),
            self.shown["film"]: gr.Video(value=path if film else None, visible=film),
            self.shown["film_help"]: gr.Markdown(visible=film),
            self.fields["seed"]: str(job.spec.request["seed"]),
            **{self.shown[name]: gr.Button(interactive=whole) for name in BUTTONS},
        }


def controlnets(service: Service) -> list[str]:
    """What the server offers beside the models that draw."""
    drawing = {info.name for info in service.models()}
    return [name for name in service.limits.models if name not in drawing]


def cached(component: Component, path: str) -> str:
    """A copy of an upload where Gradio may show it from."""
    from gradio.processing_utils import save_file_to_cache

    copy: str = save_file_to_cache(path, cache_dir=component.GRADIO_CACHE)
    return copy


def named(path: Path) -> str:
    """The goal that the tuned plan of a file is."""
    return forms.TUNED + path.stem


def captions(service: Service, model: str, language: Language) -> Choices:
    """The goals as choices: what each does to a model on this machine, and its value."""
    tuned = [
        (_promised(path.stem, plan.tuned, language), named(path))
        for path, plan in service.tuned(model).items()
        if plan.tuned is not None
    ]
    return [*preset_captions(service, model, language), *tuned]


def _promised(name: str, tuned: Tuned, language: Language) -> str:
    """What a tuned plan promises, in one line."""
    speedup = tuned.figure("speedup")
    ratio, low, high = (number(n, 2, language) for n in (speedup.mean, speedup.low, speedup.high))
    held = parts.held(tuned, language)
    targets = " & ".join(tuned.targets)
    return say(
        "generate_tuned",
        language,
        name=name,
        targets=targets,
        ratio=ratio,
        low=low,
        high=high,
        held=held,
    )


def preset_captions(service: Service, model: str, language: Language) -> Choices:
    """The presets, and one's own plan, as choices."""
    figures = service.figures(model)
    found = []
    for goal in forms.GOALS:
        name = say(f"generate_{goal}", language)
        figure = figures.get(goal)
        if figure is not None:
            ssim = figure.quality.get("ssim", 1.0)
            name = say(
                "generate_measured",
                language,
                name=name,
                ratio=parts.speedup(figure.speedup, language),
                ssim=ssim if isinstance(ssim, str) else number(ssim, 3, language),
                measured=figure.speedup.measured[:10],
            )
        elif goal in PRESETS:
            name = say("generate_unmeasured", language, name=name)
        found.append((name, goal))
    return found


# the components


def tab(service: Service) -> Page:
    """The page; it is drawn inside of the present block."""
    watching = gr.BrowserState(None, storage_key="accel-watching", secret="accel")
    told = gr.State(offered(service, "en"))
    redraw = _kept(Plan(), "knobs-drawn")
    with gr.Row():
        with gr.Column(scale=5, min_width=320):
            fields, shown = _settings(service, redraw)
        with gr.Column(scale=6, min_width=320):
            shown |= _shown()
    page = Page(
        service=service,
        shown=shown,
        watching=watching,
        fields={name: fields[name] for name in WIDGETS},
        redraw=redraw,
        told=told,
    )
    _wire(page)
    return page


def _kept(plan: Plan, elem_id: str) -> Component:
    """A text that the browser keeps, and nobody sees."""
    return gr.Textbox(
        value=knobs.shown(plan), visible="hidden", elem_id=elem_id, label=t("generate_knobs")
    )


Parts = dict[str, "Component"]


def _settings(service: Service, redraw: Component) -> tuple[Parts, Parts]:
    """The left side: settings, and the buttons among them."""
    fields, shown = _asked(service)
    fields["knobs"] = _kept(Plan.preset("balanced"), "knobs-text")
    with gr.Accordion(t("generate_inputs"), open=False, elem_id="inputs"):
        fields |= _pictures(controlnets(service))
    with gr.Accordion(t("generate_more"), open=False, elem_id="more"):
        fields |= _more()
    with gr.Accordion(t("generate_knobs"), open=False, elem_id="knobs") as folded:
        gr.Markdown(t("generate_knobs_intro"))
        _draw_knobs(service, fields, redraw, folded)
    shown["drop"] = gr.File(
        file_types=[".png", ".mp4", ".json", PLAN],
        height=110,
        elem_id="drop",
        label=t("generate_drop"),
    )
    gr.Markdown(t("generate_drop_help"))
    shown["restored"] = gr.HTML(elem_id="restored")
    return fields, shown


def _asked(service: Service) -> tuple[Parts, Parts]:
    """What every run needs."""
    models = service.models()
    fields: Parts = {
        "prompt": gr.Textbox(
            value=say("generate_example"), lines=2, elem_id="prompt", **labelled("generate_prompt")
        )
    }
    with gr.Row():
        run = gr.Button(t("generate_run"), variant="primary", elem_id="generate")
        stop = gr.Button(t("generate_stop"), interactive=False, elem_id="stop")
    fields["goal"] = gr.Radio(
        preset_captions(service, models[0].name, "en"),
        value="balanced",
        elem_id="goal",
        **labelled("generate_goal"),
    )
    evidence = gr.HTML(elem_id="evidence")
    measure = gr.Button(t("generate_measure"), size="sm", elem_id="measure")
    measuring = gr.HTML(elem_id="measuring")
    fields["budget"] = _number("budget", empty="generate_unguarded")
    fields["model"] = gr.Dropdown(
        offered(service, "en"),
        value=models[0].name,
        elem_id="model",
        **labelled("generate_model"),
    )
    with gr.Row():
        fields["seed"] = gr.Textbox(
            max_lines=1,
            elem_id="seed",
            placeholder=t("generate_drawn"),
            **labelled("generate_seed"),
        )
        fields["seed_lock"] = gr.Checkbox(elem_id="seed-lock", **labelled("generate_seed_lock"))
    with gr.Row():
        fields |= {name: _number(name) for name in ("steps", "width", "height", "frames")}
    fields["guidance"] = _number("guidance")
    fields["negative"] = gr.Textbox(elem_id="negative", **labelled("generate_negative"))
    shown = {"run": run, "stop": stop, "measure": measure, "measuring": measuring}
    return fields, {**shown, "evidence": evidence}


def offered(service: Service, language: Language) -> Choices:
    """The models as choices: what there is to know before one is chosen, and its name."""
    return [(_named(one, language), one.name) for one in service.models()]


def _named(info: ModelInfo, language: Language) -> str:
    """A model with the size of its files, or that they are yet to be downloaded."""
    if info.bytes is None:
        return f"{info.name} ({say('generate_absent', language)})"
    size = say("generate_size", language, size=number(info.bytes / 1e6, 0, language))
    told = size if info.here else say("generate_download", language, size=size)
    return f"{info.name} ({told})"


def _number(name: str, value: str = "", empty: str = "generate_own") -> Component:
    return gr.Textbox(
        value=value,
        max_lines=1,
        placeholder=t(empty),
        elem_id=name,
        min_width=110,
        **labelled(f"generate_{name}"),
    )


def _pictures(controlnets: Sequence[str]) -> Parts:
    """Files that go in. Pictures are taken as they are: as files, in their own mode."""
    fields: Parts = {}
    with gr.Row():
        for name in PICTURES:
            with gr.Column(min_width=160):
                fields[name] = gr.Image(
                    type="filepath",
                    image_mode=None,
                    sources=["upload", "clipboard"],
                    height=200,
                    elem_id=name,
                    label=t(f"generate_{name}"),
                )
                gr.Markdown(t(f"generate_{name}_help"))
    fields["strength"] = _number("strength")
    fields["controlnet"] = gr.Dropdown(
        [(t("generate_none"), ""), *((name, name) for name in controlnets)],
        value="",
        elem_id="controlnet",
        **labelled("generate_controlnet"),
    )
    fields["lora"] = gr.File(
        file_types=[".safetensors"], elem_id="lora", label=t("generate_lora"), height=120
    )
    gr.Markdown(t("generate_lora_help"))
    return fields


def _more() -> Parts:
    return {
        "negative_empty": gr.Checkbox(
            elem_id="negative-empty", **labelled("generate_negative_empty")
        ),
        "fps": _number("fps", str(Request().fps)),
        "device": gr.Textbox(max_lines=1, elem_id="device", **labelled("generate_device")),
        "dtype": gr.Dropdown(
            list(forms.DTYPES), value=forms.DEFAULT, elem_id="dtype", **labelled("generate_dtype")
        ),
        "compile": gr.Dropdown(
            list(forms.SWITCH),
            value=forms.DEFAULT,
            elem_id="compile",
            **labelled("generate_compile"),
        ),
    }


def _draw_knobs(service: Service, fields: Parts, redraw: Component, folded: gr.Accordion) -> None:
    model, text, goal = fields["model"], fields["knobs"], fields["goal"]

    def draw(model_name: str, now: str) -> None:
        try:
            knobs.draw(now, service.fits(model_name), (text, redraw, goal))
        except AccelError as error:
            gr.HTML(parts.error(str(error)))

    drawn = gr.render(
        inputs=[model, text],
        triggers=[folded.expand, redraw.change, model.change],
        show_progress="hidden",
        queue=False,
    )
    drawn(draw)


def _shown() -> Parts:
    """The right side: what is shown of a run."""
    shown: Parts = {
        "progress": gr.HTML(elem_id="progress"),
        "preview": gr.HTML(elem_id="preview"),
    }
    with gr.Column(elem_id="result"):
        shown["picture"] = gr.Image(
            type="filepath",
            interactive=False,
            visible=False,
            format="png",
            buttons=["download", "fullscreen"],
            label=t("generate_result"),
        )
        shown["film"] = gr.Video(
            interactive=False, visible=False, loop=True, label=t("generate_clip")
        )
        shown["picture_help"] = gr.Markdown(t("generate_result_help"), visible=False)
        shown["film_help"] = gr.Markdown(t("generate_clip_help"), visible=False)
    shown["badge"] = gr.HTML(elem_id="badge")
    shown["guarded"] = gr.HTML(elem_id="guarded")
    shown["banner"] = gr.HTML(elem_id="banner")
    with gr.Row():
        for name, elem_id in BUTTONS.items():
            shown[name] = gr.Button(
                t(f"generate_{name}"), interactive=False, size="sm", elem_id=elem_id
            )
    shown["copied"] = gr.Code(
        visible=False, interactive=False, elem_id="copied", label=t("generate_copied")
    )
    shown["copied_help"] = gr.Markdown(t("generate_copied_help"), visible=False)
    shown["timeline"] = gr.HTML(elem_id="timeline")
    return shown


def _wire(page: Page) -> None:
    shown, fields = page.shown, page.fields
    model, goal, text = fields["model"], fields["goal"], fields["knobs"]
    ran = shown["run"].click(page.run, page.inputs, page.results, **LIVE)
    shown["run"].click(page.uncopied, None, [shown[name] for name in COPIED], **QUIET)
    measured = page.measured
    first = ran.then(page.measure_first, model, measured, **LIVE)
    shown["stop"].click(page.stop, page.watching, page.results, **QUIET)
    asked = shown["measure"].click(page.measure, model, measured, **LIVE)
    for done in (first, asked):
        done.then(page.refreshed, page.watching, shown["badge"], **QUIET)
    ran.then(page.offered, page.told, [model, page.told], **QUIET)
    shown["drop"].upload(page.restore, [shown["drop"], model], page.settings, **QUIET)
    goal.input(page.preset, [goal, text], page.chosen, **QUIET)
    evidence = shown["evidence"]
    text.change(
        fn=None, inputs=[text, evidence], outputs=evidence, js=UNPROVEN, api_visibility="private"
    )
    model.change(page.adapt, model, page.adapted, **QUIET)
    model.change(page.captions, [model, goal], measured, **QUIET)
    model.input(page.emptied, model, page.adapted, **QUIET)
    for name, copy in {"copy_cli": page.cli, "copy_python": page.python}.items():
        given = [page.watching, *page.inputs]
        done = shown[name].click(copy, given, page.copies, **QUIET)
        done.then(fn=None, inputs=shown["copied"], js=CLIPBOARD, api_visibility="private")
