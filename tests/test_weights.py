"""Int8 by torchao: exact products, the original bits back, and by name what does not fit."""

import json
import random
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from conftest import bits_equal, differences, trace
from diffusers.hooks import apply_group_offloading
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from roster.weights import INNER, ROWS, STATIC
from saved import Folders, done, run
from test_memory_methods import check_restored, kept, networks
from tiny import PIPELINES
from torch import nn

from accel import Guard, Plan, cache, errors, memory, weights
from accel.seams import quantizing
from accel.seams.blocks import end_blocks
from accel.seams.quantizing import linears, quantized, size
from accel.weights.skipping import skipped

FORMS = tuple(row.active for row in ROWS.values())
WEIGHT_ONLY = weights.Int8WeightOnly(skip=INNER)
EASY = cache.EasyCache(threshold=1e9, warmup=2)
NAME = "flux_cfg"
HERE = {"onload_device": "cpu", "offload_device": "cpu"}

each = pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name.split(".")[1])


# The arithmetic.

SHAPES = st.tuples(st.integers(1, 9), st.integers(2, 40), st.integers(1, 24))


def integers(x, scale):
    """Rounded as torchao does: to the nearest, ties to even, within 8 bits."""
    return (x * (1.0 / scale)).round().clamp(-128, 127).to(torch.int64)


@given(SHAPES, st.integers(0, 2**31))
@settings(deadline=None, max_examples=40)
def test_static_int8_is_the_integer_product(shape, seed):
    """Bit for bit: int32 sums, scaled by the activation's scale, then the weight's."""
    rows, width, out = shape
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, rows, width, generator=generator) * 3
    weight, bias = torch.randn(out, width, generator=generator), torch.randn(out)
    scale = torch.full((1, 1, 1), 0.02)
    layer = quantized(weight, quantizing.static(scale))
    sums = integers(x, scale) @ layer.qdata.to(torch.int64).T
    assert sums.abs().max() < 2**31
    expected = sums.to(torch.int32).float() * scale * layer.scale.flatten() + bias
    assert torch.equal(nn.functional.linear(x, layer, bias), expected)


@given(SHAPES, st.integers(0, 2**31))
@settings(deadline=None, max_examples=40)
def test_dynamic_int8_is_the_integer_product(shape, seed):
    from torchao.quantization import PerRow
    from torchao.quantization.quantize_.workflows.int8.int8_tensor import Int8Tensor

    rows, width, out = shape
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=generator)
    layer = quantized(torch.randn(out, width, generator=generator), quantizing.dynamic())
    tokens = Int8Tensor.from_hp(x, PerRow())
    sums = tokens.qdata.to(torch.int64) @ layer.qdata.to(torch.int64).T
    expected = sums.float() * tokens.scale * layer.scale.flatten()
    assert torch.equal(nn.functional.linear(x, layer), expected)


@pytest.mark.parametrize("how", ["dynamic", "static"])
@given(SHAPES, st.integers(0, 2**31))
@settings(deadline=None, max_examples=25)
def test_a_layer_answers_a_sample_as_if_alone(how, shape, seed):
    """Bit for bit: a scale is that of the token, or known; sums of integers have no order."""
    rows, width, out = shape
    generator = torch.Generator().manual_seed(seed)
    weight, x = (
        torch.randn(*size, generator=generator) for size in ((out, width), (3, rows, width))
    )
    config = quantizing.dynamic() if how == "dynamic" else quantizing.static(torch.ones(1, 1, 1))
    layer = quantized(weight, config)
    together = nn.functional.linear(x, layer)
    for sample in range(3):
        assert torch.equal(nn.functional.linear(x[sample : sample + 1], layer)[0], together[sample])


@pytest.mark.parametrize(
    "form", [weights.Int8Dynamic(skip=INNER), STATIC], ids=["dynamic", "static"]
)
def test_a_sample_in_company_is_nearer_to_itself_than_to_stock(bench, form):
    """What turns over between batches is less than what int8 costs."""
    with Plan(form).attach(bench.pipe("sd3")):
        together = bench.call("sd3", steps=2, batch=2)
        alone = bench.call("sd3", steps=2)
    stock = bench.stock("sd3", steps=2)
    assert (together[:1] - alone).norm() < (alone - stock).norm()


def test_sums_do_not_saturate():
    """The largest there are, which 16 bits would not hold (as some CPUs add pairs of products)."""
    for x, w in ((-128, -128), (127, -128), (127, 127)):
        a, b = (torch.full((4, 512), one, dtype=torch.int8) for one in (x, w))
        assert (torch._int_mm(a, b.t()) == x * w * 512).all()


@given(st.integers(0, 2**31), st.floats(1e-3, 1e3))
@settings(deadline=None, max_examples=30)
def test_weights_are_within_half_a_scale(seed, scale):
    weight = torch.randn(16, 24, generator=torch.Generator().manual_seed(seed)) * scale
    layer = quantized(weight, quantizing.weight_only())
    assert ((layer.dequantize() - weight).abs() <= layer.scale * 0.5001).all()


def test_what_torchao_is_told_leaves_compilers_as_they_were():
    from torch._inductor import config

    before = config.get_config_copy()
    for how in (
        quantizing.weight_only(),
        quantizing.dynamic(),
        quantizing.static(torch.ones(1, 1)),
    ):
        quantized(torch.randn(8, 8), how)
    assert config.get_config_copy() == before


# On and off.


@each
@pytest.mark.parametrize("name", ["sd15", "flux_cfg", "wan22"])
def test_weights_come_back_bit_for_bit(bench, name, form):
    pipe = bench.pipe(name)
    before, attributes = kept(pipe), trace(pipe)
    bytes_before = sum(map(size, networks(pipe)))
    with Plan(form).attach(pipe) as run:
        layers = [
            layer
            for network in networks(pipe)
            for layer in linears(network).values()
            if type(layer.weight.data) is not torch.Tensor
        ]
        full = sum(layer.weight.numel() * 4 for layer in layers)
        assert sum(map(size, networks(pipe))) < bytes_before
        assert not bits_equal(bench.call(name, steps=2), bench.stock(name, steps=2))
    check_restored(pipe, before)
    assert not differences(attributes, trace(pipe))
    verdict = run.report.verdicts[form.name]
    assert verdict.state == "ACTIVE"
    assert f"{len(layers)} linear layers of" in verdict.detail
    assert f"the originals, {full} bytes" in verdict.detail
    assert run.report.to_dict()["cached_bytes"][form.name] == full
    assert bits_equal(bench.call(name, steps=2), bench.stock(name, steps=2))


@pytest.mark.parametrize("name", ["sd15", "flux_cfg"])
def test_weight_only_is_the_network_with_rounded_weights(bench, name):
    rounded = PIPELINES[name].build()
    with Plan(WEIGHT_ONLY).attach(bench.pipe(name)):
        ours = bench.call(name, steps=2)
        for network, plain in zip(networks(bench.pipe(name)), networks(rounded), strict=True):
            for path, layer in linears(network).items():
                if hasattr(layer.weight, "qdata"):
                    linears(plain)[path].weight.data = layer.weight.dequantize()
    torch.testing.assert_close(
        ours, torch.as_tensor(PIPELINES[name].call(rounded, steps=2)), rtol=1e-3, atol=1e-3
    )


class Fault(Exception):
    pass


@each
def test_no_trace_after_a_fault_at_any_step(bench, form):
    pipe = bench.pipe(NAME)
    before, attributes = kept(pipe), trace(pipe)
    for step in range(3):

        def callback(pipe, index, timestep, state, step=step):
            if index == step:
                raise Fault
            return state

        with pytest.raises(Fault), Plan(form, EASY).attach(pipe):
            bench.call(NAME, steps=3, callback_on_step_end=callback)
        check_restored(pipe, before)
        assert not differences(attributes, trace(pipe))


def test_no_trace_after_a_fault_at_any_layer(bench, monkeypatch):
    pipe = bench.pipe(NAME)
    before, attributes = kept(pipe), trace(pipe, strict=True)
    count = len(linears(pipe.transformer))
    for fatal in (0, 1, count - 1):
        made, inner = [], quantizing.quantized

        def broken(weight, config, made=made, fatal=fatal, inner=inner):
            made.append(weight)
            if len(made) == fatal + 1:
                raise Fault
            return inner(weight, config)

        monkeypatch.setattr(quantizing, "quantized", broken)
        with pytest.raises(Fault):
            Plan(weights.Int8Dynamic(skip=())).attach(pipe)
        monkeypatch.undo()
        check_restored(pipe, before)
        assert not differences(attributes, trace(pipe, strict=True))


@pytest.mark.parametrize("seed", range(2))
def test_undos_in_any_order(bench, seed):
    pipe = bench.pipe(NAME)
    before, attributes = kept(pipe), trace(pipe, strict=True)
    run = Plan(STATIC, EASY).attach(pipe)
    undos = [callback for _, callback in run._stack.pop_all()._exit_callbacks]
    random.Random(seed).shuffle(undos)
    for undo in undos:
        undo(None, None, None)
    check_restored(pipe, before)
    assert not differences(attributes, trace(pipe, strict=True))


def test_weights_that_were_changed_meanwhile_stay(bench):
    """Replaced, or written into: both are named, and neither is lost."""
    pipe = PIPELINES[NAME].build()
    before = kept(pipe)
    attn = pipe.transformer.transformer_blocks[1].attn
    run = Plan(WEIGHT_ONLY).attach(pipe)
    theirs = attn.to_q.weight = nn.Parameter(torch.ones(32, 32))
    attn.to_k.weight.qdata.fill_(3)
    expected = attn.to_k.weight.dequantize()
    with pytest.raises(errors.BrokenAttachment, match=r"2 weights .*to_[qk].*Fuse LoRAs"):
        run.detach()
    assert attn.to_q.weight is theirs
    assert torch.equal(attn.to_k.weight, expected)
    changed = (attn.to_q.weight, attn.to_k.weight)
    for name, weight in pipe.transformer.named_parameters():
        if all(weight is not one for one in changed):
            assert bits_equal(weight.detach(), before[f"0.{name}"][1].detach()), name


def test_a_network_that_moves_to_another_width_meanwhile():
    """The numbers that come back are the originals, as the cast would have made them."""
    pipe = PIPELINES[NAME].build()
    cast = PIPELINES[NAME].build().to(torch.bfloat16)
    run = Plan(WEIGHT_ONLY).attach(pipe)
    pipe.to(torch.bfloat16)
    run.detach()
    for (name, ours), theirs in zip(
        pipe.transformer.named_parameters(), cast.transformer.parameters(), strict=True
    ):
        assert bits_equal(ours.detach(), theirs.detach()), name


# What stays as it is.


def test_groups_of_layers():
    core = PIPELINES[NAME].build().transformer
    layers = linears(core)
    found = skipped(core, layers, ("recommended",))
    assert end_blocks(core) == ("transformer_blocks.0", "single_transformer_blocks.1")
    assert found["x_embedder"] == found["time_text_embed.text_embedder.linear_1"] == "embedders"
    assert found["transformer_blocks.0.norm1.linear"] == "modulation"
    assert found["proj_out"] == "output"
    assert found["transformer_blocks.0.attn.to_q"] == "ends"
    assert {path for path in layers if path not in found} == {
        path
        for path in layers
        if path.startswith(("transformer_blocks.1.", "single_transformer_blocks.0."))
        and "norm" not in path
    }
    assert "single_transformer_blocks.0.proj_out" not in found  # of a block, not the output
    by_hand = skipped(core, layers, ("*.attn.to_q",))
    assert len(by_hand) == 4
    assert set(by_hand.values()) == {"*.attn.to_q"}
    unet = PIPELINES["sd15"].build().unet
    assert end_blocks(unet) == ()
    assert set(skipped(unet, linears(unet), ("recommended",)).values()) == {
        "embedders",
        "modulation",
    }


def test_what_is_skipped_keeps_its_weights(bench):
    pipe = bench.pipe(NAME)
    layers = linears(pipe.transformer)
    with Plan(weights.Int8Dynamic(skip=("*.attn.*", "output"))).attach(pipe) as run:
        for path, layer in layers.items():
            plain = type(layer.weight.data) is torch.Tensor
            assert plain == (".attn." in path or path in ("proj_out", "norm_out.linear")), path
        bench.call(NAME, steps=1)
    assert "22 named in skip" in run.report.verdicts["weights.Int8Dynamic"].detail


def test_a_pattern_of_no_layer_is_refused(bench):
    with pytest.raises(errors.BadInput, match=r"'blocks\.9\.\*' is the path of no linear layer"):
        Plan(weights.Int8Dynamic(skip=("recommended", "blocks.9.*"))).attach(bench.pipe(NAME))


def test_nothing_left_is_no_success(bench):
    with (
        pytest.warns(errors.AccelWarning, match="no layer was left to quantize"),
        Plan(weights.Int8WeightOnly(skip=("*",))).attach(bench.pipe(NAME)) as run,
    ):
        assert bits_equal(bench.call(NAME, steps=2), bench.stock(NAME, steps=2))
    assert run.report.verdicts["weights.Int8WeightOnly"].state == "INACTIVE"


def test_sizes_that_accelerators_do_not_multiply():
    assert not quantizing.unfit(nn.Linear(12, 16))
    assert quantizing.unfit(nn.Linear(12, 16, device="meta"))
    assert not quantizing.unfit(nn.Linear(24, 16, device="meta"))


# Beside others.


@each
def test_a_cache_answers_for_the_quantized_network(bench, form):
    with Plan(form, EASY).attach(bench.pipe(NAME)) as run:
        outputs = [bench.call(NAME, steps=5) for _ in range(2)]
        assert run.report.verdicts["cache.EasyCache"].state == "ACTIVE"
    assert bits_equal(*outputs)


@each
def test_a_lora_stays_beside_the_layer_that_it_adds_to(form):
    """In place before: the base is int8, the adapter is not; off again, the stock with the LoRA."""
    tiny = PIPELINES["sd15"]
    pipe = tiny.build()
    torch.manual_seed(0)
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    stock, before = tiny.call(pipe, steps=2), kept(pipe)
    with Plan(form).attach(pipe):
        layer = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
        assert hasattr(layer.base_layer.weight, "qdata")
        assert type(layer.lora_A["default"].weight.data) is torch.Tensor
        assert not bits_equal(tiny.call(pipe, steps=2), stock)
    check_restored(pipe, before)
    assert bits_equal(tiny.call(pipe, steps=2), stock)


def test_methods_that_change_weights_refuse_each_other(bench):
    pipe = bench.pipe(NAME)
    for other in (memory.LayerwiseCasting(), STATIC):
        with pytest.raises(errors.Conflict, match=r"both need the seam 'weights on the CPU'"):
            Plan(WEIGHT_ONLY, other).attach(pipe)
    with pytest.raises(errors.Conflict, match=r"Int8WeightOnly and memory\.GroupOffload do not"):
        Plan(WEIGHT_ONLY, memory.GroupOffload(**HERE)).attach(pipe)
    with pytest.raises(errors.Conflict, match="does not go with a guard"):
        Plan(WEIGHT_ONLY, EASY, guard=Guard(max_error=0.1)).attach(pipe)


@pytest.mark.parametrize(
    ("when", "form"), [("before", STATIC), ("after", WEIGHT_ONLY)], ids=["before", "after"]
)
def test_compiled_blocks(form, when):
    """Compiled before the plan or while it is attached: the quantized network, then the stock."""
    tiny = PIPELINES[NAME]
    pipe = tiny.build()
    stock = tiny.call(pipe, steps=2)
    with Plan(form).attach(pipe):
        expected = tiny.call(pipe, steps=2)

    def compile_blocks():
        for block in pipe.transformer.transformer_blocks:
            block.compile(backend="eager")

    if when == "before":
        compile_blocks()
        assert bits_equal(tiny.call(pipe, steps=2), stock)
    with Plan(form).attach(pipe):
        if when == "after":
            compile_blocks()
        assert bits_equal(tiny.call(pipe, steps=2), expected)
    assert bits_equal(tiny.call(pipe, steps=2), stock)


# Refused.


class Odd(nn.Parameter):
    """As bitsandbytes and GGUF make them: a parameter of a class of their own."""


def theirs_by_torchao(pipe):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(pipe.transformer.transformer_blocks[1], Int8WeightOnlyConfig())


def theirs_by_class(pipe):
    layer = pipe.transformer.transformer_blocks[1].ff.net[2]
    layer.weight = Odd(layer.weight.data)


def theirs_by_bits(pipe):
    layer = pipe.transformer.transformer_blocks[1].ff.net[2]
    layer.weight.data = layer.weight.data.to(torch.float8_e4m3fn)


def theirs_by_module(pipe):
    kind = type("Linear8bitLt", (nn.Linear,), {"__module__": "bitsandbytes.nn.modules"})
    pipe.transformer.transformer_blocks[1].attn.to_q = kind(32, 32)


def theirs_by_loader(pipe):
    pipe.transformer.hf_quantizer = object()


@each
@pytest.mark.parametrize(
    ("how", "match"),
    [
        (theirs_by_torchao, r"transformer_blocks\.1\..*is stored as Int8Tensor"),
        (theirs_by_class, r"ff\.net\.2\.weight is stored as Odd"),
        (theirs_by_bits, r"ff\.net\.2\.weight is stored in torch.float8_e4m3fn"),
        (theirs_by_module, r"attn\.to_q is a Linear8bitLt of bitsandbytes"),
        (theirs_by_loader, r"quantized already \(object\)"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_is_quantized_already_is_refused_and_nothing_lost(form, how, match):
    pipe = PIPELINES[NAME].build()
    how(pipe)
    attributes = trace(pipe, strict=True)
    with pytest.raises(errors.UnsupportedModel, match=f"quantized already.*{match}|{match}"):
        Plan(EASY, form).attach(pipe)
    assert not differences(attributes, trace(pipe, strict=True))


def test_what_is_not_at_hand_is_refused():
    pipe = PIPELINES[NAME].build()
    apply_group_offloading(pipe.transformer, offload_type="leaf_level", **HERE_)
    with pytest.raises(errors.UnsupportedModel, match=r"offloaded in groups.*attach first"):
        Plan(WEIGHT_ONLY).attach(pipe)
    away = PIPELINES[NAME].build()
    cpu_offload(away.transformer, torch.device("cpu"))
    with pytest.raises(errors.UnsupportedModel, match="accelerate took away"):
        Plan(WEIGHT_ONLY).attach(away)


HERE_ = {name: torch.device(device) for name, device in HERE.items()}


@each
def test_without_torchao(bench, monkeypatch, form):
    monkeypatch.setattr(quantizing, "find_spec", lambda name: None)
    with pytest.raises(errors.UnsupportedModel, match=r"pip install 'diffusers-accel\[int8\]'"):
        Plan(form).attach(bench.pipe(NAME))


# The command.


def test_the_command_writes_a_plan_with_its_file(tmp_path, monkeypatch, tmp_path_factory):
    """The plan draws; the file beside it is the one that it names, and no other."""
    monkeypatch.chdir(tmp_path)
    model = Folders(tmp_path_factory.getbasetemp() / "saved-models")(NAME)
    options = ["--set", "bins=2", "--set", "sensitivity=0"]
    found = done(
        "calibrate", "int8", "--model", model, "--count", 1, "--steps", 4, *options,
        "--out", "a.toml", "--format", "json",
    )  # fmt: skip
    document = json.loads(found.stdout)
    assert "in 2 bins" in json.dumps(document)
    assert Path("a.safetensors").exists()
    done("generate", "a cat", "--model", model, "--plan", "a.toml", "--out", "a.png", "--steps", 2)
    Path("a.safetensors").write_bytes(b"something else")
    failed = run("generate", "a cat", "--model", model, "--plan", "a.toml", "--out", "b.png")
    assert failed.exit_code != 0
    assert "not those that were meant" in " ".join(failed.output.split())
    wrong = run("calibrate", "int8", "--model", model, "--set", "bins=0")
    assert wrong.exit_code != 0
    assert "int8 takes no bins = 0" in wrong.output
