"""DEIS: Adams-Bashforth on the noise prediction, in a variable of choice; and iPNDM.

Zhang & Chen, arXiv 2204.13902, section 3. With the noise-to-signal ratio ``ρ = σ/α`` the
sampling equation is ``d(x/α) = ε dρ``; ε is replaced by the polynomial through the predictions at
hand, in the training time t, in ρ itself or in λ = −ln ρ. iPNDM puts the fixed weights of an even
grid in the place of the integrals.

The integrals are exact in ρ and λ, down to ρ = 0, where λ is infinite: over s = λ − λ_0 they are
``∫ e^{−s}·s^k ds``, and that is k! at the end. In t they are by Gauss-Legendre quadrature over
``ln(1 + ρ)``, which is finite there and in which a flow's time is an entire function.

The formulas need noise levels only: floats in, weights out. Nothing here imports torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from samplers.multistep import Update, interpolated, phi
from samplers.prediction import Level
from samplers.sampler import Sampler

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from samplers.base import SolverScheduler

Form = Literal["tAB", "rhoAB", "lambdaAB", "iPNDM"]
Clock = Callable[[float], float]
"""From ρ in [0, ∞) to the variable t of tAB, rising."""

FIXED = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)
"""Weights of Adams-Bashforth on an even grid, the newest first."""


class DEIS(Sampler):
    """Follow the noise prediction by a polynomial: DDIM of higher order.

    The authors' grid is `samplers.Schedule` with ``kind="sqrt_time"``.
    Strong guidance makes the predictions jump about: the form on the data (`DPMSolverPP`) bears
    it better, and here it asks for an order of 2 at most.
    """

    name: ClassVar[str] = "samplers.DEIS"
    source: ClassVar[str] = "arXiv 2204.13902, section 3"

    order: Literal[1, 2, 3, 4] = Field(
        default=2,
        description="predictions in a step; 1 is DDIM. The authors count one less, and use 4 "
        "(their order 3) without guidance",
    )
    form: Form = Field(
        default="tAB",
        description="variable of the polynomial: tAB the training time (a flow's σ), rhoAB σ/α, "
        "lambdaAB its logarithm; iPNDM: fixed weights, as on an even grid",
    )
    lower_order_final: bool = Field(
        default=True,
        description="with fewer than 15 steps, end with orders …, 3, 2, 2; a step of lambdaAB to "
        "zero noise is of first order",
    )

    @classmethod
    def scheduler_class(cls) -> type[SolverScheduler]:
        """`samplers.DEISScheduler`."""
        from samplers.deis_scheduler import DEISScheduler

        return DEISScheduler

    def summary(self) -> str:
        """Order and form."""
        return f"{self.form}, order {self.order}"


def ratio(level: Level) -> float:
    """``ρ = σ/α``; ∞ at pure noise."""
    return level.sigma / level.alpha if level.alpha else math.inf


def flow_clock(rho: float) -> float:
    """The time of a rectified flow, its σ."""
    return 1.0 if math.isinf(rho) else rho / (1.0 + rho)


def update(
    target: Level, nodes: Sequence[Level], form: Form = "tAB", clock: Clock = flow_clock
) -> Update:
    """The step from ``nodes[0]`` to ``target``; its order is ``len(nodes)``.

    Args:
        target: The level to reach, less noisy than the nodes; σ = 0 is one.
        nodes: Levels of the predictions of ε, the newest first, at most four; all but the oldest
            with α > 0, and that too in ``rhoAB`` and ``lambdaAB``.
        form: Variable of the polynomial.
        clock: The variable of ``tAB``.
    """
    rhos = [ratio(node) for node in nodes]
    reach = ratio(target) - rhos[0]
    if len(rhos) == 1:
        weights = [reach]
    elif form == "iPNDM":
        weights = [reach * weight for weight in FIXED[len(rhos) - 1]]
    elif form == "tAB":
        weights = _quadrature(rhos, ratio(target), clock)
    else:
        weights = _exact(rhos, ratio(target), form)
    return Update(target.alpha / nodes[0].alpha, tuple(target.alpha * weight for weight in weights))


def _exact(rhos: Sequence[float], end: float, form: Form) -> list[float]:
    """``∫ L_j dρ`` from ``rhos[0]`` to ``end`` in ρ or λ."""
    count, start = len(rhos), rhos[0]
    if form == "rhoAB":
        reach = end - start
        places = [(rho - start) / reach for rho in rhos]
        moments = [reach / (k + 1) for k in range(count)]
    else:
        places = [math.log(start / rho) for rho in rhos]
        moments = [
            -start * _decaying(k, math.log(start / end) if end else None) for k in range(count)
        ]
    return interpolated(places, moments)


def _decaying(power: int, reach: float | None) -> float:
    """``∫_0^reach e^{−s}·s^power ds``; ``None`` is ∞."""
    whole = math.factorial(power)
    if reach is None:
        return whole
    return reach ** (power + 1) * math.exp(-reach) * whole * phi(power + 1, reach)


def _quadrature(rhos: Sequence[float], end: float, clock: Clock) -> list[float]:
    """``∫ L_j dρ`` from ``rhos[0]`` to ``end`` in the clock's time."""
    import numpy as np

    points, weights = _gauss()
    low, high = math.log1p(rhos[0]), math.log1p(end)
    at = low + (high - low) * points
    scaled = weights * (high - low) * np.exp(at)
    times = np.array([clock(math.expm1(y)) for y in at])
    nodes = [clock(rho) for rho in rhos]
    return [float(scaled @ _basis(j, nodes, times)) for j in range(len(nodes))]


def _basis(which: int, nodes: Sequence[float], at: NDArray[np.float64]) -> NDArray[np.float64]:
    """Values of the polynomial that is 1 at one node, 0 at the others."""
    import numpy as np

    values = np.ones_like(at)
    for other, node in enumerate(nodes):
        if other != which:
            values *= (at - node) / (nodes[which] - node)
    return values


@cache
def _gauss() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Points and weights of the 32-point rule on [0, 1]."""
    import numpy as np

    points, weights = np.polynomial.legendre.leggauss(32)
    return (points + 1.0) / 2.0, weights / 2.0
