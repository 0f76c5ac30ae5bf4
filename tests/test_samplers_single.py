"""Singlestep DPM-Solver++, and the exponential Adams steps that it shares with others."""

import math

import numpy as np
import pytest
import torch
from diffusers import DPMSolverSinglestepScheduler
from hypothesis import example, given
from hypothesis import strategies as st
from test_samplers import FLOW, TABLE, noise, numbers, run
from tiny import PIPELINES
from toy import END, GRIDS, PROCESSES, START, gaussian_data, mixture_data, mixture_path, slope, take

import accel
import samplers
from accel import cache
from accel.errors import BadInput, Conflict
from samplers import DPMSolverPPScheduler, DPMSolverPPSingleScheduler
from samplers.adams import correct, predict, step
from samplers.dpmsolverpp import update, update_after_noise
from samplers.dpmsolverpp_single import group_updates, plan_groups
from samplers.prediction import Level, flow_level

BENDS = {
    "uniform": lambda u: u,
    "bent": lambda u: u**1.5 / 2 + u / 2,
    "wavy": lambda u: u + 0.02 * np.sin(6 * np.pi * u),
}


def solve(data, levels, x, order, variant="midpoint"):
    """Run the groups of a schedule in float64; returns the final state."""
    start = 0
    for size in plan_groups(levels, order):
        history = []
        group = levels[start : start + size + 1]
        for here, taken in zip(group, group_updates(group, variant), strict=False):
            history.insert(0, data(x, here))
            x = take(taken, x, history)
        start += size
    return x


def levels_of(process, count, bend=BENDS["uniform"]):
    return [
        PROCESSES[process](START + (END - START) * u) for u in bend(np.linspace(0, 1, count + 1))
    ]


@pytest.mark.parametrize("bend", BENDS.values(), ids=BENDS)
@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize(("order", "variant"), [(2, "midpoint"), (2, "heun"), (3, "midpoint")])
def test_order_wherever_the_levels_lie(process, order, variant, bend):
    path = mixture_path(process)
    errors = [
        np.abs(solve(mixture_data, levels_of(process, n, bend), path[0], order, variant) - path[-1])
        for n in GRIDS
    ]
    errors = [np.sqrt(np.mean(error**2)) for error in errors]
    assert slope(errors) == pytest.approx(order, abs=0.2)


def test_with_the_papers_places_it_is_the_papers_step():
    """2S at ½ exactly; 3S at ⅓ and ⅔ to leading order, as the errors that are left out are."""
    x, h = 0.8, 0.4
    level = PROCESSES["vp"]
    start, half, end = (level(0.3 + h * r) for r in (0, 0.5, 1))
    first, second = group_updates([start, half, end])
    m = gaussian_data(x, start)
    u = half.sigma / start.sigma * x - half.alpha * math.expm1(-h / 2) * m
    assert take(first, x, [m]) == pytest.approx(u)
    mu = gaussian_data(u, half)
    paper = end.sigma / start.sigma * x - end.alpha * math.expm1(-h) * (m + (mu - m))
    assert take(second, u, [mu, m]) == pytest.approx(paper)
    gaps = []
    for h in (0.2, 0.1, 0.05):
        levels = [level(0.3 + h * r) for r in (0, 1 / 3, 2 / 3, 1)]
        gaps.append(abs(solve(gaussian_data, levels, x, 3) - paper_3s(x, *levels, h)))
    assert np.all(np.log2(np.divide(gaps[:-1], gaps[1:])) > 3.7)  # local error of third order


def paper_3s(x, start, near, far, end, h):
    """Algorithm 2 of the paper, for data prediction."""

    def base(to, part):
        return to.sigma / start.sigma * x - to.alpha * math.expm1(-part * h) * m

    m = gaussian_data(x, start)
    m1 = gaussian_data(base(near, 1 / 3), near)
    bend = math.expm1(-2 * h / 3) / (2 * h / 3) + 1
    m2 = gaussian_data(base(far, 2 / 3) + 2 * far.alpha * bend * (m1 - m), far)
    return base(end, 1) + 1.5 * end.alpha * (math.expm1(-h) / h + 1) * (m2 - m)


grids = st.lists(st.floats(2**-10, 1.0, width=32), min_size=1, max_size=24, unique=True).map(
    lambda values: [flow_level(v) for v in sorted(values, reverse=True)]
)


NOISY = [flow_level(value) for value in (1.0, 0.99999, 0.75, 0.5)]
"""Of these, the first two are pure noise: each is a group of its own."""


@given(grids, st.sampled_from([2, 3]), st.booleans())
@example(NOISY, 3, False)
@example(NOISY[:2], 2, True)
def test_every_number_of_evaluations_is_planned(inner, order, to_zero):
    levels = [*inner, Level(1.0, 0.0) if to_zero else flow_level(2**-11)]
    sizes = plan_groups(levels, order)
    assert sum(sizes) == len(levels) - 1
    assert set(sizes) <= set(range(1, order + 1))
    starts = np.cumsum([0, *sizes])
    for start, size in zip(starts, sizes, strict=False):
        group = levels[start : start + size + 1]
        assert size == 1 or (group[0].alpha > 0 and group[-1].sigma > 0)
        updates = group_updates(group)
        assert [len(taken.history) for taken in updates] == list(range(1, size + 1))
        assert all(np.isfinite([t.sample, *t.history]).all() for t in updates)


@pytest.mark.parametrize(
    ("count", "order", "sizes"),
    [
        (1, 3, [1]),
        (2, 3, [1, 1]),
        (3, 2, [2, 1]),
        (5, 3, [2, 2, 1]),
        (6, 3, [3, 2, 1]),
        (7, 3, [3, 3, 1]),
        (8, 2, [2, 2, 2, 1, 1]),
        (8, 3, [3, 2, 2, 1]),
    ],
)
def test_groups_of_an_even_schedule(count, order, sizes):
    levels = [*levels_of("vp", count - 1), Level(1.0, 0.0)]
    assert plan_groups(levels, order) == sizes


def test_an_inner_evaluation_that_comes_too_late_splits_its_group():
    level = PROCESSES["vp"]
    assert plan_groups([level(lam) for lam in (0, 0.59, 0.8, 1)], 3) == [3]
    assert plan_groups([level(lam) for lam in (0, 0.61, 0.8, 1)], 3) == [1, 2]


@given(st.data(), st.sampled_from(sorted(PROCESSES)), st.sampled_from([2, 3]))
def test_a_constant_prediction_is_followed_exactly(data, process, order):
    gaps = data.draw(st.lists(st.floats(0.01, 3), min_size=1, max_size=7))
    levels = [PROCESSES[process](-3.0 + gap) for gap in np.cumsum([0.0, *gaps])]
    c, eps = 1.7, -0.6
    end = solve(lambda x, here: c, levels, levels[0].alpha * c + levels[0].sigma * eps, order)
    assert end == pytest.approx(levels[-1].alpha * c + levels[-1].sigma * eps, abs=1e-8)


@pytest.mark.parametrize("count", [4, 5, 9, 10])
@pytest.mark.parametrize("variant", ["midpoint", "heun"])
def test_second_order_equals_the_stock(variant, count):
    stock = DPMSolverSinglestepScheduler(**TABLE, solver_order=2, solver_type=variant)
    ours = DPMSolverPPSingleScheduler.from_config(stock.config, variant=variant)
    for scheduler in (stock, ours):
        scheduler.set_timesteps(count)
    expected, found = run(stock, noise()), run(ours, noise())
    assert (found - expected).abs().max() < 2e-5 * expected.abs().max()


@pytest.mark.parametrize("settings", [TABLE, FLOW], ids=["vp", "flow"])
@pytest.mark.parametrize("order", [2, 3])
def test_groups_begin_where_a_run_begins(order, settings):
    """A run from the middle is the run over the rest of the schedule."""
    whole, rest = (DPMSolverPPSingleScheduler(order, **settings) for _ in range(2))
    whole.set_timesteps(11)
    whole.set_begin_index(4)
    rest.set_timesteps(sigmas=whole.sigmas[4:-1].tolist())

    def predict(x, position):
        return torch.tanh(x.roll(1, -1))

    assert torch.allclose(
        run(whole, noise(), start=4, predict=predict),
        run(rest, noise(), predict=predict),
        atol=1e-5,
    )


def test_a_new_group_begins_where_history_is_dropped():
    scheduler = DPMSolverPPSingleScheduler(3, **TABLE)
    scheduler.set_timesteps(20)
    first = DPMSolverPPScheduler(1, **TABLE)
    first.set_timesteps(20)
    x = noise()
    for i in range(5):
        scheduler.step(noise(seed=i), scheduler.timesteps[i], x)
    scheduler.reset_history()
    first.set_begin_index(5)
    results = [s.step(noise(seed=9), s.timesteps[5], x).prev_sample for s in (scheduler, first)]
    assert torch.equal(*results)


def test_a_pasted_sample_stays_inside_a_group():
    """A step goes on from the sample that it is given: what a pipeline changes in it counts."""
    ends = []
    for change in (0.0, 0.5):
        scheduler = DPMSolverPPSingleScheduler(2, prediction_type="sample", **TABLE)
        scheduler.set_timesteps(20)
        x = scheduler.step(noise(seed=1), scheduler.timesteps[0], noise()).prev_sample + change
        ends.append(scheduler.step(noise(seed=2), scheduler.timesteps[1], x).prev_sample)
    share = scheduler._planned[1].sample
    assert torch.allclose(ends[1] - ends[0], torch.full_like(ends[0], 0.5 * share), atol=1e-5)


@pytest.mark.parametrize("method", [cache.SADA(), cache.ZEUS()], ids=["sada", "zeus"])
def test_methods_that_follow_the_trajectory_refuse_it(method):
    assert not DPMSolverPPSingleScheduler().follows_ode
    pipe = PIPELINES["sd15"].build()
    with pytest.raises(Conflict, match=r"and samplers\.DPMSolverPPSingle do not go together"):
        accel.Plan(samplers.DPMSolverPPSingle(), method).attach(pipe)


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_as_many_evaluations_as_steps(steps):
    tiny = PIPELINES["sd15"]
    pipe = tiny.build()
    calls = []
    pipe.unet.register_forward_hook(lambda *_: calls.append(1))
    pipe.scheduler = DPMSolverPPSingleScheduler.from_config(pipe.scheduler.config, order=3)
    assert numbers(tiny.call(pipe, steps=steps)).isfinite().all()
    assert len(calls) == steps


def test_misuse_is_refused():
    with pytest.raises(BadInput, match="orders 2 and 3"):
        DPMSolverPPSingleScheduler(1)
    with pytest.raises(BadInput, match="midpoint or heun"):
        DPMSolverPPSingleScheduler(2, "exact")


# The steps that all these solvers share


@given(st.data(), st.integers(1, 4), st.floats(0, 2), st.booleans())
def test_weights_integrate_polynomials(data, count, eta, corrects):
    """With as many nodes as coefficients, the integral of a polynomial is met."""
    gaps = data.draw(st.lists(st.floats(0.2, 2), min_size=count, max_size=count))
    target, *nodes = (PROCESSES["vp"](float(lam)) for lam in 2.0 - np.cumsum([0.0, *gaps]))
    made = (correct if corrects else predict)(target, nodes, eta)
    known = [target, *nodes] if corrects else nodes
    h, reach = gaps[0], (1 + eta) * gaps[0]
    places, masses = np.polynomial.legendre.leggauss(40)
    theta, masses = (places + 1) / 2, masses / 2
    for k in range(len(known)):
        integral = masses @ (reach * np.exp(-reach * (1 - theta)) * theta**k)
        found = sum(
            w * ((node.lam - nodes[0].lam) / h) ** k
            for w, node in zip(made.history, known, strict=True)
        )
        assert found == pytest.approx(target.alpha * integral, rel=1e-6, abs=1e-7)


def test_a_step_from_pure_noise_is_corrected_by_the_mean():
    made = correct(flow_level(0.75), [flow_level(1.0)], rule="bh1")
    assert (made.sample, made.history) == (0.75, (0.125, 0.125))
    noisy = correct(flow_level(0.75), [flow_level(1.0)], eta=0.5)
    assert (noisy.sample, noisy.noise) == (0.0, 0.75)


def test_a_midpoint_step_is_one_with_a_simplified_rule():
    nodes = [flow_level(0.5), flow_level(0.7)]
    assert predict(flow_level(0.3), nodes, rule="bh2") == update(flow_level(0.3), nodes)
    assert step(flow_level(0.3), nodes[0], nodes) == update(flow_level(0.3), nodes, "heun")


# The second step of a run from pure noise


def start_errors(second):
    """Local errors of the second step from exact values, at steps that are halved."""
    errors = []
    for h in (0.04, 0.02, 0.01):
        pure, here, there = (flow_level(1 - k * h) for k in range(3))
        x = np.linspace(-2, 2, 16)

        def at(level, x=x):
            """Where x at pure noise goes: x = σ·ε + α·…, for Gaussian data of mean 0.7."""
            return level.alpha * 0.7 + x * math.hypot(0.6 * level.alpha, level.sigma)

        history = [gaussian_data(at(here), here), gaussian_data(at(pure), pure)]
        made = update_after_noise(there, [here, pure]) if second else update(there, [here])
        errors.append(np.abs(take(made, at(here), history) - at(there)).max())
    return errors


@pytest.mark.parametrize(("second", "expected"), [(False, 2), (True, 3)])
def test_local_order_of_the_second_step_from_pure_noise(second, expected):
    errors = start_errors(second)
    assert np.log2(np.divide(errors[:-1], errors[1:])) == pytest.approx(expected, abs=0.15)


def from_noise(count, start):
    """Error at the end of a run of DPM-Solver++ 2M from pure noise, over an unshifted flow."""

    def end(count, start):
        scheduler = DPMSolverPPScheduler(start=start, **FLOW)
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / count, count))

        def predict(x, i):
            level = scheduler._levels[i]
            return (x - torch.from_numpy(mixture_data(x.numpy(), level))) / level.sigma

        return run(scheduler, torch.linspace(-2.5, 2.5, 64, dtype=torch.float64), predict=predict)

    return float((end(count, start) - end(800, "second")).square().mean().sqrt())


@pytest.mark.parametrize(("count", "gain"), [(4, 2.0), (6, 2.0), (10, 1.3), (20, 1.2)])
def test_a_second_order_start_helps_over_a_flow_without_shift(count, gain):
    assert from_noise(count, "first") > gain * from_noise(count, "second")


def test_a_second_order_start_is_one_step_of_the_ode():
    found = [DPMSolverPPScheduler(start=s, **FLOW) for s in ("first", "second")]
    for scheduler in found:
        scheduler.set_timesteps(8)
    plain, second = (scheduler._choices for scheduler in found)
    assert [len(choices) for choices in second][:3] == [1, 2, 2]
    assert len(plain[1]) == 1
    assert plain[2:] == second[2:]
    with pytest.raises(BadInput, match="eta=0"):
        DPMSolverPPScheduler(eta=0.5, start="second")
    with pytest.raises(ValueError, match="one of the ODE"):
        samplers.DPMSolverPP(eta=0.5, start="second")
    single = DPMSolverPPScheduler(start="second", **FLOW)
    single.set_timesteps(2)  # its second step is the last one
    assert [len(choices) for choices in single._choices] == [1, 1]
