"""Align Your Steps as a search: the objective, and the authors' descent on it.

Sabour et al., arXiv 2404.14507, sections 3.2 and 3.3. Sampling with a step from σ_b down to σ_a is
sampling a stochastic equation whose denoiser is held at σ_b; the divergence between both is at most
``Σ ∫_{σ_a}^{σ_b} σ^{−3} E‖D(x_σ, σ) − D(x_{σ_b}, σ_b)‖² dσ`` with ``x_{σ_b} = x_σ + noise``.

All expectations come from the same few *noisings*: a picture, noised on a dense grid by one
Brownian path in σ² (so that x_{σ_b} is x_σ plus independent noise for every pair), and denoised
once at each node. The objective is then a sum of pairwise distances, a schedule's cost a sum over
its steps, and nothing is evaluated again while the search runs. `samplers.schedules.shortest` then
finds the optimum itself, which the authors' coordinate descent may miss by far.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from accel.errors import BadInput
from samplers.schedules.ramps import Floats

ITERATIONS = 300
REACH = 5
SETTLED = 10
COARSE = 10
"""Steps that the authors' search begins with, at most."""


def brownian(levels: Floats, noises: Floats, first: Floats | None = None) -> Floats:
    """Noise of variance ``levels²`` at each level, as one path: ``[N, D]``.

    Each is the one before scaled down, and fresh noise: the differences between levels are
    independent of what is cleaner.

    Args:
        levels: σ/α, descending, above 0, ``[N]``; the first may be ∞, where the row is not filled
            (NaN).
        noises: Standard normal numbers, ``[N, D]``.
        first: The path at the first level; ``None`` to draw it too.
    """
    path = np.full(noises.shape, np.nan)
    for i, level in enumerate(levels):
        if not np.isfinite(level):
            continue
        known = i > 0 and np.isfinite(levels[i - 1])
        if i == 0 and first is not None:
            path[0] = first
        elif not known:
            path[i] = level * noises[i]
        else:
            kept = (level / levels[i - 1]) ** 2
            path[i] = kept * path[i - 1] + level * np.sqrt(1.0 - kept) * noises[i]
    return path


def step_costs(levels: Floats, denoised: Floats) -> Floats:
    """The objective of every step between nodes of a grid, from one noising.

    Args:
        levels: σ/α, descending, above 0, ``[N]``; the first may be ∞.
        denoised: x0-predictions at these nodes, ``[N, D]``.

    Returns:
        ``[N, N]``; entry (b, a) with b < a is the integral from node a up to node b, by the
        trapezoid rule in 1/σ², in which σ^{−3} dσ is even.
    """
    squares = np.einsum("nd,nd->n", denoised, denoised)
    distances: Floats = squares[:, None] + squares[None, :] - 2.0 * (denoised @ denoised.T)
    np.maximum(distances, 0.0, out=distances)
    precision = levels.astype(np.float64) ** -2.0
    widths = 0.5 * np.diff(precision)
    pieces = 0.5 * (distances[:, 1:] + distances[:, :-1]) * widths
    inside = np.triu(np.ones_like(pieces))
    costs = np.zeros_like(distances)
    costs[:, 1:] = np.cumsum(pieces * inside, 1)
    return np.asarray(costs)


def descend(
    cost: Floats,
    start: Sequence[int],
    reach: int = REACH,
    iterations: int = ITERATIONS,
    settled: int = SETTLED,
) -> NDArray[np.int64]:
    """Move one knot after another to the best place near it, until nothing moves.

    Args:
        cost: As `step_costs` gives, summed over noisings.
        start: Nodes to start from, ascending; the first and the last stay.
        reach: How many nodes to either side are tried.
        iterations: Knots that are tried at most.
        settled: Knots in a row, beyond all of them once, that may stay before the search ends.

    Returns:
        Nodes of a cost that is not above that of ``start``.

    Raises:
        BadInput: If the nodes do not ascend within the grid.
    """
    knots = [int(node) for node in start]
    if any(b <= a for a, b in itertools.pairwise(knots)) or knots[-1] >= len(cost):
        raise BadInput(f"The knots {knots} must ascend within a grid of {len(cost)} nodes.")
    inner = len(knots) - 2
    still = 0
    for turn in range(iterations if inner > 0 else 0):
        k = 1 + turn % inner
        before, after = knots[k - 1], knots[k + 1]
        places = range(max(before + 1, knots[k] - reach), min(after, knots[k] + reach + 1))
        best = min(places, key=lambda node: (cost[before, node] + cost[node, after], node))
        better = _around(cost, before, best, after) < _around(cost, before, knots[k], after)
        knots[k], still = (best, 0) if better else (knots[k], still + 1)
        if still >= inner + settled:
            break
    return np.array(knots, np.int64)


def descend_finer(cost: Floats, jumps: int) -> NDArray[np.int64]:
    """The authors' search: descend with few knots, put one more in each gap, descend again.

    They go from 10 steps to 20 and to 40. Here the fewest steps are the number of jumps halved
    for as long as more than `COARSE` are left; a count that is no multiple gets knots in the widest
    gaps only.

    Args:
        cost: As `step_costs` gives, summed over noisings; its nodes are best even in ln σ.
        jumps: Number of jumps, 1 or more, fewer than nodes.

    Raises:
        BadInput: If the grid has fewer jumps than that.
    """
    last = len(cost) - 1
    if not 1 <= jumps <= last:
        raise BadInput(f"{jumps} jumps do not fit on a grid of {last}: search on a denser one.")
    counts = [jumps]
    while counts[0] > COARSE:
        counts.insert(0, -(-counts[0] // 2))
    start = np.linspace(0, last, counts[0] + 1).round().astype(np.int64)
    knots = descend(cost, [int(node) for node in start])
    for count in counts[1:]:
        knots = descend(cost, subdivided([int(node) for node in knots], count))
    return knots


def subdivided(nodes: Sequence[int], jumps: int) -> list[int]:
    """Nodes in the middle of gaps until there are so many jumps, the widest gaps first.

    From n jumps to 2 n that is one in each gap, as long as every gap has room. On a grid even in
    ln σ these are the geometric means, as the authors refine.
    """
    found = list(nodes)
    gaps = sorted(itertools.pairwise(nodes), key=lambda gap: gap[0] - gap[1])
    for a, b in gaps[: jumps + 1 - len(found)]:
        if b - a > 1:
            found.append((a + b) // 2)
    found.sort()
    return found if len(found) == jumps + 1 else subdivided(found, jumps)


def _around(cost: Floats, before: int, node: int, after: int) -> float:
    return float(cost[before, node] + cost[node, after])
