"""The tiny pipelines themselves: repeatable, alive in every part, and what they say they are."""

from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from tiny import PIPELINES, PROMPTS
from tiny.facts import Call, blocks, record
from torch import nn

pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast")  # Mochi's

NAMES = list(PIPELINES)
CONTROLLED = {"sd_controlnet": "image", "flux_controlnet": "control_image"}
CONTROLLED["sd3_controlnet"] = "control_image"
CONDITIONING = ("encoder_hidden_states", "cap_feats", "class_labels")

# Rounding between batch sizes, as a share of the spread. Observed: up to 2.7e-5 (Z-Image).
ROUNDING = 1e-4


@cache
def pipeline(name: str) -> DiffusionPipeline:
    return PIPELINES[name].build()


@cache
def sample(name: str, **how: object) -> torch.Tensor:
    return torch.as_tensor(PIPELINES[name].call(pipeline(name), **how))


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return ((one - other).std() / one.std()).item()


@cache
def calls(name: str, guidance: bool = True) -> list[Call]:
    """Return the denoiser calls of a run of 4 steps."""
    return record(PIPELINES[name], pipeline(name), guidance=guidance).denoiser


def evaluate(name: str, **changes: object) -> torch.Tensor:
    """Return what the denoiser answers to its first call of a run, with some arguments changed."""
    with torch.no_grad():
        output = denoiser(name)(**(calls(name)[0].values | changes))
    if isinstance(output, tuple):
        output = output[0]
    output = getattr(output, "sample", output)
    return output[0] if isinstance(output, list) else output


def denoiser(name: str) -> nn.Module:
    return getattr(pipeline(name), PIPELINES[name].denoisers[0])


@pytest.mark.parametrize("name", NAMES)
def test_two_builds_and_calls_give_equal_bits(name: str) -> None:
    again = torch.as_tensor(PIPELINES[name].call(PIPELINES[name].build()))
    assert torch.equal(again, sample(name))
    repeated = torch.as_tensor(PIPELINES[name].call(pipeline(name)))
    assert torch.equal(repeated, again)


@pytest.mark.parametrize("name", NAMES)
def test_output_is_finite_and_of_order_one(name: str) -> None:
    assert torch.isfinite(sample(name)).all()
    assert 0.1 < sample(name).std() < 30
    assert len(sample(name)) == 1


@pytest.mark.parametrize("name", NAMES)
def test_output_depends_on_prompt_noise_and_guidance(name: str) -> None:
    assert distance(sample(name), sample(name, prompts=(PROMPTS[1],), seeds=(0,))) > 0.05
    assert distance(sample(name), sample(name, seed=1)) > 0.05
    if PIPELINES[name].layout != "none":
        assert distance(sample(name), sample(name, guidance=False)) > 0.05


@pytest.mark.parametrize("name", NAMES)
def test_building_and_calling_leave_the_global_noise_alone(name: str) -> None:
    before = torch.random.get_rng_state()
    PIPELINES[name].build()
    PIPELINES[name].call(pipeline(name), steps=2)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("name", [n for n in NAMES if PIPELINES[n].batchable])
def test_a_sample_is_the_same_alone_and_in_company(name: str) -> None:
    pair = sample(name, batch=2)
    second = sample(name, prompts=(PROMPTS[1],), seeds=(1,))
    assert (pair[:1] - sample(name)).abs().max() < ROUNDING * pair.std()
    assert (pair[1:] - second).abs().max() < ROUNDING * pair.std()


@pytest.mark.parametrize("name", NAMES)
def test_denoiser_depends_smoothly_on_time(name: str) -> None:
    key = next(key for key in ("timestep", "t") if key in calls(name)[0].values)
    seen = [call.values[key].max().item() for call in calls(name)]
    template = calls(name)[0].values[key].float()

    def at(share: float) -> torch.Tensor:
        time = min(seen) + share * (max(seen) - min(seen))
        return evaluate(name, **{key: torch.full_like(template, time)})

    assert 1e-4 < distance(at(0.5), at(0.52)) < 0.1
    assert distance(at(0.5), at(1.0)) > 0.02


@pytest.mark.parametrize("name", NAMES)
def test_every_block_matters(name: str) -> None:
    stock = evaluate(name)
    for path, block in blocks(denoiser(name)):
        hook = block.register_forward_hook(lambda _, __, output: louder(output))
        assert distance(stock, evaluate(name)) > 1e-3, path
        hook.remove()
    assert torch.equal(stock, evaluate(name))


def louder(output: object) -> object:
    """Return a block's output with every second entry louder (norms undo a plain factor)."""
    if isinstance(output, tuple):
        return tuple(louder(item) for item in output)
    if not isinstance(output, torch.Tensor):
        return output
    return output * torch.where(torch.arange(output.shape[-1]) % 2 == 0, 1.2, 1.0)


@pytest.mark.parametrize("name", [n for n in NAMES if PIPELINES[n].blocks != "unet"])
def test_every_block_of_a_transformer_changes_its_stream(name: str) -> None:
    for call in record(PIPELINES[name], pipeline(name), steps=2).blocks.values():
        hidden = call.values.get("hidden_states", call.values.get("x"))
        outputs = call.output if isinstance(call.output, tuple) else (call.output,)
        same = [out for out in outputs if out is not None and out.shape == hidden.shape]
        assert distance(hidden, same[-1]) > 0.05, call.name


@pytest.mark.parametrize("name", NAMES)
def test_blocks_give_back_the_streams_in_the_stated_order(name: str) -> None:
    found = {
        streams(call) for call in record(PIPELINES[name], pipeline(name), steps=2).blocks.values()
    }
    hidden, encoder, gone = "hidden_states", "encoder_hidden_states", None
    assert (
        found
        in {
            "unet": [found],
            "hidden": [{(hidden,)}],
            "mmdit": [{(encoder, hidden)}, {(encoder, hidden), (gone, hidden)}],
            "hidden_encoder": [{(hidden, encoder)}],
            "mmdit_joined": [{(encoder, hidden), (hidden,)}],
        }[PIPELINES[name].blocks]
    )


def streams(call: Call) -> tuple[str | None, ...]:
    """Name a block's outputs by the input stream of the same shape."""
    shapes = {
        value.shape: {"x": "hidden_states"}.get(key, key)
        for key, value in call.values.items()
        if key in ("x", "hidden_states", "encoder_hidden_states") and value is not None
    }
    outputs = call.output if isinstance(call.output, tuple) else (call.output,)
    return tuple(shapes.get(getattr(out, "shape", None)) for out in outputs)


@pytest.mark.parametrize(("name", "argument"), CONTROLLED.items())
def test_control_picture_matters(name: str, argument: str) -> None:
    pipe, tiny = pipeline(name), PIPELINES[name]
    picture = torch.full((1, 3, 32, 32), 0.25)
    assert distance(sample(name), tiny.call(pipe, **{argument: picture})) > 0.02
    assert distance(sample(name), tiny.call(pipe, controlnet_conditioning_scale=0.0)) > 0.02


@pytest.mark.parametrize("name", NAMES)
def test_layout_and_order_are_what_a_run_shows(name: str) -> None:
    tiny = PIPELINES[name]
    stated = tiny.order[:2]
    number = 2 if tiny.layout in ("two_calls", "two_calls_no_context", "guider") else 1
    first_step = [call for call in calls(name) if call.step == 0]
    assert len(first_step) == number
    assert {call.context for call in first_step} == contexts(name)
    alone = conditioning(calls(name, guidance=False)[0])[0]
    seen = [part for call in first_step for part in conditioning(call, len(stated) // number)]
    matches = [part.shape == alone.shape and torch.allclose(part, alone) for part in seen]
    assert [*map("cond".__eq__, stated)] == matches


def contexts(name: str) -> set[str | None]:
    tiny = PIPELINES[name]
    if tiny.layout == "guider":
        return {"pred_cond", "pred_uncond"}
    if tiny.layout == "two_calls":
        return {"cond", "uncond"}
    named = {"flux": "cond", "flux_schnell": "cond"}
    return {"cond_uncond" if name in ("ltx", "cogvideox", "mochi") else named.get(name)}


def conditioning(call: Call, parts: int = 1) -> list[torch.Tensor]:
    value = next(call.values[key] for key in CONDITIONING if key in call.values)
    if isinstance(value, list):
        return value
    return [part[:1] for part in value.chunk(parts)]


def test_both_networks_of_wan22_run() -> None:
    names = [call.name for call in calls("wan22")]
    assert names == ["transformer"] * 4 + ["transformer_2"] * 4


@pytest.mark.parametrize("name", ["sd15", "flux_cfg", "wan21", "zimage"])
def test_neighbouring_steps_are_alike(name: str) -> None:
    tape = record(PIPELINES[name], pipeline(name), steps=20, guidance=False)
    outputs = [call.output[0] for call in tape.denoiser]
    outputs = [output[0] if isinstance(output, list) else output for output in outputs]
    steps = [distance(one, other) for one, other in pairwise(outputs)]
    assert 1e-3 < np.median(steps) < 0.15


@pytest.mark.laws_full
@pytest.mark.parametrize("name", NAMES)
def test_pictures_decode(name: str) -> None:
    frames = PIPELINES[name].call(pipeline(name), steps=2, output_type="np")
    assert np.isfinite(frames).all()
    assert np.asarray(frames).shape[-1] == 3


@pytest.mark.laws_full
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_runs_in_half_precision(name: str, dtype: torch.dtype) -> None:
    tiny, pipe = PIPELINES[name], PIPELINES[name].build().to(dtype)
    first, second = (torch.as_tensor(tiny.call(pipe, steps=2)) for _ in range(2))
    assert torch.isfinite(first).all()
    assert torch.equal(first, second)
