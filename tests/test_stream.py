"""Streams: frames that share calls are what each is alone; guidance is what its formula says."""

import warnings

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler, LCMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from roster import ROSTER
from tiny import PIPELINES

import accel
from accel import Plan, cache, guidance, memory, tokens
from accel.errors import BadInput, Conflict, UnsupportedModel
from accel.loop import RCFG, FeatureBank, SimilarityFilter, Stream, StreamBatch
from accel.seams.denoisers import Row
from accel.seams.rows import join_rows, take_rows

SIDE = 32
GUIDED = {"guidance_scale": 5.0, "negative_prompt": "blurry"}
CALLS = {
    "sd_img2img": GUIDED,
    "flux_img2img": {"height": SIDE, "width": SIDE},
    "flux true CFG": {
        **{"height": SIDE, "width": SIDE},
        **{"true_cfg_scale": 3.0, "negative_prompt": "blurry"},
    },
}
SERVED = pytest.mark.parametrize("name", CALLS)


def frames(count, side=SIDE, start=0):
    """Smooth pictures, each another one."""
    places = np.linspace(0, 3, side)
    made = []
    for number in range(start, start + count):
        waves = [np.sin(np.add.outer(places * a, places) + number) for a in (1, 2, 3)]
        made.append(Image.fromarray(((np.stack(waves, -1) + 1) * 127).astype(np.uint8)))
    return made


def pipe_of(bench, name):
    return bench.pipe("sd_img2img" if name == "sd_img2img" else "flux_img2img")


def call_of(name, **more):
    steps = {"prompt": "a red fox", "strength": 0.75, "num_inference_steps": 6}
    return {**steps, "output_type": "pt", **CALLS[name], **more}


def streamed(pipe, name, plan=(), count=6, levels=4, fed=None, **more):
    """The pictures of a stream, and its report."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        with Stream(pipe, plan, levels=levels, **call_of(name, **more)) as stream:
            made = list(stream.run(frames(count) if fed is None else fed))
            return torch.stack(made), stream.report


def near(a, b):
    torch.testing.assert_close(a, b, atol=2e-5, rtol=0)


# equal to each frame alone


@SERVED
@pytest.mark.parametrize("negative", ["none", "self", "onetime"])
def test_frames_that_share_calls_are_what_each_is_alone(bench, name, negative):
    pipe = pipe_of(bench, name)
    rcfg = RCFG(negative=negative)
    alone, _ = streamed(pipe, name, [rcfg])
    assert (alone[0] - alone[1]).abs().max() > 1e-3  # frames do make a difference
    for flying in (2, 3, 0):
        near(streamed(pipe, name, [rcfg, StreamBatch(frames=flying)])[0], alone)


@settings(max_examples=6)
@given(levels=st.integers(1, 4), flying=st.integers(0, 5), count=st.integers(1, 5))
def test_for_any_number_of_levels_and_frames(levels, flying, count):
    pipe = _pipe()
    alone, one = streamed(pipe, "sd_img2img", count=count, levels=levels)
    both, shared = streamed(
        pipe, "sd_img2img", [StreamBatch(frames=flying)], count=count, levels=levels
    )
    near(both, alone)
    assert one.rows == shared.rows == 2 * levels * count
    groups = min(flying or levels, levels)
    assert shared.calls == (count + groups - 1 if groups == levels else shared.calls)
    assert one.calls == levels * count


def _pipe(found={}):  # noqa: B006 - one for all examples
    if not found:
        found["pipe"] = PIPELINES["sd_img2img"].build()
    return found["pipe"]


def test_a_buffer_of_one_level_is_off_and_to_the_bit(bench, same):
    pipe = bench.pipe("sd_img2img")
    alone, report = streamed(pipe, "sd_img2img", [StreamBatch(frames=1)], levels=1)
    assert same(alone, streamed(pipe, "sd_img2img", [StreamBatch()], levels=1)[0])
    assert report.verdicts["loop.StreamBatch"].chosen


def test_a_frame_is_late_by_the_levels_and_none_is_lost(bench):
    with Stream(bench.pipe("sd_img2img"), [StreamBatch()], **call_of("sd_img2img")) as stream:
        came = [stream.push(frame) for frame in frames(6)]
        assert [one is None for one in came] == [True] * 3 + [False] * 3
        assert (stream.delay, stream.pending) == (3, 3)
        assert len(stream.flush()) == 3
        assert stream.pending == 0
        assert (stream.frames, stream.pictures) == (6, 6)


# equal to the stock pipeline


def stock(pipe, name, frame, seed=0, **more):
    call = call_of(name, **more)
    return pipe(image=frame, generator=torch.Generator().manual_seed(seed), **call)[0][0]


@SERVED
def test_one_evaluation_is_the_stock_pipeline(bench, name):
    pipe = pipe_of(bench, name)
    if name == "sd_img2img":
        pipe.scheduler.register_to_config(set_alpha_to_one=True)
        ends = pipe.scheduler.final_alpha_cumprod
        pipe.scheduler.final_alpha_cumprod = torch.tensor(1.0)
    few = {"num_inference_steps": 2, "strength": 0.5}
    try:
        made, _ = streamed(pipe, name, count=2, levels=1, **few)
        for picture, frame in zip(made, frames(2), strict=True):
            near(picture, stock(pipe, name, frame, **few))
    finally:
        if name == "sd_img2img":
            pipe.scheduler.register_to_config(set_alpha_to_one=False)
            pipe.scheduler.final_alpha_cumprod = ends


def test_with_consistency_scheduler_it_is_the_stock_pipeline_with_the_same_noise():
    pipe = PIPELINES["sd_img2img"].build()
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    few = {"num_inference_steps": 4, "strength": 1.0, "guidance_scale": 5.0}
    made, _ = streamed(pipe, "sd_img2img", [StreamBatch()], count=3, **few)
    for picture, frame in zip(made, frames(3), strict=True):
        near(picture, stock(pipe, "sd_img2img", frame, **few))


def test_a_scheduler_whose_sample_is_over_alpha():
    pipe = PIPELINES["sd_img2img"].build()
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    few = {"num_inference_steps": 2, "strength": 0.5}
    made, _ = streamed(pipe, "sd_img2img", count=1, levels=1, **few)
    near(made[0], stock(pipe, "sd_img2img", frames(1)[0], **few))
    near(
        streamed(pipe, "sd_img2img", [StreamBatch()], count=3)[0],
        streamed(pipe, "sd_img2img", count=3)[0],
    )


# residual guidance


def toy(monkeypatch, pipe, answer):
    """Another network in the place of a pipeline's: a function of its input, row by row."""

    def forward(sample, timestep, encoder_hidden_states, **_):
        return (answer(sample, timestep, encoder_hidden_states),)

    monkeypatch.setattr(pipe.unet, "forward", forward)


def test_recursion_of_the_paper_is_the_closed_form(monkeypatch):
    """s of level i + 1 from s of level i, in float64, against what a stream gives."""
    pipe = PIPELINES["sd_img2img"].build()
    toy(monkeypatch, pipe, lambda x, t, c: 0.3 * x + c.mean((1, 2))[:, None, None, None])
    with Stream(pipe, [RCFG()], **call_of("sd_img2img")) as stream:
        frame = frames(1)[0]
        stream.push(frame)
        clean = stream._ends.clean(stream._ends.pixels(frame)).double()
        levels, noises = stream.levels, [one.double() for one in stream._noises]
        monkeypatch.setattr(stream._ends, "picture", lambda latents: latents)
        made = stream.push(frame)
        (question,) = levels[0].evaluation.questions
        cond = float(question.call.arguments["encoder_hidden_states"][1].mean())
        weight = levels[0].evaluation.weights["cond"]
    assert weight == pytest.approx(5.0)
    s = noises[0]
    x = levels[0].noised(clean, noises[0])
    for level in levels:
        _, alpha, sigma = level.step.level
        guided = s + weight * (0.3 * x + cond - s)
        residual = (sigma * s - sigma * guided) / alpha
        x = (x - sigma * guided) / alpha
        if level.index + 1 < len(levels):
            after = levels[level.index + 1]
            _, alpha, sigma = after.step.level
            s = noises[after.index] + alpha * residual / sigma
            x = after.noised(x, noises[after.index])
    torch.testing.assert_close(made.double(), x, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", ["sd_img2img", "flux true CFG"])
def test_rows_are_n_and_n_plus_one_and_two_n(bench, name):
    rows = {}
    for negative in ("none", "self", "onetime"):
        plan = [StreamBatch(), RCFG(negative=negative)]
        rows[negative] = streamed(pipe_of(bench, name), name, plan, count=5)[1].rows
    assert rows == {"none": 40, "self": 20, "onetime": 25}


def test_residual_guidance_of_a_call_that_does_not_guide_is_idle(bench):
    plan = [StreamBatch(), RCFG()]
    pipe = bench.pipe("flux_img2img")
    made, report = streamed(pipe, "flux_img2img", plan)
    near(made, streamed(pipe, "flux_img2img", [StreamBatch()])[0])
    assert "scale is 1" in report.verdicts["loop.RCFG"].detail


def test_onetime_is_the_full_guidance_at_one_level(bench):
    pipe = bench.pipe("sd_img2img")
    full, _ = streamed(pipe, "sd_img2img", [StreamBatch()], levels=1, count=2)
    near(streamed(pipe, "sd_img2img", [RCFG(negative="onetime")], levels=1, count=2)[0], full)
    self_, _ = streamed(pipe, "sd_img2img", [RCFG()], levels=1, count=2)
    assert (self_ - full).abs().max() > 1e-3


def test_delta_of_zero_scales_the_answer(monkeypatch):
    """δ = 0: e = w·e_c, that is a network w times as large without guidance."""
    pipe = PIPELINES["sd_img2img"].build()
    toy(monkeypatch, pipe, lambda x, t, c: 0.2 * x)
    zero, _ = streamed(pipe, "sd_img2img", [RCFG(delta=0.0)], count=1)
    toy(monkeypatch, pipe, lambda x, t, c: 1.0 * x)
    near(zero, streamed(pipe, "sd_img2img", count=1, guidance_scale=1.0)[0])


# what is said, and what is left behind


def test_a_stream_leaves_no_trace_and_no_memory(bench, same):
    pipe = bench.pipe("sd_img2img")
    plan = Plan(StreamBatch(), RCFG(), SimilarityFilter(threshold=0.5), FeatureBank())
    first, _ = streamed(pipe, "sd_img2img", plan)
    assert same(first, streamed(pipe, "sd_img2img", plan)[0])


@pytest.mark.parametrize("at", [1, 2, 5])
def test_a_fault_in_the_network_leaves_the_stream_as_it_was(bench, same, at):
    pipe, fed = bench.pipe("sd_img2img"), frames(6)
    whole, _ = streamed(pipe, "sd_img2img", [StreamBatch()])
    with Stream(pipe, [StreamBatch()], **call_of("sd_img2img")) as stream:
        made = [stream.push(frame) for frame in fed[:at]]
        hook = pipe.unet.conv_in.register_forward_hook(_fail)
        with pytest.raises(RuntimeError, match="broken"):
            stream.push(fed[at])
        hook.remove()
        made += [stream.push(frame) for frame in fed[at:]] + stream.flush()
    assert same(torch.stack([one for one in made if one is not None]), whole)


def _fail(*_):
    raise RuntimeError("broken")


def test_what_is_below_a_stream_works_or_is_refused(bench):
    """Each method of the roster: a `Conflict` by name, or the same pictures as one at a time."""
    pipe = bench.pipe("sd_img2img")
    refused = set()
    for name, row in ROSTER.items():
        if row.engine == "streams" or "unet" in row.unserved or "sd_img2img" in row.refused:
            continue
        drawn = hasattr(row.active, "seed")  # of a call, by its number
        levels = 1 if drawn or "sd_img2img" in row.unsteady else 2
        try:
            alone, _ = streamed(pipe, "sd_img2img", [row.active], count=2, levels=levels)
        except Conflict as error:
            assert name in str(error)
            refused.add(name)
            continue
        both, _ = streamed(pipe, "sd_img2img", [row.active, StreamBatch()], count=2, levels=levels)
        torch.testing.assert_close(both, alone, atol=1e-3, rtol=0, msg=name)
    assert {"cache.EasyCache", "cache.DeepCache", "guidance.Adaptive", "samplers.UniPC"} <= refused
    assert not refused & {"tokens.ToMe", "tokens.ToDo", "cache.TextKV", "samplers.Steps"}


def test_in_a_single_call_the_methods_say_that_they_need_a_stream(bench):
    with (
        pytest.warns(UserWarning, match="in a stream of frames"),
        Plan(RCFG(), StreamBatch(), SimilarityFilter()).attach(bench.pipe("sd_img2img")) as run,
    ):
        made = bench.call("sd_img2img")
    assert torch.equal(made, bench.stock("sd_img2img"))
    assert {one.state for one in run.report.verdicts.values()} == {"INACTIVE"}


def test_the_report_of_an_endless_stream_stays_small(bench, monkeypatch):
    monkeypatch.setattr("accel.loop.stream.REMEMBERED", 3)
    plan = [StreamBatch(), tokens.ToMe()]
    _, report = streamed(bench.pipe("sd_img2img"), "sd_img2img", plan, count=10, levels=2)
    assert len(report.step_seconds) <= 2 * 3
    assert all(len({event.step for event in tally.events}) <= 6 for tally in report.tallies)


# another prompt


def test_another_prompt_reaches_the_frames_in_flight(bench):
    pipe, fed = bench.pipe("sd_img2img"), frames(4)
    call = call_of("sd_img2img")
    with Stream(pipe, [StreamBatch()], levels=2, **call) as stream:
        stream.push(fed[0])
        stream.change(prompt="two boats on a lake")
        mixed = stream.push(fed[1])
        last = stream.flush()[0]
        stream.change(strength=0.5)  # nothing is in flight
    near(last, streamed(pipe, "sd_img2img", levels=2, prompt="two boats on a lake")[0][1])
    assert (mixed - streamed(pipe, "sd_img2img", levels=2)[0][0]).abs().max() > 1e-3


def test_noise_levels_do_not_change_under_frames_in_flight(bench):
    with Stream(bench.pipe("sd_img2img"), [StreamBatch()], **call_of("sd_img2img")) as stream:
        stream.push(frames(1)[0])
        stream.push(frames(1)[0])
        with pytest.raises(BadInput, match=r"strength cannot change while 2 frames.*flush"):
            stream.change(strength=0.5)
        assert len(stream.flush()) == 2


# what is refused


@pytest.mark.parametrize("levels", [0, (), (2, 1), (0, 9), 9])
def test_levels_that_are_none(bench, levels):
    with (
        pytest.raises(BadInput, match="levels"),
        Stream(bench.pipe("sd_img2img"), levels=levels, **call_of("sd_img2img")) as stream,
    ):
        stream.push(frames(1)[0])


def test_levels_by_the_numbers_of_evaluations(bench):
    pipe = bench.pipe("sd_img2img")
    with Stream(pipe, levels=(1, 3), **call_of("sd_img2img")) as stream:
        stream.push(frames(1)[0])
        assert [level.step.index for level in stream.levels] == [1, 3]
    near(
        streamed(pipe, "sd_img2img", [StreamBatch()], levels=(1, 3))[0],
        streamed(pipe, "sd_img2img", levels=(1, 3))[0],
    )


@pytest.mark.parametrize("name", ["sd15", "sd_inpaint", "sd_controlnet", "flux_kontext", "wan21"])
def test_pipelines_that_make_no_picture_of_a_picture_alone(bench, name):
    with pytest.raises(UnsupportedModel, match=type(bench.pipe(name)).__name__):
        Stream(bench.pipe(name), prompt="a fox")


def test_frames_of_another_size_leave_those_in_flight(bench):
    with Stream(bench.pipe("sd_img2img"), [StreamBatch()], **call_of("sd_img2img")) as stream:
        stream.push(frames(1)[0])
        stream.push(frames(1)[0])
        with pytest.raises(BadInput, match="Frame 2 is 40×40, and those before it are 32×32"):
            stream.push(frames(1, side=40)[0])
        assert len(stream.flush()) == 2


def test_a_guard_and_arguments_that_are_the_streams_own(bench):
    pipe = bench.pipe("sd_img2img")
    with pytest.raises(Conflict, match="guard"):
        Stream(pipe, Plan(StreamBatch(), guard=accel.Guard(max_error=0.1)), prompt="a fox")
    with pytest.raises(BadInput, match="generator is the stream's own"):
        Stream(pipe, prompt="a fox", generator=torch.Generator())
    with pytest.raises(BadInput, match="latent"):
        Stream(pipe, prompt="a fox", output_type="latent")
    with pytest.raises(Conflict, match=r"cache\.EasyCache and loop\.Stream"):
        Stream(pipe, Plan(cache.EasyCache()), prompt="a fox")
    with pytest.raises(Conflict, match=r"guidance\.Residual and loop\.Stream"):
        Stream(pipe, Plan(guidance.Residual()), prompt="a fox")


def test_it_goes_with_what_moves_weights(bench, same):
    pipe = bench.pipe("sd_img2img")
    sliced = [StreamBatch(), memory.FeatureSlicing()]
    near(
        streamed(pipe, "sd_img2img", sliced, count=2, levels=2)[0],
        streamed(pipe, "sd_img2img", [StreamBatch()], count=2, levels=2)[0],
    )


# rows


def test_joining_undoes_taking():
    arguments = {
        "timestep": torch.tensor([3.0, 1.0]),
        "encoder_hidden_states": torch.randn(2, 4, 5),
        "img_ids": torch.randn(7, 3),
        "added_cond_kwargs": {"time_ids": torch.randn(2, 6)},
        "return_dict": False,
        "guidance": None,
    }
    back = join_rows([take_rows(arguments, [row], 2, 1) for row in (0, 1)])
    assert torch.equal(back["timestep"], arguments["timestep"])
    assert torch.equal(back["encoder_hidden_states"], arguments["encoder_hidden_states"])
    assert back["img_ids"] is arguments["img_ids"]
    assert torch.equal(
        back["added_cond_kwargs"]["time_ids"], arguments["added_cond_kwargs"]["time_ids"]
    )
    assert back["return_dict"] is False
    with pytest.raises(UnsupportedModel, match="timestep"):
        join_rows([{"timestep": 1}, {"timestep": 2}])


def test_rows_are_named_by_their_level(bench):
    seen = []
    pipe = bench.pipe("sd_img2img")
    with Stream(pipe, [StreamBatch()], levels=2, **call_of("sd_img2img")) as stream:
        network = stream._run.onions["unet"].denoiser
        hook = pipe.unet.conv_in.register_forward_hook(lambda *_: seen.append(network.rows))
        for frame in frames(2):
            stream.push(frame)
        hook.remove()
    assert seen[-1] == (
        *(Row("uncond", 0), Row("uncond", 1)),
        *(Row("cond", 0), Row("cond", 1)),
    )
