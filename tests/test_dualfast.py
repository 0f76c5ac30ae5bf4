"""DualFast: the closed form of its steps, its order, and when it leaves a sample alone."""

import math
from contextlib import nullcontext
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from test_trajectory import Holder
from tiny import PIPELINES
from toy import END, START, mixture_data, mixture_path

import accel
import samplers
from accel import cache, guidance
from accel.errors import Conflict, UnsupportedModel
from accel.report import Tally
from accel.trajectory import Trajectory
from samplers import (
    DEISScheduler,
    DPMSolverPPScheduler,
    DualFast,
    PseudoCorrectorScheduler,
    UniPCScheduler,
)

TABLE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
FLOW = {"prediction_type": "flow_prediction"}
OURS = {
    "dpm++ 1": lambda **s: DPMSolverPPScheduler(order=1, **s),
    "dpm++ 2": lambda **s: DPMSolverPPScheduler(order=2, **s),
    "dpm++ 3": lambda **s: DPMSolverPPScheduler(order=3, **s),
    "deis 3": lambda **s: DEISScheduler(order=3, **s),
    "unip 2": lambda **s: UniPCScheduler(order=2, corrector=False, **s),
}


def noise(shape=(2, 4, 8, 8), seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def network(x, position):
    return torch.tanh(x.roll(1, -1) * 0.8 + 0.1 * position)


class Beside:
    """A scheduler with the method on it, as a plan would have it, and no pipeline."""

    def __init__(self, scheduler, method):
        self.scheduler = scheduler
        self.trajectory = Trajectory(Holder(scheduler), lambda scheduled: scheduled)
        self.trajectory.attach()
        self.tally = Tally(method.name)
        site = SimpleNamespace(
            pipe=SimpleNamespace(scheduler=scheduler),
            tally=self.tally,
            claim=lambda seam: None,
            beside=lambda seam: nullcontext(),
            on_start=self.trajectory.starts.append,
            edit_step=lambda editor: self.trajectory.edit(1, editor),
            edit_result=self.trajectory.revisers.append,
        )
        list(method.attach(site))

    def run(self, x, predict=network, steps=None, computed=lambda i, row: {"cond": True}):
        """The samples at all levels; ``computed`` says of branches whether they were."""
        path = [x]
        for i, t in enumerate(self.scheduler.timesteps[:steps]):
            for row in range(len(x)):
                for branch, fresh in computed(i, row).items():
                    self.trajectory.answered(row, branch, fresh)
            x = self.scheduler.step(predict(x, i), t, x).prev_sample
            path.append(x)
        return path


def beside(scheduler, count=8, **settings):
    run = Beside(scheduler, DualFast(**settings))
    scheduler.set_timesteps(count)
    return run


def plain(scheduler, x, count=8):
    scheduler.set_timesteps(count)
    path = [x]
    for i, t in enumerate(scheduler.timesteps):
        path.append(scheduler.step(network(path[-1], i), t, path[-1]).prev_sample)
    return path


# Order


def on_the_toy(count, **settings):
    """The error after ``count`` steps of DDIM over the toy's range, uniform in λ."""
    scheduler = DEISScheduler(order=1)
    run = Beside(scheduler, DualFast(ramp="none", **settings))
    scheduler.set_timesteps(sigmas=np.exp(-np.linspace(START, END, count + 1)))
    exact = mixture_path("vp")

    def predict(x, i):
        level = scheduler._levels[i]
        values = x[0].numpy()
        return torch.tensor((values - level.alpha * mixture_data(values, level)) / level.sigma)[
            None
        ]

    end = run.run(torch.tensor(exact[0])[None], predict, steps=count)[-1]
    return float(np.sqrt(np.mean((end[0].numpy() - exact[-1]) ** 2)))


def observed(errors, counts):
    return -np.polyfit(np.log(counts), np.log(errors), 1)[0]


@pytest.mark.parametrize("target", ["first_order_term", "all"])
def test_half_a_change_makes_ddim_of_second_order(target):
    counts = (20, 40, 80, 160)
    errors = [on_the_toy(count, c=0.5, target=target) for count in counts]
    assert observed(errors, counts) == pytest.approx(2.0, abs=0.12)
    errors = [on_the_toy(count, c=0.25, target=target) for count in counts]
    assert observed(errors, counts) == pytest.approx(1.0, abs=0.12)


def test_errors_of_ten_steps():
    """Those that were measured before this was written, on 64 other points of the same problem."""
    ddim, quarter, half = (on_the_toy(10, c=c) for c in (1e-9, 0.25, 0.5))
    assert [ddim, quarter, half] == pytest.approx([0.158, 0.090, 0.028], abs=0.006)


def test_with_the_first_step_the_error_stays():
    errors = [on_the_toy(count, c=0.25, reference="first") for count in (40, 160)]
    assert errors[1] > 0.5 * errors[0] > 0.01


# The closed form


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample", "flow_prediction"])
@pytest.mark.parametrize("build", OURS.values(), ids=OURS)
def test_only_the_first_order_term_changes(build, prediction):
    """x_t = a·x + Σ_k b_k·p_k with p̂ − p added Σ_k b_k times: the differences stay."""
    scheduler = build(prediction_type=prediction)
    run = beside(scheduler, c=0.4, ramp="none")
    x, older, latest = noise(dtype=torch.float64), None, {}

    def predict(x, i):
        latest.update(x=x, output=network(x, i))
        return latest["output"]

    path = [x]
    for i, t in enumerate(scheduler.timesteps):
        x = path[-1]
        run.trajectory.answered(0, "cond", True)
        path.append(scheduler.step(predict(x, i), t, x).prev_sample)
        level, after = scheduler._levels[i], scheduler._levels[i + 1]
        eps = scheduler._conversion.noise(latest["output"], x, level)
        if not level.alpha:
            older = eps
            continue
        expected = scheduler._choices[i][
            min(len(scheduler.history), len(scheduler._choices[i])) - 1
        ].apply(x, scheduler.history)
        if older is not None:
            hat = eps + 0.4 * (eps - older)
            clean = [(x - level.sigma * e) / level.alpha for e in (hat, eps)]
            gain = after.alpha - after.sigma * level.alpha / level.sigma  # α_t(1 − e^{−h})
            expected = expected + gain * (clean[0] - clean[1])
        assert torch.allclose(path[-1], expected, atol=2e-5 * (1 + expected.abs().max()))
        older = eps


@pytest.mark.parametrize("settings", [TABLE, FLOW], ids=["vp", "flow"])
@pytest.mark.parametrize("build", OURS.values(), ids=OURS)
def test_all_terms_are_those_of_the_extrapolated_noise(build, settings):
    """The same as giving the scheduler the output of a network that predicts ê."""
    x, kept = noise(), []
    by_hand = build(**settings)
    by_hand.set_timesteps(8)

    def extrapolated(x, i):
        output, level = network(x, i), by_hand._levels[i]
        eps = by_hand._conversion.noise(output, x, level)
        hat = eps + 0.4 * (eps - kept[-1]) if kept else eps
        kept.append(eps)
        if i == 0:
            return output
        return hat if settings is TABLE else (hat - x) / level.alpha

    for i, t in enumerate(by_hand.timesteps):
        x = by_hand.step(extrapolated(x, i), t, x).prev_sample
    end = beside(build(**settings), c=0.4, ramp="none", target="all").run(noise())[-1]
    assert torch.allclose(end, x, atol=2e-4 * (1 + x.abs().max()))


@pytest.mark.parametrize(
    "stock",
    [
        diffusers.DDIMScheduler(**TABLE, clip_sample=False),
        diffusers.EulerDiscreteScheduler(**TABLE),
        diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_of_a_solver_of_first_order_the_term_is_all_there_is(stock):
    x = noise() * (14.0 if "EulerD" in type(stock).__name__[:6] else 1.0)
    ends = []
    for target in ("first_order_term", "all"):
        run = beside(stock, c=0.4, target=target)
        ends.append(run.run(x)[-1])
        run.trajectory.editors.clear()
        run.trajectory.revisers.clear()
    assert torch.equal(*ends)
    assert not torch.equal(ends[0], plain(stock, x)[-1])


@pytest.mark.parametrize("target", ["first_order_term", "all"])
@pytest.mark.parametrize("settings", [TABLE, FLOW], ids=["vp", "flow"])
def test_before_and_behind_the_step_are_the_same_in_first_order(target, settings):
    scheduler = DPMSolverPPScheduler(order=1, **settings)
    reference = DEISScheduler(order=1, **settings)
    ends = [
        beside(scheduler, c=0.4, target=target).run(noise())[-1],
        beside(reference, c=0.4, target="all").run(noise())[-1],
    ]
    assert torch.allclose(*ends, atol=1e-4 * (1 + ends[0].abs().max()))


def test_a_stock_multistep_solver_does_what_ours_does():
    stock = diffusers.DPMSolverMultistepScheduler(**TABLE)
    ours = DPMSolverPPScheduler.from_config(stock.config)
    for target in ("first_order_term", "all"):
        ends = [
            beside(scheduler, 10, c=0.4, target=target).run(noise())[-1]
            for scheduler in (diffusers.DPMSolverMultistepScheduler(**TABLE), ours)
        ]
        assert torch.allclose(*ends, atol=1e-4 * (1 + ends[0].abs().max()))
        ours = DPMSolverPPScheduler.from_config(stock.config)


def test_samples_over_their_signal_are_changed_in_their_units():
    """LMS of first order, whose sample is x/α, is DDIM."""
    lms = diffusers.LMSDiscreteScheduler(**TABLE)
    ddim = DEISScheduler(order=1, **TABLE)
    runs = [Beside(scheduler, DualFast(c=0.4)) for scheduler in (lms, ddim)]
    lms.set_timesteps(8)
    ddim.set_timesteps(sigmas=lms.sigmas[:-1].tolist())
    x = noise()
    over = x / ddim._levels[0].alpha
    for i in range(8):
        output = network(x, i)
        lms.scale_model_input(over, lms.timesteps[i])
        for run in runs:
            run.trajectory.answered(0, "cond", True)
        over = lms.step(output, lms.timesteps[i], over, order=1).prev_sample
        x = ddim.step(output, ddim.timesteps[i], x).prev_sample
        assert torch.allclose(over * ddim._levels[i + 1].alpha, x, atol=1e-4)
    assert "7 steps" in runs[0].tally.change


@pytest.mark.parametrize("build", [UniPCScheduler, PseudoCorrectorScheduler])
def test_a_corrector_of_ours_keeps_the_change(build):
    """The correction is a sum of predictions, added to the sample as it is."""
    spared, changed = (build(**TABLE) for _ in range(2))
    spared.set_timesteps(8)
    run = beside(changed, c=0.4, ramp="none")
    x, outputs = noise(), [noise(seed=i) for i in range(3)]
    for i in range(2):
        run.trajectory.answered(0, "cond", True)
        ends = [s.step(outputs[i], s.timesteps[i], x).prev_sample for s in (spared, changed)]
        x = ends[0]
    change = ends[1] - ends[0]
    assert change.abs().max() > 1e-3
    run.trajectory.revisers.clear()
    last = [
        s.step(outputs[2], s.timesteps[2], end).prev_sample
        for s, end in zip((spared, changed), ends, strict=True)
    ]
    here, there = spared._levels[2:4]
    share = there.sigma / here.sigma if build is UniPCScheduler else there.alpha / here.alpha
    difference = last[1] - last[0]
    if build is PseudoCorrectorScheduler:  # its predictions of ε do not depend on the sample
        assert torch.allclose(difference, share * change, atol=1e-4)
    else:
        assert (difference - share * change).abs().max() < difference.abs().max()


# When


def test_c_rises_from_the_first_step_to_the_last():
    runs = {
        ramp: beside(DPMSolverPPScheduler(order=1, **TABLE), c=0.4, ramp=ramp)
        for ramp in ("linear", "none")
    }
    outputs = [noise(seed=i) for i in range(8)]
    paths = {}
    for ramp, run in runs.items():
        paths[ramp] = []
        for i, t in enumerate(run.scheduler.timesteps):
            run.trajectory.answered(0, "cond", True)
            stepped = run.scheduler.step(outputs[i], t, noise()).prev_sample
            paths[ramp].append(stepped)
    bare = DPMSolverPPScheduler(order=1, **TABLE)
    bare.set_timesteps(8)
    for i, t in enumerate(bare.timesteps):
        end = bare.step(outputs[i], t, noise()).prev_sample
        full, part = paths["none"][i] - end, paths["linear"][i] - end
        assert torch.allclose(part, full * i / 7, atol=1e-5)
    assert full.abs().max() > 0.01


def test_steps_that_were_not_computed_are_neither_changed_nor_kept():
    """Row 1 is filled in at every second step; row 0 is as in a run of its own."""
    x = noise()

    def computed(i, row):
        return {"cond": row == 0 or i % 2 == 0, "uncond": row == 0}

    settings = {"c": 0.4, "target": "all"}
    mixed = beside(DEISScheduler(order=1, **TABLE), **settings).run(x, computed=computed)
    whole = beside(DEISScheduler(order=1, **TABLE), **settings).run(x[:1])
    for found, expected in zip(mixed, whole, strict=True):
        assert torch.equal(found[:1], expected)
    outputs = [noise(seed=i) for i in range(8)]
    given = []
    scheduler = DEISScheduler(order=1, **TABLE)
    run = beside(scheduler, ramp="none", **settings)
    run.trajectory.edit(0, lambda update: given.append(update.output) or update.output)
    run.run(x, lambda x, i: outputs[i], computed=computed)
    for i in range(8):
        assert torch.equal(given[i][1], outputs[i][1]) == (i % 2 == 1 or i == 0)
    expected = outputs[4][1] + 0.4 * (outputs[4][1] - outputs[2][1])
    assert torch.allclose(given[4][1], expected, atol=1e-6)


def test_where_guidance_switches_it_begins_anew():
    given, outputs = [], [noise(seed=i) for i in range(8)]
    run = beside(DEISScheduler(order=1, **TABLE), c=0.4, ramp="none", target="all")
    run.trajectory.edit(0, lambda update: given.append(update.output) or update.output)
    run.run(
        noise(),
        lambda x, i: outputs[i],
        computed=lambda i, row: {"cond": True} if i >= 4 else {"cond": True, "uncond": True},
    )
    same = [torch.equal(*pair) for pair in zip(given, outputs, strict=True)]
    assert same == [True, False, False, False, True, False, False, False]
    assert "6 steps" in run.tally.change


def test_a_run_of_one_step_is_not_changed_and_says_so():
    run = beside(DPMSolverPPScheduler(**FLOW), 1)
    end = run.run(noise())[-1]
    assert torch.equal(end, plain(DPMSolverPPScheduler(**FLOW), noise(), 1)[-1])
    assert run.tally.verdict().state == "INACTIVE"


def test_it_reads_no_sample_from_the_device():
    run = beside(DPMSolverPPScheduler(**FLOW))
    run.scheduler.set_begin_index(0)
    assert run.run(noise().to("meta"))[-1].shape == (2, 4, 8, 8)
    assert "7 steps" in run.tally.change


# In plans


def test_schedulers_that_cannot_be_served_are_refused():
    def attach(scheduler, **settings):
        Beside(scheduler, DualFast(**settings))

    with pytest.raises(UnsupportedModel, match=r"takes each step again.*samplers\.UniPC"):
        attach(diffusers.UniPCMultistepScheduler(**TABLE))
    attach(diffusers.UniPCMultistepScheduler(**TABLE), target="all")
    with pytest.raises(UnsupportedModel, match="clips its predictions"):
        attach(diffusers.DPMSolverMultistepScheduler(**TABLE, thresholding=True))
    attach(diffusers.DPMSolverMultistepScheduler(**TABLE, thresholding=True), target="all")
    with pytest.raises(UnsupportedModel, match="adds noise, evaluates a step twice"):
        attach(diffusers.EulerAncestralDiscreteScheduler(**TABLE))
    with pytest.raises(UnsupportedModel, match="2 times a step"):
        attach(diffusers.HeunDiscreteScheduler(**TABLE))


@pytest.mark.parametrize(
    "sampler",
    [samplers.RhoRK(), samplers.DPMSolverPPSingle(), samplers.SASolver()],
    ids=lambda sampler: sampler.name,
)
def test_samplers_of_the_plan_that_it_does_not_fit_are_a_conflict(sampler):
    pipe = PIPELINES["sd15"].build()
    before = pipe.scheduler
    with pytest.raises(Conflict, match=r"samplers\.DualFast and ") as conflict:
        accel.Plan(DualFast(), sampler).attach(pipe)
    assert sampler.name in str(conflict.value)
    assert pipe.scheduler is before


def numbers(output):
    return torch.as_tensor(np.asarray(output)).float()


@pytest.mark.parametrize("name", ["sd15", "sdxl", "flux_cfg", "wan21"])
def test_in_a_pipeline_it_acts_and_leaves_no_trace(name):
    tiny = PIPELINES[name]
    pipe = tiny.build()
    stock = numbers(tiny.call(pipe, steps=5))
    with accel.Plan(DualFast(c=0.0)).attach(pipe):
        assert torch.equal(numbers(tiny.call(pipe, steps=5)), stock)
    for plan in (
        accel.Plan(DualFast(target="all")),
        accel.Plan(DualFast(), samplers.UniPC()),
        accel.Plan(DualFast(), samplers.DEIS()),
        accel.Plan(DualFast(), samplers.DPMSolverPP(), cache.EasyCache(threshold=10.0)),
    ):
        with plan.attach(pipe) as run:
            found = [numbers(tiny.call(pipe, steps=5)) for _ in range(2)]
        assert torch.equal(*found)
        assert not torch.equal(found[0], stock)
        assert run.report.verdicts["samplers.DualFast"].state == "ACTIVE"
    assert torch.equal(numbers(tiny.call(pipe, steps=5)), stock)


def test_with_guidance_that_ends_it_is_told_of_the_switch():
    tiny = PIPELINES["sd15"]
    pipe = tiny.build()
    with accel.Plan(DualFast(), guidance.Interval(low=1.0, high=math.inf)).attach(pipe) as run:
        tiny.call(pipe, steps=6)
    switched = run.report.verdicts["samplers.DualFast"].detail
    with accel.Plan(DualFast()).attach(pipe) as run:
        tiny.call(pipe, steps=6)
    assert "5 steps" in run.report.verdicts["samplers.DualFast"].detail
    assert "4 steps" in switched
