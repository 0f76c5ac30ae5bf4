"""SA-Solver: equal to the stock for the same noise, its law, and its ODE at τ = 0."""

import math

import numpy as np
import pytest
import torch
from diffusers import SASolverScheduler as Stock
from pydantic import ValidationError
from test_samplers import FLOW, TABLE, noise, run
from tiny import PIPELINES
from toy import END, GRIDS, PROCESSES, START, mixture_data, mixture_path, slope, take

import accel
import samplers
from accel import cache
from accel.errors import BadInput, Conflict
from samplers import DPMSolverPPScheduler, SASolverScheduler, UniPCScheduler
from samplers.adams import correct, predict

EVERYWHERE = {"tau_from": 1.0, "tau_to": 0.0}


def ready(count=10, **settings):
    scheduler = SASolverScheduler(**settings)
    scheduler.set_timesteps(count)
    return scheduler


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("corrector", [2, 3, 4])
@pytest.mark.parametrize("predictor", [1, 2, 3])
def test_equals_the_stock_for_the_same_noise(predictor, corrector, tau):
    orders = {"predictor_order": predictor, "corrector_order": corrector}
    stock = Stock(**TABLE, **orders, tau_func=lambda t: tau)
    ours = SASolverScheduler.from_config(
        stock.config, **orders, tau=tau, **EVERYWHERE, final_sigmas_type="sigma_min"
    )
    results = []
    for scheduler in (stock, ours):
        scheduler.set_timesteps(10)
        results.append(run(scheduler, noise(), generator=torch.Generator().manual_seed(3)))
    assert (results[0] - results[1]).abs().max() < 2e-5 * results[0].abs().max()


@pytest.mark.parametrize("count", [3, 10, 20])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("settings", [TABLE, FLOW], ids=["vp", "flow"])
def test_without_noise_it_is_unipc(settings, order, count):
    """A corrector of one more node than the predictor, and B(h) = h."""
    ours = ready(count, predictor_order=order, corrector_order=order + 1, tau=0.0, **settings)
    other = UniPCScheduler(order, "bh1", **settings)
    other.set_timesteps(count)
    assert torch.equal(run(ours, noise()), run(other, noise()))
    assert ours.follows_ode


@pytest.mark.parametrize("settings", [TABLE, FLOW], ids=["vp", "flow"])
def test_of_first_order_without_corrector_it_is_the_sde_of_dpm_solver_pp(settings):
    ours = ready(
        10, predictor_order=1, corrector_order=0, tau=math.sqrt(0.5), **EVERYWHERE, **settings
    )
    other = DPMSolverPPScheduler(1, eta=0.5, **settings)
    other.set_timesteps(10)
    ends = [run(s, noise(), generator=torch.Generator().manual_seed(1)) for s in (ours, other)]
    assert torch.allclose(*ends, atol=1e-5)


def solve(levels, x, predictor, corrector):
    """Run the formulas at τ = 0 with their ordinary warm-up in float64."""
    history, before = [], None
    for i in range(len(levels) - 1):
        m = mixture_data(x, levels[i])
        if before is not None and corrector:
            known = min(len(history), corrector - 1)
            redone = correct(levels[i], levels[i - known : i][::-1], rule="bh1")
            x = take(redone, before, [m, *history])
        history, before = [m, *history][:4], x
        used = min(len(history), predictor)
        nodes = levels[i - used + 1 : i + 1][::-1]
        x = take(predict(levels[i + 1], nodes, rule="bh1"), x, history)
    return x


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize(
    ("predictor", "corrector", "expected"), [(1, 0, 1), (2, 0, 2), (2, 2, 2), (1, 2, 2), (2, 3, 3)]
)
def test_order_of_the_ode(process, predictor, corrector, expected):
    path = mixture_path(process)
    errors = []
    for count in GRIDS:
        levels = [PROCESSES[process](lam) for lam in np.linspace(START, END, count + 1)]
        end = solve(levels, path[0], predictor, corrector)
        errors.append(np.sqrt(np.mean((end - path[-1]) ** 2)))
    assert slope(errors) == pytest.approx(expected, abs=0.25)


def variance(levels, eta, predictor, corrector, std=0.6):
    """Of the end of a run on data N(0, std²): exact, every quantity a sum of unit normals."""

    def data(x, level):
        return level.alpha * std**2 / ((level.alpha * std) ** 2 + level.sigma**2) * x

    x = np.zeros(len(levels))
    unit = np.eye(len(levels))
    x[0] = math.hypot(levels[0].alpha * std, levels[0].sigma)
    history, before, drawn = [], None, 0.0
    for i in range(len(levels) - 1):
        m = data(x, levels[i])
        if before is not None and corrector:
            known = min(len(history), corrector - 1)
            redone = correct(levels[i], levels[i - known : i][::-1], eta, "bh1")
            x = take(redone, before, [m, *history]) + redone.noise * drawn
        history, before = [m, *history][:4], x
        drawn = unit[i + 1]
        used = min(len(history), predictor)
        made = predict(levels[i + 1], levels[i - used + 1 : i + 1][::-1], eta, "bh1")
        x = take(made, x, history) + made.noise * drawn
    return float((x**2).sum()) / ((levels[-1].alpha * std) ** 2 + levels[-1].sigma ** 2)


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("tau", [0.5, 1.0, 1.4])
@pytest.mark.parametrize(
    ("predictor", "corrector", "order"), [(1, 0, 1), (1, 2, 2), (2, 0, 2), (2, 2, 2), (3, 4, 2)]
)
def test_the_sde_keeps_the_law(process, tau, predictor, corrector, order):
    """The variance of the end is right to the order of the solver, and to 0.5 % at 320 steps."""
    errors = []
    for count in GRIDS:
        levels = [PROCESSES[process](lam) for lam in np.linspace(START, END, count + 1)]
        errors.append(abs(variance(levels, tau**2, predictor, corrector) - 1.0))
    assert slope(errors) > order - 0.25
    assert errors[-1] < (0.005 if order > 1 else 0.03)


def noises(scheduler):
    return [max(update.noise for update in choices) for choices in scheduler._choices]


def test_noise_is_added_inside_its_window_only():
    scheduler = ready(20, **TABLE)
    for time, amount in zip(scheduler.timesteps.tolist(), noises(scheduler), strict=True):
        assert (amount > 0) == (200 <= time <= 800)
    flow = ready(20, **FLOW, shift=3.0)
    for sigma, amount in zip(flow.sigmas.tolist(), noises(flow), strict=False):
        assert (amount > 0) == (0.2 <= sigma <= 0.8)
    inverted = ready(20, **FLOW, shift=3.0, invert_sigmas=True)
    assert noises(inverted) == pytest.approx(noises(flow), abs=1e-4)


def test_a_sample_is_the_same_in_company_though_noise_begins_late():
    x = noise((3, 4, 8))
    together, alone = (ready(8, **FLOW) for _ in range(2))
    assert noises(together)[0] == 0
    assert torch.equal(run(together, x)[1:2], run(alone, x[1:2]))
    assert not torch.equal(run(ready(8, **FLOW, tau=0.0), x), run(ready(8, **FLOW), x))


@pytest.mark.parametrize("method", [cache.SADA(), cache.ZEUS()], ids=["sada", "zeus"])
def test_methods_that_follow_the_trajectory_take_it_without_noise_only(method):
    pipe = PIPELINES["flux_cfg"].build()
    accel.Plan(samplers.SASolver(tau=0.0), method).attach(pipe).detach()
    with pytest.raises(Conflict, match=r"and samplers\.SASolver do not go together"):
        accel.Plan(samplers.SASolver(), method).attach(pipe)


def test_misuse_is_refused():
    for settings in ({"predictor_order": 4}, {"corrector_order": 1}):
        with pytest.raises(BadInput, match="no corrector"):
            SASolverScheduler(**settings)
    for settings in ({"tau": -1.0}, {"tau_from": 0.1}, {"tau_to": -0.1}):
        with pytest.raises(BadInput, match="tau is"):
            SASolverScheduler(**settings)
    with pytest.raises(ValidationError, match="must not be below"):
        samplers.SASolver(tau_from=0.1)
