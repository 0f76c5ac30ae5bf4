"""DPM-Solver++ in its singlestep form: groups of two or three evaluations, each from its start.

Lu et al., arXiv 2211.01095, algorithm 1 (2S) and 2206.00927, algorithm 2 (3S). As in diffusers the
intermediate evaluations are at noise levels of the schedule, so that N evaluations are N levels;
their places in a group are then what the schedule makes them, not ½ or ⅓ and ⅔. For places r1 < r2
the last step of a group of three is exact for parabolas, and the second evaluation is placed so
that the errors of both, first order at r1, cancel in it: the third-order condition of Runge-Kutta
methods, ``b1·δ1 + b2·δ2 = 0``. With r1 = ⅓ and r2 = ⅔ this is, to leading order, the paper's.

The formulas need noise levels only: floats in, weights out. Nothing here imports torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise, takewhile
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from samplers.adams import Rule, predict, step
from samplers.multistep import Update, phi
from samplers.prediction import Level
from samplers.sampler import Sampler

if TYPE_CHECKING:
    from samplers.base import SolverScheduler

Variant = Literal["midpoint", "heun"]

LATEST = 0.6
"""Where the first evaluation inside a group of three may be at most: at ⅔ of the way in λ the
condition of third order has no solution."""


class DPMSolverPPSingle(Sampler):
    """Steps of order 2 or 3 that use no evaluation from before them.

    An alternative to `DPMSolverPP` where predictions change quickly, as with strong guidance.
    Evaluations inside a group are beside the trajectory: SADA and ZEUS are refused.
    """

    name: ClassVar[str] = "samplers.DPMSolverPPSingle"
    source: ClassVar[str] = "arXiv 2211.01095, algorithm 1; 2206.00927, algorithm 2"

    order: Literal[2, 3] = Field(
        default=2, description="evaluations in a group, and its order: 2 (2S) or 3 (3S)"
    )
    variant: Variant = Field(
        default="midpoint", description="how groups of two weigh their difference"
    )

    @classmethod
    def scheduler_class(cls) -> type[SolverScheduler]:
        """`samplers.DPMSolverPPSingleScheduler`."""
        from samplers.dpmsolverpp_single_scheduler import DPMSolverPPSingleScheduler

        return DPMSolverPPSingleScheduler

    def summary(self) -> str:
        """Order."""
        return f"order {self.order}, singlestep"


def plan_groups(levels: Sequence[Level], order: int) -> list[int]:
    """How many evaluations each group of a run has, for any number of them.

    A step from pure noise or to σ = 0 is a group of its own; between them are groups of ``order``,
    and at the end smaller ones for what is left over.

    Args:
        levels: All levels of the run, from where it begins to where it ends.
        order: 2 or 3.
    """
    count = len(levels) - 1
    noise = takewhile(lambda level: level.pure_noise, levels[:count])
    head = [1 for _ in noise]
    tail = [1] if levels[-1].sigma == 0.0 and count > len(head) else []
    inner = count - len(head) - len(tail)
    full, rest = divmod(inner, order)
    sizes = [order] * full + [rest] * (rest > 0)
    if order == 3 and rest == 1 and full:
        sizes[-2:] = [2, 2]
    starts = accumulate(sizes, initial=len(head))
    grouped = [
        size
        for start, size in zip(starts, sizes, strict=False)
        for size in _fitting(levels, start, size)
    ]
    return [*head, *grouped, *tail]


def _fitting(levels: Sequence[Level], start: int, size: int) -> list[int]:
    """A group as it is, or in two parts where its first inner evaluation comes too late."""
    if size < 3:
        return [size]
    first, inner, last = (levels[start + k].lam for k in (0, 1, 3))
    return [3] if inner - first <= LATEST * (last - first) else [1, 2]


def group_updates(group: Sequence[Level], variant: Variant = "midpoint") -> list[Update]:
    """The steps of one group, each from the sample that the one before reached.

    Args:
        group: The levels of its evaluations, and the level that it reaches; 2 to 4. σ = 0 or
            α = 0 only in a group of one evaluation.
        variant: How groups of two weigh their difference.

    Returns:
        One update an evaluation, for the predictions of the group, the newest first.
    """
    start = group[0]
    steps = [predict(group[1], [start])]
    if len(group) == 3:
        rule: Rule = "bh2" if variant == "midpoint" else "exact"
        steps.append(step(group[2], start, [group[1], start], rule=rule))
    if len(group) == 4:
        last = step(group[3], start, [group[2], group[1], start])
        steps += [_second(group, last), last]
    return [steps[0], *(_onward(before, after) for before, after in pairwise(steps))]


def _second(group: Sequence[Level], last: Update) -> Update:
    """The second of three steps: with an error that cancels the first one's in ``last``."""
    start, first, second = group[:3]
    near, far = (level.lam - start.lam for level in (first, second))
    errors = [level.alpha * gap**2 * phi(2, -gap) for level, gap in ((first, near), (second, far))]
    of_second, of_first = last.history[:2]
    slope = (errors[1] + of_first / of_second * errors[0]) / near
    gain = second.alpha * -math.expm1(-far)
    return Update(second.sigma / start.sigma, (slope, gain - slope))


def _onward(before: Update, after: Update) -> Update:
    """A step from a group's start, as one from where the step before it went."""
    share = after.sample / before.sample
    older = (new - share * old for new, old in zip(after.history[1:], before.history, strict=True))
    return Update(share, (after.history[0], *older))
