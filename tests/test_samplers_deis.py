"""DEIS: its integrals, its order in every variable, its end at σ = 0."""

import math

import numpy as np
import pytest
import torch
from diffusers import DEISMultistepScheduler, FlowMatchEulerDiscreteScheduler
from hypothesis import example, given
from hypothesis import strategies as st
from tiny import PIPELINES
from toy import END, GRIDS, PROCESSES, START, mixture_data, mixture_path, slope, take

import accel
import samplers
from accel.errors import BadInput
from samplers import DEISScheduler
from samplers.deis import FIXED, flow_clock, ratio, update
from samplers.deis_scheduler import table_clock
from samplers.prediction import Level, flow_level, vp_level
from samplers.vp import VPNoise

AB = ("tAB", "rhoAB", "lambdaAB")
FLOW = {"prediction_type": "flow_prediction"}
TABLE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def linear_clock(rho, low=0.1, rise=19.9):
    """The time of the process with β(t) = low + rise·t: ln(1 + ρ²) is its integral."""
    return (math.sqrt(low**2 + 2 * rise * math.log1p(rho * rho)) - low) / rise


CLOCKS = {"vp": linear_clock, "flow": flow_clock}


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


# The formulas


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("form", AB)
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_order_on_a_mixture_from_an_exact_start(process, form, order):
    path, errors = mixture_path(process), []
    for count in GRIDS:
        exact = path[:: GRIDS[-1] // count]
        levels = [PROCESSES[process](lam) for lam in np.linspace(START, END, count + 1)]
        history = [mixture_noise(exact[i], levels[i]) for i in range(order - 1)][::-1]
        x = exact[order - 1]
        for i in range(order - 1, count):
            history.insert(0, mixture_noise(x, levels[i]))
            nodes = levels[i - order + 1 : i + 1][::-1]
            x = take(update(levels[i + 1], nodes, form, CLOCKS[process]), x, history)
        errors.append(np.sqrt(np.mean((x - path[-1]) ** 2)))
    assert slope(errors) == pytest.approx(order, abs=0.25 if order == 4 else 0.1)


falling = st.lists(st.floats(0.01, 0.99), min_size=2, max_size=5, unique=True).map(
    lambda values: sorted(values, reverse=True)
)
ends = st.sampled_from(["as drawn", "zero"])


def drawn(sigmas, end, process):
    """Target and nodes, the newest first."""
    levels = [flow_level(s) if process == "flow" else vp_level(4.0 * s) for s in sigmas]
    target = Level(1.0, 0.0) if end == "zero" else levels[-1]
    return target, (levels if end == "zero" else levels[:-1])[::-1][:4]


@example([0.5, 0.010000000000000002, 0.01], "as drawn", "flow", "tAB")
@given(falling, ends, st.sampled_from(sorted(PROCESSES)), st.sampled_from([*AB, "iPNDM"]))
def test_weights_sum_to_the_step_in_rho(sigmas, end, process, form):
    """So that a constant ε is followed exactly: ``x = α·x0 + σ·ε`` with both constant."""
    target, nodes = drawn(sigmas, end, process)
    step = update(target, nodes, form, CLOCKS[process])
    scale = sum(abs(weight) for weight in step.history)
    expected = target.alpha * (ratio(target) - ratio(nodes[0]))
    rounding = 1e-15 * ratio(nodes[0])  # of levels that are neighbours among floats
    assert sum(step.history) == pytest.approx(expected, abs=1e-12 * scale + rounding)
    assert step.sample * nodes[0].alpha == pytest.approx(target.alpha)
    assert step.noise == 0.0


@given(falling, ends, st.sampled_from(sorted(PROCESSES)))
def test_one_prediction_is_ddim_in_every_form(sigmas, end, process):
    target, nodes = drawn(sigmas, end, process)
    here = nodes[0]
    found = {update(target, [here], form, CLOCKS[process]) for form in (*AB, "iPNDM")}
    assert len(found) == 1
    step = found.pop()
    transfer = target.sigma - here.sigma * target.alpha / here.alpha
    assert step.sample == pytest.approx(target.alpha / here.alpha)
    assert step.history == pytest.approx((transfer,))


def dense_weights(target, nodes, form, clock):
    """The integrals of the basis polynomials as sums over 400 000 pieces, even in √ρ."""
    edges = np.linspace(math.sqrt(ratio(nodes[0])), math.sqrt(ratio(target)), 400_001) ** 2
    at = (edges[1:] + edges[:-1]) / 2
    variable = {"tAB": np.vectorize(clock), "rhoAB": lambda r: r, "lambdaAB": lambda r: -np.log(r)}
    u, places = variable[form](at), variable[form](np.array([ratio(node) for node in nodes]))
    found = []
    for j, place in enumerate(places):
        others = np.delete(places, j)
        basis = np.prod([(u - other) / (place - other) for other in others], axis=0)
        found.append(target.alpha * float(basis @ np.diff(edges)))
    return found


@pytest.mark.parametrize("form", AB)
@pytest.mark.parametrize("end", [0.2, 0.0])
@pytest.mark.parametrize("process", PROCESSES)
def test_weights_equal_the_integrals(process, end, form):
    level = flow_level if process == "flow" else vp_level
    nodes = [level(s) for s in (0.3, 0.5, 0.6, 0.9)]
    found = update(level(end), nodes, form, CLOCKS[process]).history
    expected = dense_weights(level(end), nodes, form, CLOCKS[process])
    assert found == pytest.approx(expected, abs=2e-5 * max(map(abs, expected)))


def test_the_step_to_zero_in_lambda_is_the_limit():
    nodes = [flow_level(s) for s in (0.1, 0.25, 0.4)]
    limit = update(flow_level(0.0), nodes, "lambdaAB")
    near = update(flow_level(1e-9), nodes, "lambdaAB")
    assert near.history == pytest.approx(limit.history, rel=1e-5)
    gap = [math.log(ratio(node) / ratio(nodes[0])) for node in nodes]
    two = update(flow_level(0.0), nodes[:2], "lambdaAB").history
    expected = -ratio(nodes[0]) * np.array([1 + 1 / gap[1], -1 / gap[1]])  # ∫ e^−s·s ds = 1
    assert two == pytest.approx(expected)


def test_ipndm_has_the_weights_of_an_even_grid_whatever_the_grid():
    for count, weights in enumerate(FIXED, 1):
        assert sum(weights) == pytest.approx(1.0)
        nodes = [flow_level(s) for s in (0.2, 0.5, 0.6, 0.9)][:count]
        target = flow_level(0.1)
        step = update(target, nodes, "iPNDM")
        reach = target.alpha * (ratio(target) - ratio(nodes[0]))
        assert step.history == pytest.approx([reach * weight for weight in weights])
        even = [Level(1.0, rho) for rho in (4.0, 5.0, 6.0, 7.0)][:count]  # α = 1: ρ is σ
        of_rho = update(Level(1.0, 3.0), even, "rhoAB").history
        assert of_rho == pytest.approx(update(Level(1.0, 3.0), even, "iPNDM").history)


def test_a_flow_goes_on_from_pure_noise_in_time():
    """ρ is infinite there, the time is not: two values, and the line through them."""
    target, here, pure = (flow_level(s) for s in (0.5, 0.75, 1.0))
    step = update(target, [here, pure], "tAB")
    fine = np.linspace(3.0, 1.0, 400_001)
    at = (fine[1:] + fine[:-1]) / 2
    older = target.alpha * float(((at / (1 + at) - 0.75) / 0.25) @ np.diff(fine))
    assert step.history[1] == pytest.approx(older)
    assert sum(step.history) == pytest.approx(target.alpha * (1.0 - 3.0))


def test_the_clock_of_a_table_reads_its_timesteps():
    table = VPNoise(**TABLE).table()
    clock = table_clock(table)
    assert [clock(float(table[t])) for t in (0, 1, 500, 999)] == pytest.approx([0, 1, 500, 999])
    assert clock(0.0) == -1.0
    beyond = [clock(float(table[999]) * factor) for factor in (1, 1.001, 2, 50)]
    assert np.all(np.diff(beyond) > 0)
    assert beyond[1] - 999 == pytest.approx(0.002 / TABLE["beta_end"], rel=0.02)
    between = [clock(rho) for rho in np.linspace(0.0, float(table[0]), 9)]
    assert np.all(np.diff(between) > 0)


# The scheduler


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_in_lambda_it_is_the_stock_one(prediction, order):
    stock = DEISMultistepScheduler(**TABLE, prediction_type=prediction, solver_order=order)
    ours = DEISScheduler.from_config(
        stock.config, order=order, form="lambdaAB", final_sigmas_type="zero"
    )
    for scheduler in (stock, ours):
        scheduler.set_timesteps(20)
    expected, found = noise(), noise()
    for i, t in enumerate(stock.timesteps[:-1]):  # the stock ends at its lowest training level
        expected = stock.step(network(expected, i), t, expected).prev_sample
        found = ours.step(network(found, i), t, found).prev_sample
    assert (found - expected).abs().max() < 2e-5 * expected.abs().max()


@pytest.mark.parametrize("invert", [False, True])
def test_first_order_on_a_flow_is_euler(invert):
    stock = FlowMatchEulerDiscreteScheduler(shift=3.0, invert_sigmas=invert)
    ours = DEISScheduler.from_config(stock.config, order=1)
    for scheduler in (stock, ours):
        scheduler.set_timesteps(9)
    assert torch.allclose(run(ours, noise()), run(stock, noise()), atol=2e-5)


levels = st.lists(st.floats(2**-10, 1.0, width=32), min_size=1, max_size=12, unique=True).map(
    lambda values: sorted(values, reverse=True)
)
solvers = st.builds(
    dict,
    order=st.integers(1, 4),
    form=st.sampled_from([*AB, "iPNDM"]),
    lower_order_final=st.booleans(),
)


@given(levels, solvers)
def test_results_are_finite_and_a_straight_flow_ends_at_its_data(sigmas, solver):
    scheduler = DEISScheduler(**solver, **FLOW)
    scheduler.set_timesteps(sigmas=sigmas)
    data, eps = noise((1, 2, 4), 1, torch.float64), noise((1, 2, 4), 2, torch.float64)
    first = scheduler.sigmas[0].double()
    end = run(scheduler, (1 - first) * data + first * eps, predict=lambda *_: eps - data)
    weights = [w for choices in scheduler._choices for c in choices for w in c.history]
    assert np.isfinite(weights).all()
    assert scheduler.sigmas[-1] == 0
    assert torch.allclose(end, data, atol=1e-10 * (1 + max(map(abs, weights)) ** 2))


@pytest.mark.parametrize("settings", [TABLE, FLOW | {"shift": 3.0}], ids=["vp", "flow"])
@pytest.mark.parametrize("form", [*AB, "iPNDM"])
def test_the_end_holds_no_noise(settings, form):
    """Of a network that knows the data, the end is the data: no σ is left, as in the stock."""
    scheduler = DEISScheduler(order=3, form=form, **settings)
    scheduler.set_timesteps(12)
    data = noise(seed=3, dtype=torch.float64)

    def predict(x, i):
        level = scheduler._levels[i]
        eps = (x - level.alpha * data) / level.sigma
        return eps - data if "shift" in settings else eps

    first = scheduler._levels[0]
    x = first.alpha * data + first.sigma * noise(dtype=torch.float64)
    assert torch.allclose(run(scheduler, x, predict=predict), data, atol=1e-8)


def test_levels_beyond_the_table_are_told_apart():
    """Stable Video Diffusion starts at σ/α = 700; its table ends at 15."""
    scheduler = DEISScheduler(order=3, **TABLE)
    scheduler.set_timesteps(sigmas=[700.0, 300.0, 100.0, 30.0, 5.0, 0.5])
    assert run(scheduler, noise()).isfinite().all()


def orders(**settings):
    scheduler = DEISScheduler(**settings)
    scheduler.set_timesteps(settings.pop("steps", 8))
    return [len(choices) for choices in scheduler._choices]


def test_orders_rise_at_the_start_and_fall_at_the_end():
    assert orders(order=4, **TABLE) == [1, 2, 3, 4, 4, 3, 2, 2]
    assert orders(order=4, lower_order_final=False, **TABLE) == [1, 2, 3, 4, 4, 4, 4, 4]
    assert orders(order=3, form="lambdaAB", **TABLE) == [1, 2, 3, 3, 3, 3, 2, 1]
    assert orders(order=3, form="tAB", **FLOW) == [1, 2, 3, 3, 3, 3, 2, 2]
    for form in ("rhoAB", "lambdaAB"):
        assert orders(order=3, form=form, **FLOW)[:4] == [1, 1, 2, 3]


def test_a_run_from_pure_noise_keeps_the_sample_as_its_noise():
    scheduler = DEISScheduler(**FLOW)
    scheduler.set_timesteps(6)
    scheduler.step(noise(seed=1), scheduler.timesteps[0], noise())
    assert torch.equal(scheduler.history[0], noise())


@pytest.mark.parametrize("settings", [TABLE, FLOW], ids=["vp", "flow"])
def test_two_runs_are_bit_identical_and_an_aborted_one_leaves_nothing(settings):
    scheduler, results = DEISScheduler(order=3, **settings), []
    for _ in range(2):
        scheduler.set_timesteps(8)
        results.append(run(scheduler, noise()))
        scheduler.set_timesteps(8)
        scheduler.step(noise(seed=9), scheduler.timesteps[0], noise())
    assert torch.equal(*results)


def test_a_step_reads_nothing_from_the_device():
    scheduler = DEISScheduler(order=4, **FLOW)
    scheduler.set_timesteps(20, device="meta")
    scheduler.set_begin_index(0)
    assert run(scheduler, noise().to("meta")).shape == (2, 4, 8, 8)


def test_settings_out_of_range_are_refused():
    with pytest.raises(BadInput, match="orders 1, 2, 3 and 4"):
        DEISScheduler(order=5)
    with pytest.raises(BadInput, match="tAB, rhoAB, lambdaAB, iPNDM"):
        DEISScheduler(form="log")


@pytest.mark.parametrize("name", ["sd15", "flux"])
@pytest.mark.parametrize("form", ["tAB", "iPNDM"])
def test_as_a_method_of_a_plan_and_by_hand(name, form):
    tiny = PIPELINES[name]
    pipe, by_hand = tiny.build(), tiny.build()
    by_hand.scheduler = DEISScheduler.from_config(by_hand.scheduler.config, order=3, form=form)
    with accel.Plan(samplers.DEIS(order=3, form=form)).attach(pipe) as attached:
        found = torch.as_tensor(np.asarray(tiny.call(pipe)))
    assert torch.equal(found, torch.as_tensor(np.asarray(tiny.call(by_hand))))
    assert f"{form}, order 3" in attached.report.verdicts["samplers.DEIS"].detail
