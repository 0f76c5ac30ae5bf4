"""Tuned plans in a folder, and the one that a goal asks for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from accel.errors import BadInput, PlanError
from accel.plan import Plan
from accel.tuned import Tuned
from accel.tuning.targets import Target, Targets


def fastest(plans: Mapping[Path, Plan], goal: Targets, where: str) -> tuple[Path, Plan]:
    """The fastest tuned plan that was proven to hold a goal.

    What was proven for a stricter target holds a looser one; times are what was measured.

    Args:
        plans: Plans that `accel tune` wrote, for one model, by their files (`tuned_plans`).
        goal: What is to be held.
        where: The plans are, for messages: ``the folder tuned``.

    Raises:
        BadInput: If there is none, or those that hold it are of several networks.
    """
    found = [(path, plan, plan.tuned) for path, plan in plans.items() if plan.tuned]
    if not found:
        raise BadInput(
            f"There is no tuned plan in {where}: write one into it by `accel tune --target "
            f'"{goal.each[0]}" --out FOLDER/NAME.toml`.'
        )
    good = [(path, plan, tuned) for path, plan, tuned in found if holds(tuned, goal)]
    wanted = " and ".join(map(str, goal.each))
    if not good:
        there = "; ".join(f"{path.name}: {_promise(tuned)}" for path, _, tuned in found)
        raise BadInput(
            f"No plan in {where} was proven to hold {wanted} (there are {there}): tune one by "
            f'`accel tune --target "{goal.each[0]}"`, or ask for less.'
        )
    if len({tuned.network for *_, tuned in good}) > 1:
        raise BadInput(
            f"In {where} are plans for several networks that hold {wanted} "
            f"({', '.join(path.name for path, *_ in good)}): keep those of one model in a folder, "
            "or give one by --plan."
        )
    path, plan, _ = max(good, key=lambda one: one[2].figure("speedup").mean)
    return path, plan


def holds(tuned: Tuned, goal: Targets) -> bool:
    """Whether a plan was proven to hold a goal."""
    proven = {target.measure: target for target in map(Target.parse, tuned.targets)}
    fidelity = all(
        target.measure in proven and target.met_by(proven[target.measure].level)
        for target in goal.fidelity
    )
    return fidelity and all(
        target.met_by(tuned.figure(target.measure).mean) for target in goal.times
    )


def tuned_plans(folder: Path) -> dict[Path, Plan]:
    """The plans of a folder that have evidence, by their file, in the order of the names.

    Raises:
        BadInput: If there is no such folder.
        PlanError: If a file is no plan.
    """
    if not folder.is_dir():
        raise BadInput(f"There is no folder {folder}: give that of plans which `accel tune` wrote.")
    found = {}
    for path in sorted(folder.glob("*.toml")):
        try:
            plan = Plan.from_toml(path.read_text(encoding="utf-8"))
        except (PlanError, UnicodeDecodeError) as error:
            raise PlanError(f"{path}: {error}") from error
        if plan.tuned is not None:
            found[path] = plan.beside(folder)
    return found


def _promise(tuned: Tuned) -> str:
    return f"{' and '.join(tuned.targets)} at {tuned.figure('speedup').mean:.2f} times stock"
