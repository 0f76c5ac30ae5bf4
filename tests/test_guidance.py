"""Guidance: spaces, latching per sample, intervals, and branches that disappear in mid-run."""

import contextlib
import itertools

import diffusers
import pytest
import torch
from test_laws_counts import computed_steps, counting, switch_of
from test_samplers_v3 import LIKE_PP
from tiny import PIPELINES

import samplers
from accel import Plan, cache, errors, guidance, hooks
from accel.seams.history import forgetter
from accel.seams.spaces import convert, matching
from accel.seams.stages import start_of
from accel.trajectory import Levels, Step
from samplers.dpmsolverpp_single import plan_groups
from samplers.rho_rk import plan_steps

# A network's answer in other spaces, from the definitions alone.

SCHEDULERS = {
    "epsilon": diffusers.DDIMScheduler(prediction_type="epsilon"),
    "v_prediction": diffusers.DDIMScheduler(prediction_type="v_prediction"),
    "sample": diffusers.DDIMScheduler(prediction_type="sample"),
    "flow_prediction": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
}


@pytest.mark.parametrize("position", [1, 4, 7])
@pytest.mark.parametrize("kind", SCHEDULERS)
def test_spaces_are_what_their_names_say(kind, position):
    scheduler = SCHEDULERS[kind]
    scheduler.set_timesteps(8)
    step = Step(position, 8, position, Levels(scheduler))
    _, alpha, sigma = step.level
    data, noise = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    x = alpha * data + sigma * noise
    v = alpha * noise - sigma * data
    answer = {"epsilon": noise, "v_prediction": v, "sample": data, "flow_prediction": noise - data}
    flow = kind == "flow_prediction"
    assert torch.equal(convert(answer[kind], x, step, "raw", "Any"), answer[kind])
    assert torch.allclose(convert(answer[kind], x, step, "x0", "Any"), data, atol=1e-3)
    velocity = convert(answer[kind], x, step, "v", "Any")
    assert torch.allclose(velocity, answer[kind] if flow else v, atol=1e-3)


def test_a_network_that_answers_the_other_way_round_is_turned():
    scheduler = SCHEDULERS["flow_prediction"]
    scheduler.set_timesteps(8)
    step = Step(3, 8, 3, Levels(scheduler))
    x, y = torch.randn(2, 4, 8, 8)
    plain = convert(y, x, step, "x0", "FluxTransformer2DModel")
    for network in ("ZImageTransformer2DModel", "Lumina2Transformer2DModel"):
        assert torch.equal(convert(-y, x, step, "x0", network), plain)


@pytest.mark.parametrize(("x", "y"), [((8, 4, 4), (4, 4, 4)), ((4, 4, 4), (8, 4, 4))])
def test_input_and_answer_share_their_first_channels(x, y):
    x, y = torch.randn(x), torch.randn(y)
    shared = matching(x, y)
    assert torch.equal(shared[0], x[:4])
    assert torch.equal(shared[1], y[:4])


# Adaptive.


def guided_steps(bench, name, method, **call):
    run = Plan(method).attach(bench.pipe(name))
    bench.call(name, steps=8, **call)
    run.detach()
    return computed_steps(run, method)


def test_guidance_once_ended_stays_ended(bench):
    for threshold in (0.2, 0.5, 0.9):
        method = guidance.Adaptive(threshold=threshold, min_steps=1, min_guided=0.0)
        for steps in guided_steps(bench, "sd15", method, batch=3).values():
            assert steps == set(range(len(steps)))


@pytest.mark.parametrize(("fields", "guided"), [((5, 0.0), 5), ((0, 0.5), 4), ((2, 0.6), 5)])
def test_the_guard_holds_against_latching_at_once(bench, fields, guided):
    steps, share = fields
    method = guidance.Adaptive(threshold=-1.0, min_steps=steps, min_guided=share)
    for computed in guided_steps(bench, "flux_cfg", method).values():
        assert computed == set(range(guided))


@pytest.mark.parametrize("kind", [cache.EasyCache, cache.FirstBlock])
def test_a_cached_answer_is_no_evidence(bench, kind):
    """Adaptive never looks at pairs that a cache answered: only computed steps can end it."""
    method = guidance.Adaptive(threshold=-1.0, min_steps=4, min_guided=0.0)
    plan = Plan(method, kind(threshold=1e9, warmup=2))
    run = plan.attach(bench.pipe("flux_cfg"))
    bench.call("flux_cfg", steps=8)
    run.detach()
    # steps 2 to 6 are predicted, so the first pair after the guard is that of the last step
    assert computed_steps(run, method)["uncond", 0] == set(range(8))


def test_adaptive_says_why_it_never_ended(bench):
    with (
        pytest.warns(errors.AccelWarning, match=r"never agreed: highest cosine 0\.\d+"),
        Plan(guidance.Adaptive(threshold=1.0)).attach(bench.pipe("flux_cfg")),
    ):
        bench.call("flux_cfg", steps=6)


EVERY = {
    method.name: method
    for method in (
        guidance.Adaptive(),
        guidance.Interval(),
        guidance.CFGCache(),
        guidance.LinearAG(coefficients=((-1.0, 1.0, 1.0),)),
        guidance.Residual(),
        guidance.SkipAtOne(),
    )
}


def test_every_method_of_guidance_is_asked_here():
    assert set(EVERY) == {f"guidance.{name}" for name in guidance.__all__}


@pytest.mark.parametrize("method", EVERY.values(), ids=EVERY)
@pytest.mark.parametrize(
    ("name", "call", "told"),
    [
        ("flux", {}, r"guidance is embedded: the network is told the scale \(guidance\)"),
        ("sd15", {"guidance": False}, "guidance is off"),
    ],
)
def test_without_a_branch_there_is_nothing_to_leave_out(bench, same, name, call, told, method):
    """Embedded guidance is called by its name."""
    with (
        pytest.warns(errors.AccelWarning, match=told),
        Plan(method).attach(bench.pipe(name)),
    ):
        output = bench.call(name, steps=4, **call)
    assert same(output, bench.stock(name, steps=4, **call))


def test_guidance_without_its_branch_is_the_conditional_picture(bench):
    """An interval that guides nowhere gives what guidance 1 gives, in every layout."""
    method = guidance.Interval(low=1e6, high=2e6)
    for name in ("sd15", "sd3", "flux_cfg", "pixart_sigma", "wan21"):
        run = Plan(method).attach(bench.pipe(name))
        output = bench.call(name, steps=4)
        run.detach()
        stock = bench.stock(name, steps=4, guidance=False)
        assert torch.allclose(output, stock, atol=1e-3, rtol=1e-3)


# Guidance cut in mid-run, as the callback recipe of diffusers does.


def cut_at(index, *names):
    def cut(pipe, step, timestep, state):
        if step == index:
            pipe._guidance_scale = 0.0
            state |= {name: state[name].chunk(2)[-1] for name in names}
        return state

    return {
        "callback_on_step_end": cut,
        "callback_on_step_end_tensor_inputs": ["latents", *names],
    }


CUTS = {
    "sd15": ("prompt_embeds",),
    "sdxl": ("prompt_embeds", "add_text_embeds", "add_time_ids"),
    "sd3": ("prompt_embeds", "pooled_prompt_embeds"),
}


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", CUTS)
def test_guidance_cut_in_mid_run(bench, same, name, batch):
    call = {"steps": 6, "batch": batch, **cut_at(2, *CUTS[name])}
    stock = bench.call(name, **call)
    run = Plan(cache.EasyCache(threshold=1e-12)).attach(bench.pipe(name))
    assert same(bench.call(name, **call), stock)
    assert run.report.nfe == 3 * 2 + 3
    run.detach()


@pytest.mark.parametrize("name", CUTS)
@pytest.mark.parametrize(
    "method",
    [
        cache.EasyCache(threshold=1e9, warmup=2),
        guidance.Adaptive(threshold=-1.0, min_steps=2, min_guided=0.0),
    ],
)
def test_methods_follow_a_cut(bench, name, method):
    pipe = bench.pipe(name)
    with counting(pipe) as counts:
        run = Plan(method).attach(pipe)
        output = bench.call(name, steps=6, batch=2, **cut_at(3, *CUTS[name]))
        run.detach()
    assert torch.isfinite(output).all()
    assert run.report.nfe == counts["network"] / 2
    branches = {(step, branch) for step, branch, *_ in run.report.to_dict()["events"][method.name]}
    assert (3, "uncond") in branches
    assert (4, "uncond") not in branches


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_lcm_runs_are_unguided_and_short(name):
    """A turbo or LCM pipeline: 4 steps, no guidance. Whatever cannot help says so."""
    tiny = PIPELINES[name]
    pipe = tiny.build()
    pipe.scheduler = diffusers.LCMScheduler.from_config(pipe.scheduler.config)
    stock = torch.as_tensor(tiny.call(pipe, steps=4, guidance=False))
    plan = Plan(cache.EasyCache(), guidance.Adaptive(), guidance.Interval())
    with pytest.warns(errors.AccelWarning) as warned, plan.attach(pipe) as run:
        output = torch.as_tensor(tiny.call(pipe, steps=4, guidance=False))
    assert torch.equal(output, stock)
    assert {verdict.state for verdict in run.report.verdicts.values()} == {"INACTIVE"}
    assert len(warned) == 3


# A scale of 1.


@pytest.mark.parametrize("batch", [1, 2])
def test_where_the_scale_is_1_the_branch_is_left_out(bench, batch):
    """Wan 2.2 compares the scale of its first network alone with 1."""
    call = {"steps": 8, "batch": batch, "guidance_scale": 4.0, "guidance_scale_2": 1.0}
    pipe = bench.pipe("wan22")
    with counting(pipe) as stock:
        expected = bench.call("wan22", **call)
    assert stock["network"] == 2 * 8 * batch  # the stock pipeline evaluates it
    answers = []
    with Plan(guidance.SkipAtOne()).attach(pipe) as run:
        undo = hooks.wrap(
            pipe.transformer_2,
            "forward",
            lambda inner, *a, **k: answers.append(inner(*a, **k)[0].clone()) or (answers[-1],),
        )
        output = bench.call("wan22", **call)
        undo()
    first = switch_of(pipe)
    assert 0 < first < 8
    assert run.report.nfe == 8 + first
    assert computed_steps(run, guidance.SkipAtOne())["uncond", 0] == set(range(first))
    for cond, uncond in zip(answers[::2], answers[1::2], strict=True):
        assert torch.equal(cond, uncond)
    assert torch.allclose(output, expected, rtol=1e-5, atol=1e-5)  # u + (c − u) rounds


def test_it_leaves_out_what_guidance_by_the_conditional_branch_alone_would(bench, same):
    """To the bit: the second network's part is a run without guidance."""
    call = {"steps": 8, "guidance_scale": 4.0, "guidance_scale_2": 1.0}
    with Plan(guidance.SkipAtOne()).attach(bench.pipe("wan22")):
        output = bench.call("wan22", **call)
    guided_first = guidance.Adaptive(
        threshold=-1.0, min_steps=switch_of(bench.pipe("wan22")), min_guided=0.0
    )
    with Plan(guided_first).attach(bench.pipe("wan22")):
        assert same(bench.call("wan22", **call), output)


@pytest.mark.parametrize("name", ["wan22", "sd15", "flux_cfg", "cogvideox", "zimage"])
def test_at_other_scales_it_is_stock(bench, same, name):
    with (
        pytest.warns(errors.AccelWarning, match="or its scale is not 1"),
        Plan(guidance.SkipAtOne()).attach(bench.pipe(name)),
    ):
        assert same(bench.call(name, steps=4), bench.stock(name, steps=4))


ONE = {
    "sd15": {"guidance_scale": 1.0},
    "sd3": {"guidance_scale": 1.0},
    "flux_cfg": {"true_cfg_scale": 1.0},
    "wan21": {"guidance_scale": 1.0},
    "cogvideox": {"guidance_scale": 1.0},
    "zimage": {"guidance_scale": 0.0},  # it means w − 1
    "lumina2": {"guidance_scale": 1.0},
    "qwenimage": {"true_cfg_scale": 1.0},
}


@pytest.mark.parametrize("name", ONE)
def test_other_pipelines_leave_it_out_themselves(bench, name):
    with counting(bench.pipe(name)) as counts:
        bench.call(name, steps=3, **ONE[name])
    assert counts["network"] == 3


def test_it_goes_with_other_methods(bench):
    call = {"steps": 8, "guidance_scale": 4.0, "guidance_scale_2": 1.0}
    for other in (
        guidance.Adaptive(threshold=-1.0, min_steps=2, min_guided=0.0),
        guidance.Interval(low=0.5),
        guidance.CFGCache(interval=2, start=5000.0),
        cache.EasyCache(threshold=1e6, warmup=2),
    ):
        run = Plan(guidance.SkipAtOne(), other).attach(bench.pipe("wan22"))
        assert torch.isfinite(bench.call("wan22", **call)).all()
        run.detach()
        left = set(range(8)) - computed_steps(run, guidance.SkipAtOne())["uncond", 0]
        assert run.report.verdicts[other.name].state == "ACTIVE"
        assert left or other.name in ("guidance.Adaptive", "guidance.Interval")


# A solver's history where guidance switches.


@contextlib.contextmanager
def following(pipe, scheduler):
    """A pipeline with another scheduler, for as long as it is entered."""
    before = pipe.scheduler
    pipe.scheduler = scheduler
    try:
        yield
    finally:
        pipe.scheduler = before


VP = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
MULTISTEP = {
    "dpm++": (diffusers.DPMSolverMultistepScheduler, {"solver_order": 2}),
    "dpm++ 3": (diffusers.DPMSolverMultistepScheduler, {"solver_order": 3}),
    "deis": (diffusers.DEISMultistepScheduler, {"solver_order": 3}),
    "unipc": (diffusers.UniPCMultistepScheduler, {"solver_order": 2}),
    "sa": (diffusers.SASolverScheduler, {"tau_func": lambda t: 0.0}),
    "ours": (samplers.DPMSolverPPScheduler, {"order": 2}),
}


def of_kind(kind, **more):
    build, settings = MULTISTEP[kind]
    if kind == "ours":
        return build(prediction_type="epsilon", num_train_timesteps=1000, **VP, **settings)
    return build(**VP, **(settings | more))


@pytest.mark.parametrize("kind", MULTISTEP)
def test_a_forgotten_history_leaves_no_trace(kind):
    """After it the step is that of a run whose earlier outputs were others, or none."""
    results = []
    for seed in (1, 2):
        scheduler = of_kind(kind)
        scheduler.set_timesteps(8)
        forget = forgetter(scheduler, "test")
        draw = torch.Generator().manual_seed(seed)
        for timestep in scheduler.timesteps[:4]:
            x, y = torch.randn(2, 1, 4, 8, 8, generator=draw)
            scheduler.step(y, timestep, x)
        forget()
        draw = torch.Generator().manual_seed(0)
        after = []
        for timestep in scheduler.timesteps[4:7]:
            x, y = torch.randn(2, 1, 4, 8, 8, generator=draw)
            after.append(scheduler.step(y, timestep, x, return_dict=False)[0])
        results.append(torch.cat(after))
    assert torch.allclose(*results, atol=1e-5)


@pytest.mark.parametrize("kind", MULTISTEP)
def test_without_forgetting_the_history_shows(kind):
    results = []
    for seed in (1, 2):
        scheduler = of_kind(kind)
        scheduler.set_timesteps(8)
        draw = torch.Generator().manual_seed(seed)
        for timestep in scheduler.timesteps[:4]:
            x, y = torch.randn(2, 1, 4, 8, 8, generator=draw)
            scheduler.step(y, timestep, x)
        x, y = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        results.append(scheduler.step(y, scheduler.timesteps[4], x, return_dict=False)[0])
    assert not torch.allclose(*results, atol=1e-3)


ALONE = {
    "dpm++": of_kind,
    "deis": of_kind,
    "unipc": of_kind,
    "sa": of_kind,
    "ours": of_kind,
    "our deis": lambda _: samplers.DEISScheduler(prediction_type="epsilon", order=3, **VP),
    "our unipc": lambda _: samplers.UniPCScheduler(prediction_type="epsilon", **VP),
    "our sa": lambda _: samplers.SASolverScheduler(prediction_type="epsilon", tau=0.0, **VP),
    "v3": lambda _: samplers.DPMSolverV3Scheduler(
        LIKE_PP.to_scalars().model_dump(mode="json"), 3, prediction_type="epsilon", **VP
    ),
}
LATCHING = guidance.Adaptive(threshold=-1.0, min_steps=3, min_guided=0.0, reset_history=True)
LIMITED = guidance.Interval(low=0.5, high=4.0, reset_history=True)
LINEAR = guidance.LinearAG(coefficients=((-1.0, 1.0, 1.0),), guided=0.4, reset_history=True)
CACHED = guidance.CFGCache(interval=3, start=5000.0, reset_history=True)


@pytest.mark.parametrize(
    ("method", "scheduler"),
    [
        *((method, kind) for method in (LIMITED, LATCHING) for kind in ("dpm++", "ours")),
        *((LINEAR, kind) for kind in ALONE),
        *((CACHED, kind) for kind in ("unipc", "v3")),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_the_solver_forgets_where_guidance_switches(bench, method, scheduler):
    """There, and only there, the step is of first order: that of a solver that knows nothing."""
    pipe = bench.pipe("sd15")
    first = ALONE[scheduler](scheduler)
    steps, firsts = 9, []

    def compare(inner, output, timestep, sample, **kwargs):
        result = inner(output, timestep, sample, **kwargs)
        first.set_timesteps(steps)
        alone = first.step(output, timestep, sample, return_dict=False)[0]
        firsts.append(torch.allclose(result[0], alone, atol=1e-5))
        return result

    with following(pipe, ALONE[scheduler](scheduler)), Plan(method).attach(pipe) as run:
        undo = hooks.wrap(pipe.scheduler, "step", compare)
        bench.call("sd15", steps=steps)
        undo()
    guided = {
        step
        for step, _, _, state in run.report.to_dict()["events"][method.name]
        if state == "computed" or (method is LINEAR and state == "predicted")
    }
    changed = [i for i in range(1, steps) if (i in guided) != (i - 1 in guided)]
    assert len(changed) == {LIMITED: 2, LATCHING: 1, LINEAR: 1, CACHED: 5}[method]
    ends = {0, steps - 1}  # the last one may be of first order by itself
    assert {i for i, order_1 in enumerate(firsts) if order_1} - ends == set(changed) - ends


# Solvers of several evaluations a step.

STAGED = {
    "rho_rk": (samplers.RhoRK(order=3), None),
    "dpm++ single": (samplers.DPMSolverPPSingle(order=3), None),
    "pseudo": (samplers.PseudoCorrector(heun=3), None),
    "heun": (None, diffusers.HeunDiscreteScheduler(**VP)),
    "dpm++ single, stock": (
        None,
        diffusers.DPMSolverSinglestepScheduler(solver_order=3, final_sigmas_type="zero", **VP),
    ),
    "pndm": (None, diffusers.PNDMScheduler(**VP)),
    "plms": (None, diffusers.PNDMScheduler(skip_prk_steps=True, **VP)),
}


def groups_of(kind, scheduler):
    """The evaluations of each step, by what the solver's definition says."""
    count = len(scheduler.timesteps)
    if kind == "rho_rk":
        sizes = plan_steps(scheduler._levels, 3)
    elif kind == "dpm++ single":
        sizes = plan_groups(scheduler._levels, 3)
    elif kind == "pseudo":
        sizes = [2, 2, 2] + [1] * count
    elif kind == "heun":
        sizes = [2] * count
    elif kind == "pndm":
        sizes = [4, 4, 4] + [1] * count
    elif kind == "plms":
        sizes = [2] + [1] * count
    else:
        starts = [i for i, order in enumerate(scheduler.order_list) if order == 1]
        sizes = [b - a for a, b in itertools.pairwise([*starts, count])]
    ends = [min(end, count) for end in itertools.accumulate(sizes)]
    return [set(range(a, b)) for a, b in itertools.pairwise([0, *ends]) if a < b]


@pytest.mark.parametrize("kind", STAGED)
def test_the_stages_of_a_step_are_guided_all_or_none(bench, kind):
    sampler, scheduler = STAGED[kind]
    pipe = bench.pipe("pixart_sigma")
    for method in (
        guidance.Interval(low=0.8, high=6.0),
        guidance.Adaptive(threshold=-1.0, min_steps=3, min_guided=0.0),
        guidance.Adaptive(threshold=-1.0, min_steps=4, min_guided=0.0),
        guidance.LinearAG(every=1, guided=0.35),
    ):
        plan = Plan(method, *[sampler] * bool(sampler))
        with following(pipe, scheduler or pipe.scheduler), plan.attach(pipe) as run:
            bench.call("pixart_sigma", steps=10)
            groups, count = groups_of(kind, pipe.scheduler), len(pipe.scheduler.timesteps)
        guided = computed_steps(run, method)["uncond", 0]
        assert guided and len(groups) < count
        for group in groups:
            assert not group & guided or group <= guided, (method, group, guided)


PAIRS = (
    diffusers.HeunDiscreteScheduler,
    diffusers.KDPM2DiscreteScheduler,
    diffusers.KDPM2AncestralDiscreteScheduler,
    diffusers.FlowMatchHeunDiscreteScheduler,
)


@pytest.mark.filterwarnings("ignore:__array_wrap__")  # KDPM2 of diffusers under numpy 2
@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("begin", [0, 4])
def test_the_stages_that_caches_keep_apart_are_those_of_guidance(kind, begin):
    """Where ``order`` tells them. Image-to-image begins at a multiple of it."""
    scheduler = kind()
    scheduler.set_timesteps(6)
    for position in range(begin, len(scheduler.timesteps)):
        levels, index = Levels(scheduler), position - begin
        step = Step(index, 11 - begin, position, levels, scheduler.order)
        assert index - start_of(step, scheduler).index == step.stage == index % 2


@pytest.mark.parametrize("begin", [0, 2, 3])
def test_pndm_counts_evaluations_wherever_it_begins(begin):
    """Those of a step of Runge and Kutta go on from one sample, so its own step tells them."""
    scheduler = diffusers.PNDMScheduler(**VP)
    scheduler.set_timesteps(10)
    count = len(scheduler.timesteps) - begin
    starts, given = [], []
    for index, timestep in enumerate(scheduler.timesteps[begin:]):
        step = Step(index, count, begin + index, Levels(scheduler))
        starts.append(start_of(step, scheduler).index)
        x, y = torch.randn(2, 1, 4, 4, 4)
        scheduler.step(y, timestep, x)
        given.append(scheduler.cur_sample is x or index >= len(scheduler.prk_timesteps))
    expected = [max(i for i in range(index + 1) if given[i]) for index in range(count)]
    assert starts == expected


def test_without_stages_a_step_starts_where_it_is():
    for scheduler in (diffusers.DDIMScheduler(**VP), of_kind("ours"), of_kind("unipc")):
        scheduler.set_timesteps(6)
        for index in range(6):
            step = Step(index, 6, index, Levels(scheduler))
            assert start_of(step, scheduler) is step


def test_without_the_option_the_history_stays(bench, same):
    method = guidance.Interval(low=0.5, high=4.0)
    plan = Plan(samplers.DPMSolverPP(order=2), method)
    resetting = Plan(
        samplers.DPMSolverPP(order=2), method.model_copy(update={"reset_history": True})
    )
    outputs = []
    for one in (plan, resetting):
        with one.attach(bench.pipe("flux_cfg")):
            outputs.append(bench.call("flux_cfg", steps=8))
    assert not same(*outputs)


@pytest.mark.parametrize("name", ["sd15", "flux_cfg"])
def test_a_solver_of_one_step_has_nothing_to_forget(bench, same, name):
    outputs = []
    for reset in (False, True):
        with Plan(guidance.Interval(low=0.5, high=4.0, reset_history=reset)).attach(
            bench.pipe(name)
        ):
            outputs.append(bench.call(name, steps=6))
    assert same(*outputs)


@pytest.mark.parametrize("kind", [diffusers.LMSDiscreteScheduler, diffusers.PNDMScheduler])
def test_a_history_that_is_not_known_is_refused(bench, kind):
    pipe = bench.pipe("sd15")
    with (
        following(pipe, kind.from_config(pipe.scheduler.config)),
        pytest.raises(errors.UnsupportedModel, match=f"does not fit {kind.__name__}"),
    ):
        Plan(guidance.Interval(reset_history=True)).attach(pipe)


def test_samples_that_end_apart_are_warned_of(bench, gauged):
    pipe = bench.pipe("flux_cfg")
    run = Plan(guidance.Adaptive(threshold=1.0, min_steps=2, min_guided=0.0)).attach(pipe)
    bench.call("flux_cfg", steps=6, batch=2)
    run.detach()
    middle = sum(gauged[:2]) / 2
    method = guidance.Adaptive(threshold=middle, min_steps=2, min_guided=0.0, reset_history=True)
    with (
        pytest.warns(errors.AccelWarning, match="depends on its neighbours"),
        Plan(method, samplers.DPMSolverPP(order=2)).attach(pipe),
    ):
        bench.call("flux_cfg", steps=6, batch=2)
