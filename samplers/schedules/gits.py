"""GITS: what one Euler jump along a teacher's trajectory costs.

Chen et al., arXiv 2405.11326, sections 4.1 and 4.2. Trajectories have a regular shape: where they
bend, steps must be short. The cost of a jump from node i to node j is measured on the teacher alone
– N evaluations a sample, no others – and `samplers.schedules.shortest` finds the schedule, in the
authors' work with γ = 1.15 (1.20 for Stable Diffusion).

An Euler jump is the same in all coordinates, `straight`; how far it ends from the teacher is not.
The authors measure ``x/α`` (``ratio``), which gives more weight to early jumps than the sample
itself does (``sample``). On the flow scenes-flux, at 6 and 8 steps, ``sample`` with γ = 1 more than
halves the distance of DPM-Solver++ to the exact solution; ``ratio`` with γ = 1.15 does so at 8 and
fails at 6, where it jumps from σ/α = 14 to 0.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from samplers.schedules.ramps import Floats

if TYPE_CHECKING:
    from samplers.prediction import Level

Metric = Literal["l2", "dev"]
Scale = Literal["ratio", "sample"]
GAMMAS: dict[Scale, float] = {"ratio": 1.15, "sample": 1.0}
"""What follows a jump weighs that much more; with ``sample``, early jumps count less already."""


def straight(x: Floats, data: Floats, here: Level, there: Sequence[Level]) -> Floats:
    """The steps of first order (DDIM; Euler for a flow) from one level to others, ``[L, D]``.

    Args:
        x: The state, ``[D]``.
        data: The x0-prediction at it, ``[D]``.
        here: Its level.
        there: The levels to go to.
    """
    kept = np.array([level.sigma / here.sigma for level in there])
    gain = np.array([level.alpha for level in there]) - kept * here.alpha
    return np.asarray(np.outer(kept, x) + np.outer(gain, data))


def jump_costs(
    levels: Sequence[Level],
    states: Floats,
    data: Floats,
    metric: Metric = "l2",
    scale: Scale = "ratio",
) -> Floats:
    """The cost of every jump along one trajectory.

    Args:
        levels: The nodes from noise to data, N + 1.
        states: The teacher's states at the nodes, ``[N + 1, D]``.
        data: Its x0-predictions, ``[N, D]``.
        metric: ``l2``: distance from where the jump ends to the teacher there. ``dev``: its
            distance to the chord from the teacher's start to its end, less the teacher's own.
        scale: Whether x/α is compared, or x.

    Returns:
        ``[N + 1, N + 1]``, of use above the diagonal.
    """
    count = len(levels) - 1
    alphas = np.array([level.alpha if scale == "ratio" else 1.0 for level in levels])
    costs = np.zeros((count + 1, count + 1))
    chord = Chord(states, alphas) if metric == "dev" else None
    for i in range(count):
        after = alphas[i + 1 :, None]
        ends = straight(states[i], data[i], levels[i], levels[i + 1 :]) / after
        there = states[i + 1 :] / after
        if chord is None:
            costs[i, i + 1 :] = np.sqrt(np.sum((ends - there) ** 2, axis=1))
        else:
            costs[i, i + 1 :] = chord.distances(ends) - chord.distances(there)
    return costs


class Chord:
    """The straight line from a trajectory's start to its end.

    Args:
        states: The trajectory's states, ``[N + 1, D]``.
        alphas: What each is divided by; where the first is 0, the start is infinitely far away in
            the direction of the first state.
    """

    def __init__(self, states: Floats, alphas: Floats) -> None:
        self._end = states[-1] / alphas[-1]
        toward = states[0] if alphas[0] == 0.0 else states[0] / alphas[0] - self._end
        self._toward = toward / np.linalg.norm(toward)

    def distances(self, points: Floats) -> Floats:
        """How far each point is from the line, ``[P]``."""
        offsets = points - self._end
        along = offsets @ self._toward
        return np.asarray(np.linalg.norm(offsets - np.outer(along, self._toward), axis=1))
