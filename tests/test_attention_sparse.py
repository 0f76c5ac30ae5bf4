"""Sparse attention on pipelines: what is served, as whom, how it is counted, when it pays."""

import contextlib
import re
from dataclasses import replace
from functools import cache
from itertools import count
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from roster import CI, CORE, ROSTER, full, in_ci, pipelines
from roster.attention import CLIPS, DENSE, FORCED, UNORDERED
from test_attention_patterns import layouts, mask_of, on_layouts
from tiny import PIPELINES, Ask
from torch.nn import functional

from accel import Plan, attention, explain, load
from accel.attach import Accelerator
from accel.attention import choice, paying, serving, sizes, static, timing
from accel.attention.account import Account
from accel.attention.patterns import Full, Surrounding
from accel.attention.patterns.expression import normal, parsed
from accel.attention.searching import Searching
from accel.attention.sparse import Patterned, Sparse
from accel.errors import AccelWarning, BadInput, Conflict, PlanError, UnsupportedModel
from accel.explain import UNASKED
from accel.report import Tally
from accel.seams import tokens as places
from accel.seams.attention import Asked, answer_attention, valid_text
from accel.seams.denoisers import Row as DenoiserRow
from accel.seams.denoisers import find_denoisers
from accel.seams.layout import Layout
from accel.seams.modules import find_modules
from accel.seams.tokens import layout_of

PATTERNED = ("attention.GRAT", "attention.Neighbourhood", "attention.Pattern", "attention.Radial")
SERVED = frozenset(PIPELINES) - UNORDERED - DENSE


class Everything(Patterned):
    """Every pair, by the lowering all the same."""

    name: ClassVar[str] = "test.Everything"
    source: ClassVar[str] = "here"

    def pattern(self, layout):
        return Full()


class Masked(Accelerator):
    """The reference: torch's attention with the pattern's mask, pair by pair from its definition.

    Knows nothing of tables, lowerings or the engine.
    """

    name: ClassVar[str] = "test.Masked"
    layer: ClassVar[str] = "attention"
    seam: ClassVar[str] = "attention"
    supports: ClassVar[str] = "tests"
    source: ClassVar[str] = "here"

    patterned: Patterned

    @classmethod
    def off(cls):
        return None

    def why_off(self):
        return None

    def attach(self, site):
        calls = []
        site.tally.change = "masked"

        @cache
        def kept(layout):
            mask = torch.ones(layout.tokens, layout.tokens, dtype=torch.bool)
            pattern = self.patterned.pattern(layout)
            mask[layout.image_span, layout.image_span] = mask_of(pattern, layout)
            return mask

        def answer(asked):
            mask = kept(layout_of(calls[-1], asked.query.shape[2]))
            if asked.attn_mask is not None:
                assert asked.attn_mask.dtype == torch.bool
                mask = mask & asked.attn_mask
            return functional.scaled_dot_product_attention(
                asked.query, asked.key, asked.value, mask, scale=asked.scale
            )

        for denoiser in site.denoisers:
            yield site.around(denoiser, lambda call, inner: (calls.append(call), inner(call))[1])
            for module in find_modules(denoiser):
                if module.kind == "self":
                    yield answer_attention(module, answer)


def verdict(run):
    return next(iter(run.report.verdicts.values()))


def near(output, expected, error):
    return (output - expected).abs().max() <= error * expected.std()


# what is computed


@pipelines(where=lambda tiny: tiny.name in SERVED)
def test_a_full_pattern_is_the_stock_pipeline(bench, monkeypatch, name):
    """Though it goes through the lowering, which nobody would do: the engine leaves it dense."""
    monkeypatch.setattr(static.Prepared, "density", 0.5)
    with Plan(Everything(warm_up=0.0, **FORCED)).attach(bench.pipe(name)) as run:
        output = bench.call(name, steps=2)
    assert "by gather" in verdict(run).detail and "left dense" not in verdict(run).detail
    assert near(output, bench.stock(name, steps=2), 1e-4)


FORMS = [
    pytest.param(
        tiny.name,
        form,
        id=f"{tiny.name}-{name}{place or ''}",
        marks=full(not in_ci(tiny, name, CI) or place > 0),
    )
    for name in PATTERNED
    for place, form in enumerate((ROSTER[name].active, *ROSTER[name].variants))
    for tiny in PIPELINES.values()
    if ROSTER[name].acts(tiny)
]


@pytest.mark.parametrize(("name", "method"), FORMS)
def test_it_is_attention_with_the_pattern_s_mask(bench, name, method):
    method = method.model_copy(update={"warm_up": 0.0, "dense_layers": 0, "lowering": "gather"})
    batch = 2 if PIPELINES[name].batchable else 1
    run = Plan(Masked(patterned=method)).attach(bench.pipe(name))
    reference = bench.call(name, steps=2, batch=batch)
    run.detach()
    with Plan(method).attach(bench.pipe(name)) as run:
        output = bench.call(name, steps=2, batch=batch)
    assert near(output, reference, 1e-3)
    stock = bench.stock(name, steps=2, batch=batch)
    assert not near(output, stock, 1e-3), "the pattern changes nothing here"


LONGER = "a very long prompt about a great many things that are said one after the other in words"


@pytest.mark.parametrize("name", ["qwenimage", "hunyuanvideo", "cogvideox", "sd3"])
def test_padded_text_is_attended_to_by_nobody(bench, name):
    """Beside a longer prompt, where it is padded, a sample is what it is alone."""
    method = attention.GRAT(box=(1, 2, 2), warm_up=0.0, **FORCED)
    prompts, seeds = ["a fox", LONGER], [0, 1]
    with Plan(method).attach(bench.pipe(name)) as run:
        together = bench.call(name, steps=2, prompts=prompts, seeds=seeds)
        for sample in (0, 1):
            alone = bench.call(name, steps=2, prompts=prompts[sample:][:1], seeds=[sample])
            assert near(together[sample], alone[0], 1e-3)
    assert "mask" not in verdict(run).detail


# what is served, and how it is counted


@settings(max_examples=6, deadline=None)
@given(share=st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.99]), layers=st.integers(0, 5))
@pytest.mark.parametrize(("name", "modules", "calls"), [("dit", 3, 1), ("flux_cfg", 4, 2)])
def test_served_are_all_but_the_first_steps_and_layers(name, modules, calls, share, layers):
    steps, pipe = 5, built(name)
    method = attention.GRAT(box=(1, 2, 2), warm_up=share, dense_layers=layers, **FORCED)
    run = Plan(method).attach(pipe)
    PIPELINES[name].call(pipe, steps=steps)
    run.detach()
    warm = {0.0: 0, 0.1: 1, 0.3: 2, 0.5: 3, 0.99: 5}[share]
    served = (steps - warm) * calls * max(modules - layers, 0)
    said = verdict(run)
    assert (said.state == "ACTIVE") == (served > 0)
    numbers = dict(reversed(pair) for pair in re.findall(r"(\d+) ([a-z ]+[a-z])", said.detail))
    assert int(numbers.get("attentions by gather at a mean density of", 0)) == served
    assert int(numbers.get("in the first steps", 0)) == warm * calls * modules
    left = (steps - warm) * calls * min(layers, modules)
    assert int(numbers.get("in the first layers", 0)) == left


@cache
def built(name):
    return PIPELINES[name].build()


def test_density_is_the_formula_s_and_small_levels_are_said_to_be_dense(bench):
    plan = Plan(attention.GRAT(warm_up=0.0, box=(1, 4, 4), **FORCED))
    with plan.attach(bench.pipe("sd15")) as run:
        bench.call("sd15", steps=2)
    shares = {16: 7 / 16, 8: 3 / 4}  # (n + m - 1) / (n m) of n × m boxes; half the modules each
    density = (shares[16] + shares[8]) / 2
    assert verdict(run).detail == (
        f"12 attentions by gather at a mean density of {density:.2f}; left dense: 2 where the "
        "pattern keeps all (4 × 4 tokens)"
    )


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("chroma", "with a mask that is not of padded text"),
        ("sana", "it is linear"),
        ("sd3", "where the pattern keeps all (125 of text + 8 × 8 tokens)"),
    ],
)
def test_what_stays_dense_is_said_with_its_reason_and_is_stock(bench, same, name, reason):
    run = Plan(attention.Radial(warm_up=0.0)).attach(bench.pipe(name))
    output = bench.call(name, steps=2)
    run.detach()
    assert verdict(run).state == "INACTIVE"
    assert reason in verdict(run).detail
    assert same(output, bench.stock(name, steps=2))


def test_a_network_whose_order_of_tokens_is_not_known_is_refused_by_name(bench):
    with pytest.raises(UnsupportedModel, match=r"GRAT does not fit Lumina2.*order .* is not known"):
        Plan(attention.GRAT()).attach(bench.pipe("lumina2"))
    with (
        Plan(attention.GRAT(warm_up=0.0)).attach(bench.pipe("flux_kontext")),
        pytest.raises(UnsupportedModel, match=r"FluxTransformer2DModel .* order is not known"),
    ):
        bench.call("flux_kontext", steps=2)


def test_a_pattern_that_does_not_fit_is_refused_with_the_layout(bench):
    wide = attention.Pattern(expression="Neighbourhood((1, 9, 9))", warm_up=0.0)
    with (
        Plan(wide).attach(bench.pipe("dit")),
        pytest.raises(BadInput, match=r"On 8 × 8 tokens: A window of 9 every 1 tokens does not"),
    ):
        bench.call("dit", steps=2)
    whole = attention.Neighbourhood(window=(0, 9, 4), stride=(1, 1, 1), **FORCED)
    with Plan(whole).attach(bench.pipe("dit")) as run:
        bench.call("dit", steps=2)
    assert "mean density of 0.50" in verdict(run).detail  # the whole axis, half of the other


def test_one_method_holds_the_attention(bench):
    with pytest.raises(Conflict, match=r"attention\.GRAT and attention\.Backend"):
        Plan(attention.Backend(), attention.GRAT()).attach(bench.pipe("dit"))


def noted(inner, seen):
    """The function, whose calls are written down."""

    def counted(*args):
        seen.append(args)
        return inner(*args)

    return counted


def test_tables_and_layouts_are_asked_for_once_and_masks_once_a_call(bench, monkeypatch):
    asked = {"compiled": [], "layout_of": [], "valid_text": []}
    for module, name in ((static, "compiled"), (places, "layout_of"), (serving, "valid_text")):
        monkeypatch.setattr(module, name, noted(getattr(module, name), asked[name]))
    plan = Plan(attention.GRAT(box=(1, 2, 2), warm_up=0.0, **FORCED))
    with plan.attach(bench.pipe("hunyuanvideo")) as run:
        for _ in range(2):
            bench.call("hunyuanvideo", steps=2)
    assert len(asked["compiled"]) == 1
    assert len(asked["layout_of"]) == 2  # runs
    assert len(asked["valid_text"]) == 2 * run.report.calls


def test_tables_are_kept_for_the_latest_layouts_alone(bench, monkeypatch, same):
    """However few there are: a UNet's levels take turns."""
    plan = Plan(attention.GRAT(box=(1, 2, 2), warm_up=0.0, **FORCED))
    expected, _ = bench.under("sd15", plan, steps=2)
    made = []
    monkeypatch.setattr(static, "compiled", noted(static.compiled, made))
    monkeypatch.setattr(static, "KEPT", 1)
    with plan.attach(bench.pipe("sd15")):
        assert same(bench.call("sd15", steps=2), expected)
    assert len(made) > 3


@st.composite
def padded(draw):
    layout = draw(layouts().filter(lambda layout: layout.text))
    rows = draw(st.integers(1, 3))
    bits = st.lists(st.booleans(), min_size=rows * layout.text, max_size=rows * layout.text)
    return layout, torch.tensor(draw(bits)).view(rows, layout.text)


@settings(max_examples=40, deadline=None)
@given(padded(), st.sampled_from([None, -1e4, -torch.inf, torch.finfo(torch.float32).min]))
def test_a_mask_of_padded_text_is_read_whatever_its_form(case, hidden):
    layout, text = case
    mask = torch.ones(len(text), 1, 1, layout.tokens, dtype=torch.bool)
    mask[:, 0, 0, layout.text_span] = text
    if hidden is not None:
        mask = torch.zeros(mask.shape).masked_fill(~mask, hidden)
    assert torch.equal(valid_text(mask, layout), text)
    image = mask.clone()
    image[0, 0, 0, layout.image_span.start] = False if hidden is None else hidden
    assert valid_text(image, layout) is None
    assert valid_text(mask.expand(-1, -1, layout.tokens, -1), layout) is None or layout.tokens == 1
    if hidden is not None:
        between = mask.clone()
        between[0, 0, 0, -1] = -1.0
        assert valid_text(between, layout) is None


def test_mochi_attends_to_a_sample_at_a_time_with_its_valid_text_alone():
    """Why rows are counted there: of two, an attention has one entry, of another length each."""
    pipe, asked = PIPELINES["mochi"].build(), []

    def look(given):
        asked.append(given.query.shape)
        return given.dense()

    module = find_modules(find_denoisers(pipe)[0])[0]
    undo = answer_attention(module, look)
    PIPELINES["mochi"].call(pipe, steps=2)
    undo()
    assert {shape[0] for shape in asked} == {1}
    assert len({shape[2] for shape in asked}) == 2


@cache
def row_by_row():
    """A network that attends to one row after the other."""
    [denoiser] = find_denoisers(PIPELINES["mochi"].build())
    return denoiser


@given(st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=4, unique=True), min_size=1))
def test_rows_that_attend_one_after_the_other_are_told_apart(asked):
    """Whatever rows a module runs for, and however often in one call of the network."""
    denoiser = row_by_row()
    one, other = find_modules(denoiser)[:2]
    passing = serving.Passing(None)
    for numbers in asked:
        rows = tuple(DenoiserRow("cond", number) for number in numbers)
        with denoiser.computing(rows):
            for row in rows:
                assert passing.rows(one) == (row,)
            assert passing.rows(other) == rows[:1]
        passing.turns.pop(other.index)


@pytest.mark.parametrize("name", ["mochi", "hunyuanvideo"])
def test_every_attention_is_that_of_one_row_or_of_all(bench, monkeypatch, name):
    seen = []
    answer = static.Static.__call__
    monkeypatch.setattr(
        static.Static,
        "__call__",
        lambda self, moment: (seen.append(moment), answer(self, moment))[1],
    )
    with Plan(attention.GRAT(box=(1, 2, 2), warm_up=0.0, **FORCED)).attach(bench.pipe(name)):
        bench.call(name, steps=2, batch=2)
    whose = [moment.rows for moment in seen]
    assert all(moment.entries == 1 for moment in seen)
    if name == "mochi":  # of a layer, the rows of both branches in their order
        rows = whose[:4]
        assert {len(one) for one in whose} == {1} and len(set(rows)) == 4
        assert whose == rows * (len(whose) // 4)
    else:
        assert {len(one) for one in whose} == {2}


def test_chroma_s_mask_is_none_of_padding(bench):
    """Why it stays dense: valid pairs get 1 more, and padded text is attended to all the same."""
    seen = []

    def look(given):
        seen.append(given)
        return given.dense()

    pipe = PIPELINES["chroma"].build()
    undo = answer_attention(find_modules(find_denoisers(pipe)[0])[0], look)
    PIPELINES["chroma"].call(pipe, steps=2)
    undo()
    mask = seen[0].attn_mask
    assert mask.dtype != torch.bool and set(mask.unique().tolist()) == {0.0, 1.0}
    hidden = replace(seen[0], attn_mask=mask > 0)
    image = mask[0, 0].amax(1) > 0
    stock, padding = (one.dense()[:1, :, image] for one in (seen[0], hidden))
    assert not near(padding, stock, 1e-3)


# what computes it, and whether it pays


def asked_for(dtype=torch.float32, heads=1):
    return Asked(*torch.zeros(3, 1, heads, 4, 8, dtype=dtype))


def timed(table):
    """A clock that takes seconds from a table, by what it is given to run; and what it was."""
    seen = []

    def seconds(run, device):
        make, name, *_ = run.args
        make(name)
        seen.append(name)
        return table[name]

    return seconds, seen


class Named:
    def __init__(self, name):
        self.name = name
        if name == "xformers":
            raise RuntimeError("no kernel for this width\nand more")

    def __call__(self, *args):
        raise AssertionError("only timed")


def test_the_fastest_lowering_is_measured_once_for_what_takes_equally_long(monkeypatch):
    monkeypatch.setattr(choice, "refusals", lambda table, device: {})
    seconds, seen = timed({"gather": 2.0, "flex": 1.0})
    chooser = choice.Choice("auto", seconds)
    assert [chooser.of("a", None, Named, asked_for(), None) for _ in range(3)] == ["flex"] * 3
    assert sorted(seen) == ["flex", "gather"]
    assert chooser.failed == {"xformers": "no kernel for this width"}
    chooser.of("b", None, Named, asked_for(), None)
    chooser.of("a", None, Named, asked_for(heads=3), None)  # of shapes, the key tells
    chooser.of("a", None, Named, asked_for(torch.float64), None)
    assert len(seen) == 6


def test_what_it_takes_to_make_a_lowering_counts(monkeypatch):
    monkeypatch.setattr(choice, "refusals", lambda table, device: {"xformers": "not here"})
    clock = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])

    def make(name):
        clock[0] += {"gather": 0.01, "flex": 0.1}[name]
        return lambda *_: clock.__setitem__(0, clock[0] + {"gather": 0.05, "flex": 0.01}[name])

    assert choice.Choice("auto").of("a", None, make, asked_for(), None) == "gather"


def test_nothing_is_measured_where_there_is_no_choice(monkeypatch):
    def never(run, device):
        raise AssertionError

    assert choice.Choice("flex", never).of("a", None, Named, asked_for(), None) == "flex"
    table = static.Prepared(Surrounding((1, 2, 2)), Layout(0, 1, 8, 8), torch.device("cpu")).table
    assert choice.Choice("auto", never).of("a", table, Named, asked_for(), None) == "gather"


def test_seconds_are_the_median_of_three_after_one_that_warms_up(monkeypatch):
    for took, expected, runs in (([0.2, 0.1, 0.2, 0.15], 0.15, 4), ([3.0], 3.0, 1)):
        clock = iter(
            x for one, start in zip(took, count(), strict=False) for x in (start, start + one)
        )
        monkeypatch.setattr(timing.time, "perf_counter", lambda clock=clock: next(clock))
        done = []
        found = timing.seconds(lambda done=done: done.append(1), torch.device("cpu"))
        assert found == pytest.approx(expected)
        assert len(done) == runs


@pytest.mark.parametrize("pays", [True, False])
def test_where_dense_attention_is_faster_the_plan_warns(bench, monkeypatch, same, pays):
    """Once a run, in the verdict and as a warning; whatever is said, the picture is the same."""
    times = iter([0.002, 0.003] if pays else [0.003, 0.002])
    monkeypatch.setattr(timing, "seconds", lambda run, device: next(times))
    plan = Plan(attention.GRAT(box=(1, 4, 4), warm_up=0.0))
    run = plan.attach(bench.pipe("dit"))
    outputs = [bench.call("dit", steps=2) for _ in range(2)]
    advice = "does not pay here: 64 tokens at density 0.75 take 3.0 ms, dense 2.0 ms"
    assert (advice in verdict(run).detail) != pays
    if pays:
        run.__exit__(None, None, None)
    else:
        with pytest.warns(AccelWarning, match=f"attention.GRAT: {advice}"):
            run.__exit__(None, None, None)
    monkeypatch.undo()
    assert all(same(output, bench.under("dit", plan, steps=2)[0]) for output in outputs)


def test_another_batch_is_timed_anew(bench, monkeypatch):
    times = iter([3.0, 2.0, 1.0, 2.0, 3.0, 2.0])
    monkeypatch.setattr(timing, "seconds", lambda run, device: next(times))
    run = Plan(attention.GRAT(box=(1, 4, 4), warm_up=0.0)).attach(bench.pipe("dit"))
    for batch, advised in ((1, True), (2, False), (1, True)):
        bench.call("dit", steps=2, batch=batch)
        assert ("does not pay" in verdict(run).detail) == advised
    run.detach()


def test_attention_that_is_sliced_is_said_to_be_out_of_reach():
    pipe = PIPELINES["sd15"].build()
    pipe.enable_attention_slicing()
    run = Plan(attention.GRAT(box=(1, 2, 2), warm_up=0.0)).attach(pipe)
    PIPELINES["sd15"].call(pipe, steps=2)
    run.detach()
    assert "attention slicing" in verdict(run).detail


def test_what_is_compiled_at_its_first_call_is_measured_at_its_second(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: None)
    clock = iter([0.0, 9.0, 9.0, 9.4])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    assert timing.seconds(lambda: None, torch.device("cuda")) == pytest.approx(0.4)


@pytest.mark.parametrize("device", ["cuda", "mps", "xpu"])
def test_any_accelerator_is_waited_for(monkeypatch, device):
    waited = []
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    timing.seconds(lambda: None, torch.device(device))
    timing.seconds(lambda: None, torch.device("cpu"))
    assert waited == [torch.device(device)] * 8


@pytest.mark.parametrize("short", [True, False])
def test_a_forced_lowering_is_judged_where_attention_is_long(bench, monkeypatch, short):
    monkeypatch.setattr(paying, "LONG", 65 if short else 64)
    timed = []
    monkeypatch.setattr(timing, "seconds", lambda run, device: timed.append(run) or len(timed))
    with Plan(attention.GRAT(box=(1, 4, 4), warm_up=0.0, **FORCED)).attach(bench.pipe("dit")):
        bench.call("dit", steps=2)
    assert len(timed) == (0 if short else 2)


def test_a_bundled_clip_at_its_usual_size_is_warned_of():
    """Measured on the spot, though its attention is short."""
    pipe, call = load("scenes-wan")
    pipe.set_progress_bar_config(disable=True)
    short = call | {"num_inference_steps": 2, "output_type": "latent"}
    run = Plan(attention.SpargeAttn(block=8, cell=8, warm_up=0.0)).attach(pipe)
    pipe("a red ball", **short)
    with pytest.warns(AccelWarning, match=r"does not pay here: 320 tokens .* explain --sparse"):
        run.__exit__(None, None, None)


@pytest.mark.parametrize("name", ["attention.GRAT", "attention.SpargeAttn", "attention.SVG"])
@pytest.mark.parametrize("pays", [True, False])
def test_it_stays_dense_where_that_is_faster_if_one_says_so(bench, monkeypatch, same, name, pays):
    """Measured once; then nothing is searched for any more. The report says it with the seconds."""
    taken = iter([1.0, 2.0 if pays else 0.5])
    monkeypatch.setattr(timing, "seconds", lambda run, device: next(taken, 0.0))
    searched = []
    monkeypatch.setattr(Searching, "_search", noted(Searching._search, searched))
    method = ROSTER[name].active.model_copy(update={"lowering": "auto-dense", "warm_up": 0.0})
    run = Plan(method).attach(bench.pipe("wan21"))
    output = bench.call("wan21", steps=3)
    run.detach()
    assert same(output, bench.stock("wan21", steps=3)) != pays
    found = verdict(run)
    assert found.state == ("ACTIVE" if pays else "INACTIVE")
    said = re.search(
        r"(\d+) where dense attention is faster \(.* take 1000.0 ms.*, dense 500.0 ms\)",
        found.detail,
    )
    assert not run.report.tallies[0].advice
    assert pays or len(searched) <= 1
    if pays:
        assert said is None
    else:
        modules = find_modules(find_denoisers(bench.pipe("wan21"))[0])
        count = sum(module.kind == "self" for module in modules)
        assert said and int(said[1]) == run.report.calls * count


def test_an_account_is_of_one_run():
    tally = Tally("test")
    account = Account(tally)
    account.left("in the first steps")
    assert tally.verdict().detail == "all attentions stayed dense: 1 in the first steps"
    account.served(0.5, "gather")
    account.served(0.25, "gather")
    account.advise("take another")
    assert tally.verdict().detail == (
        "2 attentions by gather at a mean density of 0.38; left dense: 1 in the first steps; "
        "take another"
    )
    tally.start()
    account.reset()
    assert tally.verdict().state == "INACTIVE"
    assert not tally.advice


# from which size on it pays


def clocked(dense, sparse, search=lambda _: 0.0):
    """Seconds by tokens, of dense attention, of a method and of its search; and the time by them.

    Which is which is told by what comes back: dense attention is what the network would have had.
    """
    now = [0.0]

    def seconds(run, device):
        if getattr(run, "__func__", None) is Asked.dense:
            took = dense(run.__self__.query.shape[2])
        else:
            given = run()
            given = given[0] if isinstance(given, tuple) else given
            took = search(0) if isinstance(given, list) else sparse(given.shape[2])
        now[0] += took
        return took

    return seconds, lambda: now[0]


def seen(layout, span=None, total=10):
    """One attention of a network that is not there."""
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn((3, 1, 1, layout.tokens, 8), generator=generator)
    module = SimpleNamespace(index=0, denoiser=SimpleNamespace(name="transformer"))
    step = SimpleNamespace(index=0, total=total)
    moment = serving.Moment(Asked(*qkv), layout, None, module, (DenoiserRow("cond", 0),), step)
    return sizes.Seen(moment, span)


@pytest.mark.parametrize("frames", [1, 2])
def test_sizes_grow_until_the_next_would_take_more_than_is_left(frames):
    """Dense attention takes the square of the tokens, ours as many tokens times a thousand."""
    seconds, now = clocked(lambda n: n * n / 1e6, lambda n: n / 1e3)
    methods = [attention.GRAT(form="surrounding", box=(1, 2, 2)), attention.Radial()]
    grat, radial = sizes.paying(seen(Layout(0, frames, 8, 8)), methods, 20.0, seconds, now)
    tokens = [one.tokens for one in grat.timed]
    assert tokens == [64 * 2**power for power in range(frames - 1, 6)]
    assert now() <= 20.0
    assert [one.pays for one in grat.timed] == [count > 1000 for count in tokens]
    assert str(grat).startswith("pays from 1,024 tokens on")
    assert not any(one.density == 1.0 for one in grat.timed)
    if frames == 1:
        assert str(radial) == ("is dense up to here: where the pattern keeps all (32 × 64 tokens)")


def test_it_is_said_for_which_resolution_and_length_a_pattern_pays():
    """16 pixels and 4 frames a token: from 64 × 128 pixels and 9 frames on."""
    seconds, now = clocked(lambda n: n * n / 1e6, lambda n: 64 * n / 1e6 + 2e-6)
    method = attention.GRAT(form="surrounding", box=(1, 2, 2))
    span = places.Span(16, 16, 1, 4)
    (found,) = sizes.paying(seen(Layout(3, 2, 4, 4), span), [method], 1.0, seconds, now)
    assert str(found) == (
        "pays from 67 tokens on (64 × 64 pixels × 13 frames, 3 of text + 4 × 4 × 4 tokens)"
    )


@pytest.mark.parametrize("total", [10, 40])
def test_searches_count_as_often_as_they_are_made(total):
    seconds, now = clocked(lambda _: 1.0, lambda _: 0.5, lambda _: 2.0)
    methods = [
        attention.AdaSpa(block=8),
        attention.SpargeAttn(block=8, cell=8, share=0.5, likeness=-1.0),
    ]
    seldom, always = sizes.paying(seen(Layout(0, 1, 8, 8), total=total), methods, 0, seconds, now)
    assert seldom.timed[0].sparse == pytest.approx(0.5 + 2.0 * 2 / total)
    assert always.timed[0].sparse == pytest.approx(2.5)
    assert str(always) == "does not pay up to 64 tokens (8 × 8 tokens)"


def test_what_is_enlarged_is_the_network_s_own():
    """Every token stands where it stood, beside copies of itself; text is not enlarged."""
    own, large = Layout(2, 1, 2, 3, text_first=False), Layout(2, 1, 4, 6, text_first=False)
    given = seen(own).moment.asked.key[0, 0]
    found = seen(own).enlarged(large).asked.key[0, 0]
    grid = found[large.image_span].view(4, 6, 8)
    assert torch.equal(grid[::2, ::2].flatten(0, 1), given[own.image_span])
    assert torch.equal(grid[1::2, 1::2], grid[::2, ::2])
    assert torch.equal(found[large.text_span], given[own.text_span])


def test_what_does_not_pay_and_what_does_not_fit_is_said():
    seconds, now = clocked(lambda _: 1.0, lambda _: 2.0)
    methods = [
        attention.GRAT(box=(1, 2, 2)),
        attention.Pattern(expression="Neighbourhood((1, 9, 9))"),
    ]
    grat, wide = sizes.paying(seen(Layout(0, 1, 8, 8)), methods, 0.0, seconds, now)
    assert str(grat) == "does not pay up to 64 tokens (8 × 8 tokens)"
    assert "On 8 × 8 tokens" in str(wide)


def test_a_size_pays_if_all_larger_ones_do():
    times = [sizes.Timed(n, str(n), 0.5, 1.0, s) for n, s in ((1, 0.5), (2, 2.0), (3, 0.5))]
    assert sizes.Payoff("test", tuple(times)).since == times[2]


@pytest.mark.parametrize("name", ["sd15", "flux_cfg", "hunyuanvideo", "wan22", "ltx", "cogvideox"])
def test_explain_measures_the_network_s_own_attention(bench, monkeypatch, same, name):
    monkeypatch.setattr(sizes, "BUDGET", 0.0)
    monkeypatch.setattr(timing, "seconds", lambda run, device: float(run() is not None))
    call = PIPELINES[name].inputs(Ask(["a fox"], [0], guidance=True))
    said = explain(bench.pipe(name), call)
    sparse = {kind for kind, row in ROSTER.items() if isinstance(row.active, Sparse)}
    assert {paying.method for paying in said.sparse} == sparse
    timed = [one for paying in said.sparse for one in paying.timed]
    shown = f"{call['height']} × {call['width']} pixels"
    if "num_frames" in call:
        shown += f" × {call['num_frames']} frames"
    assert timed and all(one.layout.startswith(f"{shown}, ") for one in timed)
    assert all(str(paying) in str(said) for paying in said.sparse)
    assert same(bench.call(name, steps=2), bench.stock(name, steps=2))


def test_explain_draws_nothing_from_the_caller(bench, monkeypatch):
    """Neither from a generator of the call nor from the global one."""
    monkeypatch.setattr(sizes, "BUDGET", 0.0)
    monkeypatch.setattr(timing, "seconds", lambda run, device: 1.0)
    for own in (torch.Generator().manual_seed(3), [torch.Generator().manual_seed(4)], None):
        given = (
            [torch.default_generator] if own is None else own if isinstance(own, list) else [own]
        )
        before = [one.get_state() for one in given]
        call = PIPELINES["dit"].inputs(Ask(["a fox"], [0], guidance=True))
        explain(bench.pipe("dit"), call | {"generator": own})
        after = [one.get_state() for one in given]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_the_ladder_ends_where_the_device_has_no_memory():
    """What was measured before stays."""
    seconds, now = clocked(lambda n: n * n / 1e6, lambda n: n / 1e6)

    def full(run, device):
        found = seconds(run, device)
        if found >= 128 * 128 / 1e6:  # dense attention of the second layout
            raise torch.OutOfMemoryError("full")
        return found

    method = attention.GRAT(form="surrounding", box=(1, 2, 2))
    (found,) = sizes.paying(seen(Layout(0, 1, 8, 8)), [method], 20.0, full, now)
    assert [one.tokens for one in found.timed] == [64]


def test_looking_keeps_the_longest_attention_alone(bench):
    looking = sizes.Looking()
    with Plan(looking).attach(bench.pipe("sd15")), contextlib.suppress(sizes.Enough):
        bench.call("sd15", steps=2)
    assert [type(one) for one in looking.__pydantic_private__.values()] == [sizes.Seen]
    assert looking.found.moment.layout.tokens == 16 * 16


def test_explain_says_how_to_learn_from_where_on_it_pays(bench):
    """In a line, where there is attention that could be sparse."""
    assert UNASKED in str(explain(bench.pipe("dit"))) and "--sparse" in UNASKED
    assert UNASKED not in str(explain(bench.pipe("lumina2")))


def test_explain_says_where_nothing_can_be_left_out(bench):
    call = PIPELINES["sana"].inputs(Ask(["a fox"], [0], guidance=True))
    with pytest.raises(UnsupportedModel, match=r"SanaPipeline .* linear"):
        explain(bench.pipe("sana"), call)


# patterns as text


@settings(max_examples=60, deadline=None)
@given(on_layouts())
def test_a_pattern_is_read_from_what_it_prints(case):
    pattern, _ = case
    assert parsed(repr(pattern)) == pattern
    assert parsed(normal(repr(pattern))) == pattern
    assert normal(normal(repr(pattern))) == normal(repr(pattern))


def test_equal_expressions_make_equal_plans():
    texts = [
        "Surrounding( reach=1 )|(Radial(decay=.5))",
        "Surrounding(reach=1) | Radial(decay=0.5)",
    ]
    plans = [Plan(attention.Pattern(expression=text)) for text in texts]
    assert plans[0] == plans[1]
    assert Plan.from_toml(plans[0].to_toml()) == plans[1]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Surounding()", r"did you mean Surrounding"),
        ("Full", r"did you mean Full"),
        ("__import__('os').getcwd()", "write CrissCross, Full"),
        ("Full() + Full()", "write CrissCross, Full"),
        ("((", "cannot be read as a pattern"),
        ("Radial(dcay=1)", "unexpected keyword argument 'dcay'"),
        ("Radial(decay=-1)", "has no bands"),
        ("Radial(decay=1e-308)", "has no bands"),
        ("Radial(decay=1e999)", "has no bands"),
        ("Radial(decay={[]})", "takes numbers"),
        ("Radial(decay=open('x'))", "takes numbers"),
        ("Surrounding(group=(1, 2))", r"Surrounding\.group\.2"),
        ("Surrounding(reach=1.5)", r"Surrounding\.reach: Input should be a valid integer"),
    ],
)
def test_what_is_no_pattern_is_refused_and_never_run(text, said):
    with pytest.raises(PlanError, match=said):
        Plan.from_dict({"attention": {"Pattern": {"expression": text}}})


def test_sliding_tiles_are_windows_of_whole_tiles():
    tiles = attention.Neighbourhood(form="sliding tile", window=(1, 3, 5), stride=(1, 2, 4))
    keys = attention.Neighbourhood(window=(1, 6, 20), stride=(1, 2, 4))
    layout = Layout(0, 2, 16, 24)
    assert tiles.pattern(layout) == keys.pattern(layout)


def test_the_rows_of_the_roster_are_all_tested_here():
    found = {name for name, row in ROSTER.items() if isinstance(row.active, Patterned)}
    assert found == set(PATTERNED)
    assert CLIPS <= SERVED and set(CORE) <= SERVED
