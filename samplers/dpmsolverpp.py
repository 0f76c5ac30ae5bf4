"""DPM-Solver++: multistep solvers on the x0-prediction, for the ODE and for its SDEs.

Lu et al., arXiv 2211.01095, section 4 and appendix A; third order as in arXiv 2206.00927 appendix
B.3, with the second difference written as ``2(A − B)/(r0 + r1)``: the 2 is lost in the common
implementations, which are of second order for that reason. The SDE family with a free amount of
noise η is arXiv 2206.00364 section 4 in this notation (η = 1 is the ancestral process).

The formulas need noise levels only: floats in, weights out. Nothing here imports torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, model_validator

from accel.errors import BadInput
from samplers.multistep import Update, phi
from samplers.prediction import Level
from samplers.sampler import Sampler

if TYPE_CHECKING:
    from samplers.base import SolverScheduler

Variant = Literal["midpoint", "heun"]


class DPMSolverPP(Sampler):
    """Solve the sampling equation to second or third order: fewer steps for the same error.

    A flow that starts at pure noise takes two steps of first order, and every run that ends at
    zero noise takes its last one so.
    """

    name: ClassVar[str] = "samplers.DPMSolverPP"
    source: ClassVar[str] = "arXiv 2211.01095, section 4"

    order: Literal[1, 2, 3] = Field(
        default=2,
        description="order of the solver: 1 is DDIM (Euler for a flow); the authors use 2 with "
        "guidance, 3 without; at 10 steps or less 3 is no better than 2",
    )
    variant: Variant = Field(
        default="midpoint", description="how order 2 weighs its difference: midpoint or heun"
    )
    eta: float = Field(
        default=0.0,
        ge=0.0,
        le=1.0,
        description="noise added on the way: 0 is the ODE, 1 the ancestral SDE; order 1 or 2",
    )
    lower_order_final: bool = Field(
        default=True, description="with fewer than 15 steps, end with orders 2 and 1"
    )

    @model_validator(mode="after")
    def _solvable(self) -> Self:
        if self.eta and self.order == 3:
            raise BadInput(
                f"order=3 with eta={self.eta}: the SDE is solved with order 1 or 2 only. Set "
                "order=2, or eta=0."
            )
        return self

    @classmethod
    def scheduler_class(cls) -> type[SolverScheduler]:
        """`samplers.DPMSolverPPScheduler`."""
        from samplers.dpmsolverpp_scheduler import DPMSolverPPScheduler

        return DPMSolverPPScheduler

    def summary(self) -> str:
        """Order and noise."""
        return f"order {self.order}" + (f", eta {self.eta:g}" if self.eta else "")


def usable_order(target: Level, nodes: Sequence[Level]) -> int:
    """How many of the nodes (the newest first) a step to ``target`` can interpolate.

    Differences in λ need finite λ on both sides: the step to σ = 0, the step from α = 0 and the
    step after that are of first order.
    """
    if math.isinf(target.lam) or math.isinf(nodes[0].lam):
        return 1
    finite = 1
    while finite < len(nodes) and math.isfinite(nodes[finite].lam):
        finite += 1
    return finite


def update(
    target: Level, nodes: Sequence[Level], variant: Variant = "midpoint", eta: float = 0.0
) -> Update:
    """The step from ``nodes[0]`` to ``target``; its order is ``len(nodes)``.

    Args:
        target: The level to reach, less noisy than the nodes; σ = 0 with one node only.
        nodes: Levels of the predictions, the newest first, at most three; α = 0 only where one
            node is given. ``nodes[0]`` is the level of the sample.
        variant: How order 2 weighs its first difference.
        eta: Amount of noise: 0 is the ODE, 1 the ancestral SDE; at most 2 nodes where it is not 0.
    """
    here = nodes[0]
    h = target.lam - here.lam
    gain = target.alpha * -math.expm1(-(1.0 + eta) * h)
    sample, noise = target.sigma / here.sigma, 0.0
    if eta:
        sample *= math.exp(-eta * h)
        noise = target.sigma * math.sqrt(-math.expm1(-2.0 * eta * h))
    if len(nodes) == 1:
        return Update(sample, (gain,), noise)
    differences = _differences(target, nodes, h, variant, eta)
    history = [gain, *[0.0] * (len(nodes) - 1)]
    for k, weight in enumerate(differences):
        history[k] += weight
        history[k + 1] -= weight
    return Update(sample, tuple(history), noise)


def _differences(
    target: Level, nodes: Sequence[Level], h: float, variant: Variant, eta: float
) -> list[float]:
    """Weights of the backward differences ``m − m₋₁`` and ``m₋₁ − m₋₂``."""
    reach = (1.0 + eta) * h
    first = target.alpha * reach * phi(2, -reach)
    r0 = (nodes[0].lam - nodes[1].lam) / h
    if len(nodes) == 2:
        if variant == "midpoint":
            first = target.alpha * reach * phi(1, -reach) / 2.0
        return [first / r0]
    r1 = (nodes[1].lam - nodes[2].lam) / h
    second = 2.0 * target.alpha * reach * phi(3, -reach)
    bend = (first * r0 + second) / (r0 + r1)
    return [(first + bend) / r0, -bend / r1]
