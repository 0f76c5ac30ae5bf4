"""SADA and ZEUS: what the solver is given, closed forms, and what is refused."""

import math
from collections import defaultdict
from types import SimpleNamespace

import diffusers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from roster import CORE
from test_laws_memory import Abort, callback_raises
from test_laws_samples import only
from test_trajectory import NOISERS, SD, Holder
from tiny import PIPELINES

import samplers
from accel import Plan, cache, errors, guidance, hooks
from accel.cache.sada import Seen, Stability
from accel.cache.solver_coupled import CleanNodes, Point, first
from accel.cache.zeus import Pattern
from accel.seams.denoisers import find_denoisers
from accel.seams.solvers import DETERMINISTIC, Solver
from accel.trajectory import Trajectory

FIVE = ("sd15", "sd15_v", "sdxl", "flux", "mochi", "pixart_sigma", "wan21")
"""DDIM (ε and v), Euler, flow Euler (to the clean sample, and from it), DPM++ multistep, UniPC."""


def events(run, method):
    """By branch and sample: the states of the steps."""
    found = defaultdict(list)
    for _, branch, sample, state in run.report.to_dict()["events"][method.name]:
        found[branch, sample].append(state)
    return found


def computed(run, method):
    """Steps that a sample computed; all its branches the same."""
    steps = defaultdict(set)
    for step, branch, sample, state in run.report.to_dict()["events"][method.name]:
        steps[branch, sample]
        if state == "computed":
            steps[branch, sample].add(step)
    sets = list(steps.values())
    assert all(each == sets[0] for each in sets)
    return sets[0]


# Editors at `scheduler.step`.


class Editing(guidance.Interval):
    """A method that edits what the scheduler is given."""

    name = "guidance.Editing"

    def attach(self, site):
        yield site.edit_step(self.edit)

    def edit(self, update):
        return update.output


@pytest.mark.parametrize("name", FIVE)
def test_an_editor_that_changes_nothing_changes_nothing(bench, same, name):
    run = Plan(Editing()).attach(bench.pipe(name))
    assert same(bench.call(name, steps=4), bench.stock(name, steps=4))
    run.detach()
    assert same(bench.call(name, steps=4), bench.stock(name, steps=4))


@pytest.mark.parametrize("name", FIVE)
def test_the_scheduler_gets_what_the_editor_returns(bench, same, name):
    """As if the network had answered it: an edit of the factor 1/2 is a network of half size."""

    class Halving(Editing):
        def edit(self, update):
            assert update.sample.shape == update.output.shape
            assert not {"model_output", "sample"} & set(update.options)
            return update.output / 2

    pipe = bench.pipe(name)
    run = Plan(Halving()).attach(pipe)
    edited = bench.call(name, steps=4)
    run.detach()
    undo = hooks.wrap(
        pipe.scheduler, "step", lambda inner, y, *args, **kwargs: inner(y / 2, *args, **kwargs)
    )
    expected = bench.call(name, steps=4)
    undo()
    assert same(edited, expected)
    assert not same(edited, bench.stock(name, steps=4))


@pytest.mark.parametrize("named", [False, True])
def test_editors_are_asked_from_the_network_outward_and_leave_in_any_order(named):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    trajectory = Trajectory(Holder(scheduler), lambda scheduled: scheduled)
    trajectory.attach()
    undos = [
        trajectory.edit(2, lambda update: update.output * 3),
        trajectory.edit(5, lambda update: update.output + 1),
        trajectory.edit(2, lambda update: update.output - 7),
    ]
    x, given = torch.ones(2, 4), torch.full((2, 4), 5.0)

    def slope():
        scheduler.set_timesteps(4)
        time = scheduler.timesteps[0]
        if named:
            after = scheduler.step(model_output=given, timestep=time, sample=x)[0]
        else:
            after = scheduler.step(given, time, x)[0]
        return ((after - x) / (scheduler.sigmas[1] - scheduler.sigmas[0]))[0, 0].item()

    assert slope() == pytest.approx((5 + 1) * 3 - 7, abs=1e-4)
    undos[0]()
    assert slope() == pytest.approx(5 + 1 - 7, abs=1e-4)
    undos[1]()
    undos[2]()
    assert trajectory.editors == []
    assert slope() == pytest.approx(5, abs=1e-4)


# How a scheduler reads an output.

DETERMINED = {
    name: build for name, build in NOISERS.items() if type(build()).__name__ in DETERMINISTIC
}
DETERMINED |= {
    "ddim v": lambda: diffusers.DDIMScheduler(
        **SD, prediction_type="v_prediction", clip_sample=False
    ),
    "ddim x0": lambda: diffusers.DDIMScheduler(**SD, prediction_type="sample", clip_sample=False),
    "euler v": lambda: diffusers.EulerDiscreteScheduler(**SD, prediction_type="v_prediction"),
    "dpm++ v": lambda: diffusers.DPMSolverMultistepScheduler(**SD, prediction_type="v_prediction"),
    "deis": lambda: diffusers.DEISMultistepScheduler(**SD),
    "lms": lambda: diffusers.LMSDiscreteScheduler(**SD),
    "cogvideox": lambda: diffusers.CogVideoXDDIMScheduler(prediction_type="v_prediction"),
    "ours": lambda: samplers.DPMSolverPPScheduler.from_config(
        diffusers.DDIMScheduler(**SD).config, order=3
    ),
    "ours flow": lambda: samplers.DPMSolverPPScheduler.from_config(
        diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0).config, order=2
    ),
}
DETERMINED["ddim"] = lambda: diffusers.DDIMScheduler(**SD, steps_offset=1, clip_sample=False)
DETERMINED["ddim trailing"] = lambda: diffusers.DDIMScheduler(
    **SD, timestep_spacing="trailing", clip_sample=False
)


@pytest.fixture
def random():
    return torch.Generator().manual_seed(3)


@pytest.mark.parametrize("build", DETERMINED.values(), ids=DETERMINED)
def test_a_straight_line_is_followed_to_its_clean_sample(build, random):
    """The output that `Solver` makes of a constant slope keeps every scheduler on x0 + s·f."""
    scheduler = build()
    clean = torch.randn(2, 3, 4, 4, generator=random)
    slope = torch.randn(2, 3, 4, 4, generator=random)
    solver, places = Solver(scheduler), []

    def edit(update):
        step = update.step
        place = solver.place(update.sample, step)
        places.append((place - clean) / solver.time(step) - slope)
        output = solver.output(slope, place, step)
        assert torch.allclose(solver.slope(output, place, step), slope, atol=2e-3)
        assert torch.allclose(solver.toward(clean, place, step), slope, atol=2e-3)
        return output

    trajectory = Trajectory(Holder(scheduler), lambda scheduled: scheduled)
    trajectory.attach()
    trajectory.edit(5, edit)
    scheduler.set_timesteps(8)
    step = trajectory.now
    unit = solver.place(torch.ones(1), step)  # 1/α, or 1
    x = (clean + slope * solver.time(step)) / unit
    for timestep in scheduler.timesteps:
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(x, timestep)
        x = scheduler.step(torch.full_like(x, math.nan), timestep, x)[0]
    assert len(places) == 8
    assert all(place.abs().max() < 5e-3 for place in places), "it left the line"
    assert (x - clean).abs().max() < 0.12  # DDIM and LMS end a little above no noise


REFUSED = {
    "heun": lambda: diffusers.HeunDiscreteScheduler(**SD),
    "euler a": lambda: diffusers.EulerAncestralDiscreteScheduler(**SD),
    "lcm": lambda: diffusers.LCMScheduler(**SD),
    "ddpm": lambda: diffusers.DDPMScheduler(**SD),
    "pndm": lambda: diffusers.PNDMScheduler(**SD),
    "sde": lambda: diffusers.DPMSolverMultistepScheduler(**SD, algorithm_type="sde-dpmsolver++"),
    "flow heun": diffusers.FlowMatchHeunDiscreteScheduler,
    "stochastic flow": lambda: diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
    "our sde": lambda: samplers.DPMSolverPPScheduler(order=2, eta=1.0),
}


@pytest.mark.parametrize("method", [cache.SADA(), cache.ZEUS()], ids=lambda m: m.name)
@pytest.mark.parametrize("build", REFUSED.values(), ids=REFUSED)
def test_noise_and_second_evaluations_are_refused_by_name(bench, build, method):
    pipe = bench.pipe("sd15")
    kept, scheduler = pipe.scheduler, build()
    pipe.scheduler = scheduler
    try:
        with pytest.raises(errors.UnsupportedModel, match=type(scheduler).__name__) as caught:
            Plan(method).attach(pipe)
        assert f"{method.name} does not fit" in str(caught.value)
        assert "samplers.DPMSolverPP" in str(caught.value)
    finally:
        pipe.scheduler = kept


def test_noise_that_only_the_call_asks_for_is_refused(bench):
    with (
        pytest.raises(errors.UnsupportedModel, match=r"DDIMScheduler adds noise \(eta = 0\.5"),
        Plan(cache.SADA()).attach(bench.pipe("sd15")),
    ):
        bench.call("sd15", steps=4, eta=0.5)


# The track of one sample, step by step.


class Levels(SimpleNamespace):
    """Noise levels of a schedule: those of a flow, or of σ/α."""

    prediction = "flow_prediction"

    def at(self, position):
        level = self.times[position]
        if self.prediction == "flow_prediction":
            return math.inf, 1 - level, level
        alpha = 1 / math.sqrt(1 + level * level)
        return level, alpha, level * alpha


def steps(times, prediction="flow_prediction"):
    """The steps of a run at given noise levels."""
    levels = Levels(times=times, prediction=prediction)
    return [
        SimpleNamespace(
            index=i,
            position=i,
            total=len(times) - 1,
            levels=levels,
            level=levels.at(i),
            time=-math.log(times[i]),  # rises, as the log-SNR does
        )
        for i in range(len(times) - 1)
    ]


def solver():
    return Solver(diffusers.FlowMatchEulerDiscreteScheduler())


uneven = st.lists(st.floats(0.02, 0.5), min_size=6, max_size=9).map(
    lambda gaps: [*(sum(gaps[i:]) for i in range(len(gaps))), 0.01]
)


def at(step, slope, place):
    return Point(step, torch.as_tensor(slope), torch.as_tensor(place))


@settings(max_examples=40)
@given(uneven, st.sampled_from(["flow_prediction", "epsilon"]))
def test_a_slope_that_is_linear_in_time_is_integrated_exactly(times, prediction):
    """x̂ = x + h[(1 + h/2h₋)f_n − (h/2h₋)f_{n+1}], on any grid: the integral of the line."""
    line = lambda s: 2.0 - 3.0 * s  # noqa: E731
    integral = lambda s: 5.0 + 2.0 * s - 1.5 * s * s  # noqa: E731
    track = Stability(cache.SADA(start=0.0, stop=1.0), solver(), Seen())
    run = steps(times, prediction)
    for step, time in zip(run[:4], times[:4], strict=True):
        track.learn(at(step, [line(time)], [integral(time)]))
    assert track.judge(run[3], torch.tensor([7.0])) is not None
    assert track._expected.item() == pytest.approx(integral(times[4]), abs=1e-4)
    h, before = times[4] - times[3], times[3] - times[2]
    ab2 = (1 + h / 2 / before) * line(times[3]) - h / 2 / before * line(times[2])
    assert track._expected.item() == pytest.approx(integral(times[3]) + h * ab2, abs=1e-4)
    filled = track.fill(at(run[4], [math.nan], [integral(times[4])]))
    if prediction == "flow_prediction":  # the velocity itself is extrapolated
        assert filled.item() == pytest.approx(line(times[4]), abs=1e-4)
    else:  # x0 = x̂ − s·ε with the last ε
        assert filled.item() == pytest.approx(line(times[3]), abs=1e-3)


@settings(max_examples=40)
@given(uneven, st.floats(-3, 3), st.floats(-3, 3))
def test_on_a_straight_line_the_measure_is_nought_and_the_answer_exact(times, start, slope):
    track = Stability(cache.SADA(start=0.0, stop=1.0, max_skips=2), solver(), Seen())
    skipped = []
    place = lambda time: start + slope * time  # noqa: E731
    for step, time in zip(steps(times), times[:-1], strict=True):
        if track.skips(step):
            skipped.append(step.index)
            filled = track.fill(at(step, [math.nan], [place(time)]))
            assert filled.item() == pytest.approx(slope, abs=1e-4)
        else:
            track.learn(at(step, [slope], [place(time)]))
        measure = track.judge(step, torch.tensor([place(times[step.index + 1])]))
        if measure is not None:
            assert measure.item() == 0.0
            track.decide(0.0)
    total = len(times) - 1
    assert skipped == [i for i in range(3, total) if (i - 3) % 3 != 2]


def test_the_sign_of_the_measure_is_that_of_the_paper():
    """(x − x̂)·Δ²f over the gap, by hand: an even grid, slopes 1, 2, 4, a solver of Euler's."""
    times = [1.0, 0.9, 0.8, 0.7, 0.6, 0.5]
    track = Stability(cache.SADA(start=0.0, stop=1.0), solver(), Seen())
    run, place, slopes = steps(times), 0.0, [1.0, 2.0, 4.0]
    for step, slope in zip(run[:3], slopes, strict=True):
        track.learn(at(step, [slope], [place]))
        place += slope * -0.1
    second = (4 - 2) - (2 - 1)
    expected = place - -0.1 * 4 + -0.1 * (1.5 * 4 - 0.5 * 2)
    measure = track.judge(run[2], torch.tensor([place]))
    assert measure.item() == pytest.approx((place - expected) * second / 0.1, abs=1e-5)
    assert measure > 0, "slopes that run away are not stable"


def test_the_bend_is_that_of_the_authors_code_for_flows():
    """−(v_n − v_{n+1}) + (v_{n+1} − v_{n+2}) over the gap, whatever the place."""
    times = [1.0, 0.9, 0.8, 0.7, 0.6, 0.5]
    track = Stability(cache.SADA(start=0.0, stop=1.0, criterion="bend"), solver(), Seen())
    run = steps(times)
    for step, slope in zip(run[:3], [1.0, 2.0, 4.0], strict=True):
        track.learn(at(step, [slope, slope], [0.0, 0.0]))
    for place in (-5.0, 5.0):
        measure = track.judge(run[2], torch.tensor([place, 0.0]))
        assert measure.item() == pytest.approx((-(4 - 2) + (2 - 1)) / 0.1, abs=1e-4)


def test_only_computed_outputs_enter_the_differences():
    """A second skip in a row still sees the slope: skipped outputs are none of the history."""
    times = [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4]
    track = Stability(cache.SADA(start=0.0, stop=1.0, max_skips=4), solver(), Seen())
    run = steps(times)
    for step, slope in zip(run[:3], [4.0, 3.0, 2.5], strict=True):
        track.learn(at(step, [slope], [0.0]))
    assert track.judge(run[2], torch.tensor([0.0])) is not None
    track.decide(-1.0)
    fills = []
    for step in run[3:5]:
        assert track.skips(step)
        fills.append(track.fill(at(step, [2.5], [0.0])).item())
        assert track.judge(step, torch.tensor([0.0])).item() != 0.0
        track.decide(-1.0)
    assert fills == pytest.approx([2.0, 1.5])


@pytest.mark.parametrize("value", [1e-9, math.nan, math.inf])
def test_what_is_not_stable_computes(value):
    track = Stability(cache.SADA(start=0.0, stop=1.0), solver(), Seen())
    run = steps([1.0, 0.9, 0.8, 0.7, 0.6, 0.5])
    for step in run[:3]:
        track.learn(at(step, [1.0], [0.0]))
    track.judge(run[2], torch.tensor([0.0]))
    track.decide(value)
    assert not track.skips(run[3])


@settings(max_examples=40)
@given(st.integers(1, 5), st.integers(2, 4), st.lists(st.floats(-2, 2), min_size=5, max_size=5))
def test_clean_samples_that_are_a_polynomial_in_the_log_snr_are_met(count, every, factors):
    """Of a degree below the number of nodes, at any place between and behind them."""
    nodes = CleanNodes(every, count)
    run = steps([0.98**i for i in range(4 * count * every + 3)])
    value = lambda step: sum(f * step.time**d for d, f in enumerate(factors[:count]))  # noqa: E731
    for step in run[:-2]:
        nodes.learn(step, torch.tensor([value(step)], dtype=torch.float64))
    assert [step.index for step in run if nodes.node(step)] == list(
        range(1 % every, len(run), every)
    )
    assert nodes.ready
    assert nodes.at(run[-1]).item() == pytest.approx(value(run[-1]), abs=1e-6)


# ZEUS, SADA: which steps are computed.


def skipped_by(method, total):
    track = Pattern(method, solver())
    found = []
    for step in steps([1 - i / (total + 1) for i in range(total + 1)]):
        if track.skips(step):
            found.append(step.index)
            track.fill(at(step, [0.0], [0.0]))
        else:
            track.learn(at(step, [0.0], [0.0]))
    return found


def test_zeus_skips_23_of_50_and_24_with_lagrange():
    assert len(skipped_by(cache.ZEUS(), 50)) == 23
    assert len(skipped_by(cache.ZEUS(lagrange=0.48), 50)) == 24
    assert skipped_by(cache.ZEUS(), 50) == [i + 1 for i in range(10, 45) if i % 3 in (0, 1)]
    assert skipped_by(cache.ZEUS(lagrange=0.48), 50) == [
        i + 1 for i in range(10, 45) if (i % 3 in (0, 1) if i < 24 else i % 4)
    ]


@given(st.integers(2, 6), st.integers(1, 5), st.integers(4, 60))
def test_zeus_computes_one_of_interval_steps_within_its_cap(interval, max_skips, total):
    method = cache.ZEUS(interval=interval, max_skips=max_skips, start=0.0, stop=1.0)
    skipped = skipped_by(method, total)
    assert not {0, 1} & set(skipped)
    runs, length = [], 0
    for step in range(total):
        length = length + 1 if step in skipped else 0
        runs.append(length)
    assert max(runs) <= min(max_skips, interval - 1)
    if max_skips >= interval - 1:
        assert skipped == [i for i in range(2, total) if i % interval]


def test_zeus_extrapolates_reuses_and_extrapolates_again():
    track = Pattern(cache.ZEUS(start=0.0, stop=1.0, interval=4), solver())
    run = steps([1 - i / 20 for i in range(20)])
    track.learn(at(run[0], [1.0], [0.0]))
    track.learn(at(run[1], [3.0], [0.0]))
    assert [track.fill(at(step, [math.nan], [0.0])).item() for step in run[2:5]] == [5, 3, 5]


CLOSED = {
    "SADA": cache.SADA(max_skips=3, start=0.2, stop=0.9),
    "SADA multi-step": cache.SADA(start=0.1, lagrange=0.4, every=3),
    "ZEUS": cache.ZEUS(start=0.1),
    "ZEUS multi-step": cache.ZEUS(start=0.1, lagrange=0.3, every=4),
}


def expected_steps(method, total):
    """The computed steps on a straight line."""
    if isinstance(method, cache.ZEUS):
        return set(range(total)) - set(skipped_by(method, total))
    begin, end = math.ceil(method.start * total - 1e-9), math.ceil(method.stop * total - 1e-9)
    multi = math.ceil(method.lagrange * total - 1e-9)
    done, skips = set(), 0
    for step in range(total):
        node = step % method.every == 1 % method.every
        ready = len([i for i in done if i % method.every == 1 % method.every]) > 1
        free = (ready and not node) if step >= multi else step >= 3
        if begin <= step < end and skips < method.max_skips and free:
            skips += 1
        else:
            done.add(step)
            skips = 0
    return done


@pytest.mark.parametrize("method", CLOSED.values(), ids=CLOSED)
@pytest.mark.parametrize("name", ["sd15", "flux", "flux_cfg", "mochi", "wan21"])
def test_a_network_of_constant_slope_is_skipped_as_often_as_allowed(bench, name, method):
    """A straight-line ODE: always stable, and the output is the stock one up to rounding."""
    pipe, total = bench.pipe(name), 16
    network = find_denoisers(pipe)[0].module
    inner = network.forward

    def straight(*args, **kwargs):
        native = inner(*args, **kwargs)
        generator = torch.Generator().manual_seed(5)
        value = torch.randn(native[0][:1].shape, generator=generator) / 3
        return (value.expand_as(native[0]).clone(),)

    straight.__wrapped__ = inner
    network.forward = straight
    try:
        stock = bench.call(name, steps=total)
        with Plan(method).attach(pipe) as run:
            output = bench.call(name, steps=total)
    finally:
        del network.forward
    assert computed(run, method) == expected_steps(method, run.report.steps)
    assert (output - stock).abs().max() < 2e-3 * stock.abs().max()


# On pipelines.


def test_the_history_of_a_multistep_solver_holds_what_was_predicted(bench, monkeypatch):
    """The scheduler reads x0 from what it is given; its history has the predicted ones."""
    filled, kept = [], []

    def fill(track, point, *, inner=Stability.fill):
        output = inner(track, point)
        filled.append(track._solver.clean(output, point.place, point.step))
        return output

    class Watched(cache.SADA):
        name = "cache.Watched"

        def attach(self, site):
            yield from super().attach(site)
            history = site.pipe.scheduler.history
            yield site.on_step(lambda step, _: kept.append((step.index, history[0].clone())))

    monkeypatch.setattr(Stability, "fill", fill)
    method = Watched(start=0.0, stop=1.0, lagrange=0.0, every=2, nodes=2)
    with Plan(samplers.DPMSolverPP(order=2), method).attach(bench.pipe("flux")) as run:
        bench.call("flux", steps=10)
    predicted = [value for index, value in kept if index not in computed(run, method)]
    assert len(predicted) == len(filled) >= 3
    for mine, theirs in zip(filled, predicted, strict=True):
        assert torch.allclose(mine, theirs, atol=1e-4)


STEPWISE = cache.SADA(start=0.0, stop=1.0, max_skips=2)


@pytest.mark.parametrize(
    ("name", "criterion"), [*((name, "deviation") for name in CORE), ("flux_cfg", "bend")]
)
def test_the_criterion_keeps_laws_3_and_4(bench, same, name, criterion):
    """A random network is stable or not by chance, so the roster's forms do not rest on it."""
    pipe, tiny = bench.pipe(name), PIPELINES[name]
    method = STEPWISE.model_copy(update={"criterion": criterion})
    with Plan(method).attach(pipe) as run:
        outputs = [bench.call(name, steps=10) for _ in range(2)]
        events_ = run.report.to_dict()["events"]
        assert same(*outputs)
        arguments, _ = callback_raises(pipe, 6)
        with pytest.raises(Abort):
            bench.call(name, steps=10, **arguments)
        assert same(bench.call(name, steps=10), outputs[0])
        assert run.report.to_dict()["events"] == events_
    assert tiny.batchable


@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux_cfg"])
def test_samples_are_stable_each_for_itself(bench, name):
    """In one batch one sample skips where another computes; alone, each does the same."""
    with Plan(STEPWISE).attach(bench.pipe(name)) as run:
        together = bench.call(name, steps=14, batch=3)
        states = events(run, STEPWISE)
        assert len({tuple(states["cond", k]) for k in range(3)}) > 1, "all decided alike"
        for sample in range(3):
            assert states["cond", sample] == states["uncond", sample]
            alone = bench.call(name, steps=14, **only(sample))
            assert events(run, STEPWISE)["cond", 0] == states["cond", sample]
            error = (together[sample] - alone[0]).abs().max()
            assert error < 1e-3 * together.abs().max()


@pytest.mark.parametrize("name", CORE)
def test_what_guidance_makes_is_what_the_solver_gets(bench, name):
    """With Adaptive, SADA starts anew where guidance ends."""
    adaptive = guidance.Adaptive(threshold=-1.0, min_steps=5, min_guided=0.0)
    for method in (
        cache.SADA(start=0.0, stop=1.0, lagrange=0.0, every=2, nodes=2),
        cache.ZEUS(start=0.0, stop=1.0),
    ):
        with Plan(adaptive, method).attach(bench.pipe(name)) as run:
            output = bench.call(name, steps=12)
        assert torch.isfinite(torch.as_tensor(output)).all()
        assert {v.state for v in run.report.verdicts.values()} == {"ACTIVE"}


@pytest.mark.parametrize("method", [cache.SADA(), cache.ZEUS()], ids=lambda m: m.name)
def test_another_cache_of_steps_is_refused_by_name(bench, method):
    with pytest.raises(errors.Conflict, match=r"cache\.EasyCache") as caught:
        Plan(cache.EasyCache(), method).attach(bench.pipe("sd15"))
    assert method.name in str(caught.value)


def test_zeus_never_reads_the_device_and_sada_once_a_step(bench, monkeypatch):
    reads = []
    for reader in ("item", "tolist"):
        inner = getattr(torch.Tensor, reader)

        def read(tensor, *, inner=inner):
            reads.append(tensor.shape)
            return inner(tensor)

        monkeypatch.setattr(torch.Tensor, reader, read)
    bench.pipe("flux")
    counts = {}
    for method in (None, cache.ZEUS(start=0.0, stop=1.0), STEPWISE):
        plan = Plan() if method is None else Plan(method)
        with plan.attach(bench.pipe("flux")):
            reads.clear()
            bench.call("flux", steps=12)
        counts[method and method.name] = len(reads)
    assert counts["cache.ZEUS"] <= counts[None] + 2  # the noise levels, once a run
    assert counts["cache.SADA"] <= counts[None] + 2 + 12


def test_bounds_are_shares_of_the_run():
    step = SimpleNamespace(total=50)
    assert [first(share, step) for share in (0.0, 0.2, 0.48, 0.94, 1.0)] == [0, 10, 24, 47, 50]
    assert first(0.2, SimpleNamespace(total=28)) == 6
    with pytest.raises(errors.UnsupportedModel, match="cuts its schedule"):
        first(0.2, SimpleNamespace(total=None))
