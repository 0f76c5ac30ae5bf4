"""Operators in slices: the stock pipeline's output, less memory, whole where a cut would show."""

import gc
import weakref

import pytest
import torch
from conftest import bits_equal
from diffusers import TextToVideoSDPipeline, UNet3DConditionModel
from diffusers.hooks import apply_group_offloading
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor2_0,
    PAGCFGIdentitySelfAttnProcessor2_0,
)
from diffusers.models.resnet import TemporalConvLayer
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import PIPELINES, text
from tiny.parts import ddim, image_vae, seeded
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from accel import Plan, attention, cache, errors, memory
from accel.seams.attention import answer_attention
from accel.seams.denoisers import Denoiser
from accel.seams.modules import find_modules
from accel.seams.slicing import Operator, crossing, find_operators, slices, why_whole

METHODS = (memory.FeatureSlicing, memory.OperatorGrouping)
UNETS = ("sd15", "sdxl", "animatediff", "svd")
NEAR = 1e-4
"""Of the largest latent, after several steps under guidance."""


def near(one, other, tolerance=NEAR):
    """Whether two outputs differ by rounding alone."""
    one, other = torch.as_tensor(one), torch.as_tensor(other)
    return (one - other).abs().max() <= tolerance * other.abs().max()


def verdict(run, method):
    return run.report.verdicts[method.name]


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("name", UNETS)
def test_it_is_the_stock_pipeline(bench, name, kind):
    """In few slices, and in as many as there are entries."""
    stock = bench.stock(name, steps=2)
    for fields in ({}, {"spatial": 1000, "temporal": 3}):
        method = kind(**fields)
        with Plan(method).attach(bench.pipe(name)) as run:
            assert near(bench.call(name, steps=2), stock)
        assert verdict(run, method).state == "ACTIVE"
        assert "spatial operators in" in verdict(run, method).detail
        temporal = "temporal operators in" in verdict(run, method).detail
        assert temporal == (name in ("animatediff", "svd"))


@seeded
def text_to_video():
    """UNet3D: temporal convolutions and transformers in turns with spatial ones."""
    tokenizer = text.clip_tokenizer()
    unet = UNet3DConditionModel(
        sample_size=16,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        cross_attention_dim=text.WIDTH,
        attention_head_dim=8,
        norm_num_groups=4,
    )
    for module in unet.modules():
        if isinstance(module, TemporalConvLayer):  # made to be silent at first
            nn.init.normal_(module.conv4[-1].weight, std=0.1)
    return TextToVideoSDPipeline(
        vae=image_vae(),
        text_encoder=text.clip_encoder(tokenizer, pooled=False),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=ddim(),
    )


def ask(pipe):
    generator = torch.Generator().manual_seed(0)
    return pipe(
        "a red fox",
        num_frames=3,
        height=24,
        width=24,
        num_inference_steps=3,
        generator=generator,
        output_type="latent",
    ).frames


@pytest.mark.parametrize("kind", METHODS)
def test_unet3d_keeps_its_temporal_norms_whole(kind):
    pipe = text_to_video()
    pipe.set_progress_bar_config(disable=True)
    stock, method = ask(pipe), kind(spatial=5, temporal=4)
    with Plan(method).attach(pipe) as run:
        assert near(ask(pipe), stock)
    parts = [*pipe.unet.modules()]
    convs = sum(isinstance(part, TemporalConvLayer) for part in parts)
    along = sum(type(part).__name__ == "TransformerTemporalModel" for part in parts)
    said = verdict(run, method).detail
    assert f"whole: {4 * convs + along} norms over all frames and positions" in said
    assert "spatial operators in" in said and "temporal operators in" in said
    assert bits_equal(ask(pipe), stock)


# What is cut, and what is not.


@given(st.integers(1, 200), st.integers(1, 50))
def test_slices_cover_an_axis_once(length, count):
    pieces = slices(length, count)
    assert [i for piece in pieces for i in range(length)[piece]] == list(range(length))
    sizes = [piece.stop - piece.start for piece in pieces]
    assert set(sizes[:-1]) <= {max(round(length / count), 1)} and sizes[-1] <= sizes[0]
    assert len(slices(length, 1)) == 1


class Joined(nn.Module):
    """Entries in the first axis; what belongs to them comes in every form."""

    def forward(self, hidden, beside, *, more, shared):
        whole = hidden + beside[:, None] + more["list"][0][:, None] * shared
        return (whole, {"first": None}) if self.training else (whole,)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 9), st.integers(2, 12), st.booleans())
def test_arguments_of_any_form_are_cut_and_answers_of_any_form_joined(length, count, training):
    module = Joined().train(training)
    operator = Operator("here", module, "spatial", 0, "hidden")
    hidden, beside, other = torch.randn(length, 3, 2), *torch.randn(2, length, 2)
    kwargs = {"more": {"list": [other], "number": 3}, "shared": torch.randn(1, 3, 2)}
    whole = module(hidden, beside, **kwargs)
    seen = []

    def inner(*args, **named):
        seen.append(len(args[0]))
        return module(*args, **named)

    pieces = slices(length, count)
    assert operator.length((hidden, beside), kwargs) == length
    answer = operator.run(inner, (hidden, beside), kwargs, pieces)
    assert torch.equal(answer[0], whole[0]) and answer[1:] == whole[1:]
    assert seen == [piece.stop - piece.start for piece in pieces]


def test_what_belongs_to_no_entry_is_refused():
    operator = Operator("here", Joined(), "spatial", 0, "hidden")
    args = torch.zeros(4, 3, 2), torch.zeros(3, 2)
    with pytest.raises(errors.UnsupportedModel, match=r"here is given \(3, 2\) beside 4 entries"):
        operator.run(operator.module, args, {}, slices(4, 2))


@pytest.mark.parametrize("kernel, padding, cut", [((3, 1, 1), (1, 0, 0), True), (3, 1, False)])
def test_a_convolution_along_time_is_cut_unless_it_has_a_spatial_extent(kernel, padding, cut):
    layer = nn.Conv3d(2, 3, kernel, padding=padding)
    assert (crossing(layer) is None) == cut
    clip = torch.randn(2, 2, 5, 6, 4)  # [batch, channels, frames, height, width]
    answer = Operator("conv", layer, "temporal", 3, "input").run(layer, (clip,), {}, slices(6, 3))
    assert near(answer, layer(clip), 1e-5) == cut  # the test would notice a wrong cut


def test_norms_along_time_are_never_cut(bench):
    """Every GroupNorm of a temporal part is named; cutting it would show."""
    for name in ("animatediff", "svd"):
        unet = bench.pipe(name).unet
        for grouped in (False, True):
            found = find_operators(Denoiser("unet", unet), grouped=grouped)
            ((why, paths),) = found.whole.items()
            assert why == "norms over all frames and positions"
            assert {type(unet.get_submodule(path)) for path in paths} == {nn.GroupNorm}
            cut = {operator.path for operator in found.cut}
            assert len(cut) == len(found.cut) and not cut & set(paths)
            inside = [p for p in cut if any(q.startswith(f"{p}.") for q in cut)]
            assert not inside  # none within another


def test_every_weighty_part_of_a_block_is_cut(bench):
    """No layer with weights to multiply is in no operator, but for those of the time."""
    for name in UNETS:
        unet = bench.pipe(name).unet
        for grouped in (False, True):
            found = find_operators(Denoiser("unet", unet), grouped=grouped)
            covered = tuple(operator.path for operator in found.cut)
            heavy = [
                path
                for path, part in unet.named_modules()
                if isinstance(part, nn.Linear | nn.Conv2d | nn.Conv3d)
                and not any(path == p or path.startswith(f"{p}.") for p in covered)
            ]
            assert all("emb" in path or "time" in path for path in heavy), heavy


# Memory, in bytes that live at once: no workspace of kernels, no cache of an allocator.


class Living(TorchDispatchMode):
    """Counts the bytes of all tensors that are made under it, and the most that lived at once."""

    def __init__(self):
        super().__init__()
        self.bytes = self.most = 0
        self._known = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage(), func, args)
        return made

    def _add(self, storage, func, args):
        old = {t.untyped_storage()._cdata for t in args if isinstance(t, torch.Tensor)}
        if storage in self._known or storage._cdata in old:
            return
        self._known[storage] = True
        self.bytes += storage.nbytes()
        self.most = max(self.most, self.bytes)
        weakref.finalize(storage, self._drop, storage.nbytes())

    def _drop(self, size):
        self.bytes -= size


@pytest.fixture
def no_collection():
    """What waits for Python to look for cycles is not free."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def most(pipe, name, plan, **call):
    """The most bytes that lived at once."""
    with plan.attach(pipe), Living() as living:
        PIPELINES[name].call(pipe, steps=1, **call)
    return living.most


LARGER = {
    "animatediff": {"num_frames": 8, "height": 48, "width": 48},
    "svd": {"num_frames": 6, "height": 32, "width": 32},
}


@pytest.mark.parametrize("name", LARGER)
def test_less_lives_at_once(bench, no_collection, name):
    """Of the whole network, skip residuals and all: in slices, and less in groups of operators."""
    pipe = bench.pipe(name)
    stock, sliced, grouped = (
        most(pipe, name, Plan(*methods), **LARGER[name])
        for methods in ((), (memory.FeatureSlicing(),), (memory.OperatorGrouping(),))
    )
    assert sliced < 0.65 * stock
    assert grouped < 0.5 * stock and grouped < sliced


@torch.no_grad()
def test_an_operator_needs_its_answer_and_the_insides_of_one_slice():
    """A feed-forward layer holds many times its input inside itself."""
    layer, hidden = FeedForward(32, activation_fn="geglu"), torch.randn(16, 64, 32)
    operator = Operator("ff", layer, "spatial", 0, "hidden_states")
    peaks = []
    for count in (1, 16):
        with Living() as living:
            operator.run(layer, (hidden,), {}, slices(16, count))
        peaks.append(living.most / hidden.nbytes)
    whole, sliced = peaks
    assert whole > 12
    assert sliced < 1 + (whole + 1) / 16 + 0.1


# Beside others.


@pytest.mark.parametrize("kind", METHODS)
def test_what_another_method_works_inside_of_is_left_whole(bench, kind):
    """The cache of modules does what it does alone; the rest is cut."""
    other = cache.FORA(interval=2)
    with Plan(other).attach(bench.pipe("animatediff")) as alone:
        expected = bench.call("animatediff", steps=4)
    with Plan(other, kind()).attach(bench.pipe("animatediff")) as run:
        assert near(bench.call("animatediff", steps=4), expected, 10 * NEAR)
    events, others = (one.report.to_dict()["events"][other.name] for one in (alone, run))
    assert events == others
    said = verdict(run, kind()).detail
    assert "that another method works in" in said
    assert "spatial operators in 6 slices" in said


def test_attention_sees_all_rows_where_another_method_answers_it(bench):
    """Its hook is around the module, but what it takes there lies below ours."""
    rows = set()

    class Watching(attention.Backend):
        name = "attention.Watching"

        def attach(self, site):
            for module in find_modules(site.denoisers[0]):
                if module.kind == "self":
                    yield answer_attention(module, self.answer)

        def answer(self, asked):
            rows.add(len(asked.query))
            return asked.dense()

    for kind in METHODS:
        run = Plan(Watching(), kind()).attach(bench.pipe("animatediff"))
        bench.call("animatediff", steps=1)
        run.detach()
    assert rows == {6}  # two branches of three frames


class CrossFrame(AttnProcessor2_0):
    """A processor of a user's own: every frame attends to the first of its batch."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **kwargs):
        first = hidden_states[:1].expand_as(hidden_states)
        seen = first if encoder_hidden_states is None else encoder_hidden_states
        return super().__call__(attn, hidden_states, seen, **kwargs)


@pytest.mark.parametrize("processor", [CrossFrame, PAGCFGIdentitySelfAttnProcessor2_0])
@pytest.mark.parametrize("kind", METHODS)
def test_attention_that_may_look_across_the_batch_is_left_whole(kind, processor):
    """Set while the plan is attached: it is looked at in every call."""
    tiny = PIPELINES["animatediff"]
    pipe = tiny.build()
    part = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1
    assert isinstance(part, Attention)
    with Plan(kind()).attach(pipe) as run:
        part.set_processor(processor())
        cut = tiny.call(pipe, steps=2)
    assert (
        f"1 with {processor.__name__}, which may look across the batch"
        in verdict(run, kind()).detail
    )
    assert near(cut, tiny.call(pipe, steps=2))


def test_weights_that_a_stream_brings_are_there_for_one_call():
    """Diffusers loads a layer's weights while the one before computes, and drops them after."""
    block = PIPELINES["sd15"].build().unet.mid_block.resnets[0]
    apply_group_offloading(
        block, onload_device="cpu", offload_device="cpu", offload_type="leaf_level"
    )
    assert why_whole(block) is None
    block.conv2._diffusers_hook.get_hook("group_offloading").group.stream = object()
    assert why_whole(block) == "with weights that a stream brings once a call"


def test_both_do_not_go_together(bench):
    plan = Plan(*(kind() for kind in METHODS))
    with pytest.raises(errors.Conflict, match=r"OperatorGrouping and memory\.FeatureSlicing"):
        plan.attach(bench.pipe("animatediff"))


def test_a_compiled_network_is_refused_but_not_compiled_blocks():
    tiny = PIPELINES["sd15"]
    whole, blocks = tiny.build(), tiny.build()
    whole.unet.compile(backend="eager")
    for kind in METHODS:
        with pytest.raises(errors.UnsupportedModel, match="compiled into a graph"):
            Plan(kind()).attach(whole)
    blocks.unet.compile_repeated_blocks(backend="eager")
    with pytest.raises(errors.UnsupportedModel, match=r"under memory\.OperatorGrouping"):
        Plan(memory.FeatureSlicing()).attach(blocks)
    Plan(memory.OperatorGrouping()).attach(blocks).detach()


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("fields", [{}, {"spatial": 1}])
def test_nothing_to_cut_is_said(bench, kind, fields):
    """One picture without guidance has one entry; a UNet for pictures nothing along time."""
    run = Plan(kind(**fields)).attach(bench.pipe("sd15"))
    bench.call("sd15", steps=2, guidance=False)
    run.detach()
    found = verdict(run, kind())
    why = "of that kind" if fields else "more than one entry"
    assert found.state == "INACTIVE" and why in found.detail
