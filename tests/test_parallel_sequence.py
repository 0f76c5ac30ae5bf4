"""Tokens shared out over processes: the network of one process, whatever its tokens and masks."""

import functools
import itertools
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from parallel_jobs import outcome
from roster import full
from sequence_jobs import (
    CALLS,
    MASKS,
    OTHERS,
    STRANGE,
    attended,
    coverage,
    refusal,
    shares,
    toy,
    with_references,
)
from test_parallel import CLOSE, WORLDS, agree, distance, every

from accel import cache, guidance
from accel.seams.places import PLANS
from parallel import CFG, USP, Ring, Ulysses

METHODS = pytest.mark.parametrize("method", [Ulysses(), Ring()], ids=["ulysses", "ring"])


# Networks


NETWORKS_IN_CI = [
    *("FluxTransformer2DModel", "ChromaTransformer2DModel", "HeliosTransformer3DModel"),
    *("HunyuanVideoTransformer3DModel", "HunyuanVideo15Transformer3DModel", "history"),
    *("LTX2VideoTransformer3DModel", "MochiTransformer3DModel", "QwenImageTransformer2DModel"),
    *("WanTransformer3DModel", "ZImageTransformer2DModel", "times of tokens"),
]


def test_every_network_that_is_accepted_is_called():
    accepted = {
        name
        for name, kind in coverage.classes().items()
        if name in PLANS or getattr(kind, "_cp_plan", None)
    }
    assert accepted == CALLS.keys()


@pytest.mark.parametrize("size", WORLDS)
@METHODS
@pytest.mark.parametrize(
    "name",
    [pytest.param(one, marks=full(one not in NETWORKS_IN_CI)) for one in (*CALLS, *OTHERS)],
)
def test_a_network_answers_as_in_one_process(worlds, name, method, size):
    """Texts of two lengths in turns, masked where it takes masks; nothing is divided evenly."""
    for one in worlds[size].run(toy, name, method):
        assert max(one.errors) <= CLOSE
        assert f"in {size} processes" in one.sent


@pytest.mark.laws_full
@pytest.mark.parametrize("name", [*CALLS, *OTHERS])
def test_a_network_shared_out_along_two_axes_answers_as_in_one_process(worlds, name):
    for one in worlds[4].run(toy, name, USP()):
        assert max(one.errors) <= CLOSE


@METHODS
def test_arguments_under_which_tokens_are_told_apart_by_number_are_refused(worlds, method):
    for told in worlds[2].run(refusal, with_references, method):
        assert re.match(r"Flux2Transformer2DModel is called with kv_cache_mode.* not fit", told)


# Masks


def seen(draw, tokens, size):
    """Tokens that are seen, by row: some of each process's at least."""
    rows = [[draw(st.booleans()) for _ in range(tokens)] for _ in range(draw(st.integers(1, 3)))]
    found = torch.tensor(rows)
    for part in found.tensor_split(size, 1):
        part[:, draw(st.integers(0, part.shape[1] - 1))] = True
    return found


@pytest.mark.parametrize("size", [2, 3])
@METHODS
@pytest.mark.parametrize("form", MASKS)
@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_attention_under_a_mask_is_that_of_one_process(worlds, form, method, size, data):
    mask = seen(data.draw, data.draw(st.integers(size, 14)), size)
    for alone, shared in worlds[size].run(attended, form, mask, method):
        assert distance(shared, alone) <= CLOSE


@pytest.mark.parametrize("size", [2, 3])
@METHODS
@pytest.mark.parametrize("form", [name for name in MASKS if not name.startswith("both")])
def test_a_process_may_have_nothing_that_is_seen(worlds, form, method, size):
    mask = torch.arange(11) < torch.tensor([[11], [3]])
    for alone, shared in worlds[size].run(attended, form, mask, method):
        assert distance(shared, alone) <= CLOSE


def test_masks_are_shared_out_along_two_axes(worlds):
    mask = torch.arange(11) < torch.tensor([[11], [10]])
    for form in MASKS:
        for alone, shared in worlds[4].run(attended, form, mask, USP()):
            assert distance(shared, alone) <= CLOSE


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("heads", range(2, 9, 2))
def test_any_number_of_heads_will_do(worlds, heads, groups, size):
    """Fewer than processes, a multiple of them, and some that are left over; under a mask too."""
    methods = [Ulysses(), *([USP()] if size == 4 else [])]
    mask = torch.arange(11) < torch.tensor([[11], [10]])
    for form, method in itertools.product(("none", "both, added"), methods):
        job = functools.partial(attended, heads=heads, groups=groups)
        for alone, shared in worlds[size].run(job, form, mask, method):
            assert distance(shared, alone) <= CLOSE


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("heads", range(1, 7))
@METHODS
def test_no_process_computes_more_than_its_share(worlds, heads, method, size):
    for alone, own in worlds[size].run(shares, heads, 24, method):
        assert own * size == alone


@METHODS
@pytest.mark.parametrize("form", STRANGE)
def test_a_mask_of_other_tokens_or_of_pairs_is_refused(worlds, form, method):
    mask = torch.ones(2, 11, dtype=torch.bool)
    for told in worlds[2].run(refusal, attended, form, mask, method):
        assert re.match(r"transformer.blocks.0.attn attends under a mask.* does not fit", told)


@METHODS
def test_a_mask_that_comes_after_the_first_step_is_refused(worlds, method):
    mask = torch.ones(2, 11, dtype=torch.bool)
    for told in worlds[2].run(refusal, attended, "keys", mask, method, "none"):
        assert "from the first step on" in told


# Pipelines


SEQUENCES = ["flux_cfg", "sd3", "wan22", "qwenimage", "sd3_controlnet", "hunyuanvideo", "zimage"]


@pytest.mark.parametrize("size", WORLDS)
@METHODS
@pytest.mark.parametrize("name", every(SEQUENCES, "parallel.Ulysses"))
def test_shared_tokens_are_the_picture(worlds, name, method, size):
    """Whatever the number of tokens and heads: three processes divide none of them."""
    for one in agree(worlds[size].run(outcome, name, [method], runs=2, batch=2)):
        assert all(distance(each, one.stock) <= CLOSE for each in one.found)
        assert "a part of the tokens each" in one.details[method.name]


LONG = ("a fox", "a red fox that runs through the deep snow of a wood at dawn, seen from afar " * 3)


@METHODS
@pytest.mark.parametrize("name", ["hunyuanvideo", "zimage"])
def test_prompts_of_a_batch_and_branches_may_differ_in_length(worlds, name, method):
    found = agree(worlds[3].run(outcome, name, [method], prompts=LONG, steps=3))
    assert all(distance(one.found[0], one.stock) <= CLOSE for one in found)


@pytest.mark.parametrize("beside", [cache.EasyCache(threshold=0.3), guidance.Interval(high=0.6)])
def test_tokens_are_shared_out_below_caches_and_guidance(worlds, beside):
    for one in agree(worlds[2].run(outcome, "flux_cfg", [Ulysses()], beside=[beside], steps=6)):
        assert distance(one.found[0], one.stock) <= CLOSE


@pytest.mark.parametrize("name", ["flux_cfg", "wan22", "hunyuanvideo"])
@pytest.mark.parametrize("plan", [[CFG(), Ulysses()], [USP()]], ids=["branches and tokens", "usp"])
def test_two_axes_take_four(worlds, name, plan):
    for one in agree(worlds[4].run(outcome, name, plan, steps=3)):
        assert distance(one.found[0], one.stock) <= CLOSE
