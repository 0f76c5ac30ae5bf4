"""Direct inversion: the source comes back to the bit, the edit is left alone."""

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny import PROMPTS, Ask

import samplers
from accel import Plan, cache, edit, errors, guidance, load
from accel.edit import inversion
from accel.quality import psnr
from accel.scenes import HELD_OUT, scene
from accel.scenes import picture as scene_picture
from accel.seams.pictures import TOKENS as TOKENS_OF
from accel.seams.pictures import decode
from accel.seams.solver_maps import maps_of

SOURCE, TARGET = "a red fox in the snow", "two boats on a lake"
STEPS = 6
NAMES = ("sd15", "sd15_v", "sdxl", "sd3", "flux_cfg", "chroma")
TOKENS = {"max_sequence_length": 48}
MORE = {"sd3": TOKENS, "flux_cfg": TOKENS, "chroma": TOKENS}


def picture():
    return Ask([PROMPTS[0]], [0], guidance=True).pictures(32, 32)


def inverted(pipe, name, steps=STEPS, **call):
    return edit.invert(pipe, picture(), SOURCE, steps=steps, **MORE.get(name, {}), **call)


def edited(source, prompt=TARGET, **call):
    """Latents after each step of an edit, and the last ones."""
    seen = []

    def watch(pipe, step, timestep, state):
        seen.append(state["latents"].clone())
        return {}

    call = {"guidance": 5.0, "output_type": "latent", "callback_on_step_end": watch} | call
    return seen, source.edit(prompt, **call)[0]


# The source comes back, the edit is left alone.


@pytest.mark.parametrize("scale", [1.0, 1.5, 9.0])
@pytest.mark.parametrize("name", NAMES)
def test_the_source_branch_reproduces_every_latent(bench, name, scale):
    source = inverted(bench.pipe(name), name)
    assert len(source.latents) == STEPS + 1
    seen, final = edited(source, guidance=scale)
    for latents, kept in zip(seen, source.latents[1:], strict=True):
        assert torch.equal(latents[:1], kept)
    assert torch.equal(final[:1], source.latents[-1])
    assert not torch.equal(final[1:], source.latents[-1])


@pytest.mark.parametrize("name", NAMES)
def test_the_source_row_is_the_picture_that_the_autoencoder_gives_back(bench, name):
    pipe = bench.pipe(name)
    source = inverted(pipe, name)
    again = source.reconstruct("pt")
    encoded = pipe.vae.encode(2 * picture() - 1).latent_dist.mode()
    stock = pipe.vae.decode(encoded).sample / 2 + 0.5
    assert torch.allclose(again, stock.clamp(0, 1), atol=1e-5)  # alone it rounds otherwise
    kept, target = source.edit(TARGET, guidance=3.0, output_type="pt").images
    assert torch.equal(kept, again[0])
    assert not torch.allclose(target, again[0], atol=1e-2)
    assert source.edit(TARGET).images[0].tobytes() == source.reconstruct()[0].tobytes()


@pytest.mark.parametrize("name", ["scenes-flux", "scenes-unet"])
def test_the_bundled_models_give_a_scene_back_exactly(name):
    """A held-out picture, at few steps: every latent, and every byte of the picture."""
    pipe, call = load(name)
    pipe.set_progress_bar_config(disable=True)
    shown = scene(HELD_OUT[0])
    image = Image.fromarray(scene_picture(shown, 128))
    more = {key: call[key] for key in ("max_sequence_length",) if key in call}
    source = edit.invert(pipe, image, shown.caption, steps=2, **more)
    seen, final = edited(source, "a boat on a lake at night", guidance=3.5)
    for latents, kept in zip(seen, source.latents[1:], strict=True):
        assert torch.equal(latents[:1], kept)
    kept, target = decode(pipe, final, source.height, source.width, "pil")
    back = source.reconstruct()[0]
    assert kept.tobytes() == back.tobytes() != target.tobytes()
    assert psnr(np.asarray(back), np.asarray(image)) > 20


ALONE = {
    "sd15": {"guidance_scale": 5.0},
    "sd3": {"guidance_scale": 5.0},
    "flux_cfg": {"true_cfg_scale": 5.0, "negative_prompt": ""},
}


@pytest.mark.parametrize("name", ALONE)
def test_the_target_row_is_what_it_is_alone(bench, name):
    pipe = bench.pipe(name)
    source = inverted(pipe, name)
    _, final = edited(source)
    alone = pipe(
        TARGET,
        latents=source.latents[0],
        num_inference_steps=STEPS,
        height=32,
        width=32,
        output_type="latent",
        **ALONE[name],
        **MORE.get(name, {}),
    )[0]
    assert torch.allclose(final[1:], alone, rtol=1e-4, atol=1e-4)


def test_refining_comes_nearer_to_the_latents_that_lead_back(bench):
    """Without the overwriting: the source's own prompt, unguided, as the row that is left alone."""
    misses = []
    for refine in (0, 2, 6):
        source = inverted(bench.pipe("sd3"), "sd3", refine=refine)
        _, final = edited(source, SOURCE, guidance=1.0)
        misses.append(float((final[1:] - source.latents[-1]).norm()))
    assert misses[0] > misses[1] > misses[2]
    assert misses[2] < 0.1 * misses[0]


@pytest.mark.parametrize("name", ["sd15", "sd3", "flux_cfg"])
def test_negative_prompts_reach_the_target(bench, name):
    source = inverted(bench.pipe(name), name)
    plain, other = edited(source)[1], edited(source, negative_prompt="blurry")[1]
    assert torch.equal(plain[:1], other[:1])
    assert not torch.equal(plain[1:], other[1:])


@pytest.mark.parametrize("name", ["sd15", "flux_cfg"])
def test_nothing_is_left_behind(bench, same, name):
    pipe = bench.pipe(name)
    scheduler = pipe.scheduler
    first = edited(inverted(pipe, name))[1]
    assert pipe.scheduler is scheduler
    assert same(bench.call(name), bench.stock(name))
    assert same(edited(inverted(pipe, name))[1], first)


def test_an_edit_that_breaks_off_leaves_nothing(bench, same):
    pipe = bench.pipe("sd15")
    source = inverted(pipe, "sd15")

    def fail(pipe, step, timestep, state):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        source.edit(TARGET, callback_on_step_end=fail)
    assert same(bench.call("sd15"), bench.stock("sd15"))
    assert torch.equal(edited(source)[1][:1], source.latents[-1])


PLANS = {
    "sd15": Plan(cache.EasyCache(threshold=1e6, warmup=2)),
    "sd3": Plan(guidance.Adaptive(threshold=-1.0, min_steps=2, min_guided=0.0)),
    "flux_cfg": Plan(cache.FirstBlock(threshold=1e6, warmup=2), guidance.CFGCache(interval=2)),
}


@pytest.mark.parametrize("name", PLANS)
def test_an_edit_under_a_plan_gives_the_source_back(bench, name):
    pipe = bench.pipe(name)
    source = inverted(pipe, name)
    with PLANS[name].attach(pipe) as run:
        _, final = edited(source)
    assert torch.equal(final[:1], source.latents[-1])
    assert all(verdict.state == "ACTIVE" for verdict in run.report.verdicts.values())


# Solvers as maps.

VP = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
ONE_STEP = {
    "ddim": diffusers.DDIMScheduler(**VP, clip_sample=False),
    "ddim v": diffusers.DDIMScheduler(**VP, clip_sample=False, prediction_type="v_prediction"),
    "ddim x0": diffusers.DDIMScheduler(
        **VP, clip_sample=False, prediction_type="sample", set_alpha_to_one=False
    ),
    "euler": diffusers.EulerDiscreteScheduler(**VP),
    "euler karras": diffusers.EulerDiscreteScheduler(**VP, use_karras_sigmas=True),
    "flow": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    "dpm++ 1": diffusers.DPMSolverMultistepScheduler(**VP, solver_order=1),
    "ours": samplers.DPMSolverPPScheduler(
        order=1, prediction_type="flow_prediction", num_train_timesteps=1000
    ),
}


@pytest.mark.parametrize("scheduler", ONE_STEP.values(), ids=ONE_STEP)
@settings(max_examples=8)
@given(seed=st.integers(0, 1000), steps=st.integers(2, 12))
def test_a_step_gone_back_is_where_it_came_from(scheduler, seed, steps):
    maps = maps_of(scheduler, (steps,), {})
    scheduler.set_timesteps(steps)
    draw = torch.Generator().manual_seed(seed)
    for index, timestep in enumerate(scheduler.timesteps):
        x, y = (torch.randn(1, 2, 4, 4, generator=draw) for _ in range(2))
        if hasattr(scheduler, "scale_model_input"):
            scaled = scheduler.scale_model_input(x, timestep)
            assert torch.allclose(scaled, maps.scales[index] * x, rtol=1e-5)
        after = scheduler.step(y, timestep, x, return_dict=False)[0]
        back = maps.back(index, after, y)
        scale = max(1.0, abs(maps.added[index] / maps.kept[index]))
        assert (back - x).abs().max() <= 1e-4 * scale


NO_MAP = {
    "multistep": diffusers.DPMSolverMultistepScheduler(**VP),
    "unipc": diffusers.UniPCMultistepScheduler(**VP),
    "ours": samplers.DPMSolverPPScheduler(
        order=2, prediction_type="epsilon", num_train_timesteps=1000
    ),
    "noise": diffusers.DDPMScheduler(**VP),
    "ancestral": diffusers.EulerAncestralDiscreteScheduler(**VP),
    "clips": diffusers.DDIMScheduler(**VP, clip_sample=True),
    "thresholds": diffusers.DDIMScheduler(**VP, clip_sample=False, thresholding=True),
    "heun": diffusers.HeunDiscreteScheduler(**VP),
    "ends at x0": diffusers.DDIMScheduler(**VP, clip_sample=False, prediction_type="sample"),
    "lms": diffusers.LMSDiscreteScheduler(**VP),
}


@pytest.mark.parametrize("scheduler", NO_MAP.values(), ids=NO_MAP)
def test_a_solver_that_is_no_map_is_refused(scheduler):
    state = torch.get_rng_state()
    with pytest.raises(errors.UnsupportedModel, match="cannot be inverted step by step"):
        maps_of(scheduler, (6,), {})
    assert torch.equal(state, torch.get_rng_state())


# Refusals.


def test_a_multistep_pipeline_is_refused_and_left_as_it_was(bench, same):
    pipe = bench.pipe("sd15")
    before = pipe.scheduler
    pipe.scheduler = diffusers.UniPCMultistepScheduler.from_config(before.config)
    with pytest.raises(errors.UnsupportedModel, match="UniPCMultistepScheduler cannot be inverted"):
        inverted(pipe, "sd15")
    pipe.scheduler = before
    assert same(bench.call("sd15"), bench.stock("sd15"))


@pytest.mark.parametrize("name", ["sd_img2img", "pixart_sigma", "qwenimage", "wan21"])
def test_other_pipelines_are_refused_by_name(bench, name):
    pipe = bench.pipe(name)
    with pytest.raises(errors.UnsupportedModel, match=type(pipe).__name__):
        edit.invert(pipe, picture(), SOURCE)


def test_under_a_plan_nothing_is_inverted(bench):
    run = Plan(cache.EasyCache()).attach(bench.pipe("sd15"))
    with pytest.raises(errors.Conflict, match="detach the plan"):
        inverted(bench.pipe("sd15"), "sd15")
    run.detach()


def test_noise_and_many_prompts_are_refused(bench):
    for call in ({"eta": 0.5}, {"prompt": [SOURCE, TARGET]}):
        with pytest.raises(errors.BadInput, match="one picture, told by one prompt"):
            edit.invert(bench.pipe("sd15"), picture(), call.pop("prompt", SOURCE), steps=2, **call)


def test_another_schedule_or_solver_is_refused(bench):
    pipe = bench.pipe("sd15")
    source = inverted(pipe, "sd15")
    with pytest.raises(errors.BadInput, match="inverted along 6 timesteps"):
        source.edit(TARGET, num_inference_steps=5)
    before = pipe.scheduler
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(before.config)
    with pytest.raises(errors.BadInput, match="inverted with DDIMScheduler"):
        source.edit(TARGET)
    pipe.scheduler = before
    with (
        pytest.raises(errors.BadInput, match="inverted with DDIMScheduler"),
        Plan(samplers.DPMSolverPP(order=2)).attach(pipe),
    ):
        source.edit(TARGET)


def test_another_size_is_refused(bench):
    source = inverted(bench.pipe("sd15"), "sd15")
    with pytest.raises(errors.BadInput, match="leave height and width"):
        source.edit(TARGET, height=64, width=64)


def test_the_pipelines_that_are_known_are_there_and_told():
    assert all(hasattr(diffusers, name) for name in TOKENS_OF)
    assert all(name in inversion.__doc__ for name in TOKENS_OF)
