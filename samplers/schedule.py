"""Where a run puts its noise levels: ramps, spacings, shifts, and the check of a given list.

Everything here is a pure function on numpy arrays; numbers run from noise to data. The order of
operations and the dtypes are those of diffusers, so that the values agree to the last bit.

Source: arXiv 2206.00364 eq. 5 (Karras ramp), 2407.12173 (beta ramp), 2305.08891 table 2
(spacings), 2403.03206 section 5.3.2 (shift of a flow's levels by resolution).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from accel.errors import BadInput
from samplers.prediction import Level

Floats = NDArray[np.floating[Any]]
Spacing = Literal["linspace", "leading", "trailing"]


@dataclass(frozen=True, slots=True)
class Grid:
    """The evaluations of one run, and where it ends.

    Attributes:
        timesteps: What the network is told at each of the N evaluations; int64 or float32.
        sigmas: The public noise levels in the units of the stock schedulers, float32, N + 1.
        levels: The same N + 1 levels as pairs (α, σ); the last one is where the run ends.
    """

    timesteps: NDArray[Any]
    sigmas: Floats
    levels: tuple[Level, ...]


@dataclass(frozen=True, slots=True)
class Request:
    """The arguments of one ``set_timesteps`` call.

    Attributes:
        count: Number of evaluations.
        sigmas: Noise levels that the caller gives, in the units of the process.
        timesteps: Timesteps that the caller gives.
        mu: Amount of dynamic shift.
    """

    count: int
    sigmas: Floats | None = None
    timesteps: NDArray[Any] | None = None
    mu: float | None = None


def request(
    num_inference_steps: int | None = None,
    sigmas: Sequence[float] | None = None,
    timesteps: Sequence[float] | None = None,
    mu: float | None = None,
) -> Request:
    """Check the arguments of a ``set_timesteps`` call against each other.

    Raises:
        BadInput: If they contradict each other, or a list is not a descending list of numbers.
    """
    lists = {"sigmas": sigmas, "timesteps": timesteps}
    counts = {name: len(values) for name, values in lists.items() if values is not None}
    if num_inference_steps is not None:
        counts["num_inference_steps"] = int(num_inference_steps)
    if len(set(counts.values())) != 1 or min(counts.values()) < 1:
        found = ", ".join(f"{name} says {count}" for name, count in counts.items()) or "nothing"
        raise BadInput(
            f"set_timesteps needs one number of steps, at least 1; found: {found}. Pass "
            "num_inference_steps, sigmas or timesteps; if several, of the same length."
        )
    return Request(
        next(iter(counts.values())),
        None if sigmas is None else descending(np.array(sigmas, np.float32), "sigmas"),
        None if timesteps is None else descending(_times(timesteps), "timesteps"),
        mu,
    )


def _times(timesteps: Sequence[float]) -> NDArray[Any]:
    """Integers stay integers, as networks with a lookup table need; the rest is float32."""
    times = np.array(timesteps)
    return times.astype(np.int64 if times.dtype.kind in "iu" else np.float32)


def descending(values: NDArray[Any], what: str) -> NDArray[Any]:
    """Return ``values`` if they are finite, not negative and strictly descending.

    Raises:
        BadInput: Naming the first place where they are not.
    """
    if values.ndim != 1 or not np.isfinite(values).all() or (values < 0).any():
        raise BadInput(
            f"{what} must be a flat list of finite numbers ≥ 0; found {values.tolist()}. "
            "Leave NaN, infinity and negative values out."
        )
    rises = np.flatnonzero(np.diff(values) >= 0)
    if rises.size:
        i = int(rises[0])
        raise BadInput(
            f"{what} must fall from noise to data without repeats; found {values[i]:g} and then "
            f"{values[i + 1]:g} at positions {i} and {i + 1} of {len(values)}. Sort the list in "
            "descending order, drop repeats, or ask for fewer steps."
        )
    return values


def moved(grid: Grid, sigmas: Floats, told: Floats, level: Callable[[float], Level]) -> Grid:
    """A grid whose evaluations are at other public levels; it ends where it did.

    Args:
        grid: N evaluations.
        sigmas: N public levels in float32.
        told: What the network is told there, unless the grid has the level: then it is told what
            it is told there.
        level: From a public level to the level.
    """
    known = dict(zip(grid.sigmas.tolist(), grid.timesteps.tolist(), strict=False))
    times = [known.get(s, t) for s, t in zip(sigmas.tolist(), told.tolist(), strict=True)]
    whole = all(s in known for s in sigmas.tolist())
    publics = np.append(sigmas, grid.sigmas[-1:]).astype(np.float32)
    levels = tuple(level(float(s)) for s in publics)
    return Grid(np.array(times, grid.timesteps.dtype if whole else np.float32), publics, levels)


def karras(first: float, last: float, count: int) -> Floats:
    """Uniform in σ^(1/7)."""
    top, bottom = first ** (1 / 7.0), last ** (1 / 7.0)
    return np.asarray((top + np.linspace(0, 1, count) * (bottom - top)) ** 7.0)


def exponential(first: float, last: float, count: int) -> Floats:
    """Uniform in ln σ: the uniform-λ grid of DPM-Solver for a variance-preserving process."""
    return np.exp(np.linspace(math.log(first), math.log(last), count))


def beta(first: float, last: float, count: int) -> Floats:
    """Quantiles of the Beta(0.6, 0.6) distribution: dense at both ends."""
    from scipy.stats import beta as distribution  # type: ignore[import-untyped]

    quantiles = distribution.ppf(1 - np.linspace(0, 1, count), 0.6, 0.6)
    return np.asarray(last + quantiles * (first - last))


RAMPS: dict[str, Callable[[float, float, int], Floats]] = {
    "use_karras_sigmas": karras,
    "use_exponential_sigmas": exponential,
    "use_beta_sigmas": beta,
}
"""Ramps under the names of the config flags that choose them."""


def chosen_ramp(flags: dict[str, bool]) -> Callable[[float, float, int], Floats] | None:
    """The ramp whose flag is set, if any.

    Raises:
        BadInput: If more than one flag is set.
    """
    names = [name for name in RAMPS if flags[name]]
    if len(names) > 1:
        raise BadInput(f"{' and '.join(names)} are both set; at most one ramp can be used.")
    return RAMPS[names[0]] if names else None


def spaced(last: int, train: int, count: int, spacing: Spacing, offset: int) -> NDArray[np.int64]:
    """Integer timesteps out of ``train``, of which the noisiest ``train − last`` are left out."""
    if spacing == "linspace":
        return np.linspace(0, last - 1, count + 1).round()[:0:-1].astype(np.int64)
    if spacing == "leading":
        stride = last // (count + 1)
        return np.arange(count, 0, -1, dtype=np.int64) * stride + offset
    times = np.arange(last, 0, -train / count).round()[:count]
    return times.astype(np.int64) - 1


def shift(levels: Floats, by: float) -> Floats:
    """Push levels of a flow toward noise by the factor ``by`` on the noise-to-signal ratio."""
    return np.asarray(by * levels / (1 + (by - 1) * levels))


def dynamic_shift(levels: Floats, factor: float) -> Floats:
    """The same map as `shift`, in the operations that diffusers uses for its dynamic form."""
    return np.asarray(factor / (factor + (1 / levels - 1)))


def stretch(levels: Floats, terminal: float) -> Floats:
    """Scale ``1 − level`` so that the last level becomes ``terminal``."""
    rest = 1 - levels
    return np.asarray(1 - rest / (rest[-1] / (1 - terminal)))
