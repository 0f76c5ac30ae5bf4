"""Between what stands in the widgets and a ``Spec``: pure functions, both ways.

A widget that is empty leaves its value to the model. The values of a form are a dict by the names
in ``NAMES``; ``spec_of(values_of(spec))`` is ``spec`` again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

from accel.guard import Guard
from accel.plan import PRESETS, Plan, guarding
from app.request import Dtype, Request, make
from app.serve.jobs import Kind, Spec
from app.ui import knobs

CUSTOM = "custom"
GOALS = (*PRESETS, CUSTOM)
TUNED = "tuned:"
"""In front of the name of a tuned plan, as a goal: its plan is what the knobs say."""
DEFAULT = "default"
"""In a dropdown: leave it to the model."""
DTYPES = (DEFAULT, *get_args(Dtype))
SWITCH: dict[str, bool | None] = {DEFAULT: None, "yes": True, "no": False}
NUMBERS = ("steps", "guidance", "width", "height", "frames", "fps", "strength")
"""Fields of a request that are typed as text: a number box of Gradio cannot be empty."""

BESIDE = ("negative_empty", "seed_lock", "goal", "budget", "knobs")
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
    goal, text = values.get("goal") or CUSTOM, values.get("knobs") or ""
    plan = plan_of(goal, text, values.get("budget") or "").to_dict()
    return Spec(
        kind=kind,
        request=request_of({**values, **(files or {})}).to_dict(),
        plan=plan,
        title=title_of(plan),
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


def plan_of(goal: str, text: str, budget: str = "") -> Plan:
    """The plan of a goal: a preset, or what the knobs say; under a guard, where there is a budget.

    Args:
        goal: One of ``GOALS``, or the name of a tuned plan.
        text: What the knobs say; of a guard in it all but the budget counts.
        budget: Error that a guard allows; empty: there is no guard.

    Raises:
        PlanError: If there is no such goal, the knobs make no plan, or the budget is none.
    """
    said = knobs.read(text) if goal == CUSTOM or goal.startswith(TUNED) else Plan.preset(goal)
    guard = None
    if budget.strip():
        held = {} if said.guard is None else said.guard.model_dump(mode="json")
        guard = guarding({**held, "max_error": budget.strip()})
    # what a tuned plan promises was measured without another guard
    return said if guard == said.guard else Plan(*said, guard=guard)


def goal_of(plan: Plan) -> str:
    """The preset whose methods a plan has, under a guard or not, or ``custom``."""
    if plan.tuned is not None:
        return CUSTOM
    return next((name for name in PRESETS if plan.methods == Plan.preset(name).methods), CUSTOM)


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
        "goal": goal_of(plan) if _is_plain(plan.guard) else CUSTOM,
        "budget": "" if plan.guard is None else str(plan.guard.max_error),
        "knobs": knobs.shown(plan),
    }


def _is_plain(guard: Guard | None) -> bool:
    """Whether the budget says all of a guard."""
    return guard is None or guard == Guard(max_error=guard.max_error)


def _typed(value: float | None) -> str:
    return "" if value is None else str(value)


def title_of(plan: Mapping[str, Any]) -> str:
    """What a person would call a plan: its preset, what it was tuned for, or a custom one.

    Raises:
        PlanError: If it is none.
    """
    found = Plan.from_dict(plan)
    title = goal_of(found)
    if found.tuned is not None:
        title = f"tuned for {' and '.join(found.tuned.targets)}"
    elif title == CUSTOM:
        title = "custom plan"
    return title if found.guard is None else f"{title}, error ≤ {found.guard.max_error:g}"
