"""The raw knobs: a widget for every field of every method, made from the field itself.

What the knobs say is kept in the browser as one text, ``{method: {field: JSON text}}``: an event in
the browser changes it, so that a click on *Generate* sees a knob that was turned a moment before,
and nothing is lost of a number that JavaScript cannot hold. Guard and evidence of a plan are in it,
though they have no knobs; a knob that is turned takes the evidence away.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin

import gradio as gr
from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from accel.attach import LAYERS, Accelerator
from accel.errors import BadInput, PlanError
from accel.plan import GUARD, TUNED, Plan, build, evidence, guarding, method_class, methods
from app.listing import allowed
from app.ui.words import t

if TYPE_CHECKING:
    from gradio.components import Component

    from app.serve.fitting import Fits

Kind = Literal["slider", "number", "choice", "switch", "words", "json"]
Chosen = dict[str, dict[str, str]]
"""Method → field → JSON text of its value."""

WIDEST = 10_000
"""A range of whole numbers up to this is a slider."""
CUSTOM = "custom"


@dataclass(frozen=True)
class Knob:
    """One field of a method, as a widget.

    Attributes:
        method: ``cache.EasyCache``.
        field: ``threshold``.
        kind: Which widget: a ``slider`` where both ends of the range are finite, a ``number`` where
            not, a ``choice`` of words, a ``switch``, ``words``, or ``json`` for everything else.
        default: JSON text of its default.
        info: One sentence: what it is, its range.
        whole: Whether a number is whole.
        low: Of the range, for a slider.
        high: Of the range, for a slider.
        choices: JSON values, for a choice.
    """

    method: str
    field: str
    kind: Kind
    default: str
    info: str
    whole: bool = False
    low: float = 0.0
    high: float = 0.0
    choices: tuple[Any, ...] = ()

    @property
    def elem_id(self) -> str:
        """The id of its widget in the page."""
        return f"knob-{self.method.replace('.', '-')}-{self.field}"


def of_method(name: str) -> list[Knob]:
    """The knobs of a method, in the order of its fields.

    Raises:
        UnknownMethod: If there is no such method.
    """
    kind = method_class(name)
    defaults = kind().model_dump(mode="json")
    return [
        _knob(name, field, info, json.dumps(defaults[field]))
        for field, info in kind.model_fields.items()
    ]


def _knob(method: str, field: str, info: FieldInfo, default: str) -> Knob:
    told = f"{_sentence(info.description)} ({allowed(info)})"
    kind = info.annotation
    if kind is bool:
        return Knob(method, field, "switch", default, told)
    if get_origin(kind) is Literal:
        return Knob(method, field, "choice", default, told, choices=get_args(kind))
    if kind in (int, float):
        return _number(method, field, info, default, told)
    plain: Kind = "words" if _is_words(kind) else "json"
    return Knob(method, field, plain, default, told)


def _number(method: str, field: str, info: FieldInfo, default: str, told: str) -> Knob:
    low, high = _range(info)
    whole = info.annotation is int
    finite = math.isfinite(low) and math.isfinite(high)
    kind: Kind = "slider" if finite and (not whole or high - low <= WIDEST) else "number"
    ends = (low, high) if kind == "slider" else (0.0, 0.0)
    return Knob(method, field, kind, default, told, whole, *ends)


def _range(info: FieldInfo) -> tuple[float, float]:
    """The ends of a range, open ones as closed: the method itself refuses an open end."""
    low, high = -math.inf, math.inf
    for note in info.metadata:
        match note:
            case Ge(ge=bound) | Gt(gt=bound):
                low = float(bound)  # type: ignore[arg-type]
            case Le(le=bound) | Lt(lt=bound):
                high = float(bound)  # type: ignore[arg-type]
    return low, high


def _is_words(kind: Any) -> bool:
    """Whether a field holds text or a path, or may be left empty instead."""
    if isinstance(kind, UnionType) or get_origin(kind) is Union:
        return all(one in (str, Path, NoneType) for one in get_args(kind))
    return kind in (str, Path)


def _sentence(text: str | None) -> str:
    return (text or "").strip().rstrip(".")


def by_layer() -> dict[str, list[type[Accelerator]]]:
    """Every method by its layer, outermost layer first."""
    found: dict[str, list[type[Accelerator]]] = {}
    for kind in sorted(methods().values(), key=lambda one: (LAYERS.index(one.layer), one.name)):
        found.setdefault(str(kind.layer), []).append(kind)
    return found


# what the knobs say


def shown(plan: Plan) -> str:
    """A plan as the text that the browser keeps."""
    parts: list[tuple[str, BaseModel]] = [(method.name, method) for method in plan]
    beside = {GUARD: plan.guard, TUNED: plan.tuned}
    parts += [(name, part) for name, part in beside.items() if part is not None]
    return _written(
        {
            name: {
                field: json.dumps(value) for field, value in part.model_dump(mode="json").items()
            }
            for name, part in parts
        }
    )


def read(text: str) -> Plan:
    """The plan of what the knobs say.

    Raises:
        BadInput: If the text is none that ``shown`` writes.
        PlanError: If a field holds no JSON, or is out of its range, or the evidence is of another
            plan.
        UnknownMethod: If there is no such method.
    """
    parts: dict[str, Any] = {
        name: {field: _value(name, field, value) for field, value in fields.items()}
        for name, fields in chosen(text).items()
    }
    guard, tuned = guarding(parts.pop(GUARD, None)), evidence(parts.pop(TUNED, None))
    found = (build(name, fields) for name, fields in parts.items())
    return Plan(*found, guard=guard, tuned=tuned)


def chosen(text: str) -> Chosen:
    """The methods and fields in the text that the browser keeps.

    Raises:
        BadInput: If it is none that ``shown`` writes.
    """
    try:
        found = json.loads(text or "{}")
        return {str(name): dict(fields) for name, fields in found.items()}
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise BadInput(
            f"The knobs {text[:60]!r} are no JSON object of methods and their fields: choose a "
            "goal, and turn them again."
        ) from error


def _value(name: str, field: str, text: Any) -> Any:
    try:
        return json.loads(text)
    except (ValueError, TypeError, RecursionError) as error:
        raise PlanError(
            f"{name}.{field} = {text}: this is no JSON, such as 0.5, [1, 2] or null. Run "
            f"`accel methods {name}`."
        ) from error


def _written(found: Chosen) -> str:
    return json.dumps(found, sort_keys=True)


# the widgets

Targets = tuple["Component", "Component", "Component"]

TURN = """(text, value) => {
  const all = JSON.parse(text || "{}");
  all[%(method)s][%(field)s] = %(value)s;
  delete all.tuned;
  return [JSON.stringify(all), "custom"];
}"""
TOGGLE = """(text, on) => {
  const all = JSON.parse(text || "{}");
  if (on) all[%(method)s] = %(defaults)s; else delete all[%(method)s];
  delete all.tuned;
  const now = JSON.stringify(all);
  return [now, now, "custom"];
}"""
VALUE = {
    "words": "value ? JSON.stringify(value) : %(empty)s",
    "json": "value",
}


def draw(text: str, fits: Fits, targets: Targets) -> None:
    """Put the widgets into the present block: a switch a method, and the fields of chosen ones.

    Args:
        text: What the browser keeps.
        fits: Which methods fit the model, and each other.
        targets: Components that hold that text, the text at the last change of methods (a change
            of it draws anew), and the goal.
    """
    now = {name: one for name, one in chosen(text).items() if name not in (GUARD, TUNED)}
    for layer, kinds in by_layer().items():
        count = sum(kind.name in now for kind in kinds)
        head = f"{layer} ({count})" if count else layer
        with gr.Accordion(head, open=bool(count)):
            for kind in kinds:
                _draw_method(kind, now, fits, targets)


def _draw_method(kind: type[Accelerator], now: Chosen, fits: Fits, targets: Targets) -> None:
    name, on = kind.name, kind.name in now
    reason = fits.reason(now, name)
    summary = (kind.__doc__ or "").strip().splitlines()[0]
    told = summary if reason is None else f"{t('knobs_unfit')} {reason}"
    text, redraw, goal = targets
    switch = gr.Checkbox(
        value=on,
        label=name,
        info=told,
        interactive=on or reason is None,
        elem_id=f"method-{name.replace('.', '-')}",
    )
    defaults = {knob.field: knob.default for knob in of_method(name)}
    script = TOGGLE % {"method": json.dumps(name), "defaults": json.dumps(defaults)}
    _in_browser(switch.input, script, [text, switch], [text, redraw, goal])
    if on:
        with gr.Group():
            for knob in of_method(name):
                _draw_knob(knob, now[name].get(knob.field, knob.default), text, goal)


def _draw_knob(knob: Knob, value: str, text: Component, goal: Component) -> None:
    widget = widget_of(knob, value)
    empty = json.dumps("null" if knob.default == "null" else '""')
    form = VALUE.get(kind_of(knob, value), "JSON.stringify(value)") % {"empty": empty}
    script = TURN % {
        "method": json.dumps(knob.method),
        "field": json.dumps(knob.field),
        "value": form,
    }
    changed: Any = widget.input
    _in_browser(changed, script, [text, widget], [text, goal])


def _in_browser(
    event: Callable[..., Any], script: str, inputs: list[Component], outputs: list[Component]
) -> None:
    """Answer an event in the browser alone."""
    event(fn=None, inputs=inputs, outputs=outputs, js=script, api_visibility="private")


def kind_of(knob: Knob, value: str) -> Kind:
    """Which widget can show a value: infinity and null are no numbers to a browser."""
    numeric = knob.kind in ("slider", "number")
    return "json" if numeric and not _is_number(value) else knob.kind


def _is_number(text: str) -> bool:
    found = json.loads(text)
    return isinstance(found, (int, float)) and math.isfinite(found) and abs(found) < 2**53


def widget_of(knob: Knob, value: str) -> Component:
    """The widget of a knob, showing a value given as JSON text."""
    kind = kind_of(knob, value)
    common: dict[str, Any] = {
        "label": knob.field,
        "info": knob.info,
        "elem_id": knob.elem_id,
        "interactive": True,
    }
    if kind == "json":
        return gr.Textbox(value=value, **common)
    return _MAKERS[kind](knob, json.loads(value), common)


def _slider(knob: Knob, value: Any, common: dict[str, Any]) -> Component:
    step = 1.0 if knob.whole else 10.0 ** (math.floor(math.log10(knob.high - knob.low)) - 2)
    return gr.Slider(knob.low, knob.high, value=value, step=step, **common)


_MAKERS: dict[Kind, Callable[[Knob, Any, dict[str, Any]], Component]] = {
    "slider": _slider,
    "number": lambda knob, value, common: gr.Number(
        value=value, precision=0 if knob.whole else None, step=1 if knob.whole else 0.01, **common
    ),
    "choice": lambda knob, value, common: gr.Dropdown(
        choices=[(str(one), one) for one in knob.choices], value=value, **common
    ),
    "switch": lambda _knob, value, common: gr.Checkbox(value=value, **common),
    "words": lambda _knob, value, common: gr.Textbox(value=value or "", **common),
}
