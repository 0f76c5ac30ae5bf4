"""Steps that lie densest around a place of the run.

Source: Ma et al., "DeepCache: Accelerating Diffusion Models for Free", CVPR 2024,
arXiv 2312.00858, section 3.4 (non-uniform).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from accel.errors import UnsupportedModel

if TYPE_CHECKING:
    from accel.trajectory import Step


@dataclass
class Clustered:
    """Compute ceil(turns / interval) steps of the solver, densest around a centre.

    Attributes:
        interval: Mean gap between computed steps.
        centre: Share of the run where they are densest.
        power: By what power the gaps grow away from it.
        even: The setting of its method that needs no length, for the refusal.
    """

    interval: int
    centre: float
    power: float
    even: str
    _steps: dict[int, frozenset[int]] = field(default_factory=dict)

    def due(self, step: Step, value: float | None) -> bool:  # noqa: ARG002
        """Whether the step is one of them.

        Raises:
            UnsupportedModel: If the pipeline cuts its schedule unseen.
        """
        if step.turns is None:
            raise UnsupportedModel(
                "This pipeline cuts its schedule where no public call shows it, so a non-uniform "
                f"schedule has no length: use {self.even}."
            )
        if step.turns not in self._steps:
            self._steps[step.turns] = frozenset(
                clustered(step.turns, self.interval, self.centre, self.power)
            )
        return step.turn in self._steps[step.turns]

    def computed(self, step: Step) -> None:
        """Nothing is kept."""


def clustered(total: int, interval: int, centre: float, power: float) -> list[int]:
    """ceil(total / interval) different steps of ``range(total)`` from 0 on, densest at ``centre``.

    The steps are even in sign(i − c)·|i − c|^(1/p). Where rounding to whole steps makes two of
    them one, the power is lowered; at 1 they are apart.
    """
    count, middle = math.ceil(total / interval), centre * total
    while True:
        low, high = _root(-middle, power), _root(total - middle, power)
        nodes = (low + (high - low) * k / count for k in range(1, count))
        steps = {0, *(math.floor(middle + _root(node, 1.0 / power) + 1e-9) for node in nodes)}
        if len(steps) == count or power == 1.0:
            return sorted(steps)
        power = max(1.0, power - 0.02)


def _root(x: float, power: float) -> float:
    """The power-th root, keeping the sign."""
    return math.copysign(abs(x) ** (1.0 / power), x)
