"""Analytic problems for solvers: Gaussian data, a mixture of Gaussians, both exact to float64."""

import math
from functools import cache

import numpy as np

from samplers.prediction import flow_level, vp_level

START, END = -3.0, 2.0
GRIDS = (20, 40, 80, 160, 320)
PROCESSES = {
    "vp": lambda lam: vp_level(math.exp(-lam)),
    "flow": lambda lam: flow_level(1.0 / (1.0 + math.exp(lam))),
}
WEIGHTS, MEANS, STDS = (
    np.array([0.3, 0.5, 0.2]),
    np.array([-2, 0.5, 1.8]),
    np.array([0.6, 0.4, 0.3]),
)


def gaussian_data(x, level, mean=0.7, std=0.6):
    """The exact x0-prediction for data N(mean, std²)."""
    gain = level.alpha * std**2 / (level.alpha**2 * std**2 + level.sigma**2)
    return mean + gain * (x - level.alpha * mean)


def gaussian_exact(x, here, there, mean=0.7, std=0.6):
    """The exact solution of the ODE for that data."""
    spread = [math.hypot(level.alpha * std, level.sigma) for level in (here, there)]
    return there.alpha * mean + (x - here.alpha * mean) * spread[1] / spread[0]


def mixture_data(x, level):
    """The exact x0-prediction for data from a mixture of three Gaussians."""
    variance = (level.alpha * STDS) ** 2 + level.sigma**2
    offset = x[:, None] - level.alpha * MEANS
    logits = np.log(WEIGHTS) - 0.5 * np.log(variance) - 0.5 * offset**2 / variance
    posterior = np.exp(logits - logits.max(1, keepdims=True))
    posterior /= posterior.sum(1, keepdims=True)
    return (posterior * (MEANS + level.alpha * STDS**2 / variance * offset)).sum(1)


@cache
def mixture_path(process):
    """A trajectory at the nodes of the finest grid, by RK4 on ``d(x/σ)/dλ = e^λ·m``."""
    level, substeps = PROCESSES[process], 10
    lams = np.linspace(START, END, GRIDS[-1] * substeps + 1)
    h = lams[1] - lams[0]

    def slope(lam, y):
        here = level(lam)
        return math.exp(lam) * mixture_data(here.sigma * y, here)

    y = np.linspace(-2, 2, 64) / level(START).sigma
    path = [y]
    for lam in lams[:-1]:
        k1 = slope(lam, y)
        k2 = slope(lam + h / 2, y + h / 2 * k1)
        k3 = slope(lam + h / 2, y + h / 2 * k2)
        k4 = slope(lam + h, y + h * k3)
        y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        path.append(y)
    return [level(lams[i]).sigma * path[i] for i in range(0, len(path), substeps)]


def take(step, x, history):
    """One update in float64 numpy."""
    return step.sample * x + sum(w * m for w, m in zip(step.history, history, strict=False))


def slope(errors):
    """Observed order: minus the slope of log error over log N on the three finest grids."""
    return -np.polyfit(np.log(GRIDS[-3:]), np.log(errors[-3:]), 1)[0]
