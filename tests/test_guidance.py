"""Guidance: spaces, latching per sample, intervals, and branches that disappear in mid-run."""

import diffusers
import pytest
import torch
from test_laws_counts import computed_steps, counting
from tiny import PIPELINES

from accel import Plan, cache, errors, guidance
from accel.seams.spaces import convert, matching
from accel.trajectory import Levels, Step

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


@pytest.mark.parametrize("method", [guidance.Adaptive(), guidance.Interval()])
@pytest.mark.parametrize(("name", "call"), [("flux", {}), ("sd15", {"guidance": False})])
def test_without_guidance_there_is_nothing_to_leave_out(bench, same, name, call, method):
    with (
        pytest.warns(errors.AccelWarning, match="guidance is off or embedded"),
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
