"""Calibrate a guard: what an estimated error really is, on the pictures of some calls.

Each call is run without approximations and then under the plan with several budgets of estimated
error. By split conformal prediction the ⌈(n + 1)·0.95⌉-th smallest of n real errors under a budget
bounds that of a new picture, drawn like the others, with a probability of 95 % at least
(Angelopoulos & Bates, "A Gentle Introduction to Conformal Prediction", arXiv 2107.07511, section
1). A promise is kept with the budget whose bound it is. A factor between estimate and error would
not do: now and then a picture turns into another one at the slightest touch, and then its error is
what it is under any budget.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from accel.calibration import Calibrated
from accel.errors import BadInput, BadOutput
from accel.guard import Guard
from accel.guard.file import Basis
from accel.plan import Plan

if TYPE_CHECKING:
    from torch import Tensor

COVERAGE = 0.95
LEAST = 19
"""Pictures below which no rank of the scores has that probability."""


class Options(BaseModel):
    """What `accel calibrate guard` takes by ``--set``."""

    model_config = ConfigDict(extra="forbid")

    preset: str = Field(default="balanced", description="plan to calibrate for, by name")
    plan: Path | None = Field(default=None, description="or by file")
    max_error: float = Field(
        default=0.05, ge=0.0, description="that the guard is written with; any may be used"
    )
    budgets: tuple[float, ...] = Field(
        default=(0.005, 0.02, 0.08),
        min_length=1,
        description="estimated errors to run at, rising: what promises are measured for",
    )
    check_every: int = Field(default=6, ge=1, description="as accel.Guard has it")

    @field_validator("budgets")
    @classmethod
    def _rising(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if value[0] <= 0.0 or any(after <= before for before, after in pairwise(value)):
            raise ValueError("budgets have to be above 0 and to rise")
        return value


@dataclass(frozen=True)
class Measured:
    """One guarded run beside the run without approximations.

    Attributes:
        budget: What it was allowed to spend.
        spent: What it estimates.
        real: ‖x − x*‖/‖x*‖ of its output.
        nfe: Network evaluations.
        stock: Those of the other.
        checks: Spot checks.
    """

    budget: float
    spent: float
    real: float
    nfe: float
    stock: float
    checks: int


@dataclass(frozen=True)
class Reference:
    """A run without approximations: its output in float64, and its network evaluations."""

    output: Tensor
    nfe: float


def rank(count: int, coverage: float = COVERAGE) -> int:
    """Which of so many scores, from the smallest, 1-based, bounds a new one.

    Raises:
        BadInput: If they are too few.
    """
    found = math.ceil((count + 1) * coverage - 1e-9)
    if found > count:
        raise BadInput(
            f"A guard that holds for {coverage:.0%} of pictures rests on {LEAST} at least, and "
            f"there are {count}: give --count {LEAST} or more."
        )
    return found


def reference(pipe: Any, call: Mapping[str, Any], plan: Plan) -> Reference:
    """Run a call under what a plan has besides approximations (see `measured`).

    Raises:
        BadOutput: If the pipeline gives NaN.
    """
    output, told = _run(pipe, call, Plan(*plan, guard=Guard(max_error=0.0)))
    if not bool(output.isfinite().all()):
        raise BadOutput("The stock pipeline gives NaN or infinite values: try float32.")
    return Reference(output, told["nfe"])


def measured(
    pipe: Any, call: Mapping[str, Any], plan: Plan, guards: Sequence[Guard], exact: Reference
) -> list[Measured]:
    """Run a call under a plan with each of some guards.

    Args:
        pipe: A pipeline, nothing attached.
        call: Its arguments with a generator that was not used yet; runs take copies of it.
        plan: The plan; its own guard does not count.
        guards: Budgets.
        exact: The same call without approximations.
    """
    found = []
    for guard in guards:
        output, told = _run(pipe, call, Plan(*plan, guard=guard))
        (account,) = told["guard"]["samples"] or [{"spent": 0.0, "checks": 0}]
        real = float((output - exact.output).norm() / exact.output.norm())
        counts = told["nfe"], exact.nfe, account["checks"]
        found.append(Measured(guard.max_error, account["spent"], real, *counts))
    return found


def _run(pipe: Any, call: Mapping[str, Any], plan: Plan) -> tuple[Tensor, dict[str, Any]]:
    """The output of a call in float64, and its report."""
    import torch

    generator = torch.Generator(call["generator"].device)
    generator.set_state(call["generator"].get_state())
    run = plan.attach(pipe)
    try:
        output = pipe(**{**call, "generator": generator})[0]
    finally:
        run.detach()
    return torch.as_tensor(output).double().flatten().cpu(), run.report.to_dict()


def calibrate_guard(
    pipe: Any, calls: Iterable[Mapping[str, Any]], options: Mapping[str, Any]
) -> Calibrated:
    """Measure the scale of a guard for a plan.

    Raises:
        BadInput: With fewer than 19 calls, or if nothing was approximated in them.
        BadOutput: If the pipeline gives NaN.
        PlanError: If the plan cannot be read, or has a method that goes with no guard.
    """
    from accel.seams.identity import identity

    asked = Options.model_validate(dict(options))
    plan = _plan(asked)
    guards = [
        Guard(max_error=budget, scale=1.0, check_every=asked.check_every)
        for budget in asked.budgets
    ]
    runs = [measured(pipe, one, plan, guards, reference(pipe, one, plan)) for one in calls]
    place = rank(len(runs)) - 1
    errors = [[run[number].real for run in runs] for number in range(len(guards))]
    bounds = list(accumulate((sorted(one)[place] for one in errors), max))
    if bounds[-1] == 0.0:
        raise BadInput(
            "No approximation was made within these budgets: give larger ones (--set "
            "budgets=[0.1, 0.3]), or a plan that approximates."
        )
    basis = Basis(
        coverage=COVERAGE,
        captions=len(runs),
        steps=round(max(one.stock for run in runs for one in run)),
        budgets=asked.budgets,
        bounds=tuple(bounds),
        model=identity(pipe),
        plan={method.name: method.model_dump(mode="json") for method in plan},
        errors=tuple(map(tuple, errors)),
    )
    pairs = zip(asked.budgets, bounds, strict=True)
    note = f"{COVERAGE:.0%} of pictures stay within " + ", ".join(
        f"{bound:.2g} at an estimate of {budget:g}" for budget, bound in pairs
    )
    guard = Guard(max_error=asked.max_error, check_every=asked.check_every)
    content = json.dumps(basis.model_dump(mode="json"), indent=1).encode() + b"\n"
    return Calibrated(guard, note, {"file": content}, plan.methods)


def _plan(asked: Options) -> Plan:
    if asked.plan is None:
        return Plan.preset(asked.preset)
    try:
        text = asked.plan.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(
            f"The plan {asked.plan} cannot be read: give the path of a TOML file."
        ) from error
    return Plan.from_toml(text).beside(asked.plan.parent)
