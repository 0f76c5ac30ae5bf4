"""Exponential Adams steps on the x0-prediction: the common root of several solvers.

Over one step, with θ the part of it that is done in λ and ``c = (1 + η)h``, the solution of the
sampling equation is

``x_t = (σ_t/σ_s)·e^{−ηh}·x_s + α_t·∫_0^1 c·e^{−c(1−θ)}·m(θ) dθ + σ_t·√(1 − e^{−2ηh})·z``.

An Adams step puts the polynomial through known predictions in the place of m: predictions at and
before ``s`` predict (Bashforth), one at ``t`` as well corrects (Moulton).

Source: arXiv 2211.01095 section 4 (η = 0), 2309.05019 section 4 (η = τ²), 2302.04867 appendix B
(the two simplified rules).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from samplers.multistep import Update, interpolated, phi
from samplers.prediction import Level

Rule = Literal["exact", "bh1", "bh2"]
"""How a step with two nodes weighs their difference: ``exact`` integrates the line through them;
``bh1`` and ``bh2`` put ``c/2`` and ``(1 − e^{−c})/2`` in the place of ``c·φ_2(−c)``."""


def usable_order(target: Level, nodes: Sequence[Level]) -> int:
    """How many of the nodes (the newest first) a step to ``target`` can interpolate.

    Differences in λ need finite λ on both sides: the step to σ = 0, the step from α = 0 and the
    step after that are of first order.
    """
    if math.isinf(target.lam) or math.isinf(nodes[0].lam):
        return 1
    finite = 1
    while finite < len(nodes) and math.isfinite(nodes[finite].lam):
        finite += 1
    return finite


def predict(
    target: Level, nodes: Sequence[Level], eta: float = 0.0, rule: Rule = "exact"
) -> Update:
    """The step from ``nodes[0]`` to ``target``; its order is ``len(nodes)``.

    Args:
        target: The level to reach, less noisy than the nodes; σ = 0 with one node only.
        nodes: Levels of the predictions, the newest first; α = 0 only where one node is given.
        eta: Amount of noise: 0 is the ODE, 1 the ancestral SDE.
        rule: How two nodes are weighed.
    """
    return step(target, nodes[0], nodes, eta, rule)


def correct(
    target: Level, nodes: Sequence[Level], eta: float = 0.0, rule: Rule = "exact"
) -> Update:
    """The same step redone with a prediction at ``target``; its order is one higher.

    Args:
        target: The level to reach, σ > 0; the weight of its prediction comes first.
        nodes: As for `predict`. From pure noise the two predictions are averaged.
        eta: As for `predict`.
        rule: As for `predict`; of use where ``nodes`` has one.
    """
    return step(target, nodes[0], [target, *nodes], eta, rule)


def step(
    target: Level, here: Level, nodes: Sequence[Level], eta: float = 0.0, rule: Rule = "exact"
) -> Update:
    """The step from ``here`` to ``target`` along the polynomial through predictions at ``nodes``.

    Args:
        target: The level to reach; σ = 0 only where ``here`` is the one node.
        here: The level of the sample; α = 0 only with the nodes ``here``, or ``target`` and
            ``here``.
        nodes: Levels of the predictions, ``here`` among them, in the order of the weights.
        eta: Amount of noise: 0 is the ODE, 1 the ancestral SDE.
        rule: How two nodes are weighed.
    """
    h = target.lam - here.lam
    reach = (1.0 + eta) * h
    gain = -math.expm1(-reach)
    sample, noise = target.sigma / here.sigma, 0.0
    if eta:
        sample *= math.exp(-eta * h)
        noise = target.sigma * math.sqrt(-math.expm1(-2.0 * eta * h))
    if len(nodes) == 1:
        weights = [gain]
    elif here.pure_noise:
        weights = [gain / 2.0, gain / 2.0]
    else:
        places = [(node.lam - here.lam) / h for node in nodes]
        weights = _weights(places, reach, gain, rule)
    return Update(sample, tuple(target.alpha * weight for weight in weights), noise)


def _weights(places: Sequence[float], reach: float, gain: float, rule: Rule) -> list[float]:
    """Weights that integrate the polynomial through values at ``places`` (θ; 0 among them)."""
    if len(places) == 2 and rule != "exact":
        first = (reach if rule == "bh1" else gain) / 2.0
    else:
        first = reach * phi(2, -reach)
    moments = [gain, first]
    moments += [reach * math.factorial(k) * phi(k + 1, -reach) for k in range(2, len(places))]
    return interpolated(places, moments)
