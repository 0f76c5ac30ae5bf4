"""Raw knobs: a widget for every field of every method, and what they say is the plan."""

import json
from typing import Any

import gradio as gr
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_laws_roundtrip import plans
from ui_service import drawn

from accel import Plan, cache
from accel import methods as all_methods
from accel.errors import AccelError
from accel.plan import build
from app.serve.fitting import Fits
from app.ui import knobs

FIT = Fits(methods=dict.fromkeys(all_methods()))
CLASSES = {
    "slider": gr.Slider,
    "number": gr.Number,
    "choice": gr.Dropdown,
    "switch": gr.Checkbox,
    "words": gr.Textbox,
    "json": gr.Textbox,
}
EVERY = [knob for name in all_methods() for knob in knobs.of_method(name)]


@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(plan=plans())
def test_what_the_knobs_show_of_a_plan_is_the_plan(plan: Plan) -> None:
    assert knobs.read(knobs.shown(plan)) == plan


def test_every_field_of_every_method_has_a_knob_with_its_name_and_a_sentence() -> None:
    for name, kind in all_methods().items():
        made = knobs.of_method(name)
        assert [knob.field for knob in made] == list(kind.model_fields)
        assert all(knob.info.strip() for knob in made)
    ids = [knob.elem_id for knob in EVERY]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("name", sorted(all_methods()))
def test_a_knob_shows_its_default_and_saying_it_again_changes_nothing(name: str) -> None:
    made = knobs.of_method(name)
    widgets, _ = drawn(lambda: [knobs.widget_of(knob, knob.default) for knob in made])
    for knob, widget in zip(made, widgets, strict=True):
        kind = knobs.kind_of(knob, knob.default)
        assert isinstance(widget, CLASSES[kind])
        said = widget.value if kind == "json" else in_browser(kind, knob, widget.value)
        assert build(name, {knob.field: json.loads(said)}) == all_methods()[name]()


def in_browser(kind: str, knob: knobs.Knob, value: Any) -> str:
    """What the script of a knob makes of the value of its widget."""
    if kind == "words" and not value:
        return "null" if knob.default == "null" else '""'
    return json.dumps(value)


@pytest.mark.parametrize("name", sorted(all_methods()))
def test_a_slider_and_a_choice_offer_what_the_method_takes_and_nothing_else(name: str) -> None:
    for knob in knobs.of_method(name):
        if knob.kind == "slider":
            assert knob.low <= json.loads(knob.default) <= knob.high
            for value in (knob.low - 1, knob.high + 1):
                with pytest.raises(AccelError, match=knob.field):
                    build(name, {knob.field: int(value) if knob.whole else value})
        elif knob.kind == "choice":
            assert json.loads(knob.default) in knob.choices


@settings(max_examples=50)
@given(
    text=st.text(max_size=30) | st.recursive(st.none() | st.integers(), st.lists).map(json.dumps)
)
def test_no_text_does_worse_than_a_refusal(text: str) -> None:
    for said in (
        text,
        json.dumps({"cache.EasyCache": {"threshold": text}}),
        json.dumps({text: {}}),
    ):
        try:
            knobs.read(said)
        except AccelError:
            continue


def test_a_field_that_is_no_json_is_named() -> None:
    with pytest.raises(AccelError, match=r"cache.Custom.steps = \[1, 2"):
        knobs.read(json.dumps({"cache.Custom": {"steps": "[1, 2"}}))


# the page


def page(plan: Plan, fits: Fits = FIT) -> gr.Blocks:
    """The knobs of a plan."""

    def draw() -> None:
        text, redraw, goal = gr.Textbox(), gr.Textbox(), gr.Radio(["custom"])
        knobs.draw(knobs.shown(plan), fits, (text, redraw, goal))

    return drawn(draw)[1]


def widgets(plan: Plan, fits: Fits = FIT) -> dict[str, Any]:
    """The widgets that are drawn for a plan, by id."""
    blocks = page(plan, fits).blocks.values()
    return {block.elem_id: block for block in blocks if getattr(block, "elem_id", None)}


def switch(name: str) -> str:
    return f"method-{name.replace('.', '-')}"


def test_every_method_is_offered_and_only_chosen_ones_show_their_fields() -> None:
    shown = widgets(Plan(cache.EasyCache(threshold=0.25)))
    assert {switch(name) for name in all_methods()} <= set(shown)
    fields = {knob.elem_id for knob in knobs.of_method("cache.EasyCache")}
    assert {name for name in shown if name.startswith("knob-")} == fields
    assert shown["knob-cache-EasyCache-threshold"].value == 0.25
    on = [name for name in all_methods() if shown[switch(name)].value]
    assert on == ["cache.EasyCache"]


def test_what_does_not_fit_is_greyed_out_and_says_why() -> None:
    other, reason = "tokens.ToMe", "it needs a UNet, and this is a transformer"
    fits = Fits(
        methods={**FIT.methods, other: reason},
        pairs={"cache.EasyCache cache.TeaCache": "both answer for the whole network"},
    )
    shown = widgets(Plan(cache.EasyCache()), fits)
    assert not shown[switch(other)].interactive and reason in shown[switch(other)].info
    rival = shown[switch("cache.TeaCache")]
    assert not rival.interactive and "both answer for the whole network" in rival.info
    assert all(
        shown[switch(name)].interactive
        for name in all_methods()
        if name not in (other, "cache.TeaCache")
    )
    assert widgets(Plan(), fits)[switch("cache.TeaCache")].interactive


def test_what_is_chosen_and_does_not_fit_can_still_be_taken_away() -> None:
    fits = Fits(methods={**FIT.methods, "cache.EasyCache": "it does not fit"})
    box = widgets(Plan(cache.EasyCache()), fits)[switch("cache.EasyCache")]
    assert box.interactive and box.value and "it does not fit" in box.info


def test_turning_a_knob_asks_the_server_nothing() -> None:
    turns = page(Plan(cache.EasyCache())).fns.values()
    assert len(turns) == len(all_methods()) + len(knobs.of_method("cache.EasyCache"))
    assert all(turn.fn is None and turn.js and turn.api_visibility == "private" for turn in turns)
