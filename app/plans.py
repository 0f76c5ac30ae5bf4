"""The plan that a user chose: a preset or a file, and changes to it."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accel.errors import BadInput, PlanError
from accel.plan import GUARD, TUNED, Plan
from app.request import Choice

HINT = "write METHOD.FIELD=VALUE, such as cache.EasyCache.threshold=0.05 or guard.max_error=0.05"


def chosen(choice: Choice, base: Mapping[str, Any] | None = None) -> Plan:
    """The plan of a choice.

    Args:
        choice: What was typed.
        base: A plan as ``Plan.to_dict`` writes it, for where neither file nor preset was given.

    Raises:
        PlanError: If the plan cannot be read, or is none.
        BadInput: If the file cannot be read, more than one of file, preset and goal is given, or
            no tuned plan holds the goal.
    """
    given = [name for name in ("plan", "preset", "goal") if getattr(choice, name)]
    if len(given) > 1:
        both = " and ".join(f"--{name}" for name in given)
        raise BadInput(f"{both} are both given: choose one, and change it by --set.")
    if choice.goal:
        document = for_goal(choice).to_dict()
    elif choice.plan:
        document = read(choice.plan).to_dict()
    elif choice.preset:
        document = Plan.preset(choice.preset).to_dict()
    else:
        document = dict(base or {})
    for change in choice.changes:
        document = _changed(document, change)
    if TUNED in document and any(not change.startswith("tuned.") for change in choice.changes):
        document = {name: table for name, table in document.items() if name != TUNED}
    return Plan.from_dict(document)


def for_goal(choice: Choice) -> Plan:
    """The fastest tuned plan that holds the goal of a choice.

    Raises:
        BadInput: If there is none, or no folder of tuned plans was given.
        PlanError: If a file there is no plan.
    """
    from accel.tuning.library import fastest, tuned_plans
    from accel.tuning.targets import Targets

    goal = Targets.parse(choice.goal)
    if choice.tuned is None:
        raise BadInput(
            f"--goal {goal.each[0]}: name the folder of the plans that `accel tune` wrote for this "
            "model, by --tuned."
        )
    return fastest(tuned_plans(choice.tuned), goal, f"the folder {choice.tuned}")[1]


def read(path: Path) -> Plan:
    """The plan in a TOML file, with the paths in it taken relative to its folder.

    Raises:
        BadInput: If the file is not there or not readable.
        PlanError: If it holds no plan.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise BadInput(
            f"The plan {path} cannot be read ({error.strerror}): give the path of a TOML file; "
            "`accel methods --toml` prints one."
        ) from error
    except UnicodeDecodeError as error:
        raise PlanError(
            f"The plan {path} is no text: `accel methods --toml` prints one."
        ) from error
    try:
        return Plan.from_toml(text).beside(path.parent)
    except PlanError as error:
        raise type(error)(f"{path}: {error}") from error


def _changed(document: dict[str, Any], change: str) -> dict[str, Any]:
    left, equals, value = change.partition("=")
    parts = left.strip().split(".")
    if parts[0] == TUNED:
        return _elsewhere(document, change, parts[1:], value)
    if parts[0] == GUARD and len(parts) == 2 and parts[1] and equals:
        guard = {**document.get(GUARD, {}), parts[1]: toml_value(value.strip())}
        return {**document, GUARD: guard}
    if len(parts) != (3 if equals else 2) or not all(parts):
        raise PlanError(f"--set {change}: this is no change of a plan; {HINT}.")
    family, kind, *field = parts
    kinds = dict(document.get(family, {}))
    fields = dict(kinds.get(kind, {}))
    if field:
        fields[field[0]] = toml_value(value.strip())
    return {**document, family: {**kinds, kind: fields}}


def _elsewhere(
    document: dict[str, Any], change: str, parts: list[str], value: str
) -> dict[str, Any]:
    """A tuned plan that is used elsewhere; the rest of its evidence is not to be changed."""
    if parts != ["elsewhere"] or TUNED not in document:
        raise PlanError(
            f"--set {change}: only tuned.elsewhere=warn or =refuse can be set, and only of a plan "
            "that `accel tune` has written."
        )
    return {**document, TUNED: {**document[TUNED], "elsewhere": toml_value(value.strip())}}


def toml_value(text: str) -> Any:
    """A TOML value; what is none is taken as the string that it is (``predictor=newton``)."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
