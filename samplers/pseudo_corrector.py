"""FlowTurbo's pseudo-corrector: Heun's method at one evaluation a step.

Zhao et al., arXiv 2409.18128, section 3; the part of FlowTurbo that needs no training. Each step
is predicted by Euler's method from the slope kept, and redone by the trapezoid once its end has
been evaluated; that evaluation, at the predicted point, is kept as the slope of the next step. The
way from the last evaluation to the end of the run is one of Euler's.

A flow is followed in its own time, ``dx = v dσ``; other models in ``d(x/α) = ε dρ``, ``ρ = σ/α``.

The formulas need noise levels only: floats in, weights out. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from samplers.multistep import Update
from samplers.prediction import Level
from samplers.sampler import Sampler

if TYPE_CHECKING:
    from samplers.base import SolverScheduler


class PseudoCorrector(Sampler):
    """Heun's method with each slope evaluated once, at the predicted point.

    N evaluations correct N − 1 intervals; the last one, to the end, is of first order.
    """

    name: ClassVar[str] = "samplers.PseudoCorrector"
    source: ClassVar[str] = "arXiv 2409.18128, section 3"

    heun: int = Field(
        default=0,
        ge=0,
        description="intervals at the start that are steps of Heun's method proper: each takes "
        "two evaluations, and spans two levels of the schedule",
    )

    @classmethod
    def scheduler_class(cls) -> type[SolverScheduler]:
        """`samplers.PseudoCorrectorScheduler`."""
        from samplers.pseudo_corrector_scheduler import PseudoCorrectorScheduler

        return PseudoCorrectorScheduler

    def summary(self) -> str:
        """The start, and what follows."""
        start = f"{self.heun} steps of Heun, then " if self.heun else ""
        return f"{start}Heun at one evaluation a step"


def predict(target: Level, here: Level, *, flow: bool) -> Update:
    """Euler's step, with the slope at ``here``.

    Args:
        target: The level to reach; σ = 0 is one.
        here: The level of the sample; α > 0 unless ``flow``.
        flow: Whether slopes are velocities of a flow; predictions of ε otherwise.
    """
    if flow:
        return Update(1.0, (target.sigma - here.sigma,))
    reach = target.sigma / target.alpha - here.sigma / here.alpha
    return Update(target.alpha / here.alpha, (target.alpha * reach,))


def correct(target: Level, here: Level, *, flow: bool) -> Update:
    """The same step by the trapezoid; the slope at ``target`` comes first."""
    euler = predict(target, here, flow=flow)
    return Update(euler.sample, (euler.history[0] / 2.0,) * 2)


def arranged(levels: Sequence[Level], heun: int, *, flow: bool) -> list[Level]:
    """Where the N evaluations of a run are: as scheduled, after the steps of Heun's method.

    Such a step spans two levels, and its second evaluation is at its end. The end of the run is
    not evaluated: fewer steps are made where it is near. None starts at pure noise, unless
    ``flow``.

    Args:
        levels: All N + 1 levels of the schedule.
        heun: How many steps of Heun's method are asked for.
        flow: As for `predict`.
    """
    found = list(levels[:-1])
    first = int(levels[0].pure_noise and not flow)
    for start in range(first, first + 2 * heun, 2):
        if start + 2 < len(found):
            found[start + 1] = found[start + 2]
    return found
