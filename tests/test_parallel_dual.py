"""parallel.DualParal: a clip of any length in blocks, in one process as in several."""

from types import SimpleNamespace

import diffusers
import pytest
import torch
from diffusers.models.attention_dispatch import attention_backend
from dual_jobs import made
from roster import full
from test_parallel import distance
from tiny import PIPELINES

from accel import Plan
from accel.errors import UnsupportedModel
from accel.seams.denoisers import find_denoisers
from accel.seams.loop import Evaluation
from parallel import DualParal
from parallel.blockqueue import Layers, Window, _timed
from samplers import DPMSolverPP, RhoRK, UniPC

CLOSE = 1e-5
WAN = ["wan21", "wan22"]
EACH = 2
"""Frames of a tiny pipeline's clip for each latent frame, but for the first one."""


def noise(frames, batch=1, seed=0):
    """Latents of a clip, each frame the same however many there are."""
    draw = [torch.Generator().manual_seed(seed + place) for place in range(frames)]
    return torch.stack([torch.randn(batch, 4, 16, 16, generator=one) for one in draw], 2)


def clip(pipe, name, frames, methods=(), **call):
    """A clip of so many latent frames, and what its run says."""
    asked = {"num_frames": EACH * (frames - 1) + 1, "latents": noise(frames, call.get("batch", 1))}
    with Plan(*methods).attach(pipe) as run:
        found = PIPELINES[name].call(pipe, **(asked | call)).clone()
    return found, run.report


# what is exact


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("guidance", [True, False])
@pytest.mark.parametrize("name", WAN)
@pytest.mark.filterwarnings("ignore:parallel.DualParal did nothing")
def test_one_block_as_long_as_the_clip_is_the_stock_clip(bench, name, guidance, batch):
    call = {"frames": 5, "batch": batch, "guidance": guidance}
    pipe = bench.pipe(name)
    stock, plain = clip(pipe, name, **call)
    for frames in (5, 8):
        found, report = clip(pipe, name, methods=[DualParal(frames=frames)], **call)
        assert torch.equal(found, stock)
        assert (report.calls, report.rows) == (plain.calls, plain.rows)
        assert report.verdicts["parallel.DualParal"].state == "INACTIVE"
        assert "one block of" in report.verdicts["parallel.DualParal"].detail


@pytest.mark.parametrize("sampler", [DPMSolverPP(order=3), UniPC(), RhoRK()], ids=lambda s: s.name)
@pytest.mark.filterwarnings("ignore:parallel.DualParal did nothing")
def test_so_it_is_with_any_sampler(bench, sampler):
    pipe = bench.pipe("wan21")
    alone, _ = clip(pipe, "wan21", 4, [sampler], steps=6)
    found, _ = clip(pipe, "wan21", 4, [sampler, DualParal(frames=4)], steps=6)
    assert distance(found, alone) <= CLOSE


@pytest.mark.filterwarnings("ignore:parallel.DualParal did nothing")
def test_so_it_is_where_a_run_begins_in_the_midst_of_its_schedule():
    parts = PIPELINES["wan21"].build().components
    names = ("tokenizer", "text_encoder", "transformer", "vae", "scheduler")
    pipe = diffusers.WanVideoToVideoPipeline(**{name: parts[name] for name in names})
    text = torch.randn(2, 1, 48, pipe.transformer.config.text_dim)
    given = {
        "prompt_embeds": text[0],
        "negative_prompt_embeds": text[1],
        "video": [*torch.rand(9, 3, 32, 32)],
        "height": 32,
        "width": 32,
        "strength": 0.6,
        "num_inference_steps": 6,
        "output_type": "latent",
    }

    def call():
        return pipe(**given, generator=torch.Generator().manual_seed(0))[0]

    stock = call()
    with Plan(DualParal(frames=5)).attach(pipe):
        assert torch.equal(call(), stock)
    with Plan(DualParal(frames=2)).attach(pipe):
        assert not torch.equal(call(), stock)
    assert torch.equal(call(), stock)


@pytest.mark.filterwarnings("ignore:parallel.DualParal did nothing")
def test_so_it_is_where_each_token_has_a_timestep():
    """Wan 2.2 TI2V: all alike in a clip from text; refused where they are not."""
    pipe = PIPELINES["wan21"].build()
    pipe.register_to_config(expand_timesteps=True)
    stock, _ = clip(pipe, "wan21", 4)
    found, _ = clip(pipe, "wan21", 4, [DualParal(frames=4)])
    assert distance(found, stock) <= CLOSE
    apart, report = clip(pipe, "wan21", 5, [DualParal(frames=2, context=1)])
    assert apart.isfinite().all() and report.calls == 3 * 4 * 2
    given = {"timestep": torch.tensor([[0.0, 0.0, 500.0, 500.0]])}
    call = SimpleNamespace(arguments=given)
    with pytest.raises(UnsupportedModel, match="fit only what is made from noise"):
        _timed(SimpleNamespace(call=call))


@pytest.mark.parametrize("name", WAN)
def test_without_context_each_block_is_a_clip_of_its_own(bench, name):
    pipe, whole = bench.pipe(name), noise(7)
    found, _ = clip(pipe, name, 7, [DualParal(frames=3, context=0)])
    for start in (0, 3, 6):
        part = whole[:, :, start : start + 3]
        alone, _ = clip(pipe, name, part.shape[2], latents=part)
        assert distance(found[:, :, start : start + 3], alone) <= CLOSE


@pytest.mark.parametrize("form", [{}, {"left": "latest"}, {"noise": "shuffled"}], ids=str)
def test_a_block_is_the_same_in_a_longer_clip(bench, form):
    """Once as many blocks as there are steps come behind it; before that it sees where it ends."""
    pipe, steps = bench.pipe("wan21"), 3
    method = DualParal(frames=1, context=1, **form)
    short, _ = clip(pipe, "wan21", 6, [method], steps=steps)
    for longer in (7, 12):
        found, _ = clip(pipe, "wan21", longer, [method], steps=steps)
        same = [torch.equal(found[:, :, at], short[:, :, at]) for at in range(6)]
        assert same == [True] * (6 - steps + 1) + [False] * (steps - 1)


@pytest.mark.parametrize("context", [0, 1, 2])
def test_what_a_block_sees_behind_it_is_what_it_would_see_in_one_call(context):
    """At one timestep, and where only the first layer attends to the clip: to 1e-5."""
    pipe = PIPELINES["wan21"].build()
    [denoiser] = find_denoisers(pipe)
    for block in denoiser.core.blocks[1:]:
        torch.nn.init.zeros_(block.attn1.to_out[0].weight)
        torch.nn.init.zeros_(block.attn1.to_out[0].bias)
    x, text = noise(5), torch.randn(1, 8, pipe.transformer.config.text_dim)

    @torch.no_grad()
    def ask(part):
        return denoiser.core(part, torch.tensor([500]), text, return_dict=False)[0]

    whole = ask(x[:, :, : 3 + context])[:, :, :3]
    layers = Layers(denoiser)
    undos = [*layers.attach()]
    with layers.window(Window(start=3, before=0, frames=2, context=context)):
        ask(x[:, :, 3:])
    with layers.window(Window(start=0, before=0, frames=3, context=context)):
        found = ask(x[:, :, :3])
    for undo in undos:
        undo()
    assert distance(found, whole) <= CLOSE
    assert (distance(ask(x[:, :, :3]), whole) > CLOSE) == (context > 0)


@pytest.mark.parametrize("start", [1, 31, 1000, 10**6])
def test_it_does_not_matter_where_in_the_clip_a_call_is(start):
    """Behind the end of the network's own table too, which has 32 positions."""
    pipe = PIPELINES["wan21"].build()
    [denoiser] = find_denoisers(pipe)
    x, text = noise(4), torch.randn(1, 8, pipe.transformer.config.text_dim)
    layers = Layers(denoiser)
    undos = [*layers.attach()]
    found = []
    for place in (0, start):
        with torch.no_grad(), layers.window(Window(place, 0, 4, 0)):
            found.append(denoiser.core(x, torch.tensor([500]), text, return_dict=False)[0])
    for undo in undos:
        undo()
    with torch.no_grad():
        assert torch.equal(
            found[0], denoiser.core(x, torch.tensor([500]), text, return_dict=False)[0]
        )
    assert distance(found[1], found[0]) <= CLOSE


def test_branches_stay_apart(bench, monkeypatch):
    """Guided by one branch alone, a clip does not depend on the other one's prompt."""
    monkeypatch.setattr(Evaluation, "guided", lambda self, answers: answers["cond"])
    method, pipe = DualParal(frames=2, context=1), bench.pipe("wan21")
    usual, _ = clip(pipe, "wan21", 6, [method])
    other, _ = clip(pipe, "wan21", 6, [method], negative_prompt=["nine ladders"])
    assert torch.equal(usual, other)
    changed, _ = clip(pipe, "wan21", 6, [method], prompt=["nine ladders"])
    assert not torch.equal(usual, changed)


# what is counted


@pytest.mark.parametrize("each", [1, 2, 3])
@pytest.mark.parametrize("frames", [4, 7])
@pytest.mark.parametrize("guidance", [True, False])
def test_calls_are_blocks_times_steps_times_branches(bench, frames, each, guidance):
    method = DualParal(frames=each, context=1)
    call = {"steps": 3, "guidance": guidance, "batch": 2}
    _, report = clip(bench.pipe("wan21"), "wan21", frames, [method], **call)
    blocks = -(-frames // each)
    assert report.calls == blocks * 3 * (1 + guidance)
    assert report.rows == 2 * report.calls
    assert f"in {blocks} blocks of {each}, {min(blocks, 3)} of them" in (
        report.verdicts["parallel.DualParal"].detail
    )


@pytest.mark.parametrize("left", ["level", "latest"])
def test_what_is_kept_does_not_grow_with_the_clip(bench, left):
    method = DualParal(frames=2, context=1, left=left)
    peaks = []
    for frames in (4, 8, 12, 18):
        _, report = clip(bench.pipe("wan21"), "wan21", frames, [method], steps=3)
        peaks.append(report.tallies[0].peak)
    assert peaks[0] < peaks[1] == peaks[2] == peaks[3]


def test_a_clip_may_be_longer_than_the_network_can_count(bench):
    pipe = bench.pipe("wan21")
    assert pipe.transformer.config.rope_max_seq_len == 32
    found, _ = clip(pipe, "wan21", 40, [DualParal(frames=8)], steps=2)
    assert found.shape[2] == 40 and found.isfinite().all()
    with pytest.raises(RuntimeError):
        clip(pipe, "wan21", 40, steps=2)


# processes


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("form", [{}, {"left": "latest", "noise": "shuffled"}], ids=str)
@pytest.mark.parametrize("name", WAN)
def test_the_number_of_processes_changes_nothing(worlds, name, form, size):
    method = DualParal(frames=2, context=1, **form)
    call = {"num_frames": 13, "steps": 4, "batch": 2}
    alone = made(name, method, runs=1, **call)
    ranks = worlds[size].run(made, name, method, runs=2, **call)
    for rank, one in enumerate(ranks):
        assert all(torch.equal(each, one.clips[0]) for each in (*one.clips, *ranks[0].clips))
        assert distance(one.clips[0], alone.clips[0]) <= CLOSE
        assert one.calls == alone.calls
        assert f"layers {[[1, 2], [1, 2, 3]][size - 2][rank]} to" in one.detail
        assert torch.equal(*one.after)
        assert one.peak < alone.peak


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("frames", [2, 8])
@pytest.mark.filterwarnings("ignore:parallel.DualParal did nothing")
def test_what_was_under_way_in_an_aborted_run_is_of_no_later_one(worlds, frames, size):
    method = DualParal(frames=frames, context=1)
    call = {"num_frames": 9, "steps": 4}
    alone = made("wan21", method, **call)
    for one in worlds[size].run(made, "wan21", method, aborts=(0, 1, 2), **call):
        assert distance(one.clips[0], alone.clips[0]) <= CLOSE
        assert torch.equal(*one.after)


def test_bytes_that_are_sent_are_those_of_the_blocks(worlds):
    """To the next process the stream of every call, back the guided output, the clip at the end."""
    steps, frames, width = 3, 7, 32
    method = DualParal(frames=2, context=1)
    ranks = worlds[2].run(made, "wan21", method, num_frames=2 * frames - 1, steps=steps)
    seen = frames + 3  # each but the first block is given a frame of the one before
    streams = steps * 2 * seen * 64 * width * 4
    latents = frames * 4 * 16 * 16 * 4
    sent = [int(one.detail.split("sent ")[1].split(" ")[0].replace(",", "")) for one in ranks]
    assert sent == [streams + latents, steps * latents]


# what does not fit


@pytest.mark.parametrize("name", ["ltx", "sd15", pytest.param("mochi", marks=full(True))])
def test_other_networks_are_refused(bench, name):
    with pytest.raises(UnsupportedModel, match=r"fit WanTransformer3DModel"):
        Plan(DualParal()).attach(bench.pipe(name))


def test_a_clip_that_begins_with_a_picture_is_refused():
    pipe = PIPELINES["wan21"].build()
    config = dict(pipe.transformer.config) | {"in_channels": 8}
    pipe.transformer = diffusers.WanTransformer3DModel.from_config(config)
    with pytest.raises(UnsupportedModel, match="blocks of a clip fit only clips from text"):
        Plan(DualParal()).attach(pipe)


def test_an_attention_that_is_not_reached_is_not_passed_over():
    pipe = PIPELINES["wan21"].build()
    with attention_backend("_native_math"):  # set_attention_backend would set it for all models
        reached, _ = clip(pipe, "wan21", 4, [DualParal(frames=2, context=1)], steps=2)
    assert reached.isfinite().all()
    for block in pipe.transformer.blocks:
        block.attn1.set_processor(Linear())
    with pytest.raises(UnsupportedModel, match="could not see each other"):
        clip(pipe, "wan21", 4, [DualParal(frames=2, context=1)], steps=2)


class Linear:
    """An attention of another kind."""

    def __call__(self, attn, hidden_states, *_):
        return attn.to_out[0](attn.to_v(hidden_states))
