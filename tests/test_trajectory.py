"""Where a run is: the right index, total and noise level on every scheduler and pipeline."""

import copy
import math
from typing import ClassVar

import diffusers
import pytest
import torch
from roster import CI, pipelines
from tiny import PIPELINES

from accel import Plan, cache, errors, guidance
from accel.trajectory import Trajectory


def followed(pipe):
    """The steps of the runs that follow."""
    steps = []
    trajectory = Trajectory(pipe, lambda scheduled: scheduled)
    trajectory.attach()
    trajectory.observers.append(lambda step, _: steps.append(step))
    return steps


class Watch(guidance.Interval):
    """A method that notes each step."""

    name = "guidance.Watch"

    def attach(self, site):
        self.noted.clear()
        yield site.on_step(lambda step, _: self.noted.append(step))


@pytest.fixture
def watch():
    """A method that lists the steps of a run in ``watch.noted``."""

    class Fresh(Watch):
        noted: ClassVar[list] = []

    return Fresh()


# Noise levels: σ/α as the scheduler itself adds noise, which no formula of ours is behind.

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
NOISERS = {
    "ddim": lambda: diffusers.DDIMScheduler(**SD, steps_offset=1),
    "ddim trailing": lambda: diffusers.DDIMScheduler(**SD, timestep_spacing="trailing"),
    "pndm": lambda: diffusers.PNDMScheduler(**SD, skip_prk_steps=True, steps_offset=1),
    "euler": lambda: diffusers.EulerDiscreteScheduler(**SD),
    "euler a": lambda: diffusers.EulerAncestralDiscreteScheduler(**SD),
    "euler karras": lambda: diffusers.EulerDiscreteScheduler(**SD, use_karras_sigmas=True),
    "lcm": lambda: diffusers.LCMScheduler(**SD),
    "dpm++": lambda: diffusers.DPMSolverMultistepScheduler(**SD),
    "dpm++ karras": lambda: diffusers.DPMSolverMultistepScheduler(**SD, use_karras_sigmas=True),
    "unipc": lambda: diffusers.UniPCMultistepScheduler(**SD),
    "heun": lambda: diffusers.HeunDiscreteScheduler(**SD),
    "flow": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    "flow heun": lambda: diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0),
    "flow dpm++": lambda: diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    ),
    "flow unipc": lambda: diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    ),
}


def added(scheduler, index):
    """σ/α of the noise that a fresh scheduler adds for its timestep at an index."""
    scheduler.set_timesteps(7)
    at = scheduler.timesteps[index : index + 1]
    one, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    if hasattr(scheduler, "add_noise"):
        return (scheduler.add_noise(zero, one, at) / scheduler.add_noise(one, zero, at)).item()
    return (scheduler.scale_noise(zero, at, one) / scheduler.scale_noise(one, at, zero)).item()


class Holder:
    """A pipeline to the trajectory: something with a scheduler."""

    def __init__(self, scheduler):
        self.scheduler = scheduler


@pytest.mark.parametrize("build", NOISERS.values(), ids=NOISERS)
def test_sigma_is_the_noise_that_the_scheduler_adds(build):
    holder = Holder(build())
    steps = followed(holder)
    holder.scheduler.set_timesteps(7)
    x = torch.zeros(1, 4, 2, 2)
    for timestep in holder.scheduler.timesteps:
        holder.scheduler.step(torch.zeros_like(x), timestep, x)
    assert len(steps) == len(holder.scheduler.timesteps)
    for index, step in enumerate(steps):
        expected = added(build(), index)
        assert step.sigma == pytest.approx(expected, rel=2e-3) or step.sigma > 1e3 < expected
        assert step.index == step.position == index
        sigma, alpha, noise = step.level
        assert math.isinf(sigma) or noise == pytest.approx(sigma * alpha, rel=1e-6)


def steps_of(bench, name, watch, **call):
    run = Plan(watch).attach(bench.pipe(name))
    bench.call(name, **call)
    run.detach()
    return watch.noted


@pipelines(CI)
def test_sigma_falls_and_the_last_step_is_the_last(bench, watch, name):
    steps = steps_of(bench, name, watch, steps=6)
    sigmas = [step.sigma for step in steps]
    assert sigmas == sorted({*sigmas}, reverse=True)
    times = [step.time for step in steps]
    assert times == sorted({*times})
    assert [step.index for step in steps] == list(range(len(steps)))
    assert [step.last for step in steps] == [False] * (len(steps) - 1) + [True]
    assert {step.total for step in steps} == {len(steps)}


# Truncated schedules.

STRENGTHS = [0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("name", ["flux_img2img", "sd_img2img"])
def test_img2img_runs_the_end_of_the_schedule(bench, watch, name, strength):
    steps = steps_of(bench, name, watch, steps=8, strength=strength)
    run = int(8 * strength)
    assert [step.position for step in steps] == list(range(8 - run, 8))
    assert [step.index for step in steps] == list(range(run))
    assert {step.total for step in steps} == {run}
    assert steps[-1].last


SWAPS = {
    "ddim, no set_begin_index": (diffusers.DDIMScheduler, 4),
    "dpm++ multistep": (diffusers.DPMSolverMultistepScheduler, 4),
    "euler": (diffusers.EulerDiscreteScheduler, 4),
    "pndm, one more": (diffusers.PNDMScheduler, 5),
    "heun, two each": (diffusers.HeunDiscreteScheduler, 7),
    "lcm": (diffusers.LCMScheduler, 4),
}


@pytest.mark.parametrize(("kind", "count"), SWAPS.values(), ids=SWAPS)
def test_img2img_with_any_scheduler(watch, kind, count):
    tiny = PIPELINES["sd_img2img"]
    pipe = tiny.build()
    pipe.scheduler = kind.from_config(pipe.scheduler.config | {"skip_prk_steps": True})
    run = Plan(watch).attach(pipe)
    tiny.call(pipe, steps=8, strength=0.5)
    run.detach()
    steps = watch.noted
    assert len(steps) == run.report.calls == count
    assert {step.total for step in steps} == {count}
    whole = len(pipe.scheduler.timesteps)
    assert [step.position for step in steps] == list(range(whole - count, whole))


@pytest.mark.parametrize(("kind", "_"), SWAPS.values(), ids=SWAPS)
def test_a_cache_on_any_scheduler(kind, _):
    """One evaluation a step or two, one more than asked or not: guards hold to the last."""
    tiny = PIPELINES["sd15"]
    pipe = tiny.build()
    pipe.scheduler = kind.from_config(pipe.scheduler.config | {"skip_prk_steps": True})
    method = cache.EasyCache(threshold=1e9, warmup=3)
    with Plan(method).attach(pipe) as run:
        tiny.call(pipe, steps=5)
        events = run.report.to_dict()["events"][method.name]
    total = run.report.steps
    assert total == {diffusers.HeunDiscreteScheduler: 9, diffusers.PNDMScheduler: 6}.get(kind, 5)
    computed = {step for step, *_, state in events if state == "computed"}
    heun = {0, 1, 2, 3, 4, 5, 7, 8}  # three steps of both stages, and the last of each stage
    assert computed == (heun if kind is diffusers.HeunDiscreteScheduler else {0, 1, 2, total - 1})


def test_a_cut_that_no_call_shows_is_refused_where_the_end_matters():
    """SDXL's `denoising_end` leaves out the end of the schedule."""
    tiny = PIPELINES["sdxl"]
    pipe = tiny.build()
    method = cache.EasyCache(threshold=1e9, warmup=2)
    with Plan(method).attach(pipe) as run:
        tiny.call(pipe, steps=8, denoising_end=0.6)
    computed = {
        s for s, *_, state in run.report.to_dict()["events"][method.name] if state == "computed"
    }
    assert run.report.steps < 8
    assert computed == {0, 1, run.report.steps - 1}


# What users do to schedulers.


@pytest.mark.parametrize("name", ["sd15", "flux_cfg"])
def test_a_scheduler_replaced_under_a_plan_is_an_error(bench, same, name):
    pipe = bench.pipe(name)
    before = pipe.scheduler
    with Plan(cache.EasyCache(threshold=1e9)).attach(pipe):
        pipe.scheduler = type(before).from_config(before.config)
        with pytest.raises(errors.BrokenAttachment, match=r"pipe\.scheduler was replaced by"):
            bench.call(name, steps=4)
        pipe.scheduler = before
    assert same(bench.call(name, steps=4), bench.stock(name, steps=4))


def test_a_scheduler_replaced_in_the_middle_of_a_run_is_an_error(bench):
    pipe = bench.pipe("sd15")
    before = pipe.scheduler

    def replace(pipe, index, timestep, state):
        pipe.scheduler = type(before).from_config(before.config)
        return state

    with (
        pytest.raises(errors.BrokenAttachment, match="replaced"),
        Plan(cache.EasyCache(threshold=1e9)).attach(pipe),
    ):
        bench.call("sd15", steps=4, callback_on_step_end=replace)
    pipe.scheduler = before


@pytest.mark.parametrize("name", ["sd15", "flux_cfg", "wan21"])
def test_a_deep_copy_of_a_followed_scheduler_is_plain(bench, name):
    pipe = bench.pipe(name)
    with Plan(cache.EasyCache(threshold=1e9, warmup=2)).attach(pipe) as run:
        twin = copy.deepcopy(pipe.scheduler)
        assert twin.step.__func__ is type(twin).step
        reached = run.report.steps
        twin.set_timesteps(3, **({"mu": 0.5} if twin.config.get("use_dynamic_shifting") else {}))
        x = torch.zeros(1, 4, 4, 4)
        twin.step(x, twin.timesteps[0], x)
        assert run.report.steps == reached
        bench.call(name, steps=5)
        assert run.report.steps == 5


def test_calls_outside_of_a_run_are_left_alone(bench):
    pipe = bench.pipe("sd15")
    x, text = torch.randn(1, 4, 16, 16), torch.randn(1, 77, 32)
    plain = pipe.unet(x, 10, text).sample
    with Plan(cache.EasyCache(threshold=1e9, warmup=2)).attach(pipe) as run:
        assert torch.equal(pipe.unet(x, 10, text).sample, plain)
        bench.call("sd15", steps=5)
        nfe = run.report.nfe
        assert torch.equal(pipe.unet(x, 10, text).sample, plain)
        assert run.report.nfe == nfe
