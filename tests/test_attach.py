"""Attaching: what a plan does to a pipeline, beside other libraries and against misuse."""

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from conftest import bits_equal
from peft import LoraConfig
from roster import ROSTER, full
from tiny import PIPELINES

from accel import Plan, cache, errors, explain, guidance
from accel.seams import branches
from accel.seams.branches import layout_of

CACHES = [cache.EasyCache(threshold=1e9, warmup=2), cache.FirstBlock(threshold=1e9)]


def test_a_second_plan_is_refused(bench, same):
    pipe = bench.pipe("sd15")
    with Plan(guidance.Interval(low=0.5)).attach(pipe):
        for plan in (Plan(), Plan(cache.EasyCache()), Plan(guidance.Interval())):
            with pytest.raises(errors.Conflict, match=r"pipe\.unet already carries .*detach it"):
                plan.attach(pipe)
        bench.call("sd15", steps=4)
    assert same(bench.call("sd15", steps=4), bench.stock("sd15", steps=4))


def test_methods_that_claim_one_seam_are_named(bench):
    class Twin(cache.EasyCache):
        name = "cache.Twin"

    plan = Plan(cache.EasyCache(threshold=0.1), Twin(threshold=0.1))
    with pytest.raises(errors.Conflict, match=r"cache\.\w+ and cache\.\w+ both need the seam"):
        plan.attach(bench.pipe("sd15"))


def test_run_is_a_context_manager_and_detaches_twice(bench):
    run = Plan(cache.EasyCache(threshold=1e9)).attach(bench.pipe("sd15"))
    with run as same_run:
        assert same_run is run
        bench.call("sd15", steps=6)
    run.detach()
    assert run.report.steps == 6


def test_a_pipeline_without_a_denoiser_is_refused():
    with pytest.raises(errors.UnsupportedModel, match="no denoiser under unet, transformer"):
        Plan().attach(type("EmptyPipeline", (), {})())


def test_an_unknown_layout_is_refused_not_guessed(bench):
    pipe = bench.pipe("sd15")
    kept = type(pipe)
    pipe.__class__ = type("NovelPipeline", (kept,), {})
    try:
        with pytest.raises(errors.UnsupportedModel, match=r"NovelPipeline: .*Add its layout"):
            Plan(cache.EasyCache()).attach(pipe)
    finally:
        pipe.__class__ = kept


@pytest.mark.parametrize("name", PIPELINES)
def test_the_layout_is_that_of_the_pipeline(bench, name):
    tiny = PIPELINES[name]
    layout = layout_of(bench.pipe(name))
    styles = {"batched": "batched", "list": "batched", "embedded": "calls", "none": "calls"}
    assert layout.style == styles.get(tiny.layout, "calls")
    expected = tuple(branch for branch in tiny.order if branch != "skip")
    if len(expected) > 1 and tiny.layout != "guider":
        assert layout.order == expected


def test_refused_pipelines_are_not_in_a_known_layout():
    for name in branches.REFUSED:
        with pytest.raises(errors.UnsupportedModel):
            layout_of(type(f"{name}Pipeline", (), {})())


# Beside other libraries.


class Moving(ModelHook):
    """What offloading does: look at every call."""

    def __init__(self):
        self.calls = 0

    def pre_forward(self, module, *args, **kwargs):
        self.calls += 1
        return args, kwargs


@pytest.mark.parametrize("method", CACHES, ids=lambda method: method.name)
def test_a_hook_below_sees_computed_calls_alone(method):
    """Offload hooks sit on the network: a skipped call must not load it."""
    tiny = PIPELINES["flux_cfg"]
    pipe = tiny.build()
    moving = Moving()
    add_hook_to_module(pipe.transformer, moving)
    with Plan(method).attach(pipe) as run:
        tiny.call(pipe, steps=6)
    assert moving.calls == run.report.calls
    remove_hook_from_module(pipe.transformer)


@pytest.mark.parametrize("method", CACHES, ids=lambda method: method.name)
@pytest.mark.parametrize("name", ["flux_cfg", "wan21"])
def test_compiled_blocks_keep_working(name, method):
    """`compile_repeated_blocks` before attaching: same pictures, same decisions, no trace."""
    tiny = PIPELINES[name]
    pipe = tiny.build()
    with Plan(method).attach(pipe) as run:
        expected = torch.as_tensor(tiny.call(pipe, steps=6))
    events = run.report.to_dict()["events"]
    pipe.transformer.compile_repeated_blocks(backend="eager")
    stock = tiny.call(pipe, steps=6)
    with Plan(method).attach(pipe) as run:
        output = torch.as_tensor(tiny.call(pipe, steps=6))
        assert run.report.to_dict()["events"] == events
    assert torch.allclose(output, expected, atol=1e-4)
    assert bits_equal(tiny.call(pipe, steps=6), stock)
    torch._dynamo.reset()


def test_compiling_the_root_after_attaching_is_an_error():
    tiny = PIPELINES["flux_cfg"]
    pipe = tiny.build()
    run = Plan(cache.EasyCache(threshold=1e9)).attach(pipe)
    pipe.transformer.compile(backend="eager")
    with pytest.raises(errors.BrokenAttachment, match=r"compiled.* Detach, compile, attach again"):
        tiny.call(pipe, steps=4)
    run.detach()
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["sd15", "flux_cfg"])
def test_a_lora_loaded_after_attaching_acts(name):
    tiny = PIPELINES[name]

    def adapted(pipe):
        network = getattr(pipe, tiny.denoisers[0])
        network.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))

    method = cache.EasyCache(threshold=1e9, warmup=2)
    outputs = []
    for late in (False, True):
        pipe = tiny.build()
        torch.manual_seed(3)
        if not late:
            adapted(pipe)
        with Plan(method).attach(pipe):
            bare = tiny.call(pipe, steps=6) if late else None
            torch.manual_seed(3)
            if late:
                adapted(pipe)
            outputs.append(tiny.call(pipe, steps=6))
        assert bare is None or not bits_equal(bare, outputs[0])
    assert bits_equal(*outputs)


# `explain`.


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=full(n not in ("sd15", "flux_cfg", "wan22", "dit"))) for n in PIPELINES],
)
def test_explain_says_what_attaching_would(bench, same, name):
    said = explain(bench.pipe(name))
    assert said.pipeline == type(bench.pipe(name)).__name__
    assert len(said.denoisers) == len(PIPELINES[name].denoisers)
    fits = {fit.method: fit.fits for fit in said.fits}
    assert fits == {method: row.ready(PIPELINES[name]) for method, row in ROSTER.items()}
    assert all(fit.reason for fit in said.fits)
    assert said.pipeline in str(said)
    assert same(bench.call(name, steps=3), bench.stock(name, steps=3))
