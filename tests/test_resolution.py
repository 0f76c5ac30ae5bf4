"""Large pictures by way of smaller ones: what the network is asked, and what comes of it."""

import inspect
from contextlib import contextmanager

import diffusers
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from roster import ROSTER, full
from tiny import PIPELINES

import samplers
from accel import Plan, attention, cache
from accel.errors import AccelWarning, BadInput, Conflict, UnsupportedModel
from accel.resolution import Bottleneck, Pixelsmith
from accel.resolution.cascade import Covering, sizes, weights
from accel.resolution.phases import chequered, with_phases
from accel.resolution.resizing import lanczos, resized
from accel.resolution.stages import shared_out
from accel.seams.canvas import Window
from accel.seams.pictures import latents_from, pixels_from

WHOLE = Bottleneck(steps=(1, 0, 0))
"""One stage in the full size: what the stock pipeline does."""


def served(method, ci=("sd15", "sdxl", "sd3", "flux_cfg", "pixart_sigma", "wan21")):
    """The pipelines that a method acts on; those that CI leaves out are `laws_full`."""
    names = [name for name, tiny in PIPELINES.items() if ROSTER[method].acts(tiny)]
    return pytest.mark.parametrize(
        "name", [pytest.param(name, marks=full(name not in ci)) for name in names]
    )


@contextmanager
def asked(pipe, answer=None):
    """The arguments of each call that reaches a pipeline's network, by name.

    Args:
        pipe: The pipeline.
        answer: Answers in the place of the network, if given, from those arguments.
    """
    calls = []
    network = getattr(pipe, "unet", None) or pipe.transformer
    names = tuple(inspect.signature(type(network).forward).parameters)[1:]
    inner = network.forward

    def forward(*args, **kwargs):
        calls.append(dict(zip(names, args, strict=False)) | kwargs)
        return inner(*args, **kwargs) if answer is None else answer(calls[-1])

    network.forward = forward
    try:
        yield calls
    finally:
        del network.forward


def run(pipe, name, plan, **call):
    """The output under a plan, the report, and what the network was asked."""
    with asked(pipe) as calls, Plan(*plan).attach(pipe) as attached:
        output = torch.as_tensor(PIPELINES[name].call(pipe, **call))
    return output, attached.report, calls


def flattened(value, path=""):
    """All tensors, numbers and texts in an argument, by their path."""
    if isinstance(value, (list, tuple)):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        return {path: value}
    found = {}
    for name, one in value.items():
        found |= flattened(one, f"{path}/{name}")
    return found


# Bottleneck


@served("resolution.Bottleneck")
def test_one_stage_in_the_full_size_is_the_stock_pipeline(bench, name):
    found, report = bench.under(name, Plan(WHOLE), batch=2)
    stock = bench.stock(name, batch=2)
    assert (found - stock).abs().max() <= 1e-5 * stock.abs().max()
    assert report.verdicts[WHOLE.name].state == "ACTIVE"


@served("resolution.Bottleneck")
def test_a_small_stage_asks_what_a_call_for_a_small_picture_asks(bench, name):
    pipe, tiny = bench.pipe(name), PIPELINES[name]
    with asked(pipe) as small:
        tiny.call(pipe, steps=4, height=16, width=16)
    with asked(pipe) as large:
        tiny.call(pipe, steps=4)
    method = Bottleneck(steps=(1, 2, 1), strengths=(1.0, 1.0, 1.0))
    _, _, calls = run(pipe, name, [method], steps=4)
    assert len(calls) == len(large)
    each = len(calls) // 4
    for place, call in enumerate(calls):
        like = (small if each <= place < 3 * each else large)[place % each]
        told, expected = flattened(call), flattened(like)
        assert told.keys() == expected.keys()
        for path, value in expected.items():
            if "timestep" in path:
                continue
            if isinstance(value, torch.Tensor):
                assert told[path].shape == value.shape, path
                if path != f"/{_sample(call)}":
                    assert torch.equal(told[path], value), path
            else:
                assert told[path] == value, path


def _sample(call):
    return next(name for name in ("hidden_states", "sample", "x") if name in call)


@pytest.mark.parametrize("name", ["sd15", "sd3", "flux_cfg", "wan21", "pixart_sigma"])
@pytest.mark.parametrize("steps", [2, 5, 8])
def test_each_stage_has_the_times_of_a_schedule_of_its_own(bench, name, steps):
    """As many steps as its share, the end of a whole schedule of steps / strength."""
    pipe = bench.pipe(name)
    method = Bottleneck(steps=(2, 3, 3), strengths=(1.0, 0.75, 0.5))
    _, _, calls = run(pipe, name, [method], steps=steps)
    told = [float(call["timestep"].flatten()[0]) for call in calls]
    told = told[:: len(told) // steps]
    expected, first = [], True
    sides = (32, 16, 32)
    counts = shared_out(steps, method.steps)
    for count, strength, side in zip(counts, method.strengths, sides, strict=True):
        if count:
            whole = count if first else max(count, round(count / strength))
            with asked(pipe) as stock:
                PIPELINES[name].call(pipe, steps=whole, height=side, width=side)
            times = [float(call["timestep"].flatten()[0]) for call in stock]
            expected += times[:: len(times) // whole][-count:]
            first = False
    assert told == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", ["flux", "sd3", "wan21"])
def test_a_constant_clean_picture_survives_all_stages(bench, name):
    """A flow network whose clean picture is the same everywhere: v = (x − c)/σ."""
    pipe = bench.pipe(name)
    clean, whole = 0.3, pipe.scheduler.config.num_train_timesteps

    def answer(call):
        x = call["hidden_states"]
        told = call["timestep"].flatten()[0]
        sigma = told if name == "flux" else told / whole
        return ((x - clean) / sigma.to(x),)

    with asked(pipe, answer) as calls, Plan(Bottleneck()).attach(pipe):
        found = torch.as_tensor(PIPELINES[name].call(pipe, steps=8))
    assert len({call["hidden_states"].shape for call in calls}) == 2
    assert torch.allclose(found, torch.full_like(found, clean), atol=5e-3)


@pytest.mark.parametrize("name", ["sd3", "flux_cfg"])
def test_rounding_does_not_choose_the_noise_of_a_stage(bench, name):
    """What a stage begins with is computed, and other in its last bits beside other samples."""
    pipe, found = bench.pipe(name), []
    for value in (0.0, 1e-6):
        with (
            asked(pipe, lambda given, value=value: (given["hidden_states"] * 0 + value,)),
            Plan(Bottleneck(scale=0.5), samplers.SASolver()).attach(pipe),
        ):
            found.append(bench.call(name, steps=6))
    assert 0 < (found[0] - found[1]).abs().max() < 1e-3


@given(st.integers(1, 60), st.tuples(*[st.integers(0, 20)] * 2), st.integers(1, 20))
def test_steps_are_shared_out_by_their_shares(steps, shares, last):
    shares = (*shares, last)
    counts = shared_out(steps, shares)
    assert sum(counts) == steps and min(counts) >= 0 and counts[-1] >= 1
    for count, share in zip(counts, shares, strict=True):
        assert abs(count - steps * share / sum(shares)) < 2
        assert count == 0 or share > 0


@given(st.integers(2, 20), st.integers(2, 20), st.integers(2, 20), st.integers(2, 20))
def test_resizing_keeps_what_is_constant(height, width, rows, columns):
    for ahead in ((2, 3), (1, 2, 3)):
        picture = torch.full((*ahead, height, width), 0.7)
        assert torch.allclose(resized(picture, rows, columns), torch.tensor(0.7), atol=1e-5)
        assert resized(picture, rows, columns).shape == (*picture.shape[:-2], rows, columns)
    pixels = torch.full((2, 3, height, width), -0.4)
    assert torch.allclose(lanczos(pixels, rows, columns), torch.tensor(-0.4), atol=1e-5)


def test_frames_of_a_clip_are_resized_one_by_one():
    clip = torch.randn(2, 4, 3, 8, 6)
    found = resized(clip, 4, 12)
    frames = [resized(clip[:, :, at], 4, 12) for at in range(3)]
    assert torch.equal(found, torch.stack(frames, 2))


@pytest.mark.parametrize("name", ["sd15", "flux_cfg"])
@pytest.mark.parametrize(
    "method",
    [
        cache.EasyCache(threshold=1e9, warmup=2),
        cache.FirstBlock(threshold=1e9, warmup=2),
    ],
    ids=lambda method: method.name,
)
def test_caches_start_anew_with_each_stage(bench, name, method):
    if name == "sd15" and method.name == "cache.FirstBlock":
        method = cache.DeepCache(interval=100)
    stages = Bottleneck(steps=(3, 4, 3))
    _, report = bench.under(name, Plan(stages, method), steps=10)
    tally = next(one for one in report.tallies if one.method == method.name)
    computed = {event.step for event in tally.events if event.state == "computed"}
    assert {0, 3, 7} <= computed
    assert {event.step for event in tally.events} - computed, "nothing was saved"


def test_shifts_of_a_flow_are_those_that_are_asked_for(bench):
    """σ' = sσ/(1 + (s − 1)σ) over an even schedule."""
    _, _, calls = run(
        bench.pipe("flux"), "flux", [Bottleneck(steps=(1, 1, 2), shifts=(9.0, 6.0, 3.0))], steps=8
    )
    told = [float(call["timestep"].flatten()[0]) for call in calls]
    expected = []
    for count, whole, shift in ((2, 2, 9.0), (2, 2, 6.0), (4, 7, 3.0)):
        even = torch.linspace(1.0, 1.0 / whole, whole)[-count:]
        expected += (shift * even / (1 + (shift - 1) * even)).tolist()
    assert told == pytest.approx(expected, rel=1e-4)


def test_shifts_are_of_flows(bench):
    with pytest.raises(UnsupportedModel, match="shifts are of flows"):
        run(bench.pipe("sd15"), "sd15", [Bottleneck(shifts=(9.0, 6.0, 9.0))])


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"steps": (1, 1, 0)}, "end in the small size"),
        ({"steps": (0, 0, 0)}, "no share above 0"),
        ({"strengths": (1.0, 0.0, 0.5)}, "greater than 0"),
        ({"scale": 1.5}, "less than or equal to 1"),
    ],
)
def test_bad_settings_of_stages_say_what_is_needed(given, says):
    with pytest.raises(ValidationError, match=says):
        Bottleneck(**given)


# both


METHODS = (Bottleneck(), Pixelsmith(base=16))


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("sd_controlnet", "ControlNet"),
        ("sd_img2img", "starts from a picture"),
        ("sd_inpaint", "second picture beside the latents"),
        ("qwenimage", "weighted mean"),
        ("sd35_skip_layer", "beside its guidance"),
        ("wan22", "changes from one network to another|can be cut"),
        ("animatediff", "can be cut"),
    ],
)
def test_what_does_not_start_from_noise_alone_is_refused(bench, method, name, says):
    if isinstance(method, Pixelsmith):
        says = f"{says}|latents it does not know"
    with pytest.raises(UnsupportedModel, match=says):
        run(bench.pipe(name), name, [method], steps=6)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_latents_that_a_callback_changes_are_refused(bench, method):
    def change(_pipe, _step, _timestep, inputs):
        return {"latents": inputs["latents"] * 1.1}

    with pytest.raises(UnsupportedModel, match="changes its latents between two steps"):
        run(bench.pipe("sd15"), "sd15", [method], callback_on_step_end=change)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_schedules_of_the_users_own_are_refused(bench, method):
    with pytest.raises(BadInput, match="leave sigmas out of the call"):
        run(bench.pipe("flux"), "flux", [method], sigmas=[1.0, 0.9, 0.3, 0.1])


def test_schedulers_that_make_no_plain_steps_are_refused(bench):
    pipe = PIPELINES["sd15"].build()
    pipe.scheduler = diffusers.HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(UnsupportedModel, match="2 times a step"):
        Plan(Bottleneck()).attach(pipe)
    with pytest.raises(UnsupportedModel, match="looks back on steps"):
        Plan(Pixelsmith(base=16)).attach(pipe)
    with pytest.raises(Conflict, match=r"resolution\.Pixelsmith and samplers\.DPMSolverPP"):
        Plan(Pixelsmith(base=16), samplers.DPMSolverPP()).attach(bench.pipe("sd15"))


# Pixelsmith


@served("resolution.Pixelsmith")
def test_a_picture_no_larger_than_the_base_is_the_stock_pipelines(bench, name):
    plan = Plan(Pixelsmith(base=32, slider=0.0))
    found, report = bench.under(name, plan, batch=2)
    stock = bench.stock(name, batch=2)
    assert (found - stock).abs().max() <= 1e-5 * stock.abs().max()
    verdict = report.verdicts["resolution.Pixelsmith"]
    assert verdict.state == "INACTIVE"
    assert verdict.detail == "the picture was no larger than the base"


@served("resolution.Pixelsmith")
def test_the_network_never_sees_more_than_the_base(bench, name):
    pipe, tiny = bench.pipe(name), PIPELINES[name]
    with asked(pipe) as small:
        tiny.call(pipe, steps=2, height=16, width=16)
    _, report, calls = run(pipe, name, [Pixelsmith(base=16)], steps=2)
    sample = _sample(calls[0])
    assert {call[sample].shape for call in calls} == {small[0][sample].shape}
    patches = int(report.verdicts["resolution.Pixelsmith"].detail.split()[-2].replace(",", ""))
    assert len(calls) == (patches + 2) * (len(small) // 2)
    assert patches >= 2 * 4  # four of them cover the picture, at best, at each step


def test_a_backend_of_attention_goes_beside_patches_and_what_knows_tokens_does_not(bench):
    """It holds nothing from one call to the next, and asks for no place of a token."""
    backend = attention.Backend(backend="_native_math")
    alone, _, _ = run(bench.pipe("flux"), "flux", [Pixelsmith(base=16)], steps=2)
    together, report, _ = run(bench.pipe("flux"), "flux", [Pixelsmith(base=16), backend], steps=2)
    assert report.verdicts["attention.Backend"].state == "ACTIVE"
    assert torch.allclose(alone, together, atol=1e-3) and not torch.equal(alone, 0 * alone)
    with pytest.raises(Conflict, match=r"attention\.Radial and resolution\.Pixelsmith .*'tokens'"):
        Plan(Pixelsmith(base=16), attention.Radial()).attach(bench.pipe("flux"))


def test_sdxl_is_told_the_size_of_a_patch(bench):
    _, _, calls = run(bench.pipe("sdxl"), "sdxl", [Pixelsmith(base=16)], steps=2)
    with asked(bench.pipe("sdxl")) as small:
        PIPELINES["sdxl"].call(bench.pipe("sdxl"), steps=2, height=16, width=16)
    for call in calls:
        told = call["added_cond_kwargs"]["time_ids"]
        assert torch.equal(told, small[0]["added_cond_kwargs"]["time_ids"])


SIDES = st.integers(1, 24)


@given(SIDES, SIDES, SIDES, st.sampled_from([1, 2, 4]), st.integers(0, 9))
def test_patches_cover_a_picture_and_begin_at_whole_tokens(height, width, side, grain, seed):
    height, width = height * grain, width * grain
    rows, columns = (max(min(side, one) // grain, 1) * grain for one in (height, width))
    windows = list(Covering(height, width, rows, columns, grain, seed))
    again = list(Covering(height, width, rows, columns, grain, seed))
    assert windows == again
    counted = torch.zeros(height, width, dtype=torch.int)
    for window in windows:
        assert window.size(height, width) == (rows, columns)
        assert window.top >= 0 and window.bottom <= height
        assert window.left >= 0 and window.right <= width
        assert window.top % grain == window.left % grain == 0
        part = window.of(counted)
        assert bool((part == 0).any()), "it covers nothing new"
        part.add_(1)
    assert bool((counted >= 1).all())


@given(SIDES, SIDES, st.integers(0, 12))
def test_a_patch_counts_in_full_but_near_an_inner_edge(rows, columns, border):
    whole = weights(Window(0, rows, 0, columns), rows, columns, border)
    assert torch.equal(whole, torch.ones(rows, columns))
    inner = weights(Window(5, 5 + rows, 0, columns), rows + 9, columns, border)
    assert bool((inner > 0).all()) and bool((inner <= 1).all())
    assert torch.equal(inner, inner.flip(0))
    assert torch.allclose(inner[0], torch.tensor(1.0 / (border + 1)))
    middle = inner[border : rows - border]
    assert torch.equal(middle, torch.ones_like(middle))


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 16), st.sampled_from([1, 2]))
def test_sizes_double_from_the_base_to_what_is_asked_for(height, width, side, grain):
    height, width, side = height * grain, width * grain, side * grain
    found = sizes(height, width, side, grain)
    assert found[-1] == (height, width)
    assert all(one % grain == 0 for size in found for one in size)
    area = [rows * columns for rows, columns in found]
    assert area == sorted(area)
    if height * width <= side * side:
        assert len(found) == 1
    else:
        shrink = (height * width) ** 0.5 / side
        assert 2 ** (len(found) - 2) < shrink + 1e-9 <= 2 ** (len(found) - 1) + 1e-6


def test_phases_meet_in_the_middle_and_amounts_stay():
    picture, guide = torch.randn(2, 2, 3, 8, 8)
    mixed = with_phases(picture, guide)
    own, other, found = (torch.fft.fft2(one) for one in (picture, guide, mixed))
    assert torch.allclose(found.abs(), own.abs(), atol=1e-4)
    both = torch.sgn(own) + torch.sgn(other)
    clear = both.abs() > 0.1
    assert torch.allclose(torch.sgn(found)[clear], torch.sgn(both)[clear], atol=1e-3)
    assert torch.allclose(with_phases(picture, picture), picture, atol=1e-5)
    assert torch.allclose(with_phases(picture, -picture), picture, atol=1e-5)


def test_half_of_the_pixels_are_the_guides_and_the_other_half_at_the_next_step():
    picture, guide = torch.zeros(1, 2, 5, 7), torch.ones(1, 2, 5, 7)
    even, odd = (chequered(picture, guide, shift) for shift in (0, 1))
    assert torch.equal(even + odd, guide)
    assert even[0, 0, 0, 0] == 1 and even[0, 0, 0, 1] == 0 and even[0, 0, 1, 1] == 1


def test_the_autoencoder_works_in_tiles_for_large_pictures_alone(bench):
    pipe = bench.pipe("sd15")
    seen = []

    def look(pipe, _step, _timestep, _inputs):
        seen.append(pipe.vae.use_tiling)
        return {}

    with Plan(Pixelsmith(base=16)).attach(pipe):
        PIPELINES["sd15"].call(pipe, steps=2, callback_on_step_end=look)
    assert seen == [True, True] and not pipe.vae.use_tiling
    with pytest.warns(AccelWarning, match="no larger"), Plan(Pixelsmith(base=32)).attach(pipe):
        PIPELINES["sd15"].call(pipe, steps=2, callback_on_step_end=look)
    assert seen[2:] == [False, False]


def test_a_base_below_one_token_is_refused(bench):
    with pytest.raises(BadInput, match="set base to at least"):
        Plan(Pixelsmith(base=1)).attach(bench.pipe("flux"))


def test_noise_that_is_asked_for_is_refused(bench):
    with pytest.raises(UnsupportedModel, match="adds noise"):
        run(bench.pipe("sd15"), "sd15", [Pixelsmith(base=16)], eta=0.5)


def test_half_of_a_wholly_guided_picture_is_the_smaller_one(bench):
    """Slider 1: behind the last step every other pixel is that of the guide, which is clean."""
    pipe, tiny = bench.pipe("sd15"), PIPELINES["sd15"]
    noise = torch.randn(1, 4, 16, 16)
    small = {"height": 16, "width": 16, "latents": noise[..., :8, :8]}
    base = torch.as_tensor(tiny.call(pipe, steps=4, **small))
    pixels = lanczos(pixels_from(pipe, base), 32, 32)
    guide = latents_from(pipe, pixels)
    method = Pixelsmith(base=16, slider=1.0)
    found, _, _ = run(pipe, "sd15", [method], steps=4, latents=noise)
    assert torch.allclose(chequered(found, guide, 1), found, atol=1e-5)
    assert not torch.allclose(chequered(found, guide, 0), found, atol=1e-2)
