"""The cache of a UNet's deep branch: what runs on a skipped step, and what it answers."""

import math
from collections import Counter
from contextlib import ExitStack, contextmanager
from itertools import pairwise

import diffusers
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from roster import pipelines
from test_laws_counts import computed_steps
from tiny import PIPELINES

from accel import Plan, cache, errors
from accel.cache.clustered import clustered
from accel.seams import unet as seam
from accel.seams.denoisers import Denoiser, find_denoisers
from accel.seams.unet import DeepBranch

UNETS = [tiny.name for tiny in PIPELINES.values() if tiny.blocks == "unet"]
BRANCHES = range(6)


def unets(ci=("sd15", "sdxl", "sd_controlnet", "animatediff", "svd")):
    """Every tiny pipeline around a UNet."""
    return pipelines(ci, where=lambda tiny: tiny.blocks == "unet")


# A UNet by itself: a shallow pass behind the feature of a full pass is that full pass.

SMALL = {"norm_num_groups": 4, "block_out_channels": (8, 16), "layers_per_block": 2}
TEXT = {"cross_attention_dim": 8, "attention_head_dim": 4}


def noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def two_dimensional():
    network = diffusers.UNet2DConditionModel(
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        **SMALL | {"layers_per_block": (2, 1)},
        **TEXT,
    )
    return network, (noise(2, 4, 8, 8), 500, noise(2, 5, 8)), {}


def odd_sides():
    """Sides that do not halve evenly: the upsamplers are told the size of a residual."""
    network, (_, time, text), _ = two_dimensional()
    return network, (noise(2, 4, 7, 9), time, text), {}


def controlled():
    network, inputs, _ = two_dimensional()
    controls, middle = residuals(network)
    more = {"down_block_additional_residuals": controls, "mid_block_additional_residual": middle}
    return network, inputs, more


def adapted():
    """T2I-Adapter: added inside cross-attention blocks, and in place behind the others."""
    network, inputs, _ = two_dimensional()
    added = [noise(2, 8, 8, 8), noise(2, 16, 4, 4)]
    return network, inputs, {"down_intrablock_additional_residuals": added}


def adapted_xl():
    """T2I-Adapter-XL: behind the middle block as well."""
    network, inputs, more = adapted()
    more["down_intrablock_additional_residuals"].append(noise(2, 16, 4, 4))
    return network, inputs, more


def freed():
    network, inputs, more = two_dimensional()
    network.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    return network, inputs, more


def without_middle():
    network = diffusers.UNet2DConditionModel(
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        mid_block_type=None,
        **SMALL,
    )
    return network, (noise(2, 4, 8, 8), 500, None), {}


def floyd():
    """DeepFloyd IF: resnets for samplers, attention with added keys."""
    network = diffusers.UNet2DConditionModel(
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        **SMALL,
        **TEXT,
    )
    return network, (noise(2, 4, 8, 8), 500, noise(2, 5, 8)), {}


def unconditional():
    network = diffusers.UNet2DModel(
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        **SMALL,
    )
    return network, (noise(2, 3, 8, 8), 500), {}


def motion():
    network = diffusers.UNetMotionModel(
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
        cross_attention_dim=8,
        num_attention_heads=2,
        motion_num_attention_heads=2,
        **SMALL,
    )
    return network, (noise(2, 4, 3, 8, 8), 500, noise(2 * 3, 5, 8)), {}


def three_dimensional():
    network = diffusers.UNet3DConditionModel(
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        **SMALL,
        **TEXT,
    )
    return network, (noise(2, 4, 3, 8, 8), 500, noise(2, 5, 8)), {}


def pictures_to_video():
    network = diffusers.I2VGenXLUNet(
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        **SMALL,
        **TEXT,
    )
    pictures = {
        "fps": torch.tensor([4, 8]),
        "image_latents": noise(2, 4, 3, 8, 8),
        "image_embeddings": noise(2, 8),
    }
    more = pictures | {"encoder_hidden_states": noise(2, 5, 8)}
    return network, (noise(2, 4, 3, 8, 8), 500), more


def spatio_temporal():
    network = diffusers.UNetSpatioTemporalConditionModel(
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        in_channels=4,
        out_channels=4,
        block_out_channels=(32, 64),
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24,
        cross_attention_dim=8,
        num_attention_heads=(2, 2),
    )
    return network, (noise(2, 3, 4, 8, 8), 500, noise(2, 1, 8), noise(2, 3)), {}


def separable():
    network = diffusers.models.unets.unet_dreamlite.DreamLiteUNetModel(
        down_block_types=("DreamLiteCrossAttnNoSelfAttnDownBlock2D", "DreamLiteDownBlock2D"),
        up_block_types=("DreamLiteUpBlock2D", "DreamLiteCrossAttnNoSelfAttnUpBlock2D"),
        ff_mult=2,
        **SMALL,
        **TEXT,
    )
    return network, (noise(2, 4, 8, 8), 500, noise(2, 5, 8)), {}


NETWORKS = [
    two_dimensional,
    odd_sides,
    controlled,
    adapted,
    adapted_xl,
    freed,
    without_middle,
    floyd,
    unconditional,
    motion,
    three_dimensional,
    pictures_to_video,
    spatio_temporal,
    separable,
]


@contextmanager
def cut(network, branch):
    """The cut of a bare network."""
    deep = DeepBranch(Denoiser("unet", network), branch)
    with ExitStack() as stack:
        for undo in deep.attach():
            stack.callback(undo)
        yield deep


@pytest.fixture
def unread(monkeypatch):
    """What stands for skipped tensors is NaN: it would show wherever it is read."""
    monkeypatch.setattr(seam, "blank", lambda like: like.new_full((), math.nan))


def residuals(network, scale=1.0):
    """What a ControlNet gives for two rows of 8 × 8: a residual for each of a UNet's, and one."""
    with shapes_of(network) as shapes, torch.no_grad():
        network(noise(2, 4, 8, 8), 500, noise(2, 5, 8))
    down = [noise(*shape) * scale for shape in shapes["down"]]
    return down, noise(*shapes["mid"]) * scale


@contextmanager
def shapes_of(network):
    """Shapes of a UNet's skip residuals and of its middle."""
    shapes = {"down": []}
    hooks = [
        network.conv_in.register_forward_hook(lambda *a: shapes["down"].append(a[-1].shape)),
        network.mid_block.register_forward_hook(lambda *a: shapes.update(mid=a[-1].shape)),
        *(
            block.register_forward_hook(
                lambda *a: shapes["down"].extend(value.shape for value in a[-1][1])
            )
            for block in network.down_blocks
        ),
    ]
    yield shapes
    for hook in hooks:
        hook.remove()


def fresh(more):
    """The arguments of a call: networks use up the lists that T2I-Adapter gives them."""
    return {name: list(v) if isinstance(v, list) else v for name, v in more.items()}


@pytest.mark.parametrize("build", NETWORKS)
@torch.no_grad()
def test_a_shallow_pass_behind_the_feature_of_a_full_pass_is_that_full_pass(build, unread):
    torch.manual_seed(0)
    network, inputs, more = build()
    network.eval()
    stock = network(*inputs, **fresh(more)).sample
    for branch in range(layers(network)):
        with cut(network, branch) as deep:
            whole, feature = deep.full(2, lambda: network(*inputs, **fresh(more)).sample)
            again = deep.shallow(feature, lambda: network(*inputs, **fresh(more)).sample)
            other = deep.shallow(feature + 1.0, lambda: network(*inputs, **fresh(more)).sample)
        assert feature.shape[0] == 2
        assert torch.equal(whole, stock)
        assert torch.equal(again, stock)
        assert not torch.equal(other, stock)
    assert torch.equal(network(*inputs, **fresh(more)).sample, stock)


@pytest.mark.parametrize("build", NETWORKS)
@torch.no_grad()
def test_the_shallow_pass_of_one_row_is_that_row(build, unread):
    """Guidance cut off mid-run: a full pass of two rows, then a shallow one of the second."""
    torch.manual_seed(0)
    network, inputs, more = build()
    network.eval()
    stock = network(*inputs, **fresh(more)).sample

    def last(value):
        if isinstance(value, torch.Tensor):
            return value[len(value) // 2 :]
        return [last(item) for item in value] if isinstance(value, list) else value

    for branch in range(layers(network)):
        with cut(network, branch) as deep:
            _, feature = deep.full(2, lambda: network(*inputs, **fresh(more)))
            arguments = {name: last(value) for name, value in more.items()}
            one = deep.shallow(
                feature[1:], lambda given=arguments: network(*map(last, inputs), **given).sample
            )
        torch.testing.assert_close(one, stock[1:], rtol=1e-5, atol=1e-5)


def layers(network):
    return sum(len(block.resnets) for block in network.up_blocks)


# Against a plain shallow pass.


def plain(network, branch, x, time, text, controls=None, feature=None):
    """The answer and the feature at a cut of a two-dimensional UNet, written out.

    Args:
        feature: Of an earlier step; ``None`` runs everything.
    """
    controls, middle = controls or ([0.0] * 99, 0.0)
    emb = network.time_embedding(network.get_time_embed(sample=x, timestep=time))
    down, up = steps_of(network)
    skips, hidden = [], x
    for step in down if feature is None else down[: branch + 1]:
        hidden = layer(step, hidden, emb, text)
        skips.append(hidden)
    skips = [skip + control for skip, control in zip(skips, controls, strict=False)]
    if feature is None:
        hidden = network.mid_block(hidden, emb, encoder_hidden_states=text) + middle
        for number in range(len(up) - 1, branch, -1):
            hidden = layer(up[number], torch.cat([hidden, skips[number]], 1), emb, text)
        feature = hidden
    hidden = feature
    for number in range(branch, -1, -1):
        hidden = layer(up[number], torch.cat([hidden, skips[number]], 1), emb, text)
    return network.conv_out(network.conv_act(network.conv_norm_out(hidden))), feature


def steps_of(network):
    """What gives each residual, and what consumes each."""
    down, up = [(network.conv_in,)], []
    for block in network.down_blocks:
        down += zip(block.resnets, *extra(block), strict=True)
        down += [(sampler,) for sampler in block.downsamplers or ()]
    for block in network.up_blocks:
        up += zip(block.resnets, *extra(block), strict=True)
        up[-1] += tuple(block.upsamplers or ())
    return down, up[::-1]


def extra(block):
    return [block.attentions] if hasattr(block, "attentions") else []


def layer(step, hidden, emb, text):
    for module in step:
        if hasattr(module, "time_emb_proj"):
            hidden = module(hidden, emb)
        elif hasattr(module, "transformer_blocks"):
            hidden = module(hidden, encoder_hidden_states=text, return_dict=False)[0]
        else:
            hidden = module(hidden)
    return hidden


@pytest.mark.parametrize("branch", BRANCHES)
@torch.no_grad()
def test_control_acts_once_and_live_on_a_skipped_step(branch):
    """Two steps with different controls: those of the shallow layers act as in the plain pass."""
    torch.manual_seed(0)
    network, (x, _, text), _ = two_dimensional() if branch < 5 else sevenfold()
    if branch >= layers(network):
        pytest.skip("no such layer")
    network.eval()
    controls = [residuals(network, scale) for scale in (1.0, -0.5)]
    _, feature = plain(network, branch, x, 900, text, controls[0])
    expected, _ = plain(network, branch, x, 700, text, controls[1], feature)

    def run(time, given):
        down, middle = given
        return network(
            x,
            time,
            text,
            down_block_additional_residuals=down,
            mid_block_additional_residual=middle,
        ).sample

    with cut(network, branch) as deep:
        _, kept = deep.full(2, lambda: run(900, controls[0]))
        answer = deep.shallow(kept, lambda: run(700, controls[1]))
        torch.testing.assert_close(answer, expected)
        for number in range(layers(network)):
            changed = [control + 1.0 * (k == number) for k, control in enumerate(controls[1][0])]
            moved = deep.shallow(kept, lambda given=changed: run(700, (given, controls[1][1])))
            assert torch.equal(moved, answer) == (number > branch)
            plainly, _ = plain(network, branch, x, 700, text, (changed, controls[1][1]), feature)
            torch.testing.assert_close(moved, plainly)


def sevenfold():
    """Three layers a block."""
    network = diffusers.UNet2DConditionModel(
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        **SMALL,
        **TEXT,
    )
    return network, (noise(2, 4, 8, 8), 500, noise(2, 5, 8)), {}


@contextmanager
def following(pipe):
    """Every call of a UNet and its answer, below everything of ours."""
    calls, inner = [], pipe.unet.forward

    def forward(*args, **kwargs):
        answer = inner(*args, **kwargs)
        calls.append((args, kwargs, answer[0]))
        return answer

    forward.__wrapped__ = inner
    pipe.unet.forward = forward
    try:
        yield calls
    finally:
        del pipe.unet.forward


@pytest.mark.parametrize("branch", [0, 1, 2, 3])
@pytest.mark.parametrize("name", ["sd15", "sd_controlnet"])
def test_a_run_is_the_plain_deepcache(bench, name, branch):
    pipe = bench.pipe(name)
    method = cache.DeepCache(interval=3, branch=branch)
    with following(pipe) as calls, Plan(method).attach(pipe):
        bench.call(name, steps=7, batch=2)
    feature = None
    for index, (args, kwargs, answer) in enumerate(calls):
        given = dict(kwargs)
        controls = given.get("down_block_additional_residuals")
        if controls is not None:
            controls = (controls, given["mid_block_additional_residual"])
        old = None if index % 3 == 0 else feature
        with torch.no_grad():
            expected, feature = plain(
                pipe.unet, branch, *args, given["encoder_hidden_states"], controls, old
            )
        torch.testing.assert_close(answer, expected)


@unets()
def test_the_peer_gives_the_same_picture(bench, name):
    """DeepCache 0.1.1, where it is installed: bit for bit at branch 0."""
    peer = pytest.importorskip("DeepCache")
    if name in ("animatediff", "svd"):
        pytest.skip("the peer has no hooks for it")
    with Plan(cache.DeepCache(interval=3)).attach(bench.pipe(name)):
        ours = bench.call(name, steps=10)
    pipe = PIPELINES[name].build()
    helper = peer.DeepCacheSDHelper(pipe=pipe)
    helper.set_params(cache_interval=3, cache_branch_id=0)
    helper.enable()
    theirs = torch.as_tensor(PIPELINES[name].call(pipe, steps=10))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(ours, bench.stock(name, steps=10), rtol=1e-2)


# What runs.


@contextmanager
def counting(pipe):
    """How often each resnet, attention, motion module, sampler and block really runs."""
    counts, undos = Counter(), []

    def watch(module, label):
        inner = module.forward

        def forward(*args, **kwargs):
            counts[label] += 1
            return inner(*args, **kwargs)

        module.forward = forward
        undos.append(lambda: delattr(module, "forward"))

    for label, module in parts(pipe.unet).items():
        counts[label] = 0
        watch(module, label)
    try:
        yield counts
    finally:
        for undo in undos:
            undo()


def parts(network):
    """Modules by (path, block, layer, kind), counted from input and output inwards."""
    found = {("mid", 0, 0, "block"): network.mid_block}
    for path, blocks in (("down", network.down_blocks), ("up", network.up_blocks[::-1])):
        for index, block in enumerate(blocks):
            found[path, index, -1, "block"] = block
            for kind, modules in block.named_children():
                for place, module in enumerate(modules):
                    inward = len(modules) - 1 - place if path == "up" else place
                    sampler = {"downsamplers": len(block.resnets), "upsamplers": 0}
                    found[path, index, sampler.get(kind, inward), kind] = module
    return found


def runs_on_a_skipped_step(label, branch, per_block):
    """The rule of the paper's code, for any number of layers a block."""
    path, block, layer, kind = label
    here, depth = divmod(branch, per_block)
    if path == "mid" or block > here:
        return False
    if block < here:
        return True
    if kind == "block":
        return path == "up" or depth > 0
    return layer < depth if path == "down" else layer <= depth


@pytest.mark.parametrize("branch", BRANCHES)
@unets()
def test_only_the_shallow_part_runs_on_a_skipped_step(bench, name, branch):
    pipe = bench.pipe(name)
    per_block = len(pipe.unet.up_blocks[0].resnets)
    if branch >= layers(pipe.unet):
        pytest.skip("no such layer")
    with counting(pipe) as counts, Plan(cache.DeepCache(interval=3, branch=branch)).attach(pipe):
        bench.call(name, steps=8)
    steps = counts["up", 0, 0, "resnets"]
    full = math.ceil(steps / 3)
    assert steps > full
    assert counts == {
        label: steps if runs_on_a_skipped_step(label, branch, per_block) else full
        for label in parts(pipe.unet)
    }


@unets()
def test_what_is_skipped_is_never_read(bench, same, name, monkeypatch):
    plan = Plan(cache.DeepCache(interval=2, branch=2))
    with plan.attach(bench.pipe(name)):
        output = bench.call(name, steps=5)
        monkeypatch.setattr(seam, "blank", lambda like: like.new_full((), math.nan))
        assert same(bench.call(name, steps=5), output)


@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize("predictor", ["reuse", "newton", "foca"])
def test_a_constant_deep_branch_is_exact(branch, predictor):
    """Whatever the interval: the feature is the same at every step."""
    tiny = PIPELINES["sd15"]
    pipe = tiny.build()
    if branch == layers(pipe.unet) - 1:
        freeze(pipe.unet.mid_block.resnets[-1])
    else:
        freeze([r for block in pipe.unet.up_blocks for r in block.resnets][-2 - branch])
    for module in pipe.unet.modules():
        if hasattr(module, "proj_out"):
            torch.nn.init.zeros_(module.proj_out.weight)  # the attentions leave it as it is
    stock = tiny.call(pipe, steps=6)
    method = cache.DeepCache(interval=4, branch=branch, predictor=predictor)
    with Plan(method).attach(pipe) as run:
        output = tiny.call(pipe, steps=6)
    assert run.report.verdicts[method.name].state == "ACTIVE"
    torch.testing.assert_close(output, stock, rtol=1e-5, atol=1e-5)


def freeze(resnet):
    """Make a resnet answer a constant, whatever it is given."""
    resnet.forward = lambda hidden, temb: torch.ones(
        len(hidden), resnet.out_channels, *hidden.shape[2:]
    )


# When it runs.


@pytest.mark.parametrize("steps", [28, 50])
@pytest.mark.parametrize("interval", [2, 3, 5])
def test_uniform_computes_every_interval_th_step(bench, interval, steps):
    method = cache.DeepCache(interval=interval)
    with Plan(method).attach(bench.pipe("sd15")) as run:
        bench.call("sd15", steps=steps)
    expected = set(range(0, steps, interval))
    assert len(expected) == math.ceil(steps / interval)
    assert all(done == expected for done in computed_steps(run, method).values())


@pytest.mark.parametrize("steps", [28, 50])
def test_nonuniform_follows_the_number_of_steps(bench, steps):
    method = cache.DeepCache(interval=5, schedule="nonuniform", last=True)
    with Plan(method).attach(bench.pipe("sd15")) as run:
        bench.call("sd15", steps=steps)
    expected = {*clustered(steps, 5, 0.3, 1.4), steps - 1}
    assert all(done == expected for done in computed_steps(run, method).values())


CLUSTERED = {
    "total": st.integers(1, 200),
    "interval": st.integers(1, 20),
    "centre": st.floats(0.0, 1.0),
    "power": st.floats(1.0, 4.0),
}


@given(**CLUSTERED)
def test_a_clustered_schedule_has_as_many_steps_as_a_uniform_one(total, interval, centre, power):
    steps = clustered(total, interval, centre, power)
    assert len(steps) == math.ceil(total / interval)
    assert steps[0] == 0
    assert all(a < b for a, b in pairwise(steps))
    assert steps[-1] < total


@given(**CLUSTERED)
def test_its_gaps_grow_away_from_the_centre(total, interval, centre, power):
    steps = clustered(total, interval, centre, power)
    middle = centre * total
    gaps = [(a, b - a) for a, b in pairwise(steps)]
    right = [gap for start, gap in gaps if start >= middle]
    left = [gap for start, gap in gaps if start + gap <= middle]
    rounding = 1  # of either end
    assert all(near <= far + rounding for near, far in pairwise(right))
    assert all(near <= far + rounding for far, near in pairwise(left))


@given(total=CLUSTERED["total"], interval=CLUSTERED["interval"], centre=CLUSTERED["centre"])
def test_power_one_is_evenly_spaced(total, interval, centre):
    count = math.ceil(total / interval)
    steps = clustered(total, interval, centre, 1.0)
    assert all(abs(step - k * total / count) <= 1 + 1e-6 for k, step in enumerate(steps))


def test_the_paper_s_schedule_is_denser_around_its_centre():
    steps = clustered(50, 5, 0.3, 1.4)
    near = sum(5 <= step < 25 for step in steps)
    assert near > sum(30 <= step < 50 for step in steps)


@pytest.mark.parametrize("branch", [0, 3])
def test_a_threshold_that_nothing_reaches_computes_everything(bench, same, branch):
    """The hooks are in place and the full passes are the stock pipeline's, bit for bit."""
    for name in UNETS:
        method = cache.DeepCache(threshold=1e-12, branch=branch)
        run = Plan(method).attach(bench.pipe(name))
        output = bench.call(name, steps=4)
        run.detach()
        assert same(output, bench.stock(name, steps=4))
        assert run.report.verdicts[method.name].state == "INACTIVE"


def test_a_larger_threshold_computes_less(bench):
    computed = []
    for threshold in (0.0, 0.1, 0.3, 1e6):
        method = cache.DeepCache(interval=1, threshold=threshold, warmup=2)
        run = Plan(method).attach(bench.pipe("sd15"))
        bench.call("sd15", steps=12)
        run.detach()
        done = computed_steps(run, method).get(("cond", 0), set(range(12)))
        computed.append(len(done))
    assert computed == sorted(computed, reverse=True)
    assert computed[0] == 12
    assert computed[-1] == 2


@pytest.mark.parametrize("name", ["sd15", "sd_controlnet"])
def test_guidance_may_stop_in_the_middle(bench, name):
    """The batch shrinks from both branches to one: the rows that are left keep their features."""
    pipe = bench.pipe(name)
    method = cache.DeepCache(interval=4)

    def conditional_alone(pipe, step, timestep, tensors):
        if step == 1:
            pipe._guidance_scale = 0.0
            tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[1]
            if "image" in tensors:
                tensors["image"] = tensors["image"].chunk(2)[1]
        return tensors

    def no_guidance(pipe, step, timestep, tensors):
        if step == 1:
            pipe._guidance_scale = 1.0 + 1e-9
        return tensors

    outputs = []
    taken = ["prompt_embeds", *(["image"] if name == "sd_controlnet" else [])]
    for callback in (conditional_alone, no_guidance):
        with Plan(method).attach(pipe) as run:
            outputs.append(
                bench.call(
                    name,
                    steps=8,
                    batch=2,
                    callback_on_step_end=callback,
                    callback_on_step_end_tensor_inputs=taken,
                )
            )
        done = computed_steps(run, method)
        assert all(done["cond", sample] == {0, 4} for sample in range(2))
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)


# What it does not fit.


@pytest.mark.parametrize("name", ["flux_cfg", "pixart_sigma"])
def test_a_transformer_is_refused_with_a_cache_that_serves_it(bench, name):
    with pytest.raises(errors.UnsupportedModel, match=r"fit.*cache\.FirstBlock"):
        Plan(cache.DeepCache()).attach(bench.pipe(name))


def test_a_branch_that_the_network_does_not_have_is_refused(bench):
    count = layers(bench.pipe("sd15").unet)
    Plan(cache.DeepCache(branch=count - 1)).attach(bench.pipe("sd15")).detach()
    with pytest.raises(
        errors.UnsupportedModel, match=rf"has {count} layers.*from 0 to {count - 1}"
    ):
        Plan(cache.DeepCache(branch=count)).attach(bench.pipe("sd15"))


def irregular():
    return [
        diffusers.UNet2DConditionModel(
            down_block_types=("KDownBlock2D", "KCrossAttnDownBlock2D"),
            up_block_types=("KCrossAttnUpBlock2D", "KUpBlock2D"),
            mid_block_type=None,
            time_embedding_type="fourier",
            resnet_time_scale_shift="scale_shift",
            **SMALL | {"block_out_channels": (32, 32), "norm_num_groups": None},
            **TEXT,
        ),
        diffusers.UNet2DModel(
            down_block_types=("SkipDownBlock2D", "SkipDownBlock2D"),
            up_block_types=("SkipUpBlock2D", "SkipUpBlock2D"),
            block_out_channels=(32, 32),
        ),
    ]


@pytest.mark.parametrize("place", [0, 1])
def test_a_unet_of_another_structure_is_refused(place):
    network = irregular()[place]
    with pytest.raises(errors.UnsupportedModel, match=r"does not fit.*cache\.EasyCache"):
        DeepBranch(Denoiser("unet", network), 0)


def test_every_tiny_unet_is_served(bench):
    assert len(UNETS) > 5
    for name in UNETS:
        (denoiser,) = find_denoisers(bench.pipe(name))
        assert DeepBranch(denoiser, 0)
