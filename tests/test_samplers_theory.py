"""Theorems about the update formulas: order, consistency, the SDE's law."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy import (
    END,
    GRIDS,
    PROCESSES,
    START,
    gaussian_data,
    gaussian_exact,
    mixture_data,
    mixture_path,
    slope,
    take,
)

from samplers.adams import usable_order
from samplers.dpmsolverpp import update
from samplers.multistep import phi
from samplers.prediction import (
    Level,
    data_weights,
    flow_level,
    noise_weights,
    vp_level,
)

SOLVERS = [(1, "midpoint", 1), (2, "midpoint", 2), (2, "heun", 2), (3, "midpoint", 3)]


def solve(predict, levels, exact, order, variant):
    """Run the ODE update formulas from exact first states; returns the final state."""
    history = [predict(exact(i), levels[i]) for i in range(order - 1)][::-1]
    x = exact(order - 1)
    for i in range(order - 1, len(levels) - 1):
        history.insert(0, predict(x, levels[i]))
        x = take(update(levels[i + 1], levels[i - order + 1 : i + 1][::-1], variant), x, history)
    return x


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize(("order", "variant", "expected"), SOLVERS)
def test_order_on_gaussian_data(process, order, variant, expected):
    errors = []
    for count in GRIDS:
        levels = [PROCESSES[process](lam) for lam in np.linspace(START, END, count + 1)]
        start = np.linspace(-2, 2, 16)
        path = [gaussian_exact(start, levels[0], level) for level in levels]
        end = solve(gaussian_data, levels, path.__getitem__, order, variant)
        errors.append(np.abs(end - path[-1]).max())
    assert slope(errors) == pytest.approx(expected, abs=0.15)


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize(("order", "variant", "expected"), SOLVERS)
def test_order_on_a_mixture(process, order, variant, expected):
    path = mixture_path(process)
    errors = []
    for count in GRIDS:
        every = GRIDS[-1] // count
        levels = [PROCESSES[process](lam) for lam in np.linspace(START, END, count + 1)]
        end = solve(mixture_data, levels, path[::every].__getitem__, order, variant)
        errors.append(np.sqrt(np.mean((end - path[-1]) ** 2)))
    assert slope(errors) == pytest.approx(expected, abs=0.15)


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("eta", [0.5, 1.0])
@pytest.mark.parametrize(("count", "tolerance"), [(20, 0.01), (80, 0.005)])
def test_sde_keeps_the_variance(process, eta, count, tolerance):
    """On Gaussian data the update is linear: the covariance of (x, m₋₁) is propagated exactly."""
    std = 0.6
    levels = [PROCESSES[process](lam) for lam in np.linspace(START, END, count + 1)]
    covariance = np.diag([(levels[0].alpha * std) ** 2 + levels[0].sigma ** 2, 0.0])
    for i in range(count):
        here = levels[i]
        gain = here.alpha * std**2 / ((here.alpha * std) ** 2 + here.sigma**2)
        step = update(levels[i + 1], levels[max(i - 1, 0) : i + 1][::-1], eta=eta)
        older = step.history[1] if len(step.history) > 1 else 0.0
        transfer = np.array([[step.sample + step.history[0] * gain, older], [gain, 0.0]])
        covariance = transfer @ covariance @ transfer.T
        covariance[0, 0] += step.noise**2
    end = levels[-1]
    expected = (end.alpha * std) ** 2 + end.sigma**2
    assert covariance[0, 0] / expected == pytest.approx(1.0, abs=tolerance)


def test_first_order_sde_with_full_noise_is_the_ddpm_posterior():
    here, there = vp_level(2.0), vp_level(0.8)
    kept = here.alpha**2 / there.alpha**2
    step = update(there, [here], eta=1.0)
    assert step.sample == pytest.approx(math.sqrt(kept) * there.sigma**2 / here.sigma**2)
    assert step.history[0] == pytest.approx(there.alpha * (1 - kept) / here.sigma**2)
    assert step.noise == pytest.approx(there.sigma / here.sigma * math.sqrt(1 - kept))


@pytest.mark.parametrize("variant", ["midpoint", "heun"])
@pytest.mark.parametrize("order", [1, 2])
def test_a_little_noise_is_almost_the_ode(order, variant):
    nodes = [flow_level(s) for s in (0.5, 0.7)][:order]
    ode, sde = (update(flow_level(0.3), nodes, variant, eta) for eta in (0.0, 1e-9))
    assert ode.noise == 0.0
    assert sde.sample == pytest.approx(ode.sample)
    assert sde.history == pytest.approx(ode.history)


def test_the_third_order_has_the_weights_of_the_interpolating_parabola():
    """They integrate 1, λ and λ² exactly; without the factor 2 they would not."""
    lams = [0.9, 0.5, -0.4, -0.6]
    target, *nodes = (PROCESSES["vp"](lam) for lam in lams)
    step = update(target, nodes)
    fine = np.linspace(lams[1], lams[0], 20001)
    for k in range(3):
        integral = target.alpha * np.trapezoid(np.exp(fine - lams[0]) * fine**k, fine)
        found = sum(w * lam**k for w, lam in zip(step.history, lams[1:], strict=True))
        assert found == pytest.approx(integral, abs=1e-8)


def test_the_last_step_is_the_prediction_itself():
    for here in (flow_level(0.2), vp_level(0.3), flow_level(1.0)):
        step = update(Level(1.0, 0.0), [here], eta=0.0)
        assert (step.sample, step.history, step.noise) == (0.0, (1.0,), 0.0)
        assert update(Level(1.0, 0.0), [here], eta=1.0).noise == 0.0


def test_the_first_step_of_a_flow_is_that_of_euler():
    step = update(flow_level(0.75), [flow_level(1.0)])
    assert (step.sample, step.history) == (0.75, (0.25,))


def test_infinite_levels_lower_the_order():
    pure, middle, later, end = (flow_level(s) for s in (1.0, 0.7, 0.4, 0.0))
    assert usable_order(middle, [pure]) == 1
    assert usable_order(later, [middle, pure]) == 1
    assert usable_order(end, [later, middle, pure]) == 1
    assert usable_order(flow_level(0.2), [later, middle, pure]) == 2


@given(st.floats(-60, 60), st.integers(1, 3))
def test_phi_agrees_with_its_integral(z, order):
    nodes, weights = np.polynomial.legendre.leggauss(60)
    s = (nodes + 1) / 2
    values = np.exp((1 - s) * z) * s ** (order - 1) / math.factorial(order - 1)
    assert phi(order, z) == pytest.approx(float(weights @ values / 2), rel=1e-9, abs=1e-12)


@given(st.data(), st.sampled_from(sorted(PROCESSES)), st.integers(1, 3), st.floats(0, 1))
def test_a_constant_prediction_is_followed_exactly(data, process, order, eta):
    """With m = c and ``x = αc + σε`` the ODE update is exact, for every order and grid."""
    gaps = data.draw(st.lists(st.floats(0.01, 5), min_size=order, max_size=order))
    lams = 3.0 - np.cumsum([0.0, *gaps])
    target, *nodes = (PROCESSES[process](float(lam)) for lam in lams)
    c, noise = 1.7, -0.6
    x = nodes[0].alpha * c + nodes[0].sigma * noise
    step = update(target, nodes, "heun")
    expected = target.alpha * c + target.sigma * noise
    assert take(step, x, [c] * order) == pytest.approx(expected, abs=1e-9)
    if order < 3:  # the SDE keeps the law: mean and variance
        step = update(target, nodes, "midpoint", eta)
        mean = step.sample * nodes[0].alpha * c + c * sum(step.history)
        assert mean == pytest.approx(target.alpha * c, abs=1e-9)
        variance = (step.sample * nodes[0].sigma) ** 2 + step.noise**2
        assert variance == pytest.approx(target.sigma**2, abs=1e-9)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_conversions_of_a_vp_model_agree(prediction):
    level, data, noise = vp_level(1.3), 0.4, -0.9
    x = level.alpha * data + level.sigma * noise
    output = {
        "epsilon": noise,
        "v_prediction": level.alpha * noise - level.sigma * data,
        "sample": data,
    }[prediction]
    for weights, expected in ((data_weights, data), (noise_weights, noise)):
        of_x, of_output = weights(prediction, level)
        assert of_x * x + of_output * output == pytest.approx(expected)


def test_conversions_of_a_flow_agree():
    level, data, noise = flow_level(0.3), 0.4, -0.9
    x = level.alpha * data + level.sigma * noise
    for weights, expected in ((data_weights, data), (noise_weights, noise)):
        of_x, of_output = weights("flow_prediction", level)
        assert of_x * x + of_output * (noise - data) == pytest.approx(expected)
