"""`attention.Backend`: every attention is taken, by whatever processor, and nothing stays set."""

import pytest
import torch
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry, attention_backend
from roster import pipelines
from tiny import PIPELINES
from torch.nn import functional

from accel import Plan
from accel.attention import Backend
from accel.errors import BadInput, Conflict, UnsupportedModel
from accel.seams.attention import Asked, Dispatched, Interception, answer_attention
from accel.seams.denoisers import find_denoisers
from accel.seams.modules import find_modules

LINEAR = ("Sana",)
"""Processors by part of their name that make no call of torch's attention."""


def taken(pipe, answer):
    """Answer every attention of a pipeline; how many modules there are, and the undo."""
    undos, count = [], 0
    for denoiser in find_denoisers(pipe):
        for module in find_modules(denoiser):
            if module.kind != "mlp":
                undos.append(answer_attention(module, answer))
                count += "Linear" not in type(getattr(module.module, "processor", None)).__name__
    return count, lambda: [undo() for undo in reversed(undos)]


@pipelines()
def test_every_processor_makes_one_call(bench, same, name):
    """So a method of the attention sees each once, with `[B, H, S, D]`, and can give it back."""
    pipe, seen = bench.pipe(name), []

    def answer(asked):
        seen.append(asked)
        return asked.dense()

    modules, undo = taken(pipe, answer)
    try:
        found = bench.call(name, steps=1)
    finally:
        undo()
    assert same(found, bench.stock(name, steps=1))
    assert len(seen) >= modules and len(seen) % modules == 0
    assert all(asked.query.ndim == 4 and asked.query.shape[-1] <= 64 for asked in seen)


@pipelines()
def test_the_same_backend_is_the_same_to_the_bit(bench, same, name):
    output, report = bench.under(name, Plan(Backend(backend="native")), steps=2)
    assert same(output, bench.stock(name, steps=2))
    assert report.verdicts["attention.Backend"].state == "ACTIVE"


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("name", ["sd15", "flux_cfg", "pixart_sigma"])
def test_another_backend_is_near_and_masks_stay_with_torch(bench, name):
    output, report = bench.under(name, Plan(Backend(backend="flex")), steps=2)
    stock = bench.stock(name, steps=2)
    assert torch.allclose(*(torch.as_tensor(x) for x in (output, stock)), atol=1e-3)
    said = report.verdicts["attention.Backend"].detail
    assert "by flex" in said
    assert ("6 that it does not take stayed as they were" in said) == (name == "pixart_sigma")


def test_no_backend_stays_set():
    pipe = PIPELINES["flux_cfg"].build()
    before = _AttentionBackendRegistry.get_active_backend()[0]
    with Plan(Backend(backend="_native_math")).attach(pipe):
        assert _AttentionBackendRegistry.get_active_backend()[0] == before
        tiny = PIPELINES["sd15"]
        other = tiny.call(tiny.build(), steps=1)
    assert torch.equal(torch.as_tensor(other), torch.as_tensor(tiny.call(tiny.build(), steps=1)))
    assert _AttentionBackendRegistry.get_active_backend()[0] == before


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_a_backend_set_by_the_user_leaves_nothing_to_do_and_that_is_said(bench):
    """Flex does not call torch's attention: it is the user's choice that stands."""
    with attention_backend("flex"):
        _, report = bench.under("flux_cfg", Plan(Backend()), steps=1)
    assert report.verdicts["attention.Backend"].state == "INACTIVE"
    assert "set_attention_backend" in report.verdicts["attention.Backend"].detail


def test_what_is_not_there_is_refused():
    pipe = PIPELINES["sd15"].build()
    with pytest.raises(BadInput, match=r"no attention backend 'xfrmers'\. Did you mean xformers"):
        Plan(Backend(backend="xfrmers")).attach(pipe)
    with pytest.raises(UnsupportedModel, match="flash-attn"):
        Plan(Backend(backend="flash")).attach(pipe)
    with (
        Plan(Backend(backend="_native_cudnn")).attach(pipe),
        pytest.raises(UnsupportedModel, match=r"_native_cudnn does not serve this network here"),
    ):
        PIPELINES["sd15"].call(pipe, steps=1)
    with pytest.raises(Conflict, match="twice"):
        Plan(Backend(), Backend(backend="flex"))


@pytest.mark.parametrize(
    ("options", "native", "flash"),
    [
        ({}, True, True),
        ({"scale": 0.3}, True, True),
        ({"is_causal": True}, True, True),
        ({"attn_mask": torch.zeros(4, 4)}, True, False),
    ],
)
def test_what_a_backend_would_drop_in_silence_it_is_not_asked(options, native, flash):
    asked = Asked(*torch.randn(3, 1, 2, 4, 8), **options)
    assert Dispatched("native", "test").serves(asked) == native
    assert Dispatched("_native_flash", "test").serves(asked) == flash


@pytest.mark.parametrize("mask", [torch.ones(1, 1, 1, 4).bool(), torch.zeros(4, 4)])
def test_xformers_is_asked_for_no_mask(monkeypatch, mask):
    """It adds booleans to the scores, and reads two dimensions as batch and keys."""
    monkeypatch.setattr(
        attention_dispatch, "_check_attention_backend_requirements", lambda name: None
    )
    q = torch.randn(1, 2, 4, 8)
    assert Dispatched("xformers", "test").serves(Asked(q, q, q))
    assert not Dispatched("xformers", "test").serves(Asked(q, q, q, mask))


def test_a_compiled_attention_is_refused_by_name(bench):
    pipe = bench.pipe("dit")
    module = pipe.transformer.transformer_blocks[0].attn1
    module.compile(backend="eager")
    try:
        with pytest.raises(UnsupportedModel, match=r"transformer_blocks\.0\.attn1 is compiled"):
            Plan(Backend()).attach(pipe)
    finally:
        del module._compiled_call_impl


def test_inside_an_answer_torch_is_itself():
    q = torch.randn(1, 2, 4, 8)
    calls = []

    def answer(asked):
        calls.append(asked)
        return functional.scaled_dot_product_attention(asked.query, asked.key, asked.value)

    with Interception(answer):
        found = functional.scaled_dot_product_attention(q, q, value=q)
    assert len(calls) == 1
    assert torch.equal(found, functional.scaled_dot_product_attention(q, q, q))
