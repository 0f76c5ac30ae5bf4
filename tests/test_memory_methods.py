"""Weights that wait elsewhere: the bits of the stock pipeline, brought when needed, off again."""

import random

import pytest
import torch
from accelerate import cpu_offload
from conftest import bits_equal, differences, trace
from diffusers.hooks import HookRegistry, ModelHook, apply_group_offloading
from diffusers.hooks.group_offloading import ModuleGroup
from peft import LoraConfig
from roster import CORE, ROSTER, STEPS, pipelines
from tiny import PIPELINES

from accel import Plan, cache, errors, memory
from accel.seams import offload

HERE = {"onload_device": "cpu", "offload_device": "cpu"}
ROW = ROSTER["memory.GroupOffload"]
METHOD = ROW.active
FORMS = (METHOD, *ROW.variants)
EASY = cache.EasyCache(threshold=1e9, warmup=2)
FIRST = cache.FirstBlock(threshold=1e9, warmup=2)


@pytest.fixture
def brought(monkeypatch):
    """Counts what is brought: the first module of each group, in order."""
    seen = []
    inner = ModuleGroup.onload_

    def onload(group):
        seen.append(group)
        return inner(group)

    monkeypatch.setattr(ModuleGroup, "onload_", onload)
    return seen


@pytest.mark.parametrize("form", FORMS, ids=["blocks", "all", "leaves"])
@pipelines(CORE)
def test_it_is_the_stock_pipeline(bench, brought, name, form):
    with Plan(form).attach(bench.pipe(name)) as run:
        assert bits_equal(bench.call(name, steps=4), bench.stock(name, steps=4))
    assert brought
    verdict = run.report.verdicts["memory.GroupOffload"]
    assert verdict.state == "ACTIVE"
    assert "groups of" in verdict.detail


@pytest.mark.parametrize("method", [EASY, FIRST], ids=lambda method: method.name)
@pytest.mark.parametrize("name", ["flux_cfg", "wan21"])
def test_what_a_cache_skips_is_not_brought(bench, brought, name, method):
    """The closed form: every group at a computed call, at a skipped one what still runs."""
    pipe = bench.pipe(name)
    with Plan(METHOD).attach(pipe) as run:
        bench.call(name, steps=STEPS)
    calls, blocks = run.report.calls, len(brought) // run.report.calls - 1
    assert len(brought) == calls * (1 + blocks)  # what is in no block is a group too
    brought.clear()
    with Plan(METHOD, method).attach(pipe) as run:
        bench.call(name, steps=STEPS)
    events = run.report.to_dict()["events"][method.name]
    skipped = sum(state != "computed" for *_, state in events)
    assert skipped
    rest = 0 if method is EASY else 2  # the first block runs, and what is in none
    assert len(brought) == (calls - skipped) * (1 + blocks) + skipped * rest


def test_text_memories_spare_the_transfer_of_their_layers(bench, brought):
    leaves = memory.GroupOffload(offload_type="leaf_level", **HERE)
    counts = []
    for plan in (Plan(leaves), Plan(leaves, cache.TextKV())):
        brought.clear()
        with plan.attach(bench.pipe("sd15")):
            assert bits_equal(bench.call("sd15", steps=4), bench.stock("sd15", steps=4))
        counts.append(len(brought))
    assert counts[0] - counts[1] == 3 * 14  # later steps × keys and values


# Beside the hooks of others.


def hooked(pipe):
    """Hooks of group offloading on the networks of a pipeline."""
    parts = [part for module in networks(pipe) for part in module.modules()]
    return [part for part in parts if getattr(part, "_diffusers_hook", None) and names(part)]


def names(part):
    return [name for name in part._diffusers_hook.hooks if "offload" in name or "layer_ex" in name]


def networks(pipe):
    parts = (getattr(pipe, name, None) for name in ("unet", "transformer", "transformer_2"))
    return [part for part in parts if part is not None]


class Doubling(ModelHook):
    """A hook of a user's own."""

    def post_forward(self, module, output):
        return tuple(2 * part for part in output)


@pytest.mark.parametrize("leaves", ["theirs", "ours"])
@pytest.mark.parametrize("below", ["theirs", "ours"])
@pytest.mark.parametrize("form", FORMS, ids=["blocks", "all", "leaves"])
def test_hooks_of_others_above_and_below(form, below, leaves):
    """Theirs around the network and ours, put on and leaving in each order."""
    tiny = PIPELINES["flux_cfg"]
    pipe = tiny.build()
    stock = tiny.call(pipe, steps=4)
    registry = HookRegistry.check_if_exists_or_initialize(pipe.transformer)

    def theirs():
        registry.register_hook(Doubling(), "doubling")
        return lambda: registry.remove_hook("doubling", recurse=False)

    def ours():
        run = Plan(form, EASY).attach(pipe)
        return run.detach

    theirs()()  # diffusers leaves `forward` on the instance
    before = trace(pipe)
    hooks = {"theirs": theirs, "ours": ours}
    undo = {who: hooks[who]() for who in (below, *(hooks.keys() - {below}))}
    doubled = tiny.call(pipe, steps=STEPS)
    undo.pop(leaves)()
    once_left = tiny.call(pipe, steps=STEPS)
    assert bits_equal(once_left, doubled) is False
    for off in undo.values():
        off()
    assert bits_equal(tiny.call(pipe, steps=4), stock)
    assert not hooked(pipe)
    assert not differences(before, trace(pipe))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("form", FORMS, ids=["blocks", "all", "leaves"])
def test_undos_in_any_order(bench, form, seed):
    pipe = bench.pipe("flux_cfg")
    before = trace(pipe, strict=True)
    run = Plan(form, EASY, cache.TextKV(), FIRST).attach(pipe)
    undos = [callback for _, callback in run._stack.pop_all()._exit_callbacks]
    random.Random(seed).shuffle(undos)
    for undo in undos:
        undo(None, None, None)
    assert not differences(before, trace(pipe, strict=True))
    assert bits_equal(bench.call("flux_cfg", steps=4), bench.stock("flux_cfg", steps=4))


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_a_user_who_offloads_in_groups(bench, kind, when):
    """Our hooks keep working above or below diffusers' own."""
    tiny = PIPELINES["flux_cfg"]
    with Plan(EASY, cache.TextKV()).attach(bench.pipe("flux_cfg")) as run:
        expected = bench.call("flux_cfg", steps=STEPS)
    events = run.report.to_dict()["events"]
    pipe = tiny.build()
    options = {"num_blocks_per_group": 1, "offload_type": kind, **HERE}
    if when == "before":
        apply_group_offloading(pipe.transformer, **options)
    run = Plan(EASY, cache.TextKV()).attach(pipe)
    if when == "after":
        apply_group_offloading(pipe.transformer, **options)
    for _ in range(2):
        assert bits_equal(tiny.call(pipe, steps=STEPS), expected)
        assert run.report.to_dict()["events"] == events
    run.detach()
    assert hooked(pipe)
    assert bits_equal(tiny.call(pipe, steps=4), bench.stock("flux_cfg", steps=4))


def test_a_hook_that_leaves_in_the_midst_of_a_run_takes_none_of_ours_along():
    """What diffusers does with the hooks that watch the order of layers, after the first pass."""
    tiny = PIPELINES["flux_cfg"]
    pipe = tiny.build()
    block = pipe.transformer.transformer_blocks[1]
    registry = HookRegistry.check_if_exists_or_initialize(block)
    registry.register_hook(ModelHook(), "below")
    registry.register_hook(ModelHook(), "watching")
    with Plan(FIRST).attach(pipe) as run:

        def callback(pipe, index, timestep, state):
            if index == 0:
                registry.remove_hook("watching", recurse=False)
            return state

        tiny.call(pipe, steps=STEPS, callback_on_step_end=callback)
        first = run.report.to_dict()["events"]
        tiny.call(pipe, steps=STEPS)
        assert run.report.to_dict()["events"] == first
        assert run.report.verdicts["cache.FirstBlock"].state == "ACTIVE"
    assert registry._hook_order == ["below"]


@pytest.mark.parametrize("form", FORMS, ids=["blocks", "all", "leaves"])
def test_a_lora_that_is_loaded_while_attached(form):
    tiny = PIPELINES["sd15"]
    config = LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    outputs = []
    for plan in (Plan(), Plan(form)):
        pipe = tiny.build()
        run = plan.attach(pipe)
        tiny.call(pipe, steps=2)
        torch.manual_seed(0)
        pipe.unet.add_adapter(config)
        outputs.append(tiny.call(pipe, steps=4))
        run.detach()
        outputs.append(tiny.call(pipe, steps=4))
        assert not hooked(pipe)
    assert all(bits_equal(output, outputs[0]) for output in outputs)


# Refused.


def test_a_device_that_is_not_there(bench):
    for fields in ({"onload_device": "xpu:3"}, {"offload_device": "nowhere"}):
        plan = Plan(memory.GroupOffload(**(HERE | fields)))
        with pytest.raises(errors.BadInput, match=r"GroupOffload asks for .*does not have"):
            plan.attach(bench.pipe("sd15"))


def test_a_stream_needs_an_accelerator(bench):
    with pytest.raises(errors.BadInput, match="use_stream=False"):
        Plan(memory.GroupOffload(use_stream=True, **HERE)).attach(bench.pipe("sd15"))


def test_a_part_that_waits_elsewhere(bench):
    pipe = bench.pipe("sd15")
    with pytest.raises(errors.UnsupportedModel, match=r"pipe\.vae is on cpu.*vae=True"):
        offload.check_others("memory.GroupOffload", pipe, {"unet": pipe.unet}, "cuda")


@pytest.mark.parametrize("how", ["diffusers", "accelerate"])
def test_what_is_offloaded_already(how):
    pipe = PIPELINES["flux_cfg"].build()
    if how == "diffusers":
        apply_group_offloading(pipe.transformer, offload_type="leaf_level", **HERE)
    else:
        cpu_offload(pipe.transformer, torch.device("cpu"))
    before = trace(pipe, strict=True)
    with pytest.raises(errors.UnsupportedModel, match=r"pipe\.transformer (carries|cannot)"):
        Plan(EASY, METHOD).attach(pipe)
    assert not differences(before, trace(pipe, strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_on_an_accelerator(kind, stream):
    tiny = PIPELINES["flux_cfg"]
    pipe = tiny.build().to("cuda")
    stock = tiny.call(pipe, steps=STEPS).cpu()
    form = memory.GroupOffload(offload_type=kind, use_stream=stream)
    with Plan(form, FIRST).attach(pipe) as run:
        outputs = [tiny.call(pipe, steps=STEPS).cpu() for _ in range(2)]
        assert run.report.verdicts["cache.FirstBlock"].state == "ACTIVE"
    assert bits_equal(*outputs)
    assert {weight.device.type for weight in pipe.transformer.parameters()} == {"cuda"}
    assert bits_equal(tiny.call(pipe, steps=STEPS).cpu(), stock)


# Weights in fewer bits.

CASTS = (memory.LayerwiseCasting(), *ROSTER["memory.LayerwiseCasting"].variants)
WIDTHS = {"float8_e4m3fn": 1, "float8_e5m2": 1, "bfloat16": 2, "float16": 2}


def weights(pipe):
    return {
        f"{index}.{name}": weight
        for index, part in enumerate(networks(pipe))
        for name, weight in (*part.named_parameters(), *part.named_buffers())
    }


def kept(pipe):
    """Where the numbers of each weight are, and a copy of them."""
    return {name: (w.data_ptr(), w.clone()) for name, w in weights(pipe).items()}


def check_restored(pipe, before):
    for name, weight in weights(pipe).items():
        place, value = before[name]
        assert weight.data_ptr() == place, name  # the very tensor, on a CPU
        assert bits_equal(weight.detach(), value.detach()), name


@pytest.mark.parametrize("form", CASTS, ids=lambda form: form.storage)
@pipelines(CORE)
def test_weights_come_back_bit_for_bit(bench, name, form):
    pipe = bench.pipe(name)
    before, attributes = kept(pipe), trace(pipe)
    with Plan(form).attach(pipe) as run:
        cast = [w for w in weights(pipe).values() if w.dtype == getattr(torch, form.storage)]
        full = sum(weight.numel() * 4 for weight in cast)
        assert sum(weight.nbytes for weight in cast) * 4 == full * WIDTHS[form.storage]
        assert not bits_equal(bench.call(name, steps=2), bench.stock(name, steps=2))
    check_restored(pipe, before)
    assert not differences(attributes, trace(pipe))
    verdict = run.report.verdicts[form.name]
    assert verdict.state == "ACTIVE"
    assert f"the originals, {full} bytes" in verdict.detail
    assert run.report.to_dict()["cached_bytes"][form.name] == full
    assert bits_equal(bench.call(name, steps=2), bench.stock(name, steps=2))


@pytest.mark.parametrize("name", ["sd15", "flux_cfg"])
def test_it_is_diffusers_own_casting(bench, name):
    """And that of weights which were rounded by hand."""
    tiny = PIPELINES[name]
    theirs, rounded = tiny.build(), tiny.build()
    networks(theirs)[0].enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    names = [k for k, w in weights(theirs).items() if w.dtype == torch.float8_e4m3fn]
    for key in names:
        weight = weights(rounded)[key]
        weight.data = weight.data.to(torch.float8_e4m3fn).float()
    with Plan(memory.LayerwiseCasting()).attach(bench.pipe(name)):
        ours = bench.call(name, steps=3)
    assert bits_equal(ours, tiny.call(theirs, steps=3))
    assert bits_equal(ours, tiny.call(rounded, steps=3))


class Fault(Exception):
    pass


@pytest.mark.parametrize("where", ["attach", "run"])
def test_no_trace_of_casting_after_a_fault(bench, monkeypatch, where):
    pipe = bench.pipe("flux_cfg")
    before, attributes = kept(pipe), trace(pipe)
    layer = pipe.transformer.transformer_blocks[1].attn.to_q
    if where == "attach":
        inner = HookRegistry.register_hook

        def register(registry, hook, name):
            if registry._module_ref is layer:
                raise Fault
            inner(registry, hook, name)

        monkeypatch.setattr(HookRegistry, "register_hook", register)
        with pytest.raises(Fault):
            Plan(CASTS[0]).attach(pipe)
        monkeypatch.undo()
    else:
        inner = torch.nn.functional.linear

        def linear(x, weight, bias=None):
            if weight is layer.weight:
                raise Fault  # between the casts: the layer is wide when it breaks off
            return inner(x, weight, bias)

        with Plan(CASTS[0]).attach(pipe):
            whole = bench.call("flux_cfg", steps=2)
            monkeypatch.setattr(torch.nn.functional, "linear", linear)
            with pytest.raises(Fault):
                bench.call("flux_cfg", steps=2)
            monkeypatch.undo()
            assert bits_equal(bench.call("flux_cfg", steps=2), whole)
    check_restored(pipe, before)
    assert not differences(attributes, trace(pipe))


@pytest.mark.parametrize("form", FORMS, ids=["blocks", "all", "leaves"])
@pytest.mark.parametrize("name", ["sd15", "flux_cfg"])
def test_casting_with_group_offload_and_caches(bench, name, form):
    """What travels is narrow; the output is that of casting alone."""
    pipe = bench.pipe(name)
    before, attributes = kept(pipe), trace(pipe)
    outputs = []
    for others in ((), (form,), (form, EASY, cache.TextKV()), (EASY, cache.TextKV())):
        with Plan(CASTS[0], *others).attach(pipe):
            outputs.append(bench.call(name, steps=STEPS))
        check_restored(pipe, before)
        assert not differences(attributes, trace(pipe))
    assert bits_equal(outputs[0], outputs[1])
    assert bits_equal(outputs[2], outputs[3])
    assert not bits_equal(outputs[0], outputs[2])


@pytest.mark.parametrize("seed", range(3))
def test_undos_of_both_in_any_order(bench, seed):
    pipe = bench.pipe("flux_cfg")
    before, attributes = kept(pipe), trace(pipe, strict=True)
    leaves = memory.GroupOffload(offload_type="leaf_level", **HERE)
    run = Plan(CASTS[0], leaves, EASY, cache.TextKV()).attach(pipe)
    undos = [callback for _, callback in run._stack.pop_all()._exit_callbacks]
    random.Random(seed).shuffle(undos)
    for undo in undos:
        undo(None, None, None)
    check_restored(pipe, before)
    assert not differences(attributes, trace(pipe, strict=True))


def test_weights_that_were_changed_meanwhile_are_named(bench):
    pipe = PIPELINES["flux_cfg"].build()
    before = kept(pipe)
    layer = pipe.transformer.transformer_blocks[1].attn.to_q
    run = Plan(CASTS[0]).attach(pipe)
    layer.weight.data = layer.weight.data.float().add(1).to(torch.float8_e4m3fn)
    added = layer.bias = torch.nn.Parameter(torch.ones(len(layer.weight)).to(torch.float8_e4m3fn))
    with pytest.raises(errors.BrokenAttachment, match=r"2 weights .*to_q.*Fuse or load"):
        run.detach()
    changed = {
        name
        for name, w in weights(pipe).items()
        if not bits_equal(w.detach(), before[name][1].detach())
    }
    assert {name.rsplit(".", 1)[0] for name in changed} == {"0.transformer_blocks.1.attn.to_q"}
    assert layer.weight.dtype == added.dtype == torch.float32
    assert not [part for part in pipe.transformer.modules() if "_diffusers_hook" in vars(part)]


def test_casting_beside_copies_that_a_stream_pins(bench, monkeypatch):
    pipe = bench.pipe("flux_cfg")
    monkeypatch.setattr(offload, "check_devices", lambda *_: None)
    monkeypatch.setattr(offload, "offload", lambda *_, **__: offload.Placement(1, lambda: None))
    with pytest.raises(errors.Conflict, match=r"LayerwiseCasting and memory\.GroupOffload both"):
        Plan(CASTS[0], memory.GroupOffload(use_stream=True, **HERE)).attach(pipe)
    Plan(CASTS[0], memory.GroupOffload(**HERE)).attach(pipe).detach()


def test_casting_is_refused_by_name():
    half = PIPELINES["flux_cfg"].build().to(torch.bfloat16)
    with pytest.raises(errors.UnsupportedModel, match=r"computes in torch.bfloat16.*float8"):
        Plan(memory.LayerwiseCasting(storage="bfloat16")).attach(half)
    Plan(CASTS[0]).attach(half).detach()
    half.transformer.enable_layerwise_casting()
    with pytest.raises(errors.UnsupportedModel, match="layerwise casting already"):
        Plan(CASTS[0]).attach(half)
    away = PIPELINES["sd15"].build()
    cpu_offload(away.unet, torch.device("cpu"))
    with pytest.raises(errors.UnsupportedModel, match="accelerate took away"):
        Plan(CASTS[0]).attach(away)
    compiled = PIPELINES["sd15"].build()
    compiled.unet.mid_block.compile()
    with pytest.raises(errors.UnsupportedModel, match="is compiled"):
        Plan(CASTS[0]).attach(compiled)
