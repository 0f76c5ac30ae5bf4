"""Searches and profiles while a model runs: who is looked at, when, and whose state it is."""

from itertools import product
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from roster.attention import FORCED
from test_attention_lowerings import close, inputs
from test_attention_patterns import EXAMPLES
from test_attention_searched_rows import in_turns
from torch.nn.functional import scaled_dot_product_attention

from accel import Plan, cache, errors
from accel.attention import SVG, SVG2, AdaSpa, Searched, SpargeAttn, timing
from accel.attention import choice as choices
from accel.attention.account import Account
from accel.attention.choice import Choice
from accel.attention.masses import Exact
from accel.attention.patterns import Spatial, Temporal
from accel.attention.profiling import Profiling, chosen_of, drawn
from accel.attention.searching import Schedule, Searching
from accel.attention.selection import Cumulative, TopK
from accel.attention.serving import Moment
from accel.cache.decisions import Decisions
from accel.report import Tally
from accel.seams.attention import Asked
from accel.seams.denoisers import Row
from accel.seams.layout import Layout

ROWS = (Row("uncond", 0), Row("cond", 0))
INDICATORS = {
    "exact": {"block": 5, "cell": 4},
    "low-bit": {"block": 5, "cell": 4, "bits": 3},
    "pooled": {"block": 5, "cell": 4, "likeness": -1.0},
    "centroids": {"groups": 6, "cells": 7, "first": 3},
}
SELECTIONS = {"top-k": {"keep": 0.4}, "mass": {"share": 0.5}}
METHODS = [
    *(
        Searched(indicator=what, selection=how, **INDICATORS[what], **SELECTIONS[how])
        for what, how in product(INDICATORS, SELECTIONS)
    ),
    AdaSpa(block=5, keep=0.4),
    SpargeAttn(block=5, cell=4, share=0.5, likeness=-1.0),
    SVG(keep=0.9, block=4),
    SVG2(groups=6, cells=7, share=0.5, first=3),
]
SEARCHING = [method for method in METHODS if method.name != "attention.SVG"]


def engine(method):
    """What answers for a method, and its tally."""
    tally = Tally(method.name)
    return method.answers(Choice("gather"), Account(tally)), tally


def moment(layout, qkv, *, rows=ROWS, step=0, total=10, module=0, text_mask=None):
    """One attention of a network that is not there."""
    where = SimpleNamespace(index=module, denoiser=SimpleNamespace(name="transformer"))
    when = SimpleNamespace(index=step, total=total)
    return Moment(Asked(*qkv), layout, text_mask, where, rows, when)


# schedules


@EXAMPLES
@given(st.lists(st.integers(0, 99), unique=True, min_size=1), st.integers(1, 60))
def test_a_search_is_due_at_the_first_step_of_each_share(shares, total):
    schedule = Schedule(tuple(share / 100 for share in sorted(shares)))
    steps = [SimpleNamespace(index=index, total=total) for index in range(total)]
    numbers = [schedule.due(step) for step in steps]
    assert numbers == sorted(numbers)
    begins = {round(share / 100 * total) for share in shares}
    assert {i for i in range(1, total) if numbers[i] != numbers[i - 1]} == {
        i for i in begins if 0 < i < total
    }


def test_a_step_that_nobody_knows_the_place_of_is_no_share():
    assert Schedule().due(SimpleNamespace(index=3, total=None)) is None
    with pytest.raises(errors.UnsupportedModel, match="search at every step"):
        Schedule((0.2,)).due(SimpleNamespace(index=3, total=None))


def test_what_was_found_is_used_until_the_next_search(bench):
    _, report = bench.under("wan21", Plan(AdaSpa(block=4, keep=0.3, searches=(0.2, 0.6))), steps=10)
    said = report.verdicts["attention.AdaSpa"].detail
    layers, branches = 3, 2
    searched, reused = 2 * layers * branches, 6 * layers * branches
    assert f"{searched} searches, {reused} tables reused" in said
    assert f"left dense: {2 * layers * branches} in the first" in said


def test_a_search_that_a_cache_left_out_is_made_when_the_network_next_runs(bench):
    plan = Plan(AdaSpa(block=4, keep=0.3, warm_up=0.0, searches=(0.3, 0.6)))
    skipped = Plan(*plan, cache.Custom(site="network", interval=4, last=False))
    _, report = bench.under("flux", skipped, steps=9)  # runs at 0, 4 and 8
    layers = 4
    assert f"{3 * layers} searches, 0 tables reused" in report.verdicts["attention.AdaSpa"].detail


# what is computed


@pytest.mark.parametrize("selection", [TopK(1.0), Cumulative(1.0)], ids=repr)
def test_where_everything_is_kept_attention_stays_dense(selection):
    layout = Layout(3, 1, 4, 5)
    tally = Tally("test")
    answers = Searching(Exact(4, 4), selection, Schedule(), Choice("gather"), Account(tally))
    assert answers(moment(layout, inputs(layout))) == "where everything was kept"


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_one_block_stays_dense(method):
    """A block that is larger than the picture; a band as wide; a cluster for all."""
    wide = {
        "attention.SVG": {"block": 64},
        "attention.SVG2": {"groups": 1, "cells": 1},
        "attention.AdaSpa": {"block": 64},
    }.get(method.name, {"block": 64, "cell": 64, "groups": 1, "cells": 1})
    fields = {name: size for name, size in wide.items() if name in type(method).model_fields}
    answers, _ = engine(method.model_copy(update=fields))
    layout = Layout(3, 2, 4, 5)
    found = answers(moment(layout, inputs(layout)))
    assert found.startswith("where every")


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_text_reaches_every_row_and_padding_none(method):
    layout = Layout(4, 2, 4, 5, text_first=False)
    text_mask = torch.ones(2, 4, dtype=torch.bool)
    text_mask[1, 2] = False
    q, k, v = inputs(layout)

    def attended():
        answers, _ = engine(method)
        return answers(moment(layout, (q, k, v), text_mask=text_mask))

    before = attended()
    k[:, :, layout.text_span.start + 2] += 3.0
    v[:, :, layout.text_span.start + 2] += 3.0
    changed = (attended() != before).any(-1)
    assert changed[0].all()
    assert not changed[1].any()


@pytest.mark.parametrize("text_first", [True, False])
@pytest.mark.parametrize("method", SEARCHING, ids=repr)
def test_blocks_are_those_of_the_image_on_whatever_side_the_text_is(method, text_first):
    """With the text hidden, an image is looked at and attended to as if there were none."""
    layout, bare = Layout(4, 2, 4, 5, text_first), Layout(0, 2, 4, 5)
    qkv = inputs(layout)
    hidden = torch.zeros(2, 4, dtype=torch.bool)
    found = engine(method)[0](moment(layout, qkv, text_mask=hidden))
    alone = engine(method)[0](moment(bare, qkv[:, :, :, layout.image_span]))
    close(found[:, :, layout.image_span], alone)


# whose state it is


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_a_row_is_the_same_wherever_it_stands_and_whoever_is_with_it(method):
    layout = Layout(3, 2, 4, 5)
    rows = (Row("cond", 0), Row("uncond", 0), Row("cond", 1))
    steps = [inputs(layout, batch=3, seed=step) for step in range(4)]
    together, apart = engine(method)[0], engine(method)[0]
    for step, qkv in enumerate(steps):
        whole = together(moment(layout, qkv, rows=rows, step=step, total=4))
        for part in ([2, 0], [1]) if step % 2 else ([1, 2], [0]):
            some = tuple(rows[row] for row in part)
            found = apart(moment(layout, qkv[:, part], rows=some, step=step, total=4))
            close(found, whole[part])


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_the_entries_of_a_row_are_looked_at_one_by_one(method):
    """Frames that a network folds into its batch."""
    layout = Layout(0, 1, 4, 5)
    qkv = inputs(layout, batch=4)
    folded = engine(method)[0](moment(layout, qkv))
    rows = tuple(Row("cond", sample) for sample in range(4))
    single = engine(method)[0](moment(layout, qkv, rows=rows))
    if isinstance(folded, str):
        assert folded == single
    else:
        close(folded, single)


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_a_run_remembers_nothing_of_the_one_before(method):
    layout = Layout(3, 2, 4, 5)
    first, second = (inputs(layout, seed=seed) for seed in (1, 2))
    answers, tally = engine(method)
    answers(moment(layout, first))
    answers.reset()
    assert tally.memory() == 0
    state = torch.get_rng_state()
    found = answers(moment(layout, second))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(found, engine(method)[0](moment(layout, second)))


@pytest.mark.parametrize("name", ["flux_cfg", "wan22", "sd3"])
def test_blocks_that_run_for_some_rows_search_for_those(bench, monkeypatch, name):
    monkeypatch.setattr(Decisions, "decide", in_turns)
    sparse = AdaSpa(block=4, keep=0.3, warm_up=0.0, **FORCED)
    plan = Plan(cache.Custom(site="blocks", front=1), sparse)
    with plan.attach(bench.pipe(name)) as run:
        bench.call(name, steps=4, batch=2)
    said = run.report.verdicts["attention.AdaSpa"]
    assert said.state == "ACTIVE"
    assert "left dense" not in said.detail


def test_what_is_kept_is_counted():
    layout, method = Layout(0, 1, 4, 5), AdaSpa(block=4, keep=0.3)
    answers, tally = engine(method)
    answers(moment(layout, inputs(layout)))
    heads, blocks, tokens, labels = 3, 5, 20, 2 * 20 * 8
    assert tally.memory() == 2 * (heads * blocks * blocks + heads * tokens * 4 + labels)


# heads that take one of two patterns


def alike(layout, by):
    """Queries and keys of tokens that look at those with the same `by`."""
    places = layout.places(torch.arange(layout.image))
    kind = {"frame": places.frame, "pixel": layout.pixel_index(places) // layout.frames}[by]
    return 8 * torch.nn.functional.one_hot(kind, 64).float()


def test_heads_of_frames_are_spatial_and_heads_of_pixels_temporal():
    layout = Layout(2, 6, 4, 4)
    kinds = torch.stack([alike(layout, "frame"), alike(layout, "pixel")])
    q = torch.cat([torch.zeros(2, 2, 64), kinds], 1)[None]
    v = torch.randn(1, 2, layout.tokens, 64)
    asked = moment(layout, (q, q, v), rows=ROWS[1:])
    patterns = [Spatial(keep=0.5, block=4), Temporal(keep=0.5, block=4)]
    assert chosen_of(asked, patterns, 32).tolist() == [[0, 1]]
    swapped = moment(layout, (q.flip(1), q.flip(1), v), rows=ROWS[1:])
    assert chosen_of(swapped, patterns, 32).tolist() == [[1, 0]]
    tally = Tally("test")
    named = dict(zip(("spatial", "temporal"), patterns, strict=True))
    answers = Profiling(lambda _: named, 32, Choice("gather"), Account(tally))
    dense = scaled_dot_product_attention(q, q, v)
    assert (answers(asked) - dense).abs().max() < 0.05
    assert "50% of heads spatial, 50% of heads temporal" in tally.verdict().detail


@EXAMPLES
@given(st.integers(0, 99), st.integers(0, 99), st.integers(1, 99))
def test_the_same_queries_are_judged_in_every_branch_and_batch(step, module, samples):
    layout = Layout(2, 3, 4, 4)
    few, many = inputs(layout, batch=1), inputs(layout, batch=5)
    one = drawn(moment(layout, few, rows=ROWS[:1], step=step, module=module), samples)
    other = drawn(moment(layout, many, rows=ROWS, step=step, module=module), samples)
    assert torch.equal(one, other)
    assert len(one.unique()) == min(samples, layout.image)
    assert one.max() < layout.image


def test_other_steps_and_modules_are_judged_by_other_queries():
    layout = Layout(0, 8, 8, 8)
    qkv = inputs(layout, batch=1)
    seen = {
        tuple(drawn(moment(layout, qkv, rows=ROWS[:1], step=step, module=module), 16).tolist())
        for step in range(4)
        for module in range(4)
    }
    assert len(seen) == 16


def test_padding_counts_for_nothing_when_heads_are_judged():
    layout = Layout(4, 3, 4, 4)
    q, k, v = inputs(layout)
    valid = torch.tensor([[True, True, False, False]] * 2)
    patterns = [Spatial(keep=0.6, block=4), Temporal(keep=0.6, block=4)]
    before = chosen_of(moment(layout, (q, k, v), text_mask=valid), patterns, 48)
    k[:, :, 2:4], v[:, :, 2:4] = 50.0, 1e6
    assert torch.equal(chosen_of(moment(layout, (q, k, v), text_mask=valid), patterns, 48), before)


# whether it pays


@pytest.mark.parametrize("method", [AdaSpa(block=64), SVG(keep=0.5)], ids=repr)
@pytest.mark.parametrize(
    ("search", "attend", "dense", "pays"), [(1, 1, 3, True), (9, 1, 3, None), (1, 4, 3, False)]
)
def test_what_takes_longer_than_it_saves_is_advised_against(
    monkeypatch, method, search, attend, dense, pays
):
    """Seconds are told by hand; AdaSpa searches at a fifth of ten steps."""
    layout, answers = Layout(0, 2, 24, 24), None
    told = iter((attend, dense, search))
    monkeypatch.setattr(timing, "seconds", lambda work, _: work() is not None and next(told))
    answers, tally = engine(method)
    for step in range(2):  # measured once
        answers(moment(layout, inputs(layout), step=step))
        advised = pays is False or (pays is None and method.name == "attention.SVG")
        assert len(tally.advice) == advised
    assert all("does not pay here: 1,152 tokens" in text for text in tally.advice)


def choosing(monkeypatch):
    """As on a device that has several lowerings; what was measured."""
    measured = []

    def timed(choice, names, make, asked, text_mask):
        measured.append(asked.query.shape[1])
        choice.failed["flex"] = "no kernel"
        return "gather"

    monkeypatch.setattr(Choice, "_fastest", timed)
    monkeypatch.setattr(choices, "refusals", lambda table, device: {})
    return measured


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_lowerings_are_measured_once_whatever_the_heads_choose(monkeypatch, method):
    """And which failed is said."""
    measured = choosing(monkeypatch)
    layout, tally = Layout(0, 3, 4, 4), Tally(method.name)
    answers = method.answers(Choice("auto"), Account(tally))
    for step in range(6):
        torch.manual_seed(step)
        answers(moment(layout, inputs(layout), step=step))
    assert len(measured) == (len(method.patterns(layout)) if isinstance(method, SVG) else 1)
    assert "flex failed where it was tried: no kernel" in tally.change


# plans


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"indicator": "exact", "bits": 3}, "bits is read by indicator 'low-bit' only"),
        ({"selection": "top-k", "share": 0.5}, "share is read by selection 'mass' only"),
        ({"when": (0.5, 0.2)}, "when rises without repeats"),
        ({"when": (0.5, 1.0)}, "from 0 to below 1"),
    ],
)
def test_fields_that_mean_nothing_are_refused(fields, match):
    with pytest.raises(ValueError, match=match):
        Searched(**fields)


@pytest.mark.parametrize("searches", [(), (0.6, 0.2), (0.2, 0.2), (1.0,)])
def test_searches_are_rising_shares(searches):
    with pytest.raises(ValueError, match="searches"):
        AdaSpa(searches=searches)


@pytest.mark.parametrize(
    "method",
    [
        AdaSpa(keep=1.0),
        SpargeAttn(share=1.0),
        SVG(warm_up=1.0),
        SVG2(share=1.0),
        Searched(share=1.0),
        Searched(selection="top-k", keep=1.0),
    ],
    ids=repr,
)
def test_all_kept_is_off(bench, same, method):
    with Plan(method).attach(bench.pipe("wan21")) as run:
        output = bench.call("wan21", steps=2)
    assert same(output, bench.stock("wan21", steps=2))
    assert run.report.verdicts[method.name].detail.startswith("off: ")
