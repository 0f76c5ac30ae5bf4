"""Schedules: closed forms, and `samplers.Schedule` on every kind of scheduler."""

import copy
import itertools
import json
import math
import re
from functools import cache
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from saved import Folders, done, run
from test_cli_calibrate import calls
from tiny import PIPELINES

import samplers
from accel import Plan, quality
from accel.errors import AccelWarning, BadInput, BadOutput, Conflict, UnsupportedModel
from accel.trajectory import Levels
from samplers import schedule_calibration
from samplers.prediction import vp_level
from samplers.schedule_calibration import calibrate_schedule
from samplers.schedule_method import Schedule, Searched
from samplers.schedule_teacher import traced_run, tracing
from samplers.schedules import ramps
from samplers.schedules.gits import straight
from samplers.schedules.tables import TABLES, align_your_steps

RAMPS = {
    "uniform_lambda": ramps.uniform_lambda,
    "polynomial": ramps.polynomial,
    "arctan": ramps.arctan,
    "sqrt_time": ramps.sqrt_time,
}
LIST = (math.inf, 4.0, 1.5, 0.5)
TABLE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}

# Closed forms.


@given(st.sampled_from(list(RAMPS)), st.integers(2, 30), st.floats(0.01, 5.0), st.booleans())
def test_a_ramp_falls_and_keeps_its_ends(kind, count, last, noise):
    first = math.inf if noise else 14.6
    levels = RAMPS[kind](count, first, last)
    assert (levels[0], levels[-1], len(levels)) == (first, last, count)
    assert (np.diff(levels) < 0).all()
    assert RAMPS[kind](1, first, last).tolist() == [first]


def test_each_ramp_is_even_in_its_own_measure():
    levels = {kind: ramp(9, 14.6, 0.03) for kind, ramp in RAMPS.items()}
    measures = {
        "uniform_lambda": np.log,
        "polynomial": lambda x: x ** (1 / 7),
        "arctan": np.arctan,
        "sqrt_time": lambda x: np.sqrt(x / (1 + x)),
    }
    for kind, measure in measures.items():
        steps = np.diff(measure(levels[kind]))
        assert steps == pytest.approx(steps[0])
    scaled = ramps.arctan(9, 14.6, 0.03, c=0.5)
    assert np.diff(np.arctan(scaled / 0.5), 2) == pytest.approx(0.0, abs=1e-12)


def solved(levels, c):
    """The end of first-order steps on N(0, c²), over the exact end: exactly ∏ cos Δθ."""
    x, chain = 1.0, [vp_level(level) for level in levels]
    for here, there in itertools.pairwise(chain):
        data = here.alpha * c**2 / (here.alpha**2 * c**2 + here.sigma**2) * x
        (x,) = straight(np.array([x]), np.array([data]), here, [there])[0]
    spread = [math.hypot(level.alpha * c, level.sigma) for level in (chain[0], chain[-1])]
    return x * spread[0] / spread[1]


@pytest.mark.parametrize("c", [0.5, 1.0])
@pytest.mark.parametrize("count", [1, 4, 10])
def test_the_error_of_the_arctan_ramp_is_the_closed_form(c, count):
    first, last = 80.0, 0.002
    angle = math.atan(first / c) - math.atan(last / c)
    levels = ramps.arctan(count + 1, first, last, c)
    assert 1 - solved(levels, c) == pytest.approx(ramps.arctan_error(count, angle), rel=1e-9)


@given(st.lists(st.floats(0.01, 70.0), min_size=5, max_size=5, unique=True))
def test_no_other_schedule_is_better_on_gaussian_data(inner):
    best = solved(ramps.arctan(7, 80.0, 0.002, 0.5), 0.5)
    assert solved([80.0, *sorted(inner, reverse=True), 0.002], 0.5) <= best + 1e-12


falling = st.lists(st.integers(1, 90_000), min_size=2, max_size=12, unique=True).map(
    lambda values: np.array(sorted(values, reverse=True)) / 1000
)


@given(falling, st.integers(2, 40), st.booleans())
def test_resampling_keeps_ends_and_falls(levels, count, noise):
    if noise:
        levels[0] = math.inf
    found = ramps.resample(levels, count)
    assert len(found) == count
    assert found[[0, -1]] == pytest.approx(levels[[0, -1]])
    assert (np.diff(found) < 0).all()
    assert ramps.resample(levels, len(levels)) == pytest.approx(levels)


def test_resampling_is_log_linear():
    assert ramps.resample(np.array([8.0, 2.0]), 3) == pytest.approx([8.0, 4.0, 2.0])
    found = ramps.resample(np.array([math.inf, 1.0]), 3)
    assert found == pytest.approx([math.inf, 3.0, 1.0])  # a flow's own σ: 1, 0.75, 0.5
    with pytest.raises(BadInput, match="one level"):
        ramps.resample(np.array([1.0]), 2)


@pytest.mark.parametrize("table", TABLES)
def test_align_your_steps_is_the_published_list(table):
    name = {"sd": "StableDiffusion", "sdxl": "StableDiffusionXL", "svd": "StableDiffusionVideo"}
    published = diffusers.schedulers.AysSchedules[name[table] + "Sigmas"]
    assert align_your_steps(table, 10) == pytest.approx(published[:10])
    for count in (5, 20):
        found = align_your_steps(table, count)
        assert (len(found), found[0]) == (count, pytest.approx(published[0]))
        assert (np.diff(found) < 0).all()


def test_pure_noise_must_count_as_more_than_the_end():
    with pytest.raises(BadInput, match="set noise"):
        ramps.uniform_lambda(4, math.inf, 0.5, noise=0.1)


# The method, asked as pipelines ask.


@cache
def built(name):
    return PIPELINES[name].build()


@pytest.fixture
def pipe(request):
    """A tiny pipeline with a scheduler of its own."""
    found = built(request.param)
    before = found.scheduler
    found.scheduler = copy.deepcopy(before)
    yield found
    found.scheduler = before


def asked(pipe, plan, *args, **kwargs):
    """The levels σ/α that a call of ``set_timesteps`` gives under a plan."""
    with plan.attach(pipe):
        pipe.scheduler.set_timesteps(*args, **kwargs)
        return levels_of(pipe.scheduler)


def levels_of(scheduler):
    levels = Levels(scheduler)
    return [levels.at(i)[0] for i in range(len(levels.timesteps))]


def listed(levels=LIST, **settings):
    return Schedule(kind="listed", levels=levels, **settings)


SDE = samplers.DPMSolverPP(eta=1.0)
SAMPLERS = (samplers.DPMSolverPP(), SDE, samplers.UniPC(), samplers.SASolver())
FLOW_CALLS = {
    "sd3": {"num_inference_steps": 4},
    "flux_cfg": {"sigmas": np.linspace(1.0, 0.25, 4), "mu": 0.8},
    "mochi": {"sigmas": [1.0, 0.8, 0.5, 0.2]},
}


@pytest.mark.parametrize("sampler", [None, *SAMPLERS], ids=str)
@pytest.mark.parametrize(("pipe", "call"), FLOW_CALLS.items(), indirect=["pipe"], ids=str)
def test_a_list_comes_out_as_it_is_whatever_the_shift(pipe, call, sampler):
    for config in ({}, {"shift": 3.0}, {"use_dynamic_shifting": True, "shift": 1.0}):
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **config)
        plan = Plan(*filter(None, [sampler]), listed())
        found = asked(pipe, plan, **{"mu": 0.8, **call})
        assert found == pytest.approx(LIST, rel=1e-5)


@pytest.mark.parametrize("pipe", ["qwenimage"], indirect=True)
def test_a_terminal_level_is_kept_or_the_list_refused(pipe):
    end = pipe.scheduler.config.shift_terminal
    ratio = end / (1 - end)
    call = {"sigmas": np.linspace(1.0, 0.25, 4), "mu": 0.9}
    for kind in ("arctan", "uniform_lambda", "polynomial", "logsnr"):
        found = asked(pipe, Plan(Schedule(kind=kind)), **call)
        assert (found[0], found[-1]) == (math.inf, pytest.approx(ratio, rel=1e-4))
    assert asked(pipe, Plan(listed((*LIST[:3], ratio))), **call) == pytest.approx(
        (*LIST[:3], ratio), rel=1e-4
    )
    with pytest.raises(UnsupportedModel, match=r"stretches every schedule to 0\.02"):
        asked(pipe, Plan(listed()), **call)


@pytest.mark.parametrize("pipe", ["cogview4"], indirect=True)
def test_a_network_that_is_told_the_level_before_the_shift_still_is(pipe):
    """CogView4 passes sigmas and timesteps, of which the first alone are shifted."""
    times = np.linspace(1000, 1, 4)
    call = {"sigmas": times / 1000, "timesteps": times, "mu": 0.7}
    pipe.scheduler.set_timesteps(**call)
    stock = dict(zip(levels_of(pipe.scheduler), pipe.scheduler.timesteps.tolist(), strict=True))
    found = asked(pipe, Plan(listed(tuple(stock))), **call)
    assert found == pytest.approx(list(stock), rel=1e-3)
    assert pipe.scheduler.timesteps.tolist() == pytest.approx(list(stock.values()), rel=1e-4)


VP_LIST = (14.6, 6.0, 2.0, 0.5)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
@pytest.mark.parametrize("pipe", ["sd15", "sd15_v"], indirect=True)
def test_a_list_comes_out_as_it_is_on_a_vp_model(pipe, sampler):
    assert asked(pipe, Plan(sampler, listed(VP_LIST)), 4) == pytest.approx(VP_LIST, rel=1e-5)
    noisiest = asked(pipe, Plan(sampler, listed()), 4)[0]
    assert noisiest == pytest.approx(Levels(pipe.scheduler).at(0)[0], rel=0.1) or noisiest > 1000


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("end", ["zero", "sigma_min"])
@pytest.mark.parametrize("pipe", ["sdxl"], indirect=True)
def test_euler_takes_levels_and_its_own_end(pipe, prediction, end):
    pipe.scheduler = diffusers.EulerDiscreteScheduler(
        **TABLE, prediction_type=prediction, final_sigmas_type=end
    )
    pipe.scheduler.set_timesteps(4)
    last = pipe.scheduler.sigmas[-1].item()
    assert asked(pipe, Plan(listed(VP_LIST)), 4) == pytest.approx(VP_LIST, rel=1e-5)
    assert pipe.scheduler.sigmas[-1].item() == pytest.approx(last)


@pytest.mark.parametrize("name", ["DPMSolverMultistep", "DPMSolverSinglestep", "DDPM"])
@pytest.mark.parametrize("pipe", ["sd15"], indirect=True)
def test_schedulers_of_whole_timesteps_take_the_nearest(pipe, name):
    kind = getattr(diffusers, f"{name}Scheduler")
    pipe.scheduler = kind(**TABLE)
    table = np.sqrt(1 / pipe.scheduler.alphas_cumprod.numpy() - 1)
    found = asked(pipe, Plan(listed(VP_LIST)), 4)
    nearest = [table[np.abs(np.log(table) - math.log(level)).argmin()] for level in VP_LIST]
    assert found == pytest.approx(nearest, rel=1e-3)
    with pytest.raises(BadInput, match="are both timestep"):
        asked(pipe, Plan(listed((6.0, 2.0, 1.9999, 0.5))), 4)


@pytest.mark.parametrize("pipe", ["wan22"], indirect=True)
def test_stock_unipc_takes_levels_of_a_flow(pipe):
    found = asked(pipe, Plan(listed()), 4)
    assert found[0] > 1e5
    assert found[1:] == pytest.approx(LIST[1:], rel=1e-5)


@pytest.mark.parametrize("kind", RAMPS)
@pytest.mark.parametrize(("pipe", "call"), FLOW_CALLS.items(), indirect=["pipe"], ids=str)
def test_closed_forms_have_the_ends_of_the_schedule_they_replace(pipe, call, kind):
    pipe.scheduler.set_timesteps(**call)
    stock = levels_of(pipe.scheduler)
    found = asked(pipe, Plan(Schedule(kind=kind)), **call)
    assert len(found) == len(stock)
    assert found[0] == stock[0] == math.inf
    if kind == "arctan":  # to the end of the run: the angle of the last evaluation is one step
        assert np.arctan(found) == pytest.approx(np.pi / 2 * np.linspace(1, 0, 5)[:-1], abs=1e-5)
    else:
        assert found[-1] == pytest.approx(stock[-1], rel=1e-4)


@pytest.mark.parametrize("pipe", ["sd15"], indirect=True)
def test_log_snr_runs_over_what_was_trained(pipe):
    found = asked(pipe, Plan(samplers.DPMSolverPP(), Schedule(kind="logsnr")), 7)
    table = np.sqrt(1 / pipe.scheduler.alphas_cumprod.numpy() - 1)
    assert found == pytest.approx(np.geomspace(table[-1], table[0], 7), rel=1e-4)


@pytest.mark.parametrize("pipe", ["sd15"], indirect=True)
def test_the_grid_of_deis_is_even_in_the_root_of_the_time_that_the_network_is_told(pipe):
    plan = Plan(samplers.DEIS(order=3), Schedule(kind="sqrt_time"))
    stock = asked(pipe, Plan(samplers.DEIS(order=3)), 7)
    found = asked(pipe, plan, 7)
    assert (found[0], found[-1]) == pytest.approx((stock[0], stock[-1]), rel=1e-4)
    table = np.sqrt(1 / pipe.scheduler.alphas_cumprod.double().numpy() - 1)
    times = np.interp(np.log(found), np.log(table), np.arange(1, 1001))
    assert np.diff(np.sqrt(times), 2) == pytest.approx(0.0, abs=1e-3)
    assert times[0] - times[1] > 2 * (times[-2] - times[-1]) > 20


@pytest.mark.parametrize("pipe", ["sd15"], indirect=True)
def test_align_your_steps_on_stable_diffusion(pipe):
    plan = Plan(samplers.DPMSolverPP(), Schedule(kind="ays"))
    assert asked(pipe, plan, 10) == pytest.approx(align_your_steps("sd", 10), rel=1e-3)
    assert len(asked(pipe, plan, 7)) == 7


@pytest.mark.parametrize("pipe", ["sd3"], indirect=True)
def test_another_number_of_steps_is_refused_or_interpolated(pipe):
    with pytest.raises(BadInput, match=r"a list of 4 levels, and the run asks for 10 steps"):
        asked(pipe, Plan(listed()), 10)
    found = asked(pipe, Plan(listed(interpolate=True)), 10)
    assert found == pytest.approx(ramps.resample(np.array(LIST), 10), rel=1e-4)
    assert asked(pipe, Plan(listed(interpolate=True)), 4) == pytest.approx(LIST, rel=1e-5)


REFUSED = {
    "sd15": (Schedule(), "DDIMScheduler takes none"),
    "svd": (Schedule(), "use_karras_sigmas of the EulerDiscreteScheduler"),
    "sana": (Schedule(), "for a flow DPMSolverMultistepScheduler takes none"),
    "flux_cfg": (Schedule(kind="ays"), "this pipeline is a flow"),
}


@pytest.mark.parametrize(("pipe", "method", "told"), [
    (name, *case) for name, case in REFUSED.items()
], indirect=["pipe"], ids=list(REFUSED))  # fmt: skip
def test_what_takes_no_list_is_refused_by_name(pipe, method, told):
    with pytest.raises(UnsupportedModel, match=told):
        Plan(method).attach(pipe)


@pytest.mark.parametrize("pipe", ["sd15"], indirect=True)
def test_levels_that_the_network_does_not_know_are_refused(pipe):
    plan = Plan(samplers.DPMSolverPP(), Schedule(kind="ays", table="svd"))
    with pytest.raises(BadInput, match=r"starts at σ/α = 700, .* nothing noisier than 14\.6"):
        asked(pipe, plan, 10)


@pytest.mark.parametrize("pipe", ["sd3"], indirect=True)
def test_a_sampler_with_levels_of_its_own_is_a_conflict(pipe):
    olss = samplers.OLSS(noise=(1.0,), outputs=((-1.0,),))
    with pytest.raises(Conflict, match=r"samplers\.OLSS .* samplers\.Schedule"):
        Plan(olss, Schedule()).attach(pipe)


def test_fields_that_contradict_are_refused():
    for settings, told in (
        ({"kind": "listed"}, "has 0 lists"),
        ({"levels": LIST}, "kind='arctan' has 1 lists"),
        ({"kind": "listed", "levels": LIST, "file": Path("a.json")}, "has 2 lists"),
        ({"kind": "listed", "levels": (1.0, 2.0)}, "must fall from noise to data"),
        ({"kind": "listed", "levels": (2.0, 0.0)}, "end of a run is not among them"),
        ({"kind": "listed", "levels": (2.0, math.inf)}, "the first may be inf"),
        ({"kind": "listed", "levels": (2.0, math.nan)}, "above 0"),
    ):
        with pytest.raises(ValueError, match=told):
            Schedule(**settings)


def test_a_list_with_pure_noise_survives_toml_and_json():
    plan = Plan(listed(), samplers.UniPC())
    assert Plan.from_toml(plan.to_toml()) == plan
    assert Plan.from_json(plan.to_json()) == plan
    assert Schedule.off().why_off() == "kind is own"


# In pipelines.


@pytest.mark.parametrize("name", ["sd3", "flux_cfg", "wan22", "flux_img2img"])
def test_a_run_follows_it_and_the_report_says_so(bench, same, name):
    pipe, seen = bench.pipe(name), []
    with Plan(Schedule()).attach(pipe) as attached:
        attached.trajectory.observers.append(lambda step, _: seen.append(step.sigma))
        output = bench.call(name, steps=4)
    expected = np.tan(np.pi / 2 * np.linspace(1, 0, 5)[:-1])[-len(seen) :]
    assert np.arctan(seen) == pytest.approx(np.arctan(expected), abs=1e-4)
    verdict = attached.report.verdicts["samplers.Schedule"]
    assert (verdict.state, "arctan, c 1" in verdict.detail) == ("ACTIVE", True)
    assert not same(output, bench.stock(name, steps=4))
    assert same(bench.call(name, steps=4), bench.stock(name, steps=4))


def test_the_pipelines_own_list_changes_nothing(bench):
    """The levels of the stock schedule, as a list: the same picture up to float32 levels."""
    pipe = bench.pipe("flux_cfg")
    stock = bench.call("flux_cfg", steps=4)
    plan = Plan(listed(tuple(levels_of(pipe.scheduler))))
    with plan.attach(pipe) as attached:
        found = bench.call("flux_cfg", steps=4)
    assert attached.report.verdicts["samplers.Schedule"].detail.startswith("a list of levels")
    assert torch.allclose(found, stock, atol=1e-3 * stock.abs().max().item())


# Calibration.

METHODS = {
    "gits": {},
    "ays": {},
    "oss": {},
    "autodiffusion": {"population": 3, "epochs": 1},
}


def searched(found):
    return Searched.model_validate(json.loads(found.files["file"]))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["sd15", "flux_cfg"])
def test_a_search_gives_levels_of_the_teacher(bench, same, name, method):
    pipe, scheduler = bench.pipe(name), bench.pipe(name).scheduler
    options = {"method": method, "teacher": 7, **METHODS[method]}
    found = calibrate_schedule(pipe, calls(name, 1, 3), options)
    schedule = searched(found)
    assert len(schedule.levels) == 3
    assert schedule.method == method
    assert found.beside == (samplers.DPMSolverPP(),)
    assert pipe.scheduler is scheduler
    with Plan(samplers.DPMSolverPP(), listed(schedule.levels)).attach(pipe):
        bench.call(name, steps=3)
    assert same(bench.call(name, steps=4), bench.stock(name, steps=4))


@pytest.mark.parametrize(("name", "told"), [
    ("sd15", "l2 of ratio, gamma 1.15"), ("flux_cfg", "l2 of sample, gamma 1,")
])  # fmt: skip
def test_gits_measures_as_fits_the_process(bench, name, told):
    found = calibrate_schedule(bench.pipe(name), calls(name, 1, 3), {"teacher": 5})
    assert told in found.note


@pytest.mark.parametrize(("asked", "told", "used"), [
    ({"metric": "dev"}, "dev of sample, gamma 1,", ("dev", "sample", 1.0)),
    ({"scale": "ratio"}, "l2 of ratio, gamma 1.15", ("l2", "ratio", 1.15)),
    ({"scale": "ratio", "gamma": 1.3}, "l2 of ratio, gamma 1.3", ("l2", "ratio", 1.3)),
    ({"gamma": 1.3}, "l2 of sample, gamma 1.3", ("l2", "sample", 1.3)),
], ids=str)  # fmt: skip
def test_gits_measures_as_it_is_asked_to(bench, monkeypatch, asked, told, used):
    """What the costs are made of, what they are summed up by, and what the note says."""
    seen = []
    costs, path = schedule_calibration.jump_costs, schedule_calibration.shortest

    def costing(levels, states, data, metric, scale):
        seen[:] = [metric, scale]
        return costs(levels, states, data, metric, scale)

    def choosing(cost, count, gamma):
        seen.append(gamma)
        return path(cost, count, gamma)

    monkeypatch.setattr(schedule_calibration, "jump_costs", costing)
    monkeypatch.setattr(schedule_calibration, "shortest", choosing)
    found = calibrate_schedule(
        bench.pipe("flux_cfg"), calls("flux_cfg", 1, 3), {"teacher": 6, **asked}
    )
    assert tuple(seen) == used
    assert told in found.note


@pytest.mark.parametrize("name", ["sd15", "flux_cfg", "qwenimage"])
def test_a_teacher_on_the_polynomial_grid_has_its_levels(bench, name):
    """Even in (σ/α)^(1/7) between the ends of the pipeline's schedule, which stay."""
    pipe = bench.pipe(name)
    (call,) = calls(name, 1, 3)
    with tracing(pipe) as traced:
        own = traced_run(traced, call, 6).ratios
    with tracing(pipe, "polynomial") as traced:
        found = traced_run(traced, call, 6).ratios
    assert (found[0], found[-1]) == pytest.approx((own[0], own[-1]), rel=1e-3)
    inner = found[1:] ** (1 / 7)  # the first of a flow counts as 20
    assert np.diff(inner) == pytest.approx(np.diff(inner)[0] * np.ones(4), rel=1e-3)
    options = {"teacher": 6, "grid": "polynomial"}
    chosen = searched(calibrate_schedule(pipe, [call], options)).levels
    assert all(np.isclose(found, level, rtol=1e-4).any() for level in chosen)
    assert chosen[0] == pytest.approx(own[0])


def test_the_authors_descent_of_align_your_steps_is_offered(bench, monkeypatch):
    """It may stop above the optimum, and says how far; the optimum is the default."""
    objectives, descents, whole = {}, [], schedule_calibration.descend_finer

    def watched(cost, jumps):
        descents.append(jumps)
        return whole(cost, jumps)

    monkeypatch.setattr(schedule_calibration, "descend_finer", watched)
    for optimum in ("exact", "descent"):
        note = calibrate_schedule(
            bench.pipe("flux_cfg"),
            calls("flux_cfg", 1, 4),
            {"method": "ays", "teacher": 12, "optimum": optimum},
        ).note
        objectives[optimum] = [float(x) for x in re.findall(r"0\.\d{3}", note)]
    assert objectives["exact"][0] == objectives["exact"][1] == objectives["descent"][1]
    assert objectives["descent"][1] <= objectives["descent"][0] <= 1.0
    assert descents == [4]


@pytest.mark.parametrize(("sampler", "beside"), [("UniPC", (samplers.UniPC(),)), ("own", ())])
def test_a_schedule_is_searched_for_the_sampler_that_is_asked_for(
    bench, monkeypatch, sampler, beside
):
    """AutoDiffusion tries it with that one; the plan has it beside."""
    pipe, tried = bench.pipe("flux_cfg"), set()
    final = schedule_calibration._final

    def watched(pipe, call):
        tried.add(type(pipe.scheduler).__name__)
        return final(pipe, call)

    monkeypatch.setattr(schedule_calibration, "_final", watched)
    options = {"method": "autodiffusion", "teacher": 5, "population": 2, "epochs": 0}
    found = calibrate_schedule(pipe, calls("flux_cfg", 1, 3), {**options, "sampler": sampler})
    kind = type(pipe.scheduler).__name__ if sampler == "own" else "UniPCScheduler"
    assert tried == {kind}
    assert found.beside == beside
    assert searched(found).sampler == (kind if sampler == "own" else "samplers.UniPC")


def test_autodiffusion_can_judge_the_pictures(bench, monkeypatch):
    """The schedule that is chosen is the one whose pictures are nearest to the teacher's."""
    judged = []
    whole = quality.perceptual

    def watched(made, goal):
        judged.append((whole(made, goal), made.shape))
        return judged[-1][0]

    monkeypatch.setattr(quality, "perceptual", watched)
    options = {"method": "autodiffusion", "teacher": 6, "population": 4, "epochs": 0}
    found = calibrate_schedule(
        bench.pipe("flux_cfg"), calls("flux_cfg", 1, 3), {**options, "fitness": "perceptual"}
    )
    distances = [distance for distance, _ in judged]
    assert len(distances) == 4 and len(set(distances)) == 4
    assert all(len(shape) == 4 and shape[-1] == 3 for _, shape in judged)
    (call,) = calls("flux_cfg", 1, 3)
    pipe = bench.pipe("flux_cfg")
    with tracing(pipe):
        goal = pipe(**{**call, "num_inference_steps": 6, "output_type": "np"})[0]
    (call,) = calls("flux_cfg", 1, 3)
    with Plan(samplers.DPMSolverPP(), listed(searched(found).levels)).attach(pipe):
        made = pipe(**{**call, "output_type": "np"})[0]
    assert whole(made, goal) == pytest.approx(min(distances), rel=1e-4)


def test_the_terminal_level_is_in_every_searched_schedule(bench):
    pipe = bench.pipe("qwenimage")
    end = pipe.scheduler.config.shift_terminal
    for method, options in METHODS.items():
        found = calibrate_schedule(
            pipe, calls("qwenimage", 1, 3), {"method": method, "teacher": 6, **options}
        )
        assert searched(found).levels[-1] == pytest.approx(end / (1 - end), rel=1e-4)


def counted(pipe, options):
    """How often a search asks the network."""
    asked = []
    handle = pipe.transformer.register_forward_pre_hook(lambda *_: asked.append(1))
    try:
        calibrate_schedule(pipe, calls("sd3", 2, 3), {"teacher": 6, **options})
    finally:
        handle.remove()
    return len(asked)


def test_each_search_evaluates_as_often_as_it_says(bench):
    pipe = bench.pipe("sd3")
    assert counted(pipe, {"method": "gits"}) == 2 * 6
    assert counted(pipe, {"method": "ays"}) == 2 * 2 * 6
    assert counted(pipe, {"method": "oss"}) == 2 * 3 * 6
    options = {"method": "autodiffusion", "population": 3, "epochs": 0}
    assert counted(pipe, options) == 2 * (6 + 3 * 3)


def test_a_search_leaves_generators_as_they_were_and_repeats_itself(bench):
    (call,) = calls("flux_cfg", 1, 3)
    before = call["generator"].get_state()
    files = [
        calibrate_schedule(bench.pipe("flux_cfg"), [call], {"method": m, "teacher": 6}).files
        for m in ("ays", "ays")
    ]
    assert files[0] == files[1]
    assert torch.equal(call["generator"].get_state(), before)


def test_what_cannot_be_searched_is_refused(bench):
    pipe = bench.pipe("flux_cfg")
    with pytest.raises(BadInput, match="at least one prompt"):
        calibrate_schedule(pipe, [], {})
    with pytest.raises(BadInput, match="give --steps"):
        calibrate_schedule(pipe, [{"prompt": "x"}], {})
    with pytest.raises(BadInput, match="8 steps cannot be chosen among 8"):
        calibrate_schedule(pipe, calls("flux_cfg", 1, 8), {"teacher": 8})
    with pytest.raises(UnsupportedModel, match="DDIMScheduler takes none"):
        calibrate_schedule(bench.pipe("sd15"), calls("sd15", 1, 3), {"sampler": "own"})
    with pytest.raises(UnsupportedModel, match="starts in the middle"):
        calibrate_schedule(bench.pipe("flux_img2img"), calls("flux_img2img", 1, 3), {"teacher": 6})
    weight = pipe.transformer.x_embedder.weight
    kept = weight.data.clone()
    weight.data.fill_(math.nan)
    with pytest.raises(BadOutput, match="nothing to calibrate"):
        calibrate_schedule(pipe, calls("flux_cfg", 1, 3), {"teacher": 6})
    weight.data.copy_(kept)


def test_a_file_serves_its_model_and_no_other(bench, tmp_path):
    found = calibrate_schedule(bench.pipe("flux_cfg"), calls("flux_cfg", 1, 3), {"teacher": 6})
    path = tmp_path / "a.json"
    path.write_bytes(found.files["file"])
    assert Searched.read(path) == searched(found)
    plan = Plan(Schedule(kind="listed", file=path))
    with plan.attach(bench.pipe("flux_cfg")) as attached:
        bench.call("flux_cfg", steps=3)
    assert "a.json" in attached.report.verdicts["samplers.Schedule"].detail
    with plan.attach(bench.pipe("flux_cfg")), pytest.warns(AccelWarning, match="was|were searched"):
        bench.call("flux_cfg", steps=3, guidance=False)
    with pytest.raises(UnsupportedModel, match="another network"):
        plan.attach(bench.pipe("sd3"))
    for content, told in ((b"{}", "holds no schedule"), (b"\xff", "holds no schedule")):
        path.write_bytes(content)
        with pytest.raises(BadInput, match=told):
            plan.attach(bench.pipe("flux_cfg"))
    path.unlink()
    with pytest.raises(BadInput, match="cannot be read"):
        plan.attach(bench.pipe("flux_cfg"))


def test_the_command_writes_a_list_and_a_plan_that_is_used(tmp_path_factory, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    models = Folders(tmp_path_factory.getbasetemp() / "saved-models")
    folder = models("flux_cfg")
    result = done(
        "calibrate", "schedule", "--model", folder, "--method", "gits", "--steps", 4, "--count", 1,
        "--set", "teacher=8", "--out", "plan.toml",
    )  # fmt: skip
    assert result.stdout.splitlines() == ["plan.toml", "plan-levels.json"]
    methods = {method.name: method for method in Plan.from_toml(Path("plan.toml").read_text())}
    assert set(methods) == {"samplers.DPMSolverPP", "samplers.Schedule"}
    assert methods["samplers.Schedule"].file == Path("plan-levels.json")
    assert len(Searched.read(Path("plan-levels.json")).levels) == 4
    generate = ("generate", "a fox", "--model", folder, "--seed", 1, "--plan", "plan.toml")
    made = done(*generate, "--steps", 4, "--out", "fox.png")
    assert made.stderr.count("ACTIVE") == 2 and "INACTIVE" not in made.stderr
    refused = run(*generate, "--steps", 5, "--out", "b.png")
    assert refused.exit_code == 2 and "a list of 4 levels" in refused.stderr
    assert run("calibrate", "schedule", "--method", "magic").exit_code == 2


@pytest.mark.parametrize("method", ["ays", "oss", "autodiffusion"])
def test_every_search_is_offered_by_the_command(tmp_path_factory, tmp_path, monkeypatch, method):
    monkeypatch.chdir(tmp_path)
    models = Folders(tmp_path_factory.getbasetemp() / "saved-models")
    settings = {"teacher": 4, **METHODS[method]}
    sets = [part for item in settings.items() for part in ("--set", "{}={}".format(*item))]
    result = done(
        "calibrate", "schedule", "--model", models("flux_cfg"), "--method", method, "--steps", 3,
        "--count", 1, *sets, "--out", "plan.toml",
    )  # fmt: skip
    assert result.stdout.splitlines() == ["plan.toml", "plan-levels.json"]
    written = Searched.read(Path("plan-levels.json"))
    assert (written.method, len(written.levels)) == (method, 3)
    assert f"{method}, 3 steps of 4" in Path("plan.toml").read_text()
