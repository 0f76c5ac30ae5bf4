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
from accel.seams.offload import check_others

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
        check_others("memory.GroupOffload", pipe, {"unet": pipe.unet}, "cuda")


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
