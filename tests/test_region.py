"""Edits of a region: exact where they must be, counted, without a trace, nothing lost."""

import copy
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from accelerate import cpu_offload
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import PIPELINES, PROMPTS, Ask
from torch import nn

import samplers
from accel import Plan, cache, edit, errors, guidance, load, memory, region
from accel import tokens as token_methods
from accel.region.active import Active, Pyramid
from accel.region.masks import boxed, changed, dilated, drawn, level, onto, touched
from accel.region.pictures import Pictures, Sparse, written
from accel.region.recording import Changes, Kept
from accel.seams.denoisers import Row
from accel.seams.spatial import group_moments

BEFORE, AFTER = "a red fox in the snow", "two boats on a lake"
STEPS = 3
UNETS = ("sd15", "sdxl", "sd_img2img", "sd_inpaint", "sd_controlnet")
TOKENS = ("sd3", "flux_cfg", "wan21")
QUARTER = (0.25, 0.25, 0.25, 0.25)
WHOLE = (0, 0, 1, 1)


def arguments(name, prompt=BEFORE, **more):
    given = PIPELINES[name].inputs(Ask([prompt], [0], guidance=True))
    return {"num_inference_steps": STEPS, "output_type": PIPELINES[name].output} | given | more


def noise(seed=0):
    return torch.Generator().manual_seed(seed)


def texts(name, prompt=AFTER):
    """The prompt in the form in which a family takes it."""
    return arguments(name, prompt)["prompt"]


def dense(bench, name, **changes):
    pipe = bench.pipe(name)
    return torch.as_tensor(pipe(**(arguments(name) | changes), generator=noise())[0])


def recorded(bench, name, plan=None, **fields):
    edits = edit.sparse(bench.pipe(name), plan, **fields)
    original = edits.record(**arguments(name), generator=noise())
    return edits, torch.as_tensor(original.images)


def picture(edited):
    return torch.as_tensor(edited.images)


# The equations.


@pytest.mark.parametrize("name", [*UNETS, *TOKENS])
def test_an_edit_without_a_difference_is_the_original(bench, same, name):
    before = dense(bench, name)
    edits, original = recorded(bench, name)
    with edits:
        assert same(original, before)
        if name == "sd_inpaint":  # whose own mask is a region
            return
        again = edits.edit()
        assert same(picture(again), before)
        assert again.share == 0
        assert again.report["calls"] == 0
        assert again.report["verdicts"]["region.SIGE"]["state"] == "ACTIVE"


@pytest.mark.parametrize("name", [*UNETS, *TOKENS])
def test_a_full_region_with_statistics_of_its_own_is_dense(bench, name):
    expected = dense(bench, name, prompt=texts(name))
    edits, _ = recorded(bench, name, most=1.0)
    with edits:
        found = edits.edit(texts(name), region=WHOLE)
    assert found.share == 1
    torch.testing.assert_close(picture(found), expected, rtol=1e-3, atol=1e-3)


def test_statistics_of_the_original_are_another_picture(bench):
    expected = dense(bench, "sd15", prompt=texts("sd15"))
    edits, _ = recorded(bench, "sd15", statistics="original", most=1.0)
    with edits:
        found = picture(edits.edit(texts("sd15"), region=WHOLE))
    assert (found - expected).abs().max() > 1e-2


def test_a_trained_model_makes_what_it_would_have_made():
    """A house painted blue: by the statistics of its original there is hardly a house."""
    red, blue = (f"grassy hills with a {paint} house on the left" for paint in ("red", "blue"))
    pipe, call = load("scenes-unet")
    call |= {"num_inference_steps": 10, "output_type": "pt"}
    expected = pipe(blue, **call, generator=noise(3))[0]
    apart = {}
    for statistics in ("recomputed", "original"):
        with edit.sparse(pipe, statistics=statistics) as edits:
            original = edits.record(red, **call, generator=noise(3)).images
            found = edits.edit(blue, region=(0, 0.4, 0.5, 0.5))
        spot = (..., slice(52, 115), slice(0, 64))
        change = (expected - original)[spot].norm()
        apart[statistics] = (found.images - expected)[spot].norm() / change
        assert found.share < 0.5
    assert apart["recomputed"] < 0.2 < apart["original"], apart


@pytest.mark.parametrize("name", ["sd15", "flux_cfg"])
def test_above_the_limit_everything_is_computed_as_it_is(bench, same, name):
    expected = dense(bench, name, prompt=texts(name))
    edits, _ = recorded(bench, name)
    with edits:
        found = edits.edit(texts(name), region=WHOLE)
    assert same(picture(found), expected)
    assert found.share == 1


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "flux_cfg"])
def test_what_lies_outside_is_the_original_to_the_bit(bench, name):
    edits, original = recorded(bench, name, block=1, dilate=0)
    with edits:
        found = edits.edit(texts(name), region=(0, 0, 0.125, 0.125))
    changed_share = (picture(found) != original).float().mean()
    assert 0 < changed_share <= found.share + 1e-6
    assert found.share < 0.1


def test_the_picture_is_decoded_anew_in_part(bench, same):
    """Pictures of 64: where the whole is decoded anew or in part, with equal statistics."""
    wide = {"height": 64, "width": 64, "output_type": "pt"}
    expected = dense(bench, "sd15", prompt=texts("sd15"), **wide)
    pipe = bench.pipe("sd15")
    for fields, tolerance in (({"most": 1.0}, 1e-3), ({"statistics": "original"}, None)):
        with edit.sparse(pipe, **fields) as edits:
            original = edits.record(**arguments("sd15", **wide), generator=noise())
            assert same(edits.edit().images, original.images)
            if tolerance is not None:
                whole = edits.edit(texts("sd15"), region=WHOLE).images
                torch.testing.assert_close(whole, expected, rtol=tolerance, atol=tolerance)
            part = edits.edit(texts("sd15"), region=(0, 0, 0.1, 0.1)).images
            differs = (part != original.images).any(1)[0]
            assert differs[:8, :8].any()
            assert not differs[32:, 32:].any()


whole_numbers = st.integers(-4, 4)


@settings(max_examples=25)
@given(
    side=st.tuples(st.integers(4, 9), st.integers(4, 9)),
    stride=st.sampled_from([1, 2]),
    block=st.integers(1, 5),
    hooked=st.booleans(),
    seed=st.integers(0, 99),
)
def test_a_single_convolution_is_exact(side, stride, block, hooked, seed):
    """Whole numbers, so that sums in any order are equal: 0 error, as the authors say."""
    generator = noise(seed)
    conv = nn.Conv2d(3, 4, 3, stride=stride, padding=1)
    for values in (conv.weight.data, conv.bias.data):
        values.copy_(torch.randint(-4, 5, values.shape, generator=generator))
    if hooked:  # somebody else's hook: it is called, with windows
        conv.forward = partial(conv.forward)
    before = torch.randint(-4, 5, (2, 3, *side), generator=generator).float()
    after = before.clone()
    after[:, :, 1:3, 2:4] += 1
    mask = changed(before[0], after[0], 0.5)
    network = nn.ModuleDict({"conv": conv})
    parts = Pictures(network, "region.SIGE", recomputed=False, keep="native")
    undos = list(parts.attach())
    kept = Kept((Row("cond", 0), Row("cond", 1)))
    grid = tuple(before.shape[-2:])
    with parts.recording(kept, before):
        original = conv(before)
    active = Active(mask, Pyramid(block, 0.0, 1, 1), torch.device("cpu"))
    flowing = after.flatten(2).index_select(2, active.pixels(grid)).unsqueeze(-1)
    with parts.computing(Sparse(kept, [0, 1], active, None)):
        answer = conv(flowing)
    for undo in undos:
        undo()
    assert conv.padding == (1, 1)
    assert torch.equal(written(answer, original, active), conv(after))


@settings(max_examples=25)
@given(
    seed=st.integers(0, 99),
    centre=st.sampled_from([0.0, 3.0, 300.0]),
    block=st.integers(1, 5),
    spot=st.tuples(st.integers(0, 6), st.integers(0, 6)),
)
def test_a_single_norm_is_that_of_the_whole_edit(seed, centre, block, spot):
    generator = noise(seed)
    norm = nn.GroupNorm(3, 6)
    for values in (norm.weight.data, norm.bias.data):
        values.copy_(torch.randn(values.shape, generator=generator))
    before = centre + torch.randn(2, 6, 7, 7, generator=generator)
    after = before.clone()
    after[:, :, spot[0], spot[1]] += 5
    parts = Pictures(nn.ModuleDict({"norm": norm}), "region.SIGE", recomputed=True, keep="native")
    parts._grids[49] = (7, 7)  # what a convolution beside it would have told
    undos = list(parts.attach())
    kept = Kept((Row("cond", 0), Row("cond", 1)))
    with parts.recording(kept, before):
        norm(before)
    mask = torch.zeros(7, 7, dtype=torch.bool)
    mask[spot] = True
    active = Active(mask, Pyramid(block, 0.0, 0, 1), torch.device("cpu"))
    pixels = active.pixels((7, 7))
    flowing = after.flatten(2).index_select(2, pixels).unsqueeze(-1)
    changes = Changes()
    with parts.computing(Sparse(kept, [0, 1], active, changes)):
        answer = norm(flowing)
    changes.apply()
    for undo in undos:
        undo()
    expected = norm(after).flatten(2).index_select(2, pixels)
    torch.testing.assert_close(answer.squeeze(-1), expected, rtol=1e-3, atol=1e-3)
    variance, mean, inputs = kept.values["norm"]  # the edit is the original of the next one
    torch.testing.assert_close(inputs, after.flatten(2).transpose(1, 2))
    torch.testing.assert_close((variance, mean), group_moments(norm, after), rtol=1e-4, atol=1e-4)


def test_weights_that_come_layer_by_layer_are_not_read():
    here = {"onload_device": "cpu", "offload_device": "cpu"}
    leaves, blocks = (
        memory.GroupOffload(offload_type=each, **here) for each in ("leaf_level", "block_level")
    )
    pipe = PIPELINES["sd15"].build()
    with pytest.raises(errors.Conflict, match=r"region\.SIGE and memory\.GroupOffload"):
        Plan(region.SIGE(), leaves).attach(pipe)
    Plan(region.SIGE(), blocks).attach(pipe).detach()
    cpu_offload(pipe.unet, torch.device("cpu"), offload_buffers=True)
    with pytest.raises(errors.UnsupportedModel, match=r"take pipe\.enable_model_cpu_offload"):
        Plan(region.SIGE()).attach(pipe)


# Masks.


@given(
    side=st.integers(3, 40),
    block=st.integers(1, 6),
    spot=st.tuples(st.integers(0, 39), st.integers(0, 39)),
)
def test_blocks_hold_all_that_a_convolution_changes(side, block, spot):
    mask = torch.zeros(side, side, dtype=torch.bool)
    mask[spot[0] % side, spot[1] % side] = True
    active = Active(mask, Pyramid(block, 0.3, 0, 1), torch.device("cpu"))
    assert not bool((dilated(mask, 1) & ~active.finest).any())
    size = min(block, side)
    first = touched(mask, size, 1)
    assert int(first.min()) >= 0
    assert int(first.max()) <= side - size


@given(scale=st.sampled_from([2, 4, 8]), spot=st.tuples(st.integers(0, 15), st.integers(0, 15)))
def test_no_region_vanishes_on_its_way_down(scale, spot):
    mask = torch.zeros(16, 16, dtype=torch.bool)
    mask[spot] = True
    below = level(mask, (16 // scale, 16 // scale), 0.3, 0)
    assert below.nonzero().tolist() == [[spot[0] // scale, spot[1] // scale]]
    assert not bool(level(torch.zeros_like(mask), (4, 4), 0.3, 1).any())
    above = level(mask, (32, 32), 0.3, 0)
    assert int(above.sum()) == 4


def test_regions_are_shares_or_pixels():
    assert torch.equal(boxed((0.25, 0.5, 0.25, 0.5), 8, 16), boxed((4, 4, 4, 4), 8, 16))
    assert int(boxed((0.99, 0.99, 0.01, 0.01), 8, 8).sum()) == 1
    assert onto(boxed((5, 0, 1, 1), 8, 8), (2, 2)).tolist() == [[False, True], [False, False]]
    for wrong in ((0.5, 0.5, 0.6, 0.1), (0, 0, 0, 1), (-1, 0, 4, 4), (0, 0, float("nan"), 1)):
        with pytest.raises(errors.BadInput, match="does not lie in a picture of 8×8"):
            boxed(wrong, 8, 8)


def test_masks_of_every_kind_are_read_alike():
    import numpy as np
    from PIL import Image

    expected = boxed((0.25, 0.25, 0.5, 0.5), 8, 8)
    white = expected.numpy().astype(np.uint8) * 255
    for mask in (expected, expected.float()[None, None], white, Image.fromarray(white)):
        assert torch.equal(drawn(mask, 8, 8), expected)
    with pytest.raises(errors.BadInput, match="mask is 8×8 pixels and the picture 16×16"):
        drawn(expected, 16, 16)
    with pytest.raises(errors.BadInput, match="found str"):
        drawn("mask.png", 8, 8)


# Where the region comes from.


def test_the_region_is_what_differs_between_two_inputs(bench):
    edits, original = recorded(bench, "sd_img2img", block=1, dilate=0)
    image = arguments("sd_img2img")["image"].clone()
    image[..., :4, :4] = 1 - image[..., :4, :4]
    with edits:
        found = edits.edit(image=image)
        assert 0 < found.share < 1
        assert "advice" not in found.text
    assert not torch.equal(picture(found), original)


def test_inpainting_takes_its_own_mask(bench):
    edits, original = recorded(bench, "sd_inpaint", block=1, dilate=0, most=1.0)
    with edits:
        found = edits.edit(texts("sd_inpaint"))
        assert 0.25 <= found.share < 0.6
        smaller = torch.zeros(1, 1, 32, 32)
        smaller[..., :4, :4] = 1
        other = edits.edit(texts("sd_inpaint"), mask=smaller)
        assert other.share < found.share
    differs = (picture(other) != original).any(1)[0]
    assert not differs[8:, 8:].any()


@pytest.mark.filterwarnings("ignore:region.SIGE")
def test_another_prompt_without_a_region_computes_everything(bench, same):
    expected = dense(bench, "sd15", prompt=texts("sd15"))
    edits, _ = recorded(bench, "sd15")
    with edits:
        assert same(picture(edits.edit(texts("sd15"))), expected)
        assert "draw the region" in edits.report.tallies[0].advice[0]


@pytest.mark.parametrize("name", ["sd15", "flux_cfg"])
def test_samples_have_regions_of_their_own(bench, same, name):
    """Each as alone: one changes a little, the other not at all."""
    pipe = bench.pipe(name)
    both = PIPELINES[name].inputs(Ask([BEFORE, PROMPTS[2]], [0, 1], guidance=True))
    call = arguments(name) | both | {"generator": [noise(0), noise(1)]}
    with edit.sparse(pipe) as edits:
        original = picture(edits.record(**call))
        again = edits.edit()
        assert same(picture(again), original)
        found = picture(edits.edit(region=QUARTER))
    torch.testing.assert_close(found, original, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "scale"), [("sd15", "guidance_scale"), ("flux_cfg", "true_cfg_scale")]
)
def test_an_edit_that_leaves_the_original_outside_says_so(bench, name, scale):
    edits, _ = recorded(bench, name)
    corner = (0, 0, 0.125, 0.125)
    try:
        edits.edit(texts(name), region=corner)
        assert not edits.report.tallies[0].advice
        edits.edit(texts(name), region=corner, **{scale: 9.0})
        assert "leaves the original" in edits.report.tallies[0].advice[0]
    finally:
        edits.close()


# Edits in a row.


@pytest.mark.parametrize("name", ["sd15", "flux_cfg"])
def test_edits_reuse_the_recording_and_do_not_see_each_other(bench, same, name):
    edits, original = recorded(bench, name)
    with edits:
        size = edits.bytes
        first = picture(edits.edit(texts(name), region=QUARTER))
        edits.edit(texts(name, PROMPTS[2]), region=(0.5, 0.5, 0.25, 0.25))
        assert same(picture(edits.edit(texts(name), region=QUARTER)), first)
        assert same(picture(edits.edit()), original)
        assert edits.bytes == size


@pytest.mark.parametrize("fields", [{}, {"statistics": "original"}, {"most": 0.01}])
@pytest.mark.parametrize("name", ["sd15", "flux_cfg"])
def test_an_edit_may_be_the_next_original(bench, same, name, fields):
    edits, original = recorded(bench, name, **fields)
    corner = (0.75, 0.75, 0.125, 0.125)
    with edits:
        first = picture(edits.edit(texts(name), region=(0, 0, 0.125, 0.125), onward=True))
        assert not same(first, original)
        assert same(picture(edits.edit()), first)
        second = picture(edits.edit(texts(name, PROMPTS[2]), region=corner))
    both = (second != original).flatten(0, -3) if second.ndim == 4 else second != original
    assert both.any()
    if fields.get("most") is None:
        assert not same(second, first)


# Nothing lost, no trace.


def broken(pipe, step):
    def fail(_pipe, index, _time, _state):
        if index == step:
            raise KeyboardInterrupt
        return {}

    return {"callback_on_step_end": fail}


@pytest.mark.parametrize("step", range(STEPS))
@pytest.mark.parametrize("name", ["sd15", "flux_cfg"])
def test_a_fault_at_any_step_loses_nothing(bench, same, name, step):
    edits, original = recorded(bench, name)
    stop = broken(bench.pipe(name), step)
    with edits:
        expected = picture(edits.edit(texts(name), region=QUARTER))
        with pytest.raises(KeyboardInterrupt):
            edits.edit(texts(name), region=QUARTER, onward=True, **stop)
        with pytest.raises(KeyboardInterrupt):
            edits.record(**arguments(name, PROMPTS[3], **stop), generator=noise(1))
        assert same(picture(edits.edit()), original)
        assert same(picture(edits.edit(texts(name), region=QUARTER)), expected)
    assert same(dense(bench, name), original)  # the bench looks for traces


def test_bad_edits_are_refused_and_lose_nothing(bench, same):
    edits, original = recorded(bench, "sd15")
    with edits:
        for match, wrong in {
            "mask is 16×16": {"mask": torch.ones(16, 16)},
            "does not lie in": {"region": (0.5, 0.5, 0.6, 0.6)},
            "a region or a mask": {"region": QUARTER, "mask": torch.ones(32, 32)},
            "other evaluations": {"region": QUARTER, "num_inference_steps": STEPS + 1},
            "edit at the size": {"region": QUARTER, "height": 64, "width": 64},
        }.items():
            with pytest.raises(errors.BadInput, match=match):
                edits.edit(texts("sd15"), **wrong)
        assert same(picture(edits.edit()), original)


def test_nothing_is_edited_before_it_is_recorded(bench):
    with edit.sparse(bench.pipe("sd15")) as edits:
        with pytest.raises(errors.BadInput, match="record the original first"):
            edits.edit(AFTER, region=QUARTER)
        with pytest.raises(errors.BadInput, match="generator"):
            edits.record(**arguments("sd15"))
    parts = Pictures(bench.pipe("sd15").unet, "region.SIGE", recomputed=False, keep="native")
    latents = torch.zeros(1, 4, 16, 18)
    with pytest.raises(errors.BadInput, match="multiples of 4"), parts.recording(Kept(()), latents):
        pass


@pytest.mark.filterwarnings("ignore:region.SIGE")
def test_a_run_beside_edits_is_left_alone(bench, same):
    expected = dense(bench, "sd15", prompt=texts("sd15"))
    edits, _ = recorded(bench, "sd15")
    with edits:
        assert same(dense(bench, "sd15", prompt=texts("sd15")), expected)
        assert edits.report.verdicts["region.SIGE"].state == "INACTIVE"


def test_what_a_pipeline_has_that_does_not_fit_is_refused_by_name(bench):
    for name, match in {
        "sana": "convolve",
        "animatediff": "does not fit",
        "zimage": "order",
    }.items():
        with pytest.raises(errors.UnsupportedModel, match=match):
            edit.sparse(bench.pipe(name))
    pipe = copy.deepcopy(bench.pipe("sd15"))
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    with edit.sparse(pipe) as edits, pytest.raises(errors.UnsupportedModel, match="FreeU"):
        edits.record(**arguments("sd15"), generator=noise())
    pipe.disable_freeu()
    pipe.unet.set_attn_processor(Unfused())
    with edit.sparse(pipe) as edits, pytest.raises(errors.UnsupportedModel, match="no attention"):
        edits.record(**arguments("sd15"), generator=noise())


class Unfused:
    """A processor whose attention does not go through torch's."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **_):
        return hidden_states


# With others.


@pytest.mark.parametrize("name", ["sd15", "flux_cfg"])
@pytest.mark.parametrize(
    "others",
    [
        (cache.EasyCache(threshold=0.3),),
        (guidance.Adaptive(threshold=0.5),),
        (cache.TextKV(),),
        (samplers.Schedule(),),
    ],
    ids=lambda methods: methods[0].name,
)
def test_other_methods_go_with_it_or_are_refused(bench, same, name, others):
    try:
        edits, original = recorded(bench, name, Plan(*others))
    except (errors.Conflict, errors.UnsupportedModel) as error:
        assert others[0].name in str(error)
        return
    with edits:
        assert same(picture(edits.edit()), original)
        found = picture(edits.edit(texts(name), region=(0, 0, 0.125, 0.125)))
        assert not same(found, original)
        assert float((found != original).float().mean()) < 0.5


def test_what_works_inside_the_network_is_refused(bench):
    for method in (cache.DeepCache(interval=2), token_methods.ToMe(), cache.PAB()):
        with pytest.raises(errors.Conflict, match=r"region\.SIGE"):
            edit.sparse(bench.pipe("sd15"), Plan(method))
    with pytest.raises(errors.Conflict, match="two places"):
        edit.sparse(bench.pipe("sd15"), Plan(region.SIGE()), block=2)


def test_memory_is_counted_and_bfloat16_halves_it(bench):
    sizes = {}
    for keep in ("native", "bfloat16"):
        edits, _ = recorded(bench, "sd15", keep=keep)
        with edits:
            sizes[keep] = edits.bytes
            tally = edits.report.tallies[0]
            assert tally.peak == edits.bytes
    assert 0.5 <= sizes["bfloat16"] / sizes["native"] < 0.6


def test_counts_are_honest(bench):
    edits, _ = recorded(bench, "sd15", block=1, dilate=0)
    with edits:
        found = edits.edit(texts("sd15"), region=(0, 0, 0.125, 0.125))
        events = edits.report.tallies[0].events
    assert len(events) == STEPS * 2
    assert {event.state for event in events} == {"reused"}
    assert found.share == 9 / 256  # 2 × 2 latents and the border that a convolution reaches
    assert f"{9 / 256:.1%}" in found.report["verdicts"]["region.SIGE"]["detail"]
    assert SimpleNamespace(**found.report).calls == STEPS
