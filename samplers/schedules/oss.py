"""Optimal stepsize: the steps with which a student stays nearest to its teacher.

Pei et al., arXiv 2503.21774, section 3. ``state[k][j]`` is where a student arrives at node j of the
teacher's grid in k Euler steps: from the one of ``state[k − 1][i]``, i < j, from which it comes
nearest to the teacher at j. Each state is the student's own, so errors of earlier steps are in it,
unlike in GITS. K·N evaluations a sample.

Only the first node has a state before the first step. The authors' code gives every node one (the
initial noise), which lets a schedule start late without a word.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from accel.errors import BadInput
from samplers.schedules.gits import straight
from samplers.schedules.ramps import Floats

if TYPE_CHECKING:
    from samplers.prediction import Level

Predict = Callable[[Mapping[int, Floats]], Mapping[int, Floats]]
"""From states by node to x0-predictions there: one evaluation a node."""


def student_schedule(
    levels: Sequence[Level],
    teacher: Floats,
    predict: Predict,
    count: int,
    before_end: int | None = None,
) -> NDArray[np.int64]:
    """The nodes of ``count`` steps for one sample.

    Args:
        levels: The nodes from noise to data, N + 1.
        teacher: The teacher's states, ``[N + 1, D]``.
        predict: Evaluates the network; asked once a step, with all states at hand.
        count: Number of steps, 1 to N.
        before_end: The node from which the last step must start, if it must be one.

    Returns:
        The ``count + 1`` nodes, ascending, from the first to the last.

    Raises:
        BadInput: If the grid has fewer steps than that.
    """
    last = len(levels) - 1
    if not 1 <= count <= last:
        raise BadInput(
            f"A schedule of {count} steps cannot be chosen from a grid of {last}: ask for 1 to "
            f"{last} steps, or search on a denser grid."
        )
    states: dict[int, Floats] = {0: teacher[0]}
    came: list[dict[int, int]] = []
    for k in range(count):
        data = predict(states)
        goals = _goals(k, count, last, before_end)
        arrived: dict[int, tuple[float, Floats]] = {}
        origin: dict[int, int] = {}
        for i, x in states.items():
            ahead = [j for j in goals if j > i]
            ends = straight(x, data[i], levels[i], [levels[j] for j in ahead])
            for j, end in zip(ahead, ends, strict=True):
                error = float(np.linalg.norm(end - teacher[j]))
                if j not in arrived or error < arrived[j][0]:
                    arrived[j], origin[j] = (error, end), i
        states = {j: end for j, (_, end) in arrived.items()}
        came.append(origin)
    nodes = [last]
    for origin in reversed(came):
        nodes.append(origin[nodes[-1]])
    return np.array(nodes[::-1], np.int64)


def _goals(k: int, count: int, last: int, before_end: int | None) -> Sequence[int]:
    """Nodes that step k (from 0) may end at, so that the others still fit."""
    if k == count - 1:
        return [last]
    if k == count - 2 and before_end is not None:
        return [before_end]
    return range(k + 1, (last if before_end is None else before_end + 1) - (count - k - 1) + 1)


def median_schedule(schedules: NDArray[np.int64]) -> NDArray[np.int64]:
    """One schedule for all samples: the median of each position, pushed apart where two coincide.

    Args:
        schedules: Nodes of each sample, ``[samples, K + 1]``, ascending in each row.
    """
    nodes: NDArray[np.int64] = np.floor(np.median(schedules, 0)).astype(np.int64)
    for k in range(1, len(nodes) - 1):
        nodes[k] = max(nodes[k], nodes[k - 1] + 1)
    for k in range(len(nodes) - 2, 0, -1):
        nodes[k] = min(nodes[k], nodes[k + 1] - 1)
    return nodes
