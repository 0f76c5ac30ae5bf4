"""How much an error of the network's answer moves the final latents, in first order.

In the units of `accel.seams.solvers` a step is x̄' = x̄ + (s' − s)·f, so that an error e of the slope
f moves the next sample by |s' − s|·e. Of a flow s is σ and x̄ the sample; otherwise s is σ/α and x̄
the sample over α, so that the sample itself is moved by α'·|s' − s|·e. An answer that is v is worth
α of a slope, one that is x0 is worth 1/s.

From there the ODE carries the error on. Of data with unit variance it does so like the sample's
own size √(α'² + σ'²), which is 1 at the end: the gain is what was moved, over that size. What real
data do beyond it is in the calibrated scale.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from accel.trajectory import Levels, Step

CLEAN = (0.0, 1.0, 0.0)


def gain(step: Step, ahead: int = 0) -> float:
    """RMS of the final latents for each RMS of the guided output, at a step or some steps later.

    A solver that evaluates several times a step moves by no more than the whole step for each. A
    level that is evaluated twice (PNDM) is worth the step that leads to it.
    """
    levels, place = step.levels, step.position + ahead
    start = place - (step.index + ahead) % step.order
    here, there = _at(levels, start), _at(levels, start + step.order)
    if here == there and start:
        here = _at(levels, start - 1)
    if levels.prediction == "flow_prediction":
        return abs(there[2] - here[2]) / math.hypot(there[1], there[2])
    return _worth(levels.prediction, here) * abs(there[0] - here[0]) * there[1]


def span(step: Step, ahead: int) -> float:
    """The distance in `Step.time` from the evaluation before to one that lies ahead."""
    levels, place = step.levels, step.position + ahead
    return abs(time_at(levels, place) - time_at(levels, place - step.order))


def time_at(levels: Levels, place: int) -> float:
    """`Step.time` at a position of the schedule."""
    _, alpha, noise = levels.at(max(place, 0))
    return math.log((alpha + 0.02) / (noise + 0.02))


def left(step: Step) -> int:
    """Evaluations that the schedule has after a step."""
    return max(len(step.levels.timesteps) - step.position - 1, 0)


def _at(levels: Levels, place: int) -> tuple[float, float, float]:
    return levels.at(place) if place < len(levels.sigmas) else CLEAN


def _worth(prediction: str, level: tuple[float, float, float]) -> float:
    """How much of a slope one unit of the answer is."""
    if prediction == "v_prediction":
        return level[1]
    return 1.0 / max(level[0], 1e-6) if prediction == "sample" else 1.0
