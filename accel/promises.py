"""Calibrate a guard: what one unit of its estimate really is, on the pictures of some calls.

Each call is run without approximations and then under the plan at several budgets, with a scale of
1. Its score is the largest real error over the estimate, or over the budget where a check has shown
that more was spent. By split conformal prediction the ⌈(n + 1)·0.95⌉-th smallest of n scores bounds
that of a new picture, drawn like the others, with a probability of 95 % at least (Angelopoulos &
Bates, "A Gentle Introduction to Conformal Prediction", arXiv 2107.07511, section 1): an estimate
that counts that many times its size keeps the promise.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

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
        default=(0.01, 0.03, 0.1),
        min_length=1,
        description="estimated errors to run at: the range in which the scale is measured",
    )
    check_every: int = Field(default=6, ge=1, description="as accel.Guard has it")


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

    @property
    def score(self) -> float:
        """What the estimate would have had to be multiplied by; 0 where nothing was spent."""
        told = min(self.spent, self.budget)
        return self.real / told if told else 0.0


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


def measured(
    pipe: Any, call: Mapping[str, Any], plan: Plan, guards: Sequence[Guard]
) -> list[Measured]:
    """Run a call without approximations, and under a plan with each guard.

    Args:
        pipe: A pipeline, nothing attached.
        call: Its arguments; the generator is set back before each run.
        plan: The plan; its own guard does not count.
        guards: Budgets.

    Raises:
        BadOutput: If the pipeline gives NaN.
    """
    start = call["generator"].get_state()
    exact, report = _run(pipe, call, Plan(*plan, guard=Guard(max_error=0.0)), start)
    if not bool(exact.isfinite().all()):
        raise BadOutput("The stock pipeline gives NaN or infinite values: try float32.")
    found = []
    for guard in guards:
        output, told = _run(pipe, call, Plan(*plan, guard=guard), start)
        (account,) = told["guard"]["samples"] or [{"spent": 0.0, "checks": 0}]
        real = float((output - exact).norm() / exact.norm())
        counts = told["nfe"], report["nfe"], account["checks"]
        found.append(Measured(guard.max_error, account["spent"], real, *counts))
    return found


def _run(
    pipe: Any, call: Mapping[str, Any], plan: Plan, start: Tensor
) -> tuple[Tensor, dict[str, Any]]:
    """The output of a call in float64, and its report."""
    import torch

    call["generator"].set_state(start)
    run = plan.attach(pipe)
    try:
        output = pipe(**call)[0]
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
    runs = [measured(pipe, call, plan, guards) for call in calls]
    scores = sorted(max(one.score for one in run) for run in runs)
    scale = scores[rank(len(scores)) - 1]
    if scale == 0.0:
        raise BadInput(
            "No approximation was made within these budgets: give larger ones (--set "
            "budgets=[0.1, 0.3]), or a plan that approximates."
        )
    basis = Basis(
        scale=scale,
        coverage=COVERAGE,
        captions=len(scores),
        steps=round(max(one.stock for run in runs for one in run)),
        budgets=asked.budgets,
        model=identity(pipe),
        plan={method.name: method.model_dump(mode="json") for method in plan},
        ratios=tuple(scores),
    )
    note = (
        f"scale {scale:.3g}: by {len(scores)} pictures the real error is at most that many times "
        f"the estimate, for {COVERAGE:.0%} of new ones"
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
