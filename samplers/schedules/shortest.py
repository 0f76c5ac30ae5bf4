"""The best few nodes of a dense grid, where the cost of a schedule is a sum over its steps.

Source: arXiv 2405.11326 (GITS) section 4.2: dynamic programming, with later steps discounted by γ.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from accel.errors import BadInput
from samplers.schedules.ramps import Floats


def shortest(cost: Floats, count: int, gamma: float = 1.0) -> NDArray[np.int64]:
    """The nodes of the cheapest path of ``count`` jumps from the first node to the last.

    The cost of a path through nodes i_0 < i_1 < … is ``cost[i_0, i_1] + γ·(cost[i_1, i_2] +
    γ·(…))``. One matrix serves every number of jumps.

    Args:
        cost: ``[N + 1, N + 1]``; entry (i, j) is the cost of the jump from i to j > i, ∞ where it
            is not allowed; the rest is not read.
        count: Number of jumps, 1 to N.
        gamma: Weight of what follows a jump, beside the jump.

    Returns:
        The ``count + 1`` nodes, ascending.

    Raises:
        BadInput: If the grid has fewer jumps than that, or no path is allowed.
    """
    last = len(cost) - 1
    if not 1 <= count <= last:
        raise BadInput(
            f"A schedule of {count} steps cannot be chosen from a grid of {last}: ask for 1 to "
            f"{last} steps, or search on a denser grid."
        )
    jumps = np.where(np.triu(np.ones(cost.shape, bool), 1), cost, np.inf)
    value, onward = jumps[:, last].copy(), []
    for _ in range(count - 1):
        through = jumps + gamma * value[None, :]
        best = np.argmin(through, 1)
        onward.append(best)
        value = through[np.arange(last + 1), best]
    if not np.isfinite(value[0]):
        raise BadInput(f"No schedule of {count} steps is allowed on this grid: its cost is ∞.")
    nodes = [0]
    for best in reversed(onward):
        nodes.append(int(best[nodes[-1]]))
    return np.array([*nodes, last], np.int64)


def path_cost(cost: Floats, nodes: NDArray[np.int64], gamma: float = 1.0) -> float:
    """The cost of one path, as `shortest` counts it."""
    total = 0.0
    for here, there in zip(nodes[-2::-1], nodes[:0:-1], strict=True):
        total = float(cost[here, there]) + gamma * total
    return total
