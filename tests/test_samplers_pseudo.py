"""FlowTurbo's pseudo-corrector: Heun's method at one evaluation a step."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import PIPELINES
from toy import END, GRIDS, PROCESSES, START, mixture_data, mixture_path, slope, take

import accel
import samplers
from accel.errors import BadInput, Conflict
from samplers import DEISScheduler, PseudoCorrectorScheduler
from samplers.deis import update as adams
from samplers.prediction import flow_level
from samplers.pseudo_corrector import arranged, correct, predict

FLOW = {"prediction_type": "flow_prediction"}
TABLE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def slope_at(x, level, flow):
    """ε, or the velocity of a flow, of the toy's mixture."""
    data = mixture_data(x, level)
    eps = (x - level.alpha * data) / level.sigma
    return eps - data if flow else eps


def pseudo(levels, x, flow):
    """The method as published: corrected samples; returns evaluations as well."""
    kept = slope_at(x, levels[0], flow)
    for here, there in pairwise(levels):
        ahead = take(predict(there, here, flow=flow), x, [kept])
        new = slope_at(ahead, there, flow)
        x, kept = take(correct(there, here, flow=flow), x, [new, kept]), new
    return x


def heun(levels, x, flow):
    for here, there in pairwise(levels):
        old = slope_at(x, here, flow)
        new = slope_at(take(predict(there, here, flow=flow), x, [old]), there, flow)
        x = take(correct(there, here, flow=flow), x, [new, old])
    return x


def two_step(levels, x):
    """Adams-Bashforth in ρ, for comparison."""
    history = []
    for i, (here, there) in enumerate(pairwise(levels)):
        history.insert(0, slope_at(x, here, False))
        x = take(adams(there, levels[max(i - 1, 0) : i + 1][::-1], "rhoAB"), x, history)
    return x


def even(process, count):
    return [PROCESSES[process](lam) for lam in np.linspace(START, END, count + 1)]


def error(end, path):
    return float(np.sqrt(np.mean((end - path[-1]) ** 2)))


def noise(shape=(2, 4, 8, 8), seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def network(x, position):
    return torch.tanh(x.roll(1, -1) * 0.8 + 0.1 * position)


def run(scheduler, x, start=0, predict=network):
    for i, t in enumerate(scheduler.timesteps[start:], start):
        x = scheduler.step(predict(x, i), t, x).prev_sample
    return x


@pytest.mark.parametrize(("process", "flow"), [("vp", False), ("flow", False), ("flow", True)])
def test_order_on_a_mixture(process, flow):
    path = mixture_path(process)
    errors = [error(pseudo(even(process, count), path[0], flow), path) for count in GRIDS]
    assert slope(errors) == pytest.approx(2.0, abs=0.1)


@pytest.mark.parametrize(("process", "flow"), [("vp", False), ("flow", False), ("flow", True)])
@pytest.mark.parametrize("count", [8, 16])
def test_it_beats_heun_at_equal_evaluations_and_not_at_equal_steps(process, flow, count):
    """N evaluations: N/2 steps of Heun, or N − 1 of this one."""
    path = mixture_path(process)
    ours = error(pseudo(even(process, count - 1), path[0], flow), path)
    assert ours < error(heun(even(process, count // 2), path[0], flow), path)
    assert ours > error(heun(even(process, count - 1), path[0], flow), path)


def on_levels(levels, flow, heun=0):
    """A scheduler for these levels, in float64."""
    kind = FLOW if flow else {}
    scheduler = PseudoCorrectorScheduler(heun=heun, **kind)
    scheduler.set_timesteps(len(levels) - 1)
    places = [*arranged(levels, heun, flow=flow), levels[-1]] if heun else levels
    scheduler._levels = places
    scheduler._prepare(places)
    return scheduler, places


def steps(scheduler, levels, x, flow):
    """Drive the scheduler over the toy; returns the samples that it corrected."""
    x, revised = torch.tensor(x)[None], []
    inner = scheduler._revise

    def watch(index, prediction, sample):
        revised.append(inner(index, prediction, sample))
        return revised[-1]

    scheduler._revise = watch
    for i, t in enumerate(scheduler.timesteps):
        output = slope_at(x[0].numpy(), levels[i], flow)
        x = scheduler.step(torch.tensor(output)[None], t, x).prev_sample
    return x[0].numpy(), [sample[0].numpy() for sample in revised]


@pytest.mark.parametrize(("process", "flow"), [("vp", False), ("flow", True)])
def test_the_scheduler_is_the_published_method(process, flow):
    """N evaluations: N − 1 corrected intervals, and Euler's step to the end."""
    start = mixture_path(process)[0]
    scheduler, levels = on_levels(even(process, 10), flow)
    end, revised = steps(scheduler, levels, start, flow)
    assert len(revised) == 10
    for k in (1, 5, 9):
        assert revised[k] == pytest.approx(pseudo(levels[: k + 1], start, flow), abs=1e-12)
    last = predict(levels[-1], levels[-2], flow=flow)
    kept = scheduler.history[0][0].numpy()
    assert end == pytest.approx(take(last, revised[-1], [kept]), abs=1e-12)


@pytest.mark.parametrize(("process", "flow"), [("vp", False), ("flow", True)])
def test_a_start_of_heun_is_heun(process, flow):
    start = mixture_path(process)[0]
    grid = even(process, 9)
    scheduler, levels = on_levels(grid, flow, heun=2)
    _, revised = steps(scheduler, levels, start, flow)
    assert [levels.index(level) for level in (grid[0], grid[2], grid[4], grid[5])] == [0, 1, 3, 5]
    assert revised[2] == pytest.approx(heun([grid[0], grid[2]], start, flow), abs=1e-12)
    after = heun([grid[0], grid[2], grid[4]], start, flow)
    assert revised[4] == pytest.approx(after, abs=1e-12)
    assert revised[6] == pytest.approx(pseudo(grid[4:7], after, flow), abs=1e-12)


@given(st.integers(1, 20), st.integers(0, 12), st.booleans(), st.booleans())
def test_evaluations_stay_as_many_and_the_end_is_not_one(count, heun, pure, flow):
    levels = [flow_level(sigma) for sigma in np.linspace(1.0 if pure else 0.9, 0.0, count + 1)]
    found = arranged(levels, heun, flow=flow)
    assert len(found) == count
    assert all(a.sigma >= b.sigma > 0.0 for a, b in pairwise(found))
    first = 1 if pure and not flow else 0
    assert found[0] == levels[0]
    pairs = sum(a == b for a, b in pairwise(found))
    assert pairs == max(min(heun, (count - 1 - first) // 2), 0)


levels = st.lists(st.floats(2**-10, 1.0, width=32), min_size=1, max_size=12, unique=True).map(
    lambda values: sorted(values, reverse=True)
)


@given(levels, st.integers(0, 3), st.integers(0, 11))
def test_a_straight_flow_is_followed_exactly_on_any_grid_from_anywhere(sigmas, heun, begin):
    scheduler = PseudoCorrectorScheduler(heun=heun, **FLOW)
    scheduler.set_timesteps(sigmas=sigmas)
    begin = min(begin, len(sigmas) - 1)
    scheduler.set_begin_index(begin)
    data, eps = noise((1, 2, 4), 1, torch.float64), noise((1, 2, 4), 2, torch.float64)
    x = scheduler.scale_noise(data, scheduler.timesteps[begin], eps)
    end = run(scheduler, x, begin, predict=lambda *_: eps - data)
    assert torch.allclose(end, data, atol=1e-7)


@pytest.mark.parametrize("heun", [0, 2])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_a_constant_prediction_of_a_vp_model_is_reached(prediction, heun):
    scheduler = PseudoCorrectorScheduler(heun=heun, prediction_type=prediction, **TABLE)
    scheduler.set_timesteps(9)
    data, eps = noise((1, 2, 4), 1, torch.float64), noise((1, 2, 4), 2, torch.float64)

    def answer(_, i):
        level = scheduler._levels[i]
        velocity = level.alpha * eps - level.sigma * data
        return {"epsilon": eps, "v_prediction": velocity, "sample": data}[prediction]

    first = scheduler._levels[0]
    end = run(scheduler, first.alpha * data + first.sigma * eps, predict=answer)
    assert torch.allclose(end, data, atol=1e-7)


def test_one_evaluation_is_a_step_of_euler():
    ours, ddim = PseudoCorrectorScheduler(**FLOW), DEISScheduler(order=1, **FLOW)
    for scheduler in (ours, ddim):
        scheduler.set_timesteps(1)
        assert torch.allclose(run(scheduler, noise()), noise() - network(noise(), 0), atol=1e-6)


def test_thresholding_of_a_flow_clips_its_data():
    settings = FLOW | {"thresholding": True}
    scheduler = PseudoCorrectorScheduler(**settings)
    scheduler.set_timesteps(1)
    output = 10 * noise(seed=1)
    end = scheduler.step(output, scheduler.timesteps[0], noise()).prev_sample
    assert end.abs().max() <= 1.0 + 1e-5


def test_an_output_that_was_filled_in_corrects_nothing():
    spared, plain = (PseudoCorrectorScheduler(**FLOW) for _ in range(2))
    outputs = [noise(seed=i) for i in range(2)]
    for scheduler in (spared, plain):
        scheduler.set_timesteps(6)
    x = spared.step(outputs[0], spared.timesteps[0], noise()).prev_sample
    assert torch.equal(plain.step(outputs[0], plain.timesteps[0], noise()).prev_sample, x)
    spared.skip_corrector([1])
    found = spared.step(outputs[1], spared.timesteps[1], x).prev_sample
    expected = plain.step(outputs[1], plain.timesteps[1], x).prev_sample
    assert torch.equal(found[:1], expected[:1])
    gap = float(spared.sigmas[2] - spared.sigmas[1])
    assert torch.allclose(found[1:], x[1:] + gap * outputs[1][1:], atol=1e-6)


def test_what_is_kept_is_a_copy():
    scheduler = PseudoCorrectorScheduler(**FLOW)
    scheduler.set_timesteps(4)
    output = noise()
    scheduler.step(output, scheduler.timesteps[0], noise())
    output.zero_()
    assert scheduler.history[0].abs().sum() > 0


@pytest.mark.parametrize("settings", [TABLE, FLOW], ids=["vp", "flow"])
@pytest.mark.parametrize("heun", [0, 2])
def test_two_runs_are_bit_identical(settings, heun):
    scheduler, results = PseudoCorrectorScheduler(heun=heun, **settings), []
    for _ in range(2):
        scheduler.set_timesteps(8)
        results.append(run(scheduler, noise()))
        scheduler.set_timesteps(8)
        scheduler.step(noise(seed=9), scheduler.timesteps[0], noise())
    assert torch.equal(*results)


@pytest.mark.parametrize("heun", [0, 2])
def test_a_step_reads_nothing_from_the_device(heun):
    scheduler = PseudoCorrectorScheduler(heun=heun, **FLOW)
    scheduler.set_timesteps(20, device="meta")
    scheduler.set_begin_index(0)
    assert run(scheduler, noise().to("meta")).shape == (2, 4, 8, 8)


def test_settings_out_of_range_are_refused():
    with pytest.raises(BadInput, match="0 or more"):
        PseudoCorrectorScheduler(heun=-1)


@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_as_a_method_of_a_plan(name):
    tiny = PIPELINES[name]
    pipe, by_hand = tiny.build(), tiny.build()
    by_hand.scheduler = PseudoCorrectorScheduler.from_config(by_hand.scheduler.config)
    with accel.Plan(samplers.PseudoCorrector()).attach(pipe) as attached:
        found = torch.as_tensor(np.asarray(tiny.call(pipe)))
    assert torch.equal(found, torch.as_tensor(np.asarray(tiny.call(by_hand))))
    assert attached.report.verdicts["samplers.PseudoCorrector"].state == "ACTIVE"
    with pytest.raises(Conflict, match=r"cache\.SADA and samplers.*cache\.SADA does not fit"):
        accel.Plan(samplers.PseudoCorrector(heun=1), accel.cache.SADA()).attach(pipe)
