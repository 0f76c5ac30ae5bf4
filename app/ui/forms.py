"""Between what stands in the widgets and a ``Spec``: pure functions, both ways.

A widget that is empty leaves its value to the model. The values of a form are a dict by the names
in ``NAMES``; ``spec_of(values_of(spec))`` is ``spec`` again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

from accel.plan import PRESETS, Plan
from app.request import Dtype, Request, make
from app.serve.jobs import Kind, Spec
from app.ui import knobs

CUSTOM = "custom"
GOALS = (*PRESETS, CUSTOM)
TITLES = {CUSTOM: "custom plan"}
DEFAULT = "default"
"""In a dropdown: leave it to the model."""
DTYPES = (DEFAULT, *get_args(Dtype))
SWITCH: dict[str, bool | None] = {DEFAULT: None, "yes": True, "no": False}
NUMBERS = ("steps", "guidance", "width", "height", "frames", "fps", "strength")
"""Fields of a request that are typed as text: a number box of Gradio cannot be empty."""

BESIDE = ("negative_empty", "seed_lock", "goal", "knobs")
"""Widgets that are no field of a request."""
NAMES = (*(field.name for field in fields(Request)), *BESIDE)


def spec_of(
    values: Mapping[str, Any],
    *,
    kind: Kind = "generate",
    repeats: int = 3,
    files: Mapping[str, Path] | None = None,
) -> Spec:
    """What the widgets ask for.

    Args:
        values: By the names in ``NAMES``; what is missing is as in an empty form.
        kind: Of the job.
        repeats: Timed runs of each side, for the kinds that time.
        files: Where the files of the form lie now, by field, instead of where they were given.

    Raises:
        BadInput: If a value is of a wrong type or out of its range.
        PlanError: If a field of a method is.
    """
    goal = values.get("goal") or CUSTOM
    return Spec(
        kind=kind,
        request=request_of({**values, **(files or {})}).to_dict(),
        plan=plan_of(goal, values.get("knobs") or "").to_dict(),
        title=TITLES.get(goal, goal),
        repeats=repeats,
    )


def request_of(values: Mapping[str, Any]) -> Request:
    """The request of a form.

    Raises:
        BadInput: Names the first value that is of a wrong type or out of its range.
    """
    given = {field.name: values.get(field.name) for field in fields(Request)}
    given |= {
        "seed": values.get("seed") if values.get("seed_lock") else None,
        "dtype": _unless_default(values.get("dtype")),
        "compile": SWITCH[values.get("compile") or DEFAULT],
    }
    asked = {name: value for name, value in given.items() if value not in (None, "")}
    if values.get("negative_empty"):
        asked["negative"] = ""
    return make(Request, asked, where="")


def _unless_default(value: Any) -> Any:
    return None if value == DEFAULT else value


def plan_of(goal: str, text: str) -> Plan:
    """The plan of a goal: a preset, or what the knobs say.

    Raises:
        PlanError: If there is no such goal, or the knobs make no plan.
    """
    return knobs.read(text) if goal == CUSTOM else Plan.preset(goal)


def goal_of(plan: Plan) -> str:
    """The preset that a plan equals, or ``custom``."""
    return next((name for name in PRESETS if plan == Plan.preset(name)), CUSTOM)


def values_of(spec: Spec) -> dict[str, Any]:
    """What the widgets show for a job.

    Raises:
        BadInput: If its request is none.
        PlanError: If its plan is none.
    """
    request, plan = make(Request, spec.request, where=""), Plan.from_dict(spec.plan)
    plain = {field.name: getattr(request, field.name) for field in fields(Request)}
    switch = next(word for word, value in SWITCH.items() if value is request.compile)
    return {
        **{name: str(value) if isinstance(value, Path) else value for name, value in plain.items()},
        "negative": request.negative or "",
        **{name: _typed(plain[name]) for name in ("seed", *NUMBERS)},
        "dtype": request.dtype or DEFAULT,
        "compile": switch,
        "negative_empty": request.negative == "",
        "seed_lock": request.seed is not None,
        "goal": goal_of(plan),
        "knobs": knobs.shown(plan),
    }


def _typed(value: float | None) -> str:
    return "" if value is None else str(value)


def title_of(plan: Mapping[str, Any]) -> str:
    """What a person would call a plan: its preset, or a custom one.

    Raises:
        PlanError: If it is none.
    """
    goal = goal_of(Plan.from_dict(plan))
    return TITLES.get(goal, goal)
