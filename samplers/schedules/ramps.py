"""Schedules in closed form, and the resampling of a list to another number of steps.

Levels are σ/α, descending, as in all of this package.

Source: arXiv 2206.00927 section 3.3 (uniform in λ, which is half the log-SNR: uniform in one is
uniform in the other), 2206.00364 eq. 5 (polynomial), 2204.13902 appendix (time to a power, here ½),
2404.14507 section 3 (log-linear resampling).
The arctan ramp is the optimum of first-order solvers on Gaussian data: with ``σ/α = c·tan θ`` a
step multiplies the exact map by ``cos Δθ``, and the product is largest for equal Δθ.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from accel.errors import BadInput

Floats = NDArray[np.floating[Any]]


def uniform_lambda(count: int, first: float, last: float, noise: float = 20.0) -> Floats:
    """Uniform in λ = −ln(σ/α), the half log-SNR.

    Args:
        count: Number of levels, 1 or more.
        first: Noisiest level; ∞ stays what it is, and the others lie as if it were ``noise``.
        last: Cleanest level, above 0.
        noise: What pure noise counts as, above ``last``.
    """
    levels = np.exp(np.linspace(math.log(_finite(first, noise, last)), math.log(last), count))
    return _ended(levels, first, last)


def polynomial(
    count: int, first: float, last: float, rho: float = 7.0, noise: float = 20.0
) -> Floats:
    """Uniform in (σ/α)^(1/ρ): the ramp of EDM. Arguments as for `uniform_lambda`."""
    top = _finite(first, noise, last) ** (1.0 / rho)
    levels = np.linspace(top, last ** (1.0 / rho), count) ** rho
    return _ended(levels, first, last)


def sqrt_time(count: int, first: float, last: float, table: Floats | None = None) -> Floats:
    """Even in the root of the training time: the grid of DEIS.

    Args:
        count: Number of levels, 1 or more.
        first: Noisiest level; may be ∞.
        last: Cleanest level, above 0.
        table: σ/α by timestep, ascending, of a variance-preserving model, whose time counts from
            one timestep before the first; ``None`` for a flow, whose time is its own σ.
    """
    ends = np.array([first, last], np.float64)
    if table is None:
        with np.errstate(divide="ignore"):
            low, high = np.sqrt(1.0 / (1.0 + 1.0 / ends))
            times = np.linspace(low, high, count) ** 2
            return _ended(times / (1.0 - times), first, last)
    known, clock = np.log(np.asarray(table, np.float64)), np.arange(1.0, len(table) + 1.0)
    low, high = np.sqrt(np.interp(np.log(ends), known, clock))
    times = np.linspace(low, high, count) ** 2
    return _ended(np.exp(np.interp(times, clock, known)), first, last)


def arctan(count: int, first: float, last: float, c: float = 1.0) -> Floats:
    """Even in the angle whose tangent is σ/(α·c).

    Args:
        count: Number of levels, 1 or more.
        first: Noisiest level; may be ∞.
        last: Cleanest level; 0 is allowed.
        c: Standard deviation of the data.
    """
    angles = np.linspace(math.atan(first / c), math.atan(last / c), count)
    return _ended(c * np.tan(angles), first, last)


def arctan_error(count: int, angle: float) -> float:
    """Relative error of the end after ``count`` first-order steps of equal angle on N(0, c²)."""
    return float(1.0 - math.cos(angle / count) ** count)


def resample(levels: Floats, count: int) -> Floats:
    """The same curve over the steps at another number of levels; both ends stay.

    Piecewise linear in ln(σ/α) over the position in the list; between pure noise and the next
    level, linear in a flow's own σ.

    Args:
        levels: At least 2 unless ``count`` is 1; the first may be ∞.
        count: Number of levels, 1 or more.

    Raises:
        BadInput: If there is one level, and more are wanted.
    """
    levels = np.asarray(levels, np.float64)
    if count > 1 and len(levels) < 2:
        raise BadInput(f"A schedule of one level says nothing about {count}: give two or more.")
    places = np.linspace(0.0, len(levels) - 1.0, count)
    if math.isfinite(levels[0]):
        return np.asarray(np.exp(np.interp(places, np.arange(len(levels)), np.log(levels))))
    found = np.exp(np.interp(places, np.arange(1, len(levels)), np.log(levels[1:])))
    early = places < 1.0
    own = 1.0 + places[early] * (levels[1] / (1.0 + levels[1]) - 1.0)
    with np.errstate(divide="ignore"):
        found[early] = own / (1.0 - own)
    return np.asarray(found)


def _finite(first: float, noise: float, last: float) -> float:
    if math.isfinite(first):
        return first
    if noise <= last:
        raise BadInput(
            f"Pure noise counts as σ/α = {noise:g}, but the schedule ends at {last:g}: set noise "
            "above that."
        )
    return noise


def _ended(levels: Floats, first: float, last: float) -> Floats:
    """With both ends to the bit; a single level is the first."""
    levels = np.asarray(levels, np.float64)
    levels[-1] = last
    levels[0] = first
    return levels
