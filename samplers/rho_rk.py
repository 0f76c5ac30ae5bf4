"""ρRK-DEIS: explicit Runge-Kutta methods on ``d(x/α) = ε dρ`` with ``ρ = σ/α``.

Zhang & Chen, arXiv 2204.13902, section 3 (Kutta's third-order method there; Heun's second and the
classic fourth-order one beside). A step of s stages takes s evaluations and uses none from before
it. It spans s levels of the schedule, so that N evaluations are N levels; inside a step the
evaluations are at its start, its middle in ρ, and its end.

The formulas need noise levels only: floats in, weights out. Nothing here imports torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from samplers.multistep import Update
from samplers.prediction import Level
from samplers.sampler import Sampler

if TYPE_CHECKING:
    from samplers.base import SolverScheduler

METHODS: dict[int, tuple[tuple[float, ...], ...]] = {
    1: ((1.0,),),
    2: ((1.0,), (1 / 2, 1 / 2)),
    3: ((1 / 2,), (-1.0, 2.0), (1 / 6, 4 / 6, 1 / 6)),
    4: ((1 / 2,), (0.0, 1 / 2), (0.0, 0.0, 1.0), (1 / 6, 2 / 6, 2 / 6, 1 / 6)),
}
"""By the number of stages: where each stage leads from the start of the step, in units of the
step, as weights of the slopes so far; their sum is the place of the next stage."""


class RhoRK(Sampler):
    """Steps of order 2 to 4 that use no evaluation from before them.

    ``num_inference_steps`` counts evaluations, as everywhere: 12 of them are 4 steps of 3 stages.
    The step to zero noise and the one from pure noise take one evaluation each. Evaluations inside
    a step are beside the trajectory: SADA, ZEUS and DualFast are refused.
    """

    name: ClassVar[str] = "samplers.RhoRK"
    source: ClassVar[str] = "arXiv 2204.13902, section 3"

    order: Literal[2, 3, 4] = Field(
        default=3,
        description="evaluations in a step, and its order: 2 (Heun), 3 (Kutta), 4 (classic)",
    )

    @classmethod
    def scheduler_class(cls) -> type[SolverScheduler]:
        """`samplers.RhoRKScheduler`."""
        from samplers.rho_rk_scheduler import RhoRKScheduler

        return RhoRKScheduler

    def summary(self) -> str:
        """Order."""
        return f"order {self.order}, Runge-Kutta"


def plan_steps(levels: Sequence[Level], order: int) -> list[int]:
    """How many evaluations each step of a run has, for any number of them.

    What is left over between the ends goes to smaller steps, which come last.

    Args:
        levels: All N + 1 levels of the run.
        order: 2, 3 or 4.
    """
    count = len(levels) - 1
    head = [1] if levels[0].pure_noise and count > 0 else []
    tail = [1] if levels[-1].sigma == 0.0 and count > len(head) else []
    full, rest = divmod(count - len(head) - len(tail), order)
    sizes = [order] * full + [rest] * (rest > 0)
    if rest == 1 and full and order > 2:
        sizes[-2:] = [order - 1, 2]
    return [*head, *sizes, *tail]


def arranged(
    levels: Sequence[Level], order: int, at_ratio: Callable[[float], Level]
) -> list[Level]:
    """Where the N evaluations of a run are.

    Args:
        levels: All N + 1 levels of the schedule.
        order: 2, 3 or 4.
        at_ratio: The level with a given σ/α.
    """
    found = []
    sizes = plan_steps(levels, order)
    for start, size in zip(accumulate(sizes, initial=0), sizes, strict=False):
        here, there = levels[start], levels[start + size]
        found.append(here)
        for row in METHODS[size][:-1]:
            share = math.fsum(row)
            between = here.sigma / here.alpha * (1.0 - share) + there.sigma / there.alpha * share
            found.append(there if share == 1.0 else at_ratio(between))
    return found


def stage(step: Sequence[Level], which: int) -> list[Update]:
    """From one evaluation of a step to the next, by the number of slopes at hand.

    With fewer than the step has had by then, it began in its midst (image-to-image, or a history
    that was dropped): then Euler's method from evaluation to evaluation, and at the last the
    trapezoid over the way from the one before.

    Args:
        step: The levels of its evaluations, and the level that it reaches; α > 0.
        which: 0-based.
    """
    here, there = step[which], step[which + 1]
    ratios = [level.sigma / level.alpha for level in step]
    rows = METHODS[len(step) - 1]
    before = (*rows[which - 1], 0.0) if which else (0.0,)
    reach = ratios[-1] - ratios[0]
    full = [reach * (new - old) for new, old in zip(rows[which], before, strict=True)][::-1]
    onward = ratios[which + 1] - ratios[which]
    partial = [[onward]] * which
    if which == len(rows) - 1:
        half = (ratios[which] - ratios[which - 1]) / 2.0
        partial[1:] = [[onward + half, -half]] * (which - 1)
    return [
        Update(there.alpha / here.alpha, tuple(there.alpha * weight for weight in weights))
        for weights in [*partial, full]
    ]
