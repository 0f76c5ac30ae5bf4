"""A clip in several processes: that of one where they see all of it, else one that is near."""

import math
from dataclasses import replace
from types import SimpleNamespace

import diffusers
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from parallel_jobs import outcome
from roster import ROSTER, full
from test_parallel import CLOSE, agree, distance
from tiny import PIPELINES, text
from tiny.parts import ddim, image_vae, seeded
from tiny.videos import VACE
from worlds import Failed, World

from accel import Plan, cache
from accel.errors import BadInput, UnsupportedModel
from parallel import CFG, VideoInfinity
from parallel.clips import Options
from parallel.scopes import Scope

WHOLE = 99
"""A reach, or a number of frames over the clip, that covers every clip here."""

WORLDS = [2, 3, pytest.param(4, marks=pytest.mark.laws_full)]
CI = ["animatediff", "svd", "wan22", "ltx", "cogvideox", "hunyuanvideo"]
SERVED = [
    pytest.param(name, marks=full(name not in CI))
    for name, tiny in PIPELINES.items()
    if ROSTER["parallel.VideoInfinity"].serves(tiny)
]
LATENTS = 5
LENGTHS = {
    **{"animatediff": 5, "svd": 5, "wan21": 9, "wan22": 9},
    **{"ltx": 17, "cogvideox": 9, "hunyuanvideo": 17},
}
"""Frames of clips that the networks see as `LATENTS`: two processes have 3 and 2 of them."""


def seeing(reach=0, anchors=0, **more):
    return VideoInfinity(reach=reach, anchors=anchors, **more)


def made(world, name, method, **call):
    """The outcomes of a world for a clip of five latent frames."""
    call = {"num_frames": LENGTHS[name], "steps": 3} | call
    return agree(world.run(outcome, name, [method], **call))


def sent(one):
    """The bytes that a process says it has sent."""
    return int(
        one.details["parallel.VideoInfinity"].split("sent ")[1].split(" ")[0].replace(",", "")
    )


# scopes


@given(
    frames=st.integers(1, 60),
    count=st.integers(1, 8),
    reach=st.integers(0, 70),
    anchors=st.integers(0, 70),
)
def test_every_frame_has_one_process_that_sees_it_and_what_it_asks_for(
    frames, count, reach, anchors
):
    if frames < count:
        with pytest.raises(BadInput, match=f"start {frames} processes"):
            Scope.of(frames, count, reach, anchors)
        return
    scope = Scope.of(frames, count, reach, anchors)
    owned = [frame for rank in range(count) for frame in scope.own(rank)]
    assert owned == list(range(frames))
    assert max(scope.lengths) - min(scope.lengths) <= 1 <= min(scope.lengths)
    assert len(set(scope.spread)) == min(anchors, frames)
    gaps = [b - a for a, b in zip(scope.spread, scope.spread[1:], strict=False)]
    assert not gaps or max(gaps) - min(gaps) <= 1
    for rank in range(count):
        seen = scope.seen(rank)
        assert list(seen) == sorted({*seen}) and {*scope.own(rank), *scope.spread} <= {*seen}
        near = [one for one in seen if scope.favoured(rank, False)[seen.index(one)]]
        assert near == [
            f for f in range(frames) if min(abs(f - o) for o in scope.own(rank)) <= reach
        ]
        if reach >= frames or anchors >= frames:
            assert seen == tuple(range(frames))


@given(noise=st.floats(0.0, 1.0), switch=st.floats(0.0, 1.0))
def test_scopes_change_places_at_a_share_of_noise(noise, switch):
    """A flow's own time; of other processes σ/(α + σ)."""
    options = Options(0, 0, 1.0, switch, "sync", 0)
    flow = (noise / (1 - noise) if noise < 1 else math.inf, 1 - noise, noise)
    assert options.early(SimpleNamespace(level=flow)) == (noise / (1 - noise + noise) >= switch)
    norm = math.hypot(1 - noise, noise)
    diffusion = (flow[0], (1 - noise) / norm, noise / norm)
    if abs(noise - switch) > 1e-9:
        assert options.early(SimpleNamespace(level=diffusion)) == (noise > switch)


# the clip of one process


@pytest.mark.parametrize("size", WORLDS)
@pytest.mark.parametrize("name", SERVED)
@pytest.mark.parametrize(
    "method", [seeing(WHOLE), seeing(0, WHOLE)], ids=["nearby", "over the clip"]
)
def test_who_sees_the_whole_clip_makes_that_of_one_process(worlds, name, method, size):
    """Of an odd number of frames, with two samples, whatever the layout of guidance."""
    if method.anchors and size > 2:
        pytest.skip("the same frames by another name")
    for one in made(worlds[size], name, method, batch=2):
        assert distance(one.found[0], one.stock) <= CLOSE
        assert f"of {LATENTS} frames each in {size} processes" in one.details[method.name]


def modelscope():
    """A tiny pipeline around a UNet whose frames go through convolutions and attentions in time."""
    tokenizer = text.clip_tokenizer()
    unet = diffusers.UNet3DConditionModel(
        block_out_channels=(32, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        cross_attention_dim=text.WIDTH,
        attention_head_dim=8,
        norm_num_groups=4,
    )
    return diffusers.TextToVideoSDPipeline(
        vae=image_vae(),
        text_encoder=text.clip_encoder(tokenizer, pooled=False),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=ddim(beta_schedule="linear"),
    )


def in_pixels(ask):
    return {"prompt": ask.prompts, "height": 16, "width": 16, "num_frames": 5}


MODELSCOPE = replace(
    PIPELINES["animatediff"], name="modelscope", build=seeded(modelscope), inputs=in_pixels
)
OTHERS = {"modelscope": MODELSCOPE, "wan_vace": VACE}
"""Tiny pipelines in no matrix of the laws."""


def other(name):
    """The clip of one process, and the one of several that see all of it."""
    tiny = OTHERS[name]
    pipe = tiny.build()
    stock = torch.as_tensor(tiny.call(pipe, steps=2)).clone()
    with Plan(seeing(WHOLE)).attach(pipe):
        return stock, torch.as_tensor(tiny.call(pipe, steps=2))


@pytest.mark.parametrize("name", OTHERS)
def test_networks_beside_the_matrix_are_exact_too(worlds, name):
    for stock, found in worlds[2].run(other, name):
        assert distance(found, stock) <= CLOSE


@pytest.mark.parametrize("name", ["wan21", "animatediff"])
def test_it_goes_below_a_cache(worlds, name):
    beside = [cache.EasyCache(threshold=0.3)]
    for one in made(worlds[2], name, seeing(WHOLE), beside=beside, steps=6):
        assert distance(one.found[0], one.stock) <= CLOSE


@pytest.mark.laws_full
def test_branches_and_frames_take_four(worlds):
    plan = [CFG(), seeing(WHOLE)]
    for one in agree(worlds[4].run(outcome, "wan21", plan, steps=3, num_frames=9)):
        assert distance(one.found[0], one.stock) <= CLOSE


# less than the whole clip


@pytest.mark.parametrize("name", ["wan21", "svd"])
@pytest.mark.parametrize("scope", ["reach", "anchors"])
def test_the_error_falls_as_a_scope_grows(worlds, name, scope):
    def error(size):
        found = made(worlds[2], name, seeing(**{scope: size}))
        return distance(found[0].found[0], found[0].stock)

    errors = [error(size) for size in (0, 2, WHOLE)]
    assert errors[0] > errors[1] >= errors[2] and errors[0] > CLOSE >= errors[2]


def test_what_is_weighted_down_is_not_seen(worlds):
    """exp(−100) is nothing: one scope is as if the other were not there."""
    local = seeing(1, 3, bias=100.0, switch=2.0)
    for one, alone in zip(
        made(worlds[2], "wan21", local), made(worlds[2], "wan21", seeing(1)), strict=True
    ):
        assert distance(one.found[0], alone.found[0]) <= CLOSE
    spread = seeing(1, 2, bias=100.0, switch=0.0)
    two, three = (made(worlds[size], "wan21", spread)[0].found[0] for size in (2, 3))
    assert distance(two, three) <= CLOSE  # all queries see the same two frames, whoever has them


def test_clips_may_be_longer_than_the_positions_of_one_process(worlds):
    """The tiny motion modules have 8."""
    found = worlds[2].run(longer, 12)
    assert torch.equal(*found) and found[0].shape[2] == 12 and found[0].isfinite().all()


def longer(frames):
    """A clip that a tiny AnimateDiff cannot make by itself."""
    tiny = PIPELINES["animatediff"]
    pipe = tiny.build()
    with pytest.raises(RuntimeError, match="must match"):
        tiny.call(pipe, num_frames=frames, steps=1)
    with Plan(VideoInfinity()).attach(pipe):
        return torch.as_tensor(tiny.call(pipe, num_frames=frames, steps=2))


# a step old


def test_frames_a_step_old_cost_less_the_later_they_begin(worlds):
    def error(warmup):
        method = seeing(WHOLE, mode="stale", warmup=warmup)
        found = made(worlds[2], "wan21", method, steps=8, runs=2)
        assert torch.equal(*found[0].found)
        return distance(found[0].found[0], found[0].stock)

    errors = [error(warmup) for warmup in (0, 4, 7)]
    assert errors[0] > errors[1] > errors[2] and errors[0] > CLOSE >= errors[2]


@pytest.mark.parametrize("name", ["animatediff", "svd"])
def test_runs_do_not_know_of_each_other(worlds, name):
    method = seeing(1, 1, bias=10.0, mode="stale", warmup=0)
    for one in made(worlds[2], name, method, runs=2):
        assert torch.equal(*one.found)


# bytes and shares


def test_bytes_do_not_grow_with_the_number_of_processes(worlds):
    """Keys and values of two borders, and the answer."""
    steps, branches, layers, width, answer, frame = 2, 2, 3, 32, 16, 64
    latents, reach = 6, 1
    for size in (2, 3):
        found = made(worlds[size], "wan21", seeing(reach), steps=steps, num_frames=2 * latents - 1)
        for rank, one in enumerate(found):
            borders = ((rank > 0) + (rank < size - 1)) * reach
            kept = 2 * layers * borders * frame * width
            whole = (size - 1) * latents // size * frame * answer
            assert sent(one) == steps * branches * 4 * (kept + whole)


def test_what_all_see_is_sent_once_to_each(worlds):
    found = made(worlds[3], "wan21", seeing(0, 2), steps=1)
    bare = made(worlds[3], "wan21", seeing(), steps=1)
    frame = 2 * 3 * 64 * 32 * 4 * 2  # keys, values; layers; tokens; width; bytes; branches
    more = [(sent(one) - sent(other)) / frame for one, other in zip(found, bare, strict=True)]
    spread = Scope(LATENTS, 3, 0, 2).spread
    assert more == [
        2 * sum(frame in Scope(LATENTS, 3).own(rank) for frame in spread) for rank in range(3)
    ]


def computed(name, path, axis, **call):
    """How long an axis of what a module is given is, call by call."""
    tiny = PIPELINES[name]
    pipe, seen = tiny.build(), []
    network = getattr(pipe, tiny.denoisers[0])

    def note(_module, args, kwargs):
        seen.append((args or tuple(kwargs.values()))[0].shape[axis])

    handle = network.get_submodule(path).register_forward_pre_hook(note, with_kwargs=True)
    with Plan(seeing(1, 1)).attach(pipe):
        tiny.call(pipe, steps=1, num_frames=LENGTHS[name], batch=2)
    handle.remove()
    return seen


@pytest.mark.parametrize(
    ("name", "path", "axis", "unit"),
    [
        ("wan21", "blocks.1.ffn", 1, 64),  # tokens of a frame
        ("animatediff", "mid_block.resnets.0", 0, 4),  # rows: two samples, two branches
        ("svd", "mid_block.resnets.0.temporal_res_block", 2, 1),
    ],
)
def test_a_process_computes_its_own_frames(worlds, name, path, axis, unit):
    for size in (2, 3):
        lengths = Scope(LATENTS, size).lengths
        for rank, seen in enumerate(worlds[size].run(computed, name, path, axis)):
            assert {*seen} == {lengths[rank] * unit}


# off, and refused


def test_alone_or_with_a_degree_of_one_it_does_nothing():
    tiny = PIPELINES["wan21"]
    pipe = tiny.build()
    stock = tiny.call(pipe, steps=2)
    with pytest.warns(match="one process: start more"), Plan(VideoInfinity()).attach(pipe):
        assert torch.equal(tiny.call(pipe, steps=2), stock)
    with Plan(VideoInfinity.off()).attach(pipe) as run:
        assert torch.equal(tiny.call(pipe, steps=2), stock)
    assert "degree is 1" in run.report.verdicts["parallel.VideoInfinity"].detail


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("sd15", "it makes no clip"),
        ("flux_cfg", "it makes no clip"),
        ("pixart_sigma", "it makes no clip"),
        ("mochi", "it attends to one row after the other"),
    ],
)
def test_what_makes_no_clip_is_refused(name, why):
    pipe = PIPELINES[name].build()
    network = type(getattr(pipe, PIPELINES[name].denoisers[0])).__name__
    with pytest.raises(UnsupportedModel, match=f"{network}: {why}.* does not fit"):
        Plan(VideoInfinity()).attach(pipe)


def test_what_cuts_the_clip_itself_is_refused():
    pipe = PIPELINES["animatediff"].build()
    pipe.enable_free_noise(context_length=2, context_stride=1)
    with pytest.raises(UnsupportedModel, match=r"FreeNoise.* not fit"):
        Plan(VideoInfinity()).attach(pipe)


@pytest.mark.parametrize(
    ("name", "frames", "message"),
    [
        ("wan21", 1, "as 1 frames, and 2 processes share them"),
        ("animatediff", 20, "positions for 8: start 3 processes"),
    ],
)
def test_clips_too_short_or_too_long_are_refused_everywhere(name, frames, message):
    world = World(2)
    with pytest.raises(Failed, match=message):
        world.run(refused, name, frames)
    world.close()


def refused(name, frames):
    """Ask for a clip."""
    tiny = PIPELINES[name]
    pipe = tiny.build()
    with Plan(VideoInfinity()).attach(pipe):
        tiny.call(pipe, num_frames=frames, steps=1)
