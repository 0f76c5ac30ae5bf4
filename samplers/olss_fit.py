"""The least squares and the search of a path for OLSS, on inner products alone; numpy in float64.

Everything is computed from inner products of states and outputs, summed over all samples: what was
recorded need not be held in memory at once, and nothing here asks where it came from.

Source: arXiv 2305.14677, section 3.2 (least squares) and 3.3 (search). Of our own: the ridge, that
it pulls toward the step of first order instead of toward 0, and steps fitted one after the other
on the states of the short run itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from samplers.olss import Row, continued

Gram = NDArray[np.float64]
"""Inner products of some tensors, ``[n, n]``."""

RIDGE = 1e-6
"""Of a fit. As it pulls toward the step of first order it can be stronger than the usual 1e-8."""

ROUNDING = 1e-8
"""The ridge of a projection, against outputs that are almost one."""

BISECTIONS = 50


@dataclass(frozen=True)
class Solution:
    """Steps that were fitted.

    Attributes:
        rows: The scalars of each step.
        errors: What each step leaves, as a share of the state's norm.
        grams: Inner products of each step's terms, and of the state that it was to reach (last).
    """

    rows: tuple[Row, ...]
    errors: tuple[float, ...]
    grams: tuple[Gram, ...]


def gram_of(vectors: Sequence[Any]) -> Gram:
    """Inner products of flat arrays of one length, in float64."""
    table = np.stack([np.asarray(vector, np.float64).ravel() for vector in vectors])
    return table @ table.T


def fit(gram: Gram, prior: Sequence[float], ridge: float = RIDGE) -> Row:
    """The weights of n terms whose sum is nearest to a target.

    Args:
        gram: Inner products of the terms, then of the target, ``[n + 1, n + 1]``.
        prior: Weights that the ridge pulls to, n.
        ridge: Its strength, as a share of the mean squared norm of the terms; at 0 the weights
            nearest to ``prior`` among the best.
    """
    inner, cross = gram[:-1, :-1], gram[:-1, -1]
    start = np.asarray(prior, np.float64)
    left = _solve(inner, (cross - inner @ start)[:, None], ridge)[:, 0]
    return tuple((start + left).tolist())


def residual(gram: Gram, weights: Sequence[float]) -> float:
    """The norm of what the weighted sum of the terms leaves of the target, as a share of it."""
    signed = np.append(np.asarray(weights, np.float64), -1.0)
    return math.sqrt(max(float(signed @ gram @ signed), 0.0) / max(float(gram[-1, -1]), 1e-300))


def fit_path(
    observe: Callable[[tuple[Row, ...]], Gram],
    steps: Sequence[tuple[float, float]],
    ridge: float = RIDGE,
) -> Solution:
    """Fit one step after the other.

    Args:
        observe: From the scalars of the k steps so far, inner products of x_T, the k + 1 outputs
            (the last at the state that these steps reach) and the state to reach next. On-policy
            where it runs those steps, off-policy where it looks them up in the long run.
        steps: Weights of the step of first order (`samplers.olss.first_order`), for each step.
        ridge: See `fit`.
    """
    rows: list[Row] = []
    errors, grams = [], []
    for step in steps:
        gram = observe(tuple(rows))
        rows.append(fit(gram, continued(rows, step), ridge))
        errors.append(residual(gram, rows[-1]))
        grams.append(gram)
    return Solution(tuple(rows), tuple(errors), tuple(grams))


def looked_up(gram: Gram, path: Sequence[int]) -> Callable[[tuple[Row, ...]], Gram]:
    """What `fit_path` observes off-policy: states and outputs of the long run itself.

    Args:
        gram: Inner products of the states 0 … N of the long run, then of its N outputs.
        path: Indices of the states to go through, from 0 to N.
    """
    first = len(gram) // 2 + 1

    def observe(rows: tuple[Row, ...]) -> Gram:
        outputs = [first + i for i in path[: len(rows) + 1]]
        chosen = [0, *outputs, path[len(rows) + 1]]
        return gram[chosen][:, chosen]

    return observe


def uniform_path(length: int, count: int) -> tuple[int, ...]:
    """``count`` steps, as even as can be, over a run of ``length``."""
    return tuple(round(k * length / count) for k in range(count + 1))


def search_path(gram: Gram, count: int, ridge: float = ROUNDING) -> tuple[int, ...]:
    """The path of ``count`` steps on which the worst projection is smallest.

    From each state the path goes as far as the states lie within a tolerance of the span of that
    state and the outputs at the path's states so far; the tolerance is found by bisection. The
    authors look for the farthest state by bisection too, which rests on errors that rise with the
    distance; here all are computed at once, and the path stops before the first that is too large.

    Args:
        gram: Inner products of the states 0 … N of the long run, then of its N outputs.
        count: Number of steps, at most N.
        ridge: Against outputs that are almost one, as a share of the terms' mean squared norm.

    Returns:
        The indices of count + 1 states, from 0 to N.
    """
    low, high = 0.0, float(gram.diagonal().max())
    best = _path_within(gram, count, high, ridge)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        found = _path_within(gram, count, middle, ridge)
        if found is None:
            low = middle
        else:
            best, high = found, middle
    assert best is not None  # the norm of the largest state is a tolerance that one step meets
    return _lengthened(best, count)


def _path_within(gram: Gram, count: int, tolerance: float, ridge: float) -> list[int] | None:
    """A path of at most ``count`` steps under a tolerance, if there is one."""
    last = len(gram) // 2
    path = [0]
    while path[-1] < last:
        if len(path) > count:
            return None
        errors = projection_errors(gram, path, ridge)
        too_large = np.flatnonzero(errors[1:] > tolerance)  # the next state is always in reach
        path.append(path[-1] + 1 + int(too_large[0]) if too_large.size else last)
    return path


def projection_errors(gram: Gram, path: Sequence[int], ridge: float = ROUNDING) -> Gram:
    """Squared distances of the states behind the path's end from what can be built there."""
    last = len(gram) // 2
    terms = [path[-1], *(last + 1 + i for i in path)]
    targets = np.arange(path[-1] + 1, last + 1)
    inner, cross = gram[terms][:, terms], gram[terms][:, targets]
    weights = _solve(inner, cross, ridge)
    squares = gram[targets, targets] - 2 * (weights * cross).sum(0)
    errors: Gram = np.maximum(squares + (weights * (inner @ weights)).sum(0), 0.0)
    return errors


def _lengthened(path: list[int], count: int) -> tuple[int, ...]:
    """The path with states put in the middle of its widest gaps until it has ``count`` steps."""
    path = list(path)
    while len(path) <= count:
        gaps = np.diff(path)
        widest = int(gaps.argmax())
        path.insert(widest + 1, path[widest] + int(gaps[widest]) // 2)
    return tuple(path)


def _solve(inner: Gram, cross: Gram, ridge: float) -> Gram:
    damped = inner + ridge * np.trace(inner) / len(inner) * np.eye(len(inner))
    solution: Gram = np.linalg.lstsq(damped, cross, rcond=None)[0]
    return solution
