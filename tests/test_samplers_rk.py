"""ρRK: Runge-Kutta methods at one evaluation a step of the pipeline."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import given
from hypothesis import strategies as st
from tiny import PIPELINES
from toy import END, GRIDS, PROCESSES, START, mixture_data, mixture_path, slope, take

import accel
import samplers
from accel.errors import BadInput, Conflict
from samplers import DEISScheduler, DPMSolverPPScheduler, RhoRKScheduler
from samplers.deis import ratio
from samplers.prediction import flow_level, vp_level
from samplers.rho_rk import METHODS, arranged, plan_steps, stage

FLOW = {"prediction_type": "flow_prediction"}
TABLE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
AT = {"vp": vp_level, "flow": lambda rho: flow_level(rho / (1.0 + rho))}


def mixture_noise(x, level):
    return (x - level.alpha * mixture_data(x, level)) / level.sigma


def noise(shape=(2, 4, 8, 8), seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def network(x, position):
    return torch.tanh(x.roll(1, -1) * 0.8 + 0.1 * position)


def run(scheduler, x, start=0, predict=network):
    for i, t in enumerate(scheduler.timesteps[start:], start):
        x = scheduler.step(predict(x, i), t, x).prev_sample
    return x


def follow(levels, order, x, predict=mixture_noise, begin=0):
    """A run of the formulas in float64, from any evaluation."""
    sizes, history = plan_steps(levels, order), []
    starts = np.cumsum([0, *sizes])
    for index in range(begin, len(levels) - 1):
        which = int(np.searchsorted(starts, index, "right")) - 1
        group = levels[starts[which] : starts[which + 1] + 1]
        choices = stage(group, index - starts[which])
        history.insert(0, predict(x, levels[index]))
        x = take(choices[min(len(history), len(choices)) - 1], x, history)
    return x


def made(process, order, count):
    """The levels of ``count`` evaluations of a run over the toy's range, uniform in λ."""
    levels = [PROCESSES[process](lam) for lam in np.linspace(START, END, count + 1)]
    return [*arranged(levels, order, AT[process]), levels[-1]]


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("order", [2, 3, 4])
def test_order_on_a_mixture(process, order):
    """No exact start is needed: a step looks back at nothing."""
    path, errors = mixture_path(process), []
    for count in GRIDS:
        end = follow(made(process, order, order * count), order, path[0])
        errors.append(np.sqrt(np.mean((end - path[-1]) ** 2)))
    assert slope(errors) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("order", METHODS)
def test_methods_meet_their_conditions_of_order(order):
    rows = METHODS[order]
    places = np.array([0.0, *[math.fsum(row) for row in rows[:-1]]])
    weights = np.array(rows[-1])
    for power in range(order):
        assert weights @ places**power == pytest.approx(1 / (power + 1))
    inner = np.zeros((order, order))
    for k, row in enumerate(rows[:-1], 1):
        inner[k, : len(row)] = row
    if order > 2:
        assert weights @ inner @ places == pytest.approx(1 / 6)
    if order > 3:
        assert weights @ (places * (inner @ places)) == pytest.approx(1 / 8)
        assert weights @ inner @ places**2 == pytest.approx(1 / 12)
        assert weights @ inner @ inner @ places == pytest.approx(1 / 24)


@pytest.mark.parametrize("order", [2, 3, 4])
def test_a_step_is_the_textbook_one(order):
    levels = made("flow", order, order)
    x, slopes = np.array([0.7]), []
    v, reach = x / levels[0].alpha, ratio(levels[-1]) - ratio(levels[0])
    for k, level in enumerate(levels[:-1]):
        row = METHODS[order][k - 1] if k else ()
        at = v + reach * sum(a * e for a, e in zip(row, slopes, strict=True))
        slopes.append(mixture_noise(level.alpha * at, level))
    expected = v + reach * sum(b * e for b, e in zip(METHODS[order][-1], slopes, strict=True))
    assert follow(levels, order, x) == pytest.approx(levels[-1].alpha * expected)


counts = st.integers(1, 24)


@given(counts, st.sampled_from([2, 3, 4]), st.booleans(), st.booleans())
def test_steps_use_every_evaluation_once(count, order, pure, clean):
    sigmas = np.linspace(1.0 if pure else 0.9, 0.0 if clean else 0.1, count + 1)
    levels = [flow_level(sigma) for sigma in sigmas]
    sizes = plan_steps(levels, order)
    assert sum(sizes) == count
    assert all(1 <= size <= order for size in sizes)
    assert not pure or sizes[0] == 1
    assert not clean or sizes[-1] == 1
    inner = sizes[pure : len(sizes) - clean if clean else None]
    assert inner == sorted(inner, reverse=True)
    assert order == 2 or count < order + pure + clean or 1 not in inner
    found = arranged(levels, order, AT["flow"])
    assert len(found) == count
    assert all(a.sigma >= b.sigma for a, b in pairwise(found))
    starts = np.cumsum([0, *sizes])[:-1]
    assert [found[k] for k in starts] == [levels[k] for k in starts]


@given(counts, st.sampled_from([2, 3, 4]), st.sampled_from(["epsilon", "flow_prediction"]))
def test_the_number_of_steps_is_the_number_of_evaluations(count, order, prediction):
    scheduler = RhoRKScheduler(order=order, prediction_type=prediction)
    scheduler.set_timesteps(count)
    assert len(scheduler.timesteps) == scheduler.num_inference_steps == count
    assert len(scheduler.sigmas) == count + 1
    calls = []
    run(scheduler, noise((1, 2, 4)), predict=lambda x, i: calls.append(i) or network(x, i))
    assert calls == list(range(count))


@pytest.mark.parametrize("order", [2, 3, 4])
@pytest.mark.parametrize("settings", [TABLE, FLOW | {"shift": 3.0}], ids=["vp", "flow"])
@pytest.mark.parametrize("begin", range(10))
def test_a_run_from_anywhere_ends_without_noise(settings, order, begin):
    scheduler = RhoRKScheduler(order=order, **settings)
    scheduler.set_timesteps(10)
    scheduler.set_begin_index(begin)
    data = noise(seed=3, dtype=torch.float64)

    def predict(x, i):
        level = scheduler._levels[i]
        eps = (x - level.alpha * data) / level.sigma
        return eps - data if "shift" in settings else eps

    x = scheduler.scale_noise(data, scheduler.timesteps[begin], noise(dtype=torch.float64))
    assert torch.allclose(run(scheduler, x, begin, predict), data, atol=1e-8)


@pytest.mark.parametrize("order", [3, 4])
@pytest.mark.parametrize("into", [1, 2])
def test_a_run_from_the_midst_of_a_step_keeps_second_order_over_it(order, into):
    """Its first step is short, and of first order in places: the whole stays of second order."""
    path, errors = mixture_path("flow"), []
    for count in GRIDS:
        levels = made("flow", order, order * count)
        end = follow(levels, order, path_at(path, levels[into]), begin=into)
        errors.append(np.sqrt(np.mean((end - path[-1]) ** 2)))
    assert slope(errors) > 1.8


ASKED = {
    **{f"{name}, vp": (TABLE | {f"use_{name}_sigmas": True}, {"num_inference_steps": 10})
       for name in ("karras", "exponential", "beta")},
    **{f"{name}, flow": (
        FLOW | {"shift": 3.0, f"use_{name}_sigmas": True}, {"num_inference_steps": 10})
       for name in ("karras", "exponential", "beta")},
    "timesteps, vp": (TABLE, {"timesteps": [950, 800, 640, 500, 370, 250, 140, 90, 50, 10]}),
    "timesteps, flow": (FLOW, {"timesteps": np.linspace(1000, 100, 10)}),
    "sigmas, vp": (TABLE, {"sigmas": np.geomspace(14.0, 0.05, 10)}),
    "mu": (FLOW | {"use_dynamic_shifting": True}, {"num_inference_steps": 10, "mu": 0.8}),
    "mu and sigmas": (
        FLOW | {"use_dynamic_shifting": True}, {"sigmas": np.linspace(1, 0.1, 10), "mu": 0.8}),
    "mu of a ramp": (
        FLOW | {"use_dynamic_shifting": True, "use_beta_sigmas": True},
        {"num_inference_steps": 10, "mu": 0.8}),
}  # fmt: skip


@pytest.mark.parametrize("order", [2, 3, 4])
@pytest.mark.parametrize("case", ASKED)
def test_steps_start_at_the_levels_that_are_asked_for(case, order):
    """Levels and what is told there are those of the other samplers; and the run ends clean."""
    settings, asked = ASKED[case]
    ours, other = RhoRKScheduler(order=order, **settings), DPMSolverPPScheduler(**settings)
    for scheduler in (ours, other):
        scheduler.set_timesteps(**asked)
    starts = np.cumsum([0, *plan_steps(other._levels, order)])[:-1]
    assert 1 < len(starts) < 10
    assert torch.equal(ours.sigmas[starts], other.sigmas[starts])
    assert ours.timesteps[starts].tolist() == pytest.approx(other.timesteps[starts].tolist())
    assert ours._levels[-1] == other._levels[-1]
    assert (np.diff(ours.sigmas.numpy()) <= 0).all()
    data, flow = noise(seed=3, dtype=torch.float64), "prediction_type" in settings

    def predict(x, i):
        level = ours._levels[i]
        return (x - level.alpha * data) / level.sigma - (data if flow else 0.0)

    assert torch.allclose(run(ours, noise(dtype=torch.float64), predict=predict), data, atol=1e-8)


@pytest.mark.parametrize("settings", [TABLE, FLOW | {"shift": 3.0}], ids=["vp", "flow"])
@pytest.mark.parametrize("begin", range(0, 10, 3))
def test_noise_is_added_for_the_evaluation_that_a_run_begins_at(settings, begin):
    """Also inside a step, whatever timestep the pipeline names with it; and then where it is."""
    scheduler = RhoRKScheduler(order=4, **settings)
    scheduler.set_timesteps(10)
    scheduler.set_begin_index(begin)
    clean, eps = noise(seed=1), noise(seed=2)
    level = scheduler._levels[begin]
    found = scheduler.add_noise(clean, eps, scheduler.timesteps[:1])
    assert torch.allclose(found, level.alpha * clean + level.sigma * eps)
    scheduler.step(eps, scheduler.timesteps[begin], found)
    level = scheduler._levels[begin + 1]
    found = scheduler.add_noise(clean, eps, scheduler.timesteps[:1])
    assert torch.allclose(found, level.alpha * clean + level.sigma * eps)


def path_at(path, level):
    """The exact trajectory at a level between the toy's, by one step of RK4 from the node above."""
    lams = np.linspace(START, END, len(path))
    k = int(np.searchsorted(lams, level.lam, "right")) - 1
    here = PROCESSES["flow"](lams[k])
    if abs(here.lam - level.lam) < 1e-12:
        return path[k]
    rho, reach = ratio(here), ratio(level) - ratio(here)
    nodes = [AT["flow"](rho + reach * share) for share in (0, 0.5, 0.5, 1)]
    return follow([*nodes, level], 4, path[k])


def test_what_the_network_is_told_is_where_it_is_evaluated():
    flow = RhoRKScheduler(**FLOW | {"shift": 3.0})
    flow.set_timesteps(8)
    assert flow.timesteps.numpy() == pytest.approx(1000 * flow.sigmas[:-1].numpy(), rel=1e-5)
    table = RhoRKScheduler(**TABLE)
    table.set_timesteps(9)
    ratios = ((1 - table.alphas_cumprod) / table.alphas_cumprod).sqrt().log().numpy()
    told = np.interp(table.timesteps.numpy(), np.arange(1000), ratios)
    assert told == pytest.approx(table.sigmas[:-1].log().numpy(), abs=1e-4)
    shifted = RhoRKScheduler(**FLOW | {"shift": 3.0})  # a pipeline that tells unshifted times
    times = np.linspace(1000, 100, 10)
    shifted.set_timesteps(timesteps=times, sigmas=times / 1000)
    share = shifted.timesteps.numpy() / 1000
    assert 3 * share / (1 + 2 * share) == pytest.approx(shifted.sigmas[:-1].numpy(), rel=1e-4)


def test_a_start_that_a_timestep_does_not_tell_is_refused():
    scheduler = RhoRKScheduler(order=2, **TABLE)
    scheduler.set_timesteps(9)
    with pytest.raises(BadInput, match="evaluated more than once"):
        scheduler.step(noise(), scheduler.timesteps[1], noise())
    scheduler.set_begin_index(1)
    scheduler.step(noise(), scheduler.timesteps[1], noise())


@pytest.mark.parametrize("invert", [False, True])
def test_the_ends_of_a_flow_are_steps_of_euler(invert):
    stock = FlowMatchEulerDiscreteScheduler(invert_sigmas=invert)
    ours = RhoRKScheduler.from_config(stock.config)
    for scheduler in (stock, ours):
        scheduler.set_timesteps(2)
    assert torch.allclose(run(ours, noise()), run(stock, noise()), atol=1e-5)


def test_dropped_history_begins_a_step_anew():
    """As a run that starts there: what came before has no weight."""
    results = []
    for seed in (1, 2):
        scheduler = RhoRKScheduler(**TABLE)
        scheduler.set_timesteps(7)
        scheduler.step(noise(seed=seed), scheduler.timesteps[0], noise())
        scheduler.reset_history()
        results.append(run(scheduler, noise(), start=1))
    assert torch.equal(*results)


@pytest.mark.parametrize("settings", [TABLE, FLOW], ids=["vp", "flow"])
def test_two_runs_are_bit_identical(settings):
    scheduler, results = RhoRKScheduler(**settings), []
    for _ in range(2):
        scheduler.set_timesteps(8)
        results.append(run(scheduler, noise()))
        scheduler.set_timesteps(8)
        scheduler.step(noise(seed=9), scheduler.timesteps[0], noise())
    assert torch.equal(*results)


def test_a_step_reads_nothing_from_the_device():
    scheduler = RhoRKScheduler(order=4, **FLOW)
    scheduler.set_timesteps(20, device="meta")
    scheduler.set_begin_index(0)
    assert run(scheduler, noise().to("meta")).shape == (2, 4, 8, 8)


def test_settings_out_of_range_are_refused():
    with pytest.raises(BadInput, match=r"orders 2, 3 and 4.*DEISScheduler"):
        RhoRKScheduler(order=1)


def test_one_evaluation_a_step_is_ddim():
    """With fewer evaluations than stages nothing is left but steps of one."""
    scheduler, ddim = RhoRKScheduler(**TABLE), DEISScheduler(order=1, **TABLE)
    for one in (scheduler, ddim):
        one.set_timesteps(2)
    assert torch.allclose(run(scheduler, noise()), run(ddim, noise()))


@pytest.mark.parametrize("name", ["sd15", "flux_img2img", "wan21"])
def test_as_a_method_of_a_plan_it_counts_its_evaluations(name):
    tiny = PIPELINES[name]
    pipe = tiny.build()
    stock = tiny.build()
    with accel.Plan().attach(stock) as plain:
        tiny.call(stock, steps=6)
    with accel.Plan(samplers.RhoRK()).attach(pipe) as attached:
        found = tiny.call(pipe, steps=6)
    assert torch.as_tensor(np.asarray(found)).isfinite().all()
    assert attached.report.steps == plain.report.steps
    assert attached.report.nfe == plain.report.nfe
    with pytest.raises(Conflict, match=r"cache\.SADA and samplers.*cache\.SADA does not fit"):
        accel.Plan(samplers.RhoRK(), accel.cache.SADA()).attach(pipe)
