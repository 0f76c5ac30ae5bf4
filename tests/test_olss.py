"""OLSS: the least squares, the path, the steps as a scheduler, and their calibration."""

import math
import re
from copy import deepcopy
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from saved import Folders, done
from tiny import PIPELINES, PROMPTS, Ask

from accel import Plan, errors, hooks
from accel.cache import EasyCache
from accel.guidance import Interval
from samplers import DPMSolverPP, DPMSolverPPScheduler, OLSSScheduler, Schedule, Steps
from samplers.dpmsolverpp import update
from samplers.olss import OLSS, continued, first_order, first_order_rows
from samplers.olss_calibration import Teacher, calibrate_olss
from samplers.olss_fit import (
    fit,
    fit_path,
    gram_of,
    looked_up,
    projection_errors,
    search_path,
    uniform_path,
)
from samplers.olss_refine import Places, refine, told_to_the_end
from samplers.prediction import flow_level, vp_level
from samplers.sampler import TOKEN_TIMES
from samplers.schedule import Grid

# The toy: a mixture of Gaussians in 256 dimensions, solved by DDIM of 60 steps, all in float64.

LONG, SEEDS, SIZE = 60, 9, 256
LEVELS = [vp_level(math.exp(-lam)) for lam in np.linspace(-3, 2, LONG + 1)]
CENTRES = np.random.default_rng(1).normal(size=(5, SIZE))


def network(x, level):
    """The exact ε-prediction for samples ``[seeds, 256]``."""
    offsets = x[:, None] - level.alpha * CENTRES
    variance = (level.alpha * 0.4) ** 2 + level.sigma**2
    logits = -0.5 * (offsets**2).sum(-1) / variance / 16
    share = np.exp(logits - logits.max(1, keepdims=True))
    share = (share / share.sum(1, keepdims=True))[..., None]
    mean = (share * (CENTRES + level.alpha * 0.16 / variance * offsets)).sum(1)
    return (x - level.alpha * mean) / level.sigma


@cache
def long_run(seed=0, seeds=SEEDS):
    """States and outputs of DDIM over all levels."""
    states = [np.random.default_rng(seed).normal(size=(seeds, SIZE))]
    outputs = []
    for here, there in pairwise(LEVELS):
        outputs.append(network(states[-1], here))
        a, b = first_order("epsilon", here, there)
        states.append(a * states[-1] + b * outputs[-1])
    return states, outputs


@cache
def everything(seeds=SEEDS):
    states, outputs = long_run(0, seeds)
    return gram_of([*states, *outputs])


def terms_of(rows, path, start):
    """The noise and the outputs of a short run, up to the one after these steps."""
    terms, x = [start], start
    for k in range(len(rows) + 1):
        terms.append(network(x, LEVELS[path[k]]))
        if k < len(rows):
            x = sum(weight * term for weight, term in zip(rows[k], terms, strict=True))
    return terms


def steps_of(path):
    return [first_order("epsilon", LEVELS[i], LEVELS[j]) for i, j in pairwise(path)]


def on_policy(path, seeds=SEEDS):
    states, _ = long_run(0, seeds)

    def observe(rows):
        return gram_of([*terms_of(rows, path, states[0]), states[path[len(rows) + 1]]])

    return fit_path(observe, steps_of(path))


def off_policy(path):
    return fit_path(looked_up(everything(), path), steps_of(path))


def end_error(rows, path, seed=0):
    """RMSE of the end of the short run to that of the long one."""
    states, _ = long_run(seed)
    terms = terms_of(rows[:-1], path, states[0])
    end = sum(weight * term for weight, term in zip(rows[-1], terms, strict=True))
    return math.sqrt(((end - states[-1]) ** 2).mean())


def second_order_error(count, seed=0):
    """The same of DPM-Solver++ (2M) on even steps in λ."""
    states, _ = long_run(seed)
    levels = [LEVELS[i] for i in uniform_path(LONG, count)]
    x, history = states[0], []
    for i in range(count):
        data = (x - levels[i].sigma * network(x, levels[i])) / levels[i].alpha
        history = [data, *history][:2]
        step = update(levels[i + 1], levels[: i + 1][::-1][: len(history)])
        x = step.sample * x + sum(w * m for w, m in zip(step.history, history, strict=True))
    return math.sqrt(((x - states[-1]) ** 2).mean())


@pytest.mark.parametrize("way", [off_policy, on_policy])
def test_the_full_path_is_the_long_run(way):
    path = uniform_path(LONG, LONG)
    assert path == tuple(range(LONG + 1)) == search_path(everything(), LONG)
    found = way(path)
    assert max(found.errors) < 1e-6  # the root of what inner products cancel to
    assert end_error(found.rows, path) < 1e-9


def test_what_is_left_does_not_rise_with_more_terms():
    """Of the vectors themselves: inner products have only half of their digits for what is left."""
    states, outputs = long_run(0, SEEDS)
    vectors = np.stack([np.ravel(each) for each in (*states, *outputs)]).astype(np.float64)
    gram = gram_of(vectors)
    target = LONG
    left = []
    for count in range(1, 12):
        path = uniform_path(LONG, count)
        chosen = [0, *(LONG + 1 + i for i in uniform_path(LONG, 12)[:count]), target]
        own = gram[chosen][:, chosen]
        weights = fit(own, (0.0,) * (count + 1), ridge=0.0)
        missing = np.asarray(weights) @ vectors[chosen[:-1]] - vectors[target]
        left.append(np.linalg.norm(missing) / np.linalg.norm(vectors[target]))
        assert len(weights) == len(path)
    assert all(later <= earlier + 1e-9 for earlier, later in pairwise(left))
    assert left[-1] < left[0] / 10


@pytest.mark.parametrize("count", [6, 10])
def test_on_policy_beats_off_policy_beats_second_order(count):
    path = search_path(everything(), count)
    on, off = (end_error(way(path).rows, path) for way in (on_policy, off_policy))
    assert on < 0.5 * off < off < 0.5 * second_order_error(count)


def test_it_holds_for_noise_that_was_not_calibrated_on():
    for path in (uniform_path(LONG, 6), search_path(everything(32), 6)):
        rows = on_policy(path, 32).rows
        assert end_error(rows, path, seed=7) < 0.3 * second_order_error(6, seed=7)


def test_ridge_keeps_collinear_outputs_in_check():
    path = uniform_path(LONG, 10)
    for way in (off_policy, on_policy):
        rows = way(path).rows
        assert np.abs(np.concatenate(rows)).max() < 1e3
        assert end_error(rows, path) < second_order_error(10)
    doubled = everything().copy()  # two outputs that are one: no unique solution
    doubled[LONG + 2] = doubled[LONG + 1]
    doubled[:, LONG + 2] = doubled[:, LONG + 1]
    rows = fit_path(looked_up(doubled, (0, 1, LONG)), steps_of((0, 1, LONG))).rows
    assert np.isfinite(np.concatenate(rows)).all() and np.abs(rows[-1]).max() < 1e2


@settings(max_examples=10)
@given(st.integers(1, LONG))
def test_a_path_has_its_length_and_rises(count):
    for path in (search_path(everything(), count), uniform_path(LONG, count)):
        assert path[0] == 0 and path[-1] == LONG and len(path) == count + 1
        assert all(after > before for before, after in pairwise(path))


def test_a_path_is_not_shorter_where_one_step_would_do():
    """All outputs alike: every state lies in one span, and the authors' search ends early."""
    states, outputs = long_run()
    flat = [outputs[0]] * LONG
    line = [states[0]]
    for step in steps_of(range(LONG + 1)):
        line.append(step[0] * line[-1] + step[1] * outputs[0])
    assert len(search_path(gram_of([*line, *flat]), 7)) == 8


def test_projections_are_exact_one_step_on_and_worse_farther_out():
    errors_ahead = np.sqrt(projection_errors(everything(), [0], ridge=0.0))
    assert errors_ahead[0] < 1e-5 * errors_ahead[-1]
    assert (np.diff(errors_ahead) > 0).mean() > 0.9  # the authors assume: always


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_the_first_order_is_ddim(prediction):
    here, there = vp_level(2.0), vp_level(0.7)
    data, noise = 0.3, -1.1
    x = here.alpha * data + here.sigma * noise
    output = {"epsilon": noise, "v_prediction": here.alpha * noise - here.sigma * data}
    a, b = first_order(prediction, here, there)
    expected = there.alpha * data + there.sigma * noise
    assert a * x + b * output.get(prediction, data) == pytest.approx(expected)


def test_the_first_order_of_a_flow_is_euler_from_pure_noise_to_data():
    assert first_order("flow_prediction", flow_level(1.0), flow_level(0.6)) == pytest.approx(
        (1.0, -0.4)
    )
    assert first_order("flow_prediction", flow_level(0.2), flow_level(0.0)) == pytest.approx(
        (1.0, -0.2)
    )
    assert continued([(1.0, -0.4)], (1.0, -0.6)) == pytest.approx((1.0, -0.4, -0.6))


# The scheduler.

FLOW = {"prediction_type": "flow_prediction"}
VP = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def ddim(count=5, **settings):
    """OLSS with the scalars of first order, and that solver itself."""
    stock = DPMSolverPPScheduler(order=1, **settings)
    stock.set_timesteps(count)
    rows = first_order_rows(settings.get("prediction_type", "epsilon"), stock._levels)
    ours = OLSSScheduler.from_config(
        stock.config, noise=[row[0] for row in rows], outputs=[row[1:] for row in rows]
    )
    ours.set_timesteps(count)
    return ours, stock


def noise(seed=0, dtype=torch.float64):
    return torch.randn((2, 4, 8), generator=torch.Generator().manual_seed(seed), dtype=dtype)


def solved(scheduler, x):
    for i, t in enumerate(scheduler.timesteps):
        x = scheduler.step(torch.tanh(x.roll(1, -1) * 0.8 + 0.1 * i), t, x).prev_sample
    return x


@pytest.mark.parametrize("settings", [VP, VP | {"prediction_type": "v_prediction"}, FLOW])
def test_with_the_scalars_of_first_order_it_is_first_order(settings):
    ours, stock = ddim(**settings)
    assert torch.allclose(solved(ours, noise()), solved(stock, noise()), atol=1e-9)
    assert (ours._start, ours._kept) == (None, [])


def test_runs_are_alike_and_leave_nothing_behind():
    ours, _ = ddim(**FLOW)
    first = solved(ours, noise())
    ours.set_timesteps(5)
    ours.step(noise(3), ours.timesteps[0], noise(4))
    ours.set_timesteps(5)
    assert torch.equal(solved(ours, noise()), first)
    narrow = noise().to(torch.float16)
    ours.set_timesteps(5)
    assert solved(ours, narrow).dtype == torch.float16


def test_a_step_reads_nothing_from_the_device():
    ours, _ = ddim(**FLOW)
    ours.set_timesteps(5, device="meta")
    ours.set_begin_index(0)
    assert solved(ours, noise().to("meta")).shape == (2, 4, 8)


def test_it_is_written_and_read(tmp_path):
    ours, stock = ddim(**VP)
    ours.save_pretrained(tmp_path)
    back = OLSSScheduler.from_pretrained(tmp_path)
    for scheduler in (back, OLSSScheduler.from_config(ours.config)):
        scheduler.set_timesteps(5)
        assert torch.equal(solved(scheduler, noise()), solved(ddim(**VP)[0], noise()))
    other = DPMSolverPPScheduler.from_config(ours.config, order=1)
    other.set_timesteps(5)
    assert torch.equal(other.timesteps, stock.timesteps)


def test_what_it_cannot_do_is_refused():
    ours, _ = ddim(**FLOW)
    with pytest.raises(errors.BadInput, match="has 6 steps, and the numbers are for 5"):
        ours.set_timesteps(6)
    ours.set_timesteps(5)
    with pytest.raises(errors.BadInput, match="starts at step 2"):
        ours.set_begin_index(2)
    with pytest.raises(errors.BadInput, match="goes to step 1 after 0 steps"):
        ours.step(noise(), ours.timesteps[1], noise())
    ours.set_timesteps(5)
    ours.step(noise(), ours.timesteps[0], noise())
    with pytest.raises(errors.BadInput, match=r"\(2, 4, 8\) to \(1, 4, 8\)"):
        ours.step(noise()[:1], ours.timesteps[1], noise()[:1])
    with pytest.raises(errors.BadInput, match="rows"):
        OLSSScheduler(noise=(1.0, 1.0), outputs=((1.0,),))
    with pytest.raises(errors.BadInput, match="path_timesteps and path_sigmas"):
        OLSSScheduler(noise=(1.0,), outputs=((1.0,),), path_timesteps=(999.0,))
    with pytest.raises(errors.BadInput, match="has 5 steps, and the numbers are for 0"):
        OLSSScheduler().set_timesteps(5)


def test_another_schedule_is_refused():
    ours, stock = ddim(**FLOW)
    settings = {"noise": ours.config.noise, "outputs": ours.config.outputs}
    asked = stock.sigmas.tolist()
    strict = OLSSScheduler(**settings, asked_sigmas=asked, **FLOW)
    strict.set_timesteps(5)
    other = OLSSScheduler(**settings, asked_sigmas=asked, shift=3.0, **FLOW)
    with pytest.raises(errors.BadInput, match="another shift, resolution or spacing"):
        other.set_timesteps(5)


# Calibration on pipelines.


def calls(name, count, steps):
    for number in range(count):
        yield {
            **PIPELINES[name].inputs(Ask([PROMPTS[number]], [number], guidance=True)),
            "num_inference_steps": steps,
            "output_type": "latent",
            "generator": torch.Generator().manual_seed(number),
        }


def test_a_full_path_on_a_pipeline_is_the_long_run(bench):
    """On-policy, by first order: the scalars of DDIM come out, and its output."""
    for name in ("sd15", "flux_cfg"):
        options = {"teacher_steps": 4, "teacher_order": 1, "method": "uniform"}
        method = calibrate_olss(bench.pipe(name), calls(name, 1, 4), options).method
        expected, _ = bench.under(name, Plan(DPMSolverPP(order=1)), steps=4)
        found, report = bench.under(name, Plan(method), steps=4)
        assert torch.allclose(found, expected, atol=1e-4 * float(expected.abs().max()))
        assert report.steps == 4


def test_each_call_costs_the_long_run_and_one_evaluation_a_step(bench):
    pipe = bench.pipe("flux_cfg")
    asked = []
    handle = pipe.transformer.x_embedder.register_forward_pre_hook(lambda *_: asked.append(1))
    calibrate_olss(pipe, calls("flux_cfg", 2, 3), {"teacher_steps": 8})
    handle.remove()
    assert len(asked) == 2 * (8 + 3) * 2  # calls, evaluations, branches


@pytest.fixture(scope="module")
def taught():
    """Calibrated on one call: by least squares, then refined, and refined with the times fixed."""
    pipe = PIPELINES["flux_cfg"].build()
    options = ({}, {"refine": 4}, {"refine": 4, "times": False})
    return [
        calibrate_olss(pipe, calls("flux_cfg", 1, 3), {"teacher_steps": 8, **more})
        for more in options
    ]


def test_it_comes_nearer_to_the_long_run_and_refining_nearer_still(bench, taught):
    pipe = bench.pipe("flux_cfg")
    (call,) = calls("flux_cfg", 1, 3)

    def end(method, steps=3):
        generator = torch.Generator().manual_seed(0)
        with Plan(method).attach(pipe):
            more = {"num_inference_steps": steps, "generator": generator}
            return pipe(**{**call, **more})[0].double()

    truth = end(DPMSolverPP(order=2), 8)
    ends = [end(method) for method in (DPMSolverPP(order=2), *(one.method for one in taught))]
    plain, *found = (float((one - truth).norm() / truth.norm()) for one in ends)
    fitted, refined, timeless = found
    assert refined < timeless < fitted < plain
    told = [float(number) for number in re.findall(r"[0-9.]+", taught[1].note.split("from")[-1])]
    assert told == pytest.approx([fitted, refined], rel=0.06)  # of two digits


def test_what_gradients_refined_says_so(bench, taught):
    """In the plan, in the report and in the note; and nothing else claims it."""
    fitted, refined, timeless = (one.method for one in taught)
    assert fitted.refined == 0 and "gradients" not in taught[0].note + fitted.summary()
    for method, note in ((one.method, one.note) for one in taught[1:]):
        assert 1 <= method.refined <= 4
        assert "refined by gradients from" in note
        assert Plan.from_toml(Plan(method).to_toml()) == Plan(method)
        _, report = bench.under("flux_cfg", Plan(method), steps=3)
        assert f"refined by {method.refined} steps of gradients" in str(report)
    assert timeless.path_timesteps == fitted.path_timesteps
    assert refined.path_timesteps[0] == fitted.path_timesteps[0]
    assert all(a != b for a, b in zip(refined.rows, fitted.rows, strict=True))
    moved = zip(refined.path_timesteps[1:], fitted.path_timesteps[1:], strict=True)
    assert all(1 < abs(a - b) < 100 for a, b in moved)
    assert refined.path_sigmas[:-1] == pytest.approx([t / 1000 for t in refined.path_timesteps])


def test_refining_trains_no_weight():
    pipe = PIPELINES["flux_cfg"].build()
    weights = [*pipe.transformer.parameters()]
    weights[0].requires_grad_(True)
    calibrate_olss(pipe, calls("flux_cfg", 1, 2), {"teacher_steps": 3, "refine": 1})
    assert [weight.requires_grad for weight in weights] == [True] + [False] * (len(weights) - 1)
    assert all(weight.grad is None for weight in weights)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("told", [np.log, lambda s: 1000 * s, lambda s: 50 + 1000 * s])
def test_what_the_network_is_told_goes_on_to_the_end(told):
    """Timesteps, and ln σ/4 alike, which is below 0; never back, and no timestep below 0."""
    sigmas = np.append(np.geomspace(0.9, 0.01, 6), 0.0)
    grid = Grid(told(sigmas[:-1]), sigmas, ())
    found = told_to_the_end(grid)
    assert len(found) == len(sigmas)
    assert (np.diff(found) < 0).all()
    assert found[-1] >= 0 or found[-2] < 0


@pytest.mark.parametrize("inverted", [False, True])
def test_places_stay_in_order_between_the_ends_wherever_gradients_move_them(inverted):
    levels = np.linspace(1.0, 0.1, 10) if not inverted else np.linspace(0.0, 0.9, 10)
    grid = Grid(levels * 1000, np.append(levels, float(inverted)), ())
    places = Places(grid, (0, 2, 5, 9, 10))
    assert places.told().tolist() == pytest.approx((levels * 1000)[[0, 2, 5, 9]])
    places.told().sum().backward()
    assert (places.gaps.grad.abs() > 1.0).all()
    with torch.no_grad():
        places.gaps += torch.tensor([-9.0, 4.0, 9.0, -9.0])
    told, sigmas = places.written()
    assert told[0] == levels[0] * 1000 and sigmas[-1] == float(inverted)
    rises = np.diff([*sigmas]) if inverted else -np.diff([*sigmas])
    assert (rises > 0).all()
    assert np.array(told) == pytest.approx(np.array(sigmas[:-1]) * 1000)


def test_refining_keeps_the_best_of_all_its_steps():
    """Errors as a script: the third is the lowest, and a run that never gains is left alone."""
    grams = [np.eye(3), np.eye(4)]
    rows = [(1.0, 0.5), (1.0, 0.5, 0.5)]
    for script, steps, after in (([3.0, 2.0, 1.0, 5.0], 2, 1.0), ([1.0, 2.0, 1.0, 3.0], 0, 1.0)):
        errors_left = iter(script)
        scheduler = OLSSStub()

        def descend(onward, errors_left=errors_left, scheduler=scheduler):
            if onward:
                sum(scheduler.scalars(k).sum() for k in range(2)).backward()
            return next(errors_left)

        found = refine(descend, scheduler, rows, grams, 3, 1e-6, None)
        assert (found.steps, found.before, found.after) == (steps, script[0], after)
        assert (found.rows == tuple(rows)) == (steps == 0)


class OLSSStub:
    """Keeps the scalars that it is given."""

    told = None


def test_clipped_data_are_fitted_and_refined_in_place(bench):
    """The x0 that thresholding clips is what is kept, and its levels are left where they are."""
    pipe = bench.pipe("sd15")
    before = pipe.scheduler
    pipe.scheduler = type(before).from_config(
        before.config, thresholding=True, sample_max_value=1.0, clip_sample=False
    )
    try:
        fitted, refined = (
            calibrate_olss(pipe, calls("sd15", 1, 3), {"teacher_steps": 4, "refine": steps}).method
            for steps in (0, 2)
        )
        with Plan(refined).attach(pipe):
            output = bench.call("sd15", steps=3)
    finally:
        pipe.scheduler = before
    assert refined.refined > 0 and refined.path_timesteps == fitted.path_timesteps
    assert output.isfinite().all()
    prior = first_order("epsilon", *(vp_level(sigma) for sigma in fitted.path_sigmas[:2]))
    clipped = first_order("sample", *(vp_level(sigma) for sigma in fitted.path_sigmas[:2]))
    assert abs(fitted.rows[0][0] - clipped[0]) < abs(fitted.rows[0][0] - prior[0])


def test_a_learned_variance_is_cut_off_when_recorded_and_when_run(bench):
    """What the network says beside its prediction is neither fitted to nor added."""
    ours, _ = ddim(variance_type="learned_range", **VP)
    teacher = Teacher.from_config(ours.config)
    teacher.begin(bench.pipe("sd15"))
    teacher.set_timesteps(5)
    for scheduler in (ours, teacher):
        plain, doubled = deepcopy(scheduler), scheduler
        output = torch.cat([noise(1), noise(2)], 1)
        expected = plain.step(noise(1), plain.timesteps[0], noise()).prev_sample
        found = doubled.step(output, doubled.timesteps[0], noise()).prev_sample
        assert torch.equal(found, expected)
    assert torch.equal(teacher.outputs[0], noise(1)) and torch.equal(ours._kept[0], noise(1))


def test_a_noise_level_for_each_token_is_refused():
    for name in TOKEN_TIMES:
        pipe = type(name, (), {})()
        with pytest.raises(errors.UnsupportedModel, match="each token a noise level of its own"):
            calibrate_olss(pipe, [], {})


def test_a_plan_is_used_only_where_it_was_made(bench):
    pipe = bench.pipe("flux_cfg")
    method = calibrate_olss(pipe, calls("flux_cfg", 1, 3), {"teacher_steps": 6}).method
    plan = Plan.from_toml(Plan(method).to_toml())
    assert plan == Plan(method)
    with plan.attach(pipe):
        with pytest.raises(errors.BadInput, match=r"another guidance: .*true_cfg_scale=3\.5"):
            bench.call("flux_cfg", steps=3, true_cfg_scale=2.0)
        with pytest.raises(errors.BadInput, match="has 4 steps"):
            bench.call("flux_cfg", steps=4)
        with pytest.raises(errors.BadInput, match="another shift, resolution or spacing"):
            bench.call("flux_cfg", steps=3, sigmas=[1.0, 0.8, 0.1])
        output = bench.call("flux_cfg", steps=3)
    assert output.isfinite().all()
    with pytest.raises(errors.UnsupportedModel, match="another network"):
        plan.attach(bench.pipe("sd3"))
    with pytest.raises(errors.BadInput, match=r"another (network|noise process)"):
        OLSSScheduler(**method.settings(), **VP)


def test_img2img_is_refused_at_once(bench):
    row = OLSS(noise=(1.0,) * 4, outputs=tuple((-0.25,) * (k + 1) for k in range(4)))
    for name in ("sd_img2img", "flux_img2img"):
        with (
            Plan(row).attach(bench.pipe(name)),
            pytest.raises(errors.BadInput, match="a strength below 1"),
        ):
            bench.call(name, steps=4)


def test_calls_that_cannot_be_fitted_to_are_refused(bench):
    pipe = bench.pipe("flux_cfg")
    (call,) = calls("flux_cfg", 1, 3)
    for change, told in (
        ({"num_inference_steps": 200}, "at most the 6"),
        ({"generator": None}, "give it a generator"),
        ({"sigmas": [1.0, 0.5, 0.2]}, "no timesteps or sigmas"),
    ):
        with pytest.raises(errors.BadInput, match=told):
            calibrate_olss(pipe, [{**call, **change}], {"teacher_steps": 6})
    with pytest.raises(errors.BadInput, match="at least one prompt"):
        calibrate_olss(pipe, [], {})


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    models = Folders(tmp_path / "models")
    done(
        "calibrate", "olss", "--model", models("flux_cfg"), "--count", 1, "--steps", 3,
        "--method", "uniform", "--set", "teacher_steps=6", "--out", "olss.toml",
    )  # fmt: skip
    (method,) = Plan.from_toml(Path("olss.toml").read_text()).methods
    assert isinstance(method, OLSS) and len(method.noise) == 3
    done(
        "generate", "a fox", "--model", models("flux_cfg"), "--steps", 3, "--plan", "olss.toml",
        "--out", "fox.png",
    )  # fmt: skip
    assert Path("fox.png").exists()


# In place of more steps, and beside guidance rules.

ASKED = 6


def fewer(pipe, name, evaluations, **options):
    """Fitted to the pipeline's own run of 6 steps."""
    given = {"teacher_steps": ASKED, "teacher_order": 1, "evaluations": evaluations, **options}
    return calibrate_olss(pipe, calls(name, 1, ASKED), given).method


@pytest.mark.parametrize("name", ["flux_cfg", "sd15"])
@pytest.mark.parametrize("evaluations", [1, 3, ASKED])
def test_a_call_of_more_steps_is_answered_in_those_that_were_fitted(bench, name, evaluations):
    """And in all of them, fitted to what the stock solver does itself, the picture is stock's."""
    pipe = bench.pipe(name)
    method = fewer(pipe, name, evaluations)
    found, report = bench.under(name, Plan(method), steps=ASKED)
    assert report.steps == evaluations and found.isfinite().all()
    told = f"{evaluations} calibrated steps"
    assert f"{told} in place of {ASKED}" in str(report) or evaluations == ASKED
    if evaluations == ASKED and name == "flux_cfg":  # stock is Euler
        stock = bench.call(name, steps=ASKED)
        assert torch.allclose(found, stock, atol=1e-3 * float(stock.abs().max()))
    with (
        Plan(method).attach(pipe),
        pytest.raises(errors.BadInput, match=f"has 4 steps, and the numbers are for {ASKED}"),
    ):
        bench.call(name, steps=4)


def test_without_a_path_of_its_own_it_serves_as_many_steps_as_it_has():
    row = {"noise": (1.0,), "outputs": ((-1.0,),)}
    with pytest.raises(errors.BadInput, match="asked_sigmas has 3 numbers"):
        OLSSScheduler(**row, asked_sigmas=(1.0, 0.5, 0.0))
    OLSS(**row, asked_sigmas=(1.0, 0.0))
    OLSS(**row, asked_sigmas=(1.0, 0.5, 0.0), path_timesteps=(1.0,), path_sigmas=(1.0, 0.0))


def test_more_evaluations_than_steps_are_refused(bench):
    for evaluations, told in ((7, "7 evaluations for a call of 6"), (5, "at most the 4")):
        with pytest.raises(errors.BadInput, match=told):
            teacher = 4 if evaluations == 5 else 8
            fewer(bench.pipe("flux_cfg"), "flux_cfg", evaluations, teacher_steps=teacher)


def ends(bench, plan):
    """How far the end of a call lies from stock's."""
    (call,) = calls("flux_cfg", 1, ASKED)
    pipe, found = bench.pipe("flux_cfg"), []
    for one in (plan, Plan()):
        call["generator"] = torch.Generator().manual_seed(0)
        with one.attach(pipe):
            found.append(pipe(**call)[0].double())
    return float((found[0] - found[1]).norm() / found[1].norm())


def test_steps_that_are_fitted_beside_a_rule_make_up_for_what_it_leaves_out(bench, same):
    pipe, before = bench.pipe("flux_cfg"), bench.call("flux_cfg", steps=ASKED)
    fit = OLSS.fitter(pipe, [*calls("flux_cfg", 1, ASKED)])
    rule = Interval(low=1.0)
    alone, beside = fit([], {"evaluations": 4}), fit([rule], {"evaluations": 4})
    assert alone.path_timesteps == beside.path_timesteps and alone.rows != beside.rows
    assert ends(bench, Plan(rule, beside)) < ends(bench, Plan(rule, alone))
    assert ends(bench, Plan(alone)) < ends(bench, Plan(beside))
    assert same(bench.call("flux_cfg", steps=ASKED), before)


def test_long_runs_are_made_once_and_each_fit_costs_its_own_evaluations(bench):
    pipe, asked = bench.pipe("flux_cfg"), []
    handle = pipe.transformer.x_embedder.register_forward_pre_hook(lambda *_: asked.append(1))
    fit, rule = OLSS.fitter(pipe, [*calls("flux_cfg", 2, ASKED)]), Interval(low=1e6)
    counts = []
    for methods, evaluations in (([], 3), ([], 3), ([EasyCache()], 3), ([rule], 3), ([], 2)):
        fit(methods, {"evaluations": evaluations})
        counts.append(len(asked))
        asked.clear()
    handle.remove()
    assert counts == [2 * (ASKED + 3) * 2, 0, 0, 2 * (3 + 1), 2 * 2 * 2]  # σ/α is inf at first


@pytest.mark.parametrize("method", [DPMSolverPP(), Steps(share=0.5), Schedule(kind="arctan")])
def test_beside_another_sampler_nothing_is_fitted(bench, method):
    fit = OLSS.fitter(bench.pipe("flux_cfg"), [*calls("flux_cfg", 1, ASKED)])
    with pytest.raises(errors.Conflict, match=rf"samplers\.OLSS .* {re.escape(method.name)}"):
        fit([method], {"evaluations": 3})


@pytest.mark.parametrize("at", range(4))
def test_a_fit_that_breaks_leaves_no_trace(bench, same, at):
    """At the long run, and at each step of the short ones."""
    pipe, count = bench.pipe("flux_cfg"), iter(range(99))
    scheduler, before = pipe.scheduler, bench.call("flux_cfg", steps=ASKED)
    breaks = (0, ASKED * 2, ASKED * 2 + 1, ASKED * 2 + 5)[at]

    def broken(*_):
        if next(count) == breaks:
            raise RuntimeError("power cut")

    handle = pipe.transformer.x_embedder.register_forward_pre_hook(broken)
    try:
        with pytest.raises(RuntimeError, match="power cut"):
            OLSS.fitter(pipe, [*calls("flux_cfg", 1, ASKED)])([Interval()], {"evaluations": 3})
    finally:
        handle.remove()
    assert pipe.scheduler is scheduler and not hooks.in_place(pipe.transformer, "forward")
    assert same(bench.call("flux_cfg", steps=ASKED), before)
