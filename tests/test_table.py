"""The honest table: who is in it, what is written down, who wins, what the page holds."""

import argparse
import base64
import hashlib
import json
import re
import sys
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny import PIPELINES

import accel
import samplers
from accel import Plan, cache, guidance
from accel.scenes import HELD_OUT, picture, scene
from accel.tuning.targets import Targets

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
import album
import calibrated
import compact
import contest
import counting
import giants
import peers
import sampling
import shapes
import table
import table_field
import table_page
import winners

SIDE = 64
NETWORK = torch.nn.Linear(1, 1)


# raw numbers


def test_lines_are_found_as_they_are_read_again(tmp_path):
    path, plan = tmp_path / "x.jsonl", {"plan": 1, "cache": {"EasyCache": {"threshold": 0.05}}}
    lines = compact.Compact(path, {"model": "m"})
    written = [
        {"stage": "sweep", "seed": seed, "knob": 0.1, "plan": plan, "ssim": 0.123456789}
        for seed in (1, 2, 3)
    ]
    for line in [*written, {"stage": "sweep", "refused": "no"}, written[0] | {"seed": 4}]:
        lines.add(line)
    again = compact.Compact(path, {"model": "m"})
    assert again.found == lines.found
    assert again.found[0] == {**written[0], "ssim": 0.12346}
    assert [line.get("seed") for line in again.found] == [1, 2, 3, None, 4]
    again.add(written[0] | {"seed": 5})
    assert [one["seed"] for one in compact.Compact(path, {"model": "m"}).found[-2:]] == [4, 5]
    text = path.read_text()
    assert text.count("EasyCache") == 1  # what repeats is written once
    kept = again.pack().read_bytes()
    path.unlink()
    assert len(compact.Compact(path, {"model": "m"}).found) == 6 and path.read_text() == text
    assert compact.Compact(path, {"model": "m"}).pack().read_bytes() == kept
    with pytest.raises(SystemExit, match="model differ"):
        compact.Compact(path, {"model": "n"})


# counting


def test_evaluations_are_counted_below_all_hooks():
    """A cache that answers in the network's place makes none; one on blocks makes all of them."""
    tiny = PIPELINES["flux_cfg"]
    pipe = tiny.build()
    counter = counting.Counter(pipe)
    counter.calibrate(lambda: tiny.call(pipe, steps=1))
    tiny.call(pipe, steps=4)
    assert counter.evaluations == 4 * len(tiny.order)
    for method, steps in (
        (cache.EasyCache(threshold=1e9, warmup=2, last=False), 2),
        (cache.FirstBlock(threshold=1e9, warmup=1, last=False), 4),
    ):
        counter.reset()
        with Plan(method).attach(pipe):
            tiny.call(pipe, steps=4)
        assert counter.evaluations == steps * len(tiny.order)


def test_a_counter_that_looks_into_no_block_takes_each_evaluation_for_all():
    tiny = PIPELINES["sd15"]
    pipe = tiny.build()
    counter = counting.Counter(pipe, layers=False)
    tiny.call(pipe, steps=3)
    assert counter.rows == 3 * len(tiny.order) * len(counter.blocks) > 0
    assert "forward" not in vars(next(iter(counter.blocks[0].modules())))


# a field of three, drawn at no cost


class Benches:
    """Stands for pipelines: what is drawn is decided by `draw`."""

    def __init__(self):
        self.call = {"height": SIDE, "width": SIDE, "num_inference_steps": 28}
        self.dropped = []

    def get(self, package):
        return SimpleNamespace(transformer=NETWORK), SimpleNamespace(blocks=[1, 2])

    def drop(self, package):
        self.dropped.append(package)


@contextmanager
def nothing(pipe, call):
    yield


def knobs(package, method, values, **more):
    return [contest.Contestant(package, method, value, **more) for value in values]


def field_of():
    easy = [
        contest.Contestant(
            contest.OURS, "cache.EasyCache", one, plan=Plan(cache.EasyCache(threshold=one))
        )
        for one in (0.1, 0.2)
    ]
    both = Plan(cache.EasyCache(threshold=0.1), guidance.Adaptive())
    peer = peers.Peer("theirs", "Cache", 1, nothing)
    idle = peers.Peer("theirs", "Idle", 1, nothing)
    broken = peers.Peer("broken", "Cache", 1, nothing)
    fewer = {"num_inference_steps": 14}
    return table_field.Field(
        [
            contest.Contestant(contest.STOCK, contest.STOCK, 0),
            contest.Contestant(contest.STOCK, table_field.FEWER_STEPS, 14, call=fewer),
            *easy,
            contest.Contestant(contest.OURS, "Adaptive + EasyCache", 0.1, plan=both),
            *knobs("theirs", "Cache", (1, 2), peer=peer),
            *knobs("theirs", "Idle", (1,), peer=idle),
            *knobs("broken", "Cache", (1,), peer=broken),
        ],
        {"tuned": table_field.NO_TUNED},
    )


SPEED = {  # by method and knob: seconds, and how much of another picture is mixed in
    ("stock", 0): (2.0, 0.0),
    (table_field.FEWER_STEPS, 14): (1.0, 0.5),
    ("cache.EasyCache", 0.1): (1.0, 0.01),
    ("cache.EasyCache", 0.2): (0.5, 0.4),
    ("Adaptive + EasyCache", 0.1): (0.4, 0.02),
    ("Cache", 1): (0.8, 0.01),
    ("Cache", 2): (0.6, 0.02),
    ("Idle", 1): (2.0, 0.0),
}


def drawing(seen):
    """What stands for `contest.draw`, and notes what it drew."""

    def draw(benches, who, subject, steps=None):
        if who.package == "broken":
            raise TypeError("half changed\nfor good")
        seconds, mixed = SPEED[who.method, who.knob]
        seen.append((subject.seed, who.label))
        own, other = (picture(scene(seed), SIDE).astype(float) for seed in (subject.seed, 7))
        shown = Image.fromarray(((1 - mixed) * own + mixed * other).astype(np.uint8))
        verdicts = {one.name: ("ACTIVE", "did") for one in who.plan or ()}
        return contest.Drawn(shown, seconds, 100 * seconds, 20 * seconds, verdicts)

    return draw


@pytest.fixture
def drawn(monkeypatch):
    seen = []
    monkeypatch.setattr(contest, "draw", drawing(seen))
    return seen


def options_of(tmp_path, **changes):
    found = {"model": "toy", "out": tmp_path, "kept": tmp_path / "pictures", "fresh": False}
    found |= {"captions": 2, "held_out": 1, "budget": float("inf"), "carry": False}
    return argparse.Namespace(**found | changes)


def test_both_stages_are_drawn_and_whoever_breaks_is_named(tmp_path, drawn):
    benches = Benches()
    result = table.measured(options_of(tmp_path), benches, field_of())
    written = compact.Compact(tmp_path / "table-toy.jsonl", {}).found
    stages = {line["stage"] for line in written}
    assert stages == {"sweep", "held-out"}
    seeds = {
        stage: {one.get("seed") for one in written if one["stage"] == stage} for stage in stages
    }
    assert seeds["sweep"] == {*HELD_OUT[:2], None} and seeds["held-out"] == {HELD_OUT[table.UNSEEN]}
    assert result["left_out"] == {
        "tuned": table_field.NO_TUNED,
        "broken: Cache 1": "TypeError: half changed",
    }
    assert benches.dropped == ["broken"]
    assert result["idle"] == [f"theirs: Idle 1 is INACTIVE: Idle: {table.IDLE}"]
    rows = {contest.label(row): row for row in result["rows"]["sweep"]}
    assert rows["stock: fewer steps: 14"]["call"] == {"num_inference_steps": 14}
    assert rows["cache.EasyCache 0.1"]["nfe"] == 20 and rows["cache.EasyCache 0.1"]["parts"] == 1
    assert rows["Adaptive + EasyCache 0.1"]["parts"] == 2
    assert rows["stock: stock"]["frechet_real"] == album.TOO_FEW
    assert len(rows) == len(SPEED)


def test_a_run_that_was_cut_off_goes_on(tmp_path, drawn, monkeypatch):
    """Nothing is drawn twice but stock; winners are not drawn before the sweep is whole."""
    clock = iter(range(10**6))
    monkeypatch.setattr(table.time, "monotonic", lambda: next(clock))
    field, stages = field_of(), []
    for budget in (6, 6, 10**6):
        result = table.measured(options_of(tmp_path, budget=budget), Benches(), field)
        stages.append(bool(result["rows"]["held-out"]))
    assert stages == [False, False, True]
    others = [one for one in drawn if one[1] != "stock: stock"]
    kinds = 5  # each kind of cache was drawn once more to warm up, in each run that drew it
    assert len(set(others)) <= len(others) <= len(set(others)) + 3 * kinds
    whole = compact.Compact(tmp_path / "table-toy.jsonl", {}).found
    keys = [(one.get("seed"), one["package"], one["method"], one["knob"]) for one in whole]
    assert len(keys) == len(set(keys))


def test_numbers_of_earlier_code_stay_where_a_setting_draws_as_before(tmp_path, drawn, monkeypatch):
    """The others are drawn anew, the refused are refused again, and all of it is told."""
    path, field = tmp_path / "table-toy.jsonl", field_of()
    monkeypatch.setattr(table, "here", lambda: {"code": "old"})
    table.measured(options_of(tmp_path), Benches(), field)
    before = compact.Compact(path, {}).found
    monkeypatch.setattr(table, "here", lambda: {"code": "new"})
    monkeypatch.setitem(SPEED, ("cache.EasyCache", 0.2), (0.5, 0.3))
    monkeypatch.setitem(SPEED, ("Cache", 1), (1.6, 0.01))  # slower: the work is other too
    with pytest.raises(SystemExit, match="code differ"):
        table.measured(options_of(tmp_path), Benches(), field)
    other = {"cache.EasyCache 0.2", "theirs: Cache 1"}
    for turn in range(2):  # the second finds nothing to carry
        drawn.clear()
        result = table.measured(options_of(tmp_path, carry=True), Benches(), field)
        after = compact.Compact(path, {"code": "new"}).found
        kept = [line for line in before if contest.label(line) not in other]
        assert [line for line in after if contest.label(line) not in other] == kept
        assert len(after) == len(before)
        assert (turn == 1) == all(one[1] == "stock: stock" for one in drawn)
        (told,) = result["carried"]
        assert f"{len(SPEED) - 1} settings have numbers of earlier code (old)" in told
        assert "Drawn anew: cache.EasyCache 0.2, theirs: Cache 1." in told
        assert "1.00 (1.00 to 1.00) times the old ones" in told
    assert next((tmp_path / "pictures" / "toy").iterdir()).name.endswith("-new")
    seen = {one["ssim"] for one in after if contest.label(one) == "cache.EasyCache 0.2"}
    assert seen.isdisjoint(one.get("ssim") for one in before)


def test_another_number_of_steps_is_asked_of_the_pipeline():
    asked = []

    class Pipe:
        def __call__(self, prompt, generator, **call):
            asked.append(call["num_inference_steps"])
            return ([Image.new("RGB", (SIDE, SIDE))],)

    benches = SimpleNamespace(
        call={"num_inference_steps": 28},
        get=lambda _: (Pipe(), SimpleNamespace(reset=lambda: None, rows=1.0, evaluations=2)),
    )
    (fewer,) = table_field.fewer_steps(benches.call, 1)
    drawn = contest.draw(benches, fewer, scene(1))
    assert asked == [20] and drawn.evaluations == 2
    line = json.loads(json.dumps(fewer.named()))
    assert line["call"] == {"num_inference_steps": 20} and fewer.wrote(line)
    assert not fewer.wrote({**line, "call": {"num_inference_steps": 16}})


# who wins


def row(package, method, knob, speed, ssim, parts=1, **more):
    return {
        "package": package, "method": method, "knob": knob, "ssim": ssim, "perceptual": 1 - ssim,
        "parts": parts, "tuned": False, "inactive": {}, "block_rows": 100 / speed, "nfe": 10.0,
        "meets": {str(one): 1.0 if ssim >= one else 0.5 for one in contest.MEETS},
        "caption_accuracy": 0.9, "psnr": 30.0,
        "seconds": {"median": 1 / speed, "low": 1 / speed, "high": 1 / speed, "repeats": 2},
        "speedup": {"median": speed, "low": speed * 0.99, "high": speed * 1.01, "repeats": 2},
        "frechet_real": "too few", "frechet_stock": "too few", "seeds": 2,
    } | more  # fmt: skip


POINT = ("seconds", "stock_seconds", "block_rows", "psnr", "perceptual", "attributes_right")


def rows_of():
    return [
        row("stock", "stock", 0, 1.0, 1.0, 0, psnr=100.0),
        row("stock", "fewer steps:", 14, 2.0, 0.93, 0),
        row(contest.OURS, "A", 1, 1.5, 0.99),
        row(contest.OURS, "A", 2, 3.0, 0.96),
        row(contest.OURS, "A + B", 1, 4.0, 0.91, 2),
        row(contest.OURS, "asleep", 1, 9.0, 1.0, inactive={"x": "no"}),
        row("p", "C", 1, 1.6, 0.99, 0),
        row("p", "C", 2, 3.5, 0.96, 0),
        row("torch.compile", "blocks", 0, 1.1, 1.0, 0),
    ]


def test_winners_and_what_is_said_of_them():
    found = {one["level"]: one for one in winners.levels(rows_of(), [])}
    loose, middle, strict = (found[level] for level in (0.9, 0.95, 0.98))
    best = {side: one and contest.label(one) for side, one in loose["best"].items()}
    assert best == {
        "single": "A 2", "composed": "A + B 1", "peer": "p: C 2", "steps": "stock: fewer steps: 14",
    }  # fmt: skip
    assert strict["best"]["composed"] is None and strict["best"]["steps"] is None
    assert "A + B 1 is 1.14× as fast as the best peer, p: C 2." in loose["words"][0]
    assert "composing pays: A + B 1 is 1.33× as fast as our best single" in loose["words"][2]
    assert loose["words"][1].endswith("the best of stock in fewer steps, stock in 14 steps.")
    assert "we do not win: the best peer, p: C 2, is 1.17× as fast" in middle["words"][0]
    assert "A 2" in middle["words"][0] and "no composition of ours holds" in middle["words"][2]
    assert "no smaller number of stock's steps holds the level" in strict["words"][1]
    named = row(contest.OURS, "tuned 0.9", 0, 1.0, 1.0, made_of=["cache.A", "guidance.B"])
    assert winners.title(named) == "tuned 0.9 (cache.A + guidance.B)"
    # the peer's sweep ends at 0.96: with a larger knob it might hold 0.9 and 0.95 too
    open_ = [one["censored"] for one in (loose, middle, strict)]
    assert open_ == [["stock in fewer steps", "p: C"], ["p: C"], []]
    text = winners.markdown([loose, middle, strict], "Title", ["note"])
    assert (
        "| 0.95 | A 2 (3.00×, SSIM 0.960, 100% of captions) | none "
        "| p: C 2 (3.50×, SSIM 0.960, 100% of captions) (censored) |" in text
    )
    assert text.endswith("* note\n") and "sweeps of p: C end" in text
    assert "| stock in 14 steps (2.00×, SSIM 0.930, 100% of captions) (censored) |" in text


def test_quartiles_that_overlap_are_a_draw():
    near = [row(contest.OURS, "A", 1, 2.0, 0.99), row("p", "C", 1, 2.01, 0.99, 0)]
    (first, *_) = winners.levels(near, [])[0]["words"]
    assert "we do not win" in first and "as good as a draw" in first
    alone = winners.levels(near[1:], [])[0]["words"]
    assert "nothing of ours" in alone[0] and "we do not win" in alone[1]


@given(st.lists(st.floats(0.85, 1.0), min_size=1, max_size=40))
def test_a_level_is_held_as_tuning_holds_a_target(values):
    who = contest.Contestant("p", "C", 1)
    found = contest.summary(who, [dict.fromkeys(POINT, 1.0) | {"ssim": one} for one in values])
    for level in contest.MEETS:
        wanted = Targets.parse(f"ssim>={level}").held_by([{"ssim": one} for one in values])
        assert winners.holds(found, level) == wanted


def test_who_does_not_hold_a_level_on_other_captions_has_not_won_it():
    """Then the next one is drawn; tuned plans are drawn in any case, and so is stock."""
    sweep = [*rows_of(), row(contest.OURS, "tuned 0.9", 0, 1.2, 0.5, 1, tuned=True)]
    first = {contest.label(one) for one in winners.contending(sweep, [], 40)}
    assert first == {
        "stock: stock", "stock: fewer steps: 14", "A 1", "A 2", "A + B 1", "p: C 1", "p: C 2",
        "tuned 0.9",
    }  # fmt: skip
    drawn = [one | {"seeds": 40} for one in sweep if contest.label(one) in first]
    assert winners.contending(sweep, drawn, 40) == []
    failing = [
        one | {"seeds": 20, "meets": {**one["meets"], "0.9": 0.85}} if one["parts"] == 2 else one
        for one in drawn
    ]
    assert winners.contending(sweep, failing, 40) == []  # 3 of 40 missed, 2 may: nobody is left
    (loose, *_) = winners.levels(sweep, failing)
    assert loose["verified"] and loose["best"]["composed"] is None
    slower = row("p", "C", 2, 3.5, 0.8, 0, seeds=8)
    others = [one for one in drawn if contest.label(one) != "p: C 2"]
    assert contest.label(loose["best"]["peer"]) == "p: C 2"
    assert winners.contending(sweep, [*others, slower], 40) == []  # `C 1` has drawn for 0.98
    assert contest.label(winners.levels(sweep, [*others, slower])[0]["best"]["peer"]) == "p: C 1"


@given(st.floats(1.0, 3.0), st.floats(0.0, 1.0), st.floats(0.0, 1.0))
def test_who_is_as_fast_as_far_as_the_sweep_can_tell_draws_too(speed, apart, spread):
    """The two that are fastest of a class, if their quartiles overlap; no third one."""

    def near(knob, median):
        quartiles = {"median": median, "low": median - spread, "high": median + spread}
        return row("p", "C", knob, 1.0, 0.999, 0) | {"speedup": quartiles}

    sweep = [rows_of()[0], near(3, speed), near(2, speed - apart), near(1, speed - 2 * apart)]
    found = winners.contending(sweep, [sweep[0] | {"seeds": 40}], 40)
    overlap = speed - apart + spread >= speed - spread
    assert [contest.label(one) for one in found] == ["p: C 3", "p: C 2"][: 1 + overlap]


CAPTIONS = 40


@st.composite
def truths(draw):
    """Rows of one class with different speeds, and which captions reach 0.9 and 0.98 with each."""
    count = draw(st.integers(1, 6))
    chances = st.sampled_from((0.0, 0.5, 0.9, 0.95, 0.97, 1.0))
    found = {}
    for number in range(count):
        chance, seed = draw(chances), draw(st.integers(0, 99))
        reached = np.random.default_rng(seed).random(CAPTIONS) < chance
        found[f"p: C {number + 1}"] = np.where(reached, draw(st.sampled_from((0.94, 0.99))), 0.88)
    return found


@given(truths())
def test_the_fastest_that_holds_each_level_is_found(truth):
    """Whatever is drawn in which order: as if all had drawn all captions."""

    def seen(name, count):
        values, knob = truth[name][:count], int(name.split()[-1])
        meets = {str(one): float((values >= one).mean()) for one in contest.MEETS}
        speed, ssim = 1.0 + knob, float(values.mean())
        return row("p", "C", knob, speed, ssim, 0, meets=meets, seeds=count)

    likely = {str(one): 1.0 for one in contest.MEETS}
    stock = row("stock", "stock", 0, 1.0, 1.0, 0, seeds=CAPTIONS)
    sweep = [stock, *(seen(name, 4) | {"ssim": 1.0, "meets": likely} for name in truth)]
    counts = {"stock: stock": CAPTIONS}
    rows = [stock]
    while open_ := winners.contending(sweep, rows, CAPTIONS):
        names = [contest.label(one) for one in open_]
        least = min(counts.get(name, 0) for name in names)
        for name in names:
            assert counts.get(name, 0) < CAPTIONS
            counts[name] = max(counts.get(name, 0), min(max(8, 2 * least), CAPTIONS))
        rows = [stock, *(seen(name, counts[name]) for name in counts if name in truth)]
    for level, found in zip(contest.MEETS, winners.levels(sweep, rows), strict=True):
        holding = [name for name in truth if winners.holds(seen(name, CAPTIONS), level)]
        best = max(holding, key=lambda name: int(name.split()[-1]), default=None)
        assert (found["best"]["peer"] and contest.label(found["best"]["peer"])) == best


def test_whoever_could_still_win_stays_in_the_sweep():
    """What is far from every level, or beaten by three of its class, draws no more captions."""
    safe = [row(contest.OURS, "S", knob, 4.0 + knob / 10, 0.999) for knob in (1, 2, 3)]
    near = row(contest.OURS, "near", 1, 5.0, 0.9 - 0.03)
    far = row(contest.OURS, "far", 1, 9.0, 0.9 - 0.05)
    slow, close = row(contest.OURS, "slow", 1, 3.0, 0.999), row(contest.OURS, "close", 1, 3.8, 0.9)
    tuned = row(contest.OURS, "tuned 0.9", 0, 1.0, 0.1, tuned=True)
    peer, asleep = row("p", "C", 1, 1.2, 0.999, 0), rows_of()[5]
    stock = rows_of()[0]
    rows = [*safe, near, far, slow, close, tuned, peer, asleep, stock]
    names = [contest.label(one) for one in winners.hopeful(rows)]
    assert names == [
        "S 1", "S 2", "S 3", "near 1", "close 1", "tuned 0.9", "p: C 1", "stock: stock",
    ]  # fmt: skip
    two = [*safe[:2], slow, peer, stock]
    assert slow in winners.hopeful(two)
    first = {contest.label(one) for one in winners.contending(rows, [], 4)}
    assert first <= {*names}


def test_all_draw_the_first_captions_and_who_may_win_draws_all(tmp_path, drawn, monkeypatch):
    monkeypatch.setattr(table, "FIRST", 1)
    result = table.measured(options_of(tmp_path), Benches(), field_of())
    seeds = {contest.label(one): one["seeds"] for one in result["rows"]["sweep"]}
    assert seeds.pop("stock: fewer steps: 14") == seeds.pop("theirs: Idle 1") == 1
    assert seeds.pop("cache.EasyCache 0.2") == 1 and set(seeds.values()) == {2}
    assert {seed for seed, name in drawn if name == "cache.EasyCache 0.2"} == {HELD_OUT[0]}
    assert result["rows"]["held-out"]


def test_the_share_of_captions_that_meet_a_level():
    who = contest.Contestant("p", "C", 1)
    points = [dict.fromkeys(POINT, 1.0) | {"ssim": one} for one in (0.99, 0.96, 0.91, 0.2)]
    assert contest.summary(who, points)["meets"] == {"0.9": 0.75, "0.95": 0.5, "0.98": 0.25}
    assert "nfe" not in contest.summary(who, points)


# sets of pictures


def test_sets_are_compared_where_there_are_enough_and_all_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(album, "ENOUGH", 4)
    call = {"height": 32, "width": 32}
    book, scenes = album.Album(tmp_path, 2, call), [scene(seed) for seed in range(4)]
    who, stock = contest.Contestant("p", "C", 1), contest.Contestant("stock", "stock", 0)
    seeds = [one.seed for one in scenes]
    for one in scenes:
        shown = Image.fromarray(picture(one, 32))
        for side in (who, stock):
            book.keep(side, one, contest.Drawn(shown, 1.0, 1.0), scenes)
    found = book.frechet(who.named(), stock.named(), seeds)
    assert found["frechet_stock"] == pytest.approx(0, abs=1e-6) and found["frechet_real"] > 0
    assert book.frechet(who.named(), stock.named(), seeds[:2])["frechet_real"] == album.TOO_FEW
    other = contest.Contestant("p", "C", 2)
    assert book.frechet(other.named(), stock.named(), seeds)["frechet_real"] == album.MISSING
    book.keep(other, scenes[2], contest.Drawn(shown, 1.0, 1.0), scenes[:3])
    assert book.get(other.named(), scenes[2].seed) is None  # of few, the first are kept alone
    clips = album.Album(tmp_path / "clips", 1, call | {"num_frames": 3})
    clips.keep(who, scenes[0], contest.Drawn([shown] * 3, 1.0, 1.0), scenes)
    assert clips.get(who.named(), scenes[0].seed).shape == (3, 32, 32, 3)
    assert clips.real(2).shape == (2, 3, 32, 32, 3)


# the page


class Reader(HTMLParser):
    """Checks that elements are closed in order, and collects what a page asks for."""

    VOID = ("img", "meta")

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes = [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder with all that a table is written to."""
    pytest.importorskip("matplotlib")
    folder, field = tmp_path_factory.mktemp("table"), field_of()
    field.left["<b>tuned & gone</b>"] = "<script>alert(1)</script>"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(contest, "draw", drawing([]))
        result = table.measured(options_of(folder), Benches(), field)
    assert (folder / result["packed"]).name == "table-toy.jsonl.gz"
    for path in table.write(result, folder):
        assert path.stat().st_size > 100
    return folder


@pytest.fixture(scope="module")
def page(written):
    return (written / "table-toy.html").read_text()


def test_the_page_is_well_formed_and_asks_for_nothing(page):
    read = Reader(page)
    names = {name for name, _ in read.attributes}
    assert not [name for name in names if name == "style" or name.startswith("on")]
    assert "http" not in re.sub(r"data:[^\"]*", "", page).replace("http-equiv", "")
    sources = [value for name, value in read.attributes if name in ("src", "href")]
    assert sources and all(one.startswith("data:image/webp;base64,") for one in sources)
    assert read.tags.count("script") == 1 and "<script>alert" not in page and "<b>tuned" not in page
    assert len(page) < table_page.MOST


def test_the_page_allows_its_own_style_and_script_alone(page):
    (allowed,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', page)
    rules = dict(
        one.split(" ", 1) for one in allowed.replace("&#x27;", "'").split("; ") if " " in one
    )
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    assert rules["img-src"] == "data:"
    for name in ("style", "script"):
        (inside,) = re.findall(f"<{name}>(.*?)</{name}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert rules[f"{name}-src"] == f"'sha256-{digest}'"


def test_the_page_says_who_wins_and_who_is_left_out(page):
    for text in (
        "Adaptive + EasyCache 0.1", "composing pays", "did nothing", table_field.NO_TUNED,
        "TypeError: half changed", "too few", "On captions that the sweep has not seen", "polyline",
    ):  # fmt: skip
        assert text in page, text


def test_the_sums_hold_no_arrays(written):
    found = json.loads((written / "table-toy.json").read_text())
    assert {"machine", "levels", "rows", "left_out"} < set(found) and "shown" not in found
    assert "plan" not in found["rows"]["sweep"][0]


# who is in it


def test_every_method_is_drawn_or_left_out_with_a_reason(monkeypatch, tmp_path):
    monkeypatch.setattr(table_field, "_measured", lambda *_: None)
    (tmp_path / "scenes-flux-0.95.toml").write_text(Plan.preset("balanced").to_toml())
    (tmp_path / "scenes-flux-broken.toml").write_text("[cache.Nobody]\n")
    benches = contest.Benches("scenes-flux", 4)
    wanted = table_field.Wanted("scenes-flux", settings=1, tuned=tmp_path)
    found = table_field.gather(wanted, benches)
    drawn = {method.name for one in found.who if one.plan for method in one.plan}
    left = {name.split(",")[0] for name in found.left}
    assert set(accel.methods()) <= drawn | left
    assert all(found.left.values())
    names = {one.label for one in found.who}
    assert {"stock: stock", "tuned 0.95", "preset exact"} < names
    assert "Nobody" in found.left["tuned broken"]
    packages = {one.package for one in found.who}
    assert {"diffusers", peers.COMPILED, contest.OURS} <= packages
    methods = {one.method for one in found.who if one.package == "diffusers"}
    assert {"FirstBlockCache", "TaylorSeer", "MagCache", "FasterCache"} < methods
    assert "PyramidAttentionBroadcast" in methods
    keys = [one.key for one in found.who]
    assert len(keys) == len(set(keys))


def test_what_rests_on_measured_numbers_is_calibrated_or_named(monkeypatch, tmp_path):
    """Each curve alone and under guidance; samplers in the steps that they are calibrated for."""
    asked = []

    def calibrate(one, model, folder, steps=None):
        asked.append((one.name, steps))
        if one.name == "OLSS":
            raise RuntimeError("accel calibrate olss: error: no.")
        for _, name in one.files():
            plan = Plan(guidance.Adaptive()) if "AG" in name else Plan(samplers.DPMSolverPP())
            (folder / name).write_text(plan.to_toml())

    def plan_of(curve, value, bench):
        if curve == "Table":
            raise RuntimeError("accel calibrate table: error: no blocks.")
        return Plan(cache.EasyCache(threshold=value))

    monkeypatch.setattr(sampling, "calibrate", calibrate)
    monkeypatch.setattr(calibrated, "calibrate", calibrate)
    monkeypatch.setattr(calibrated, "plan_of", plan_of)
    monkeypatch.setattr(sampling, "plans_of", lambda *_: tmp_path)
    monkeypatch.setattr(calibrated, "plans_of", lambda *_: tmp_path)
    benches, found = contest.Benches("scenes-flux", None), table_field.Field()
    table_field._measured(table_field.Wanted("scenes-flux"), benches, found)
    assert found.left == {"cache.Table": "no blocks.", "samplers.OLSS": "no."}
    methods = {one.method for one in found.who}
    assert {"cache.StepRehash", "Adaptive + StepRehash", "guidance.LinearAG"} < methods
    solved = [one for one in found.who if one.method.startswith("samplers.DPM-Solver-v3")]
    steps = [one.call["num_inference_steps"] for one in solved]
    assert steps == [one.knob for one in solved] == [*table_field.SAMPLED]
    assert ("LinearAG", 28) in asked


def test_what_is_not_asked_for_is_not_there(tmp_path):
    wanted = table_field.Wanted("scenes-flux", only=("cache.", "tuned"))
    assert wanted.wants("cache.EasyCache") and not wanted.wants("tokens.ToMe")
    assert table_field.Wanted("scenes-flux").wants("anything")


def test_a_calibration_that_fails_is_told_without_its_command():
    error = RuntimeError("accel calibrate x --prompts /home/me/x: error: It has\nno blocks.")
    assert table_field._told(error) == "It has no blocks."


def test_stock_schedulers_in_fewer_steps_are_peers_and_come_off():
    tiny = PIPELINES["flux_cfg"]
    pipe = tiny.build()
    before = pipe.scheduler
    found = [*peers._schedulers({"num_inference_steps": 15})]
    assert [one.knob for one in found[:4]] == [14, 12, 10, 8]
    for one in (found[0], found[-1]):
        with one.enter(pipe, {}):
            assert type(pipe.scheduler).__name__ == f"{one.method.split(',')[0]}Scheduler"
        assert pipe.scheduler is before and one.call == {"num_inference_steps": one.knob}


@pytest.mark.parametrize("name", ["flux_cfg", "wan21"])
@pytest.mark.parametrize("method", ["FasterCache", "PyramidAttentionBroadcast"])
def test_caches_that_ask_where_the_pipeline_is_compute_less_and_come_off(name, method):
    tiny = PIPELINES[name]
    pipe = tiny.build()
    counter = counting.Counter(pipe)
    counter.calibrate(lambda: tiny.call(pipe, steps=1))
    (one,) = [one for one in peers._by_timestep(pipe) if (one.method, one.knob) == (method, 2)]
    with one.enter(pipe, {}):
        tiny.call(pipe, steps=8)
    whole = 8 * len(tiny.order) * len(counter.blocks)
    assert counter.rows < whole and counter.evaluations == 8 * len(tiny.order)
    counter.reset()
    tiny.call(pipe, steps=8)
    assert counter.rows == whole


@pytest.mark.parametrize("form", ["static", "dynamic", "DMD", "DBPrune"])
def test_forms_of_cache_dit_compute_less(form):
    pytest.importorskip("cache_dit", reason="the extra 'bench' is not installed")
    tiny = PIPELINES["flux_cfg"]
    pipe = tiny.build()
    counter = counting.Counter(pipe)
    counter.calibrate(lambda: tiny.call(pipe, steps=1))
    one = [one for one in peers._cache_dit() if form in one.method][-1]
    with one.enter(pipe, {"num_inference_steps": 8}):
        tiny.call(pipe, steps=8)
    whole = 8 * len(tiny.order) * len(counter.blocks)
    assert 0 < counter.rows <= whole  # what looks at an answer may find that all has changed
    assert form in ("dynamic", "DBPrune") or counter.rows < whole


def test_compiling_is_done_once_and_told_apart():
    """Its seconds go with each line; the blocks stay compiled, since the pipeline is its own."""

    class Network(torch.nn.Module):
        made = 0

        def compile_repeated_blocks(self, **options):
            assert options == {"fullgraph": True}
            self._compiled_call_impl = self._call_impl
            self.made += 1

    class Pipe:
        transformer, drawn = Network(), 0

        def __call__(self, prompt, **call):
            self.drawn += 1
            assert call["num_inference_steps"] == 2

    pipe, one = Pipe(), peers._compile()
    who = contest.Contestant(one.package, one.method, one.knob, peer=one)
    for _ in range(2):
        with who.on(pipe, {"num_inference_steps": 28}):
            pass
    assert (pipe.transformer.made, pipe.drawn) == (1, 2)
    assert who.apart["compile_seconds"] >= 0


# full-size shapes


def test_shapes_are_of_the_published_size():
    assert giants.GIANTS["sdxl"].parameters() == 2_567_463_684
    assert giants.GIANTS["flux"].parameters() == 11_901_408_320
    assert giants.GIANTS["wan-1.3b"].parameters() == 1_418_996_800


def test_full_size_is_refused_without_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="--tiny"):
        shapes.device_of(False)
    assert shapes.device_of(True) == "cpu"


@pytest.mark.parametrize("name", ["sdxl", "flux", "wan-1.3b"])
def test_shapes_run_in_small(tmp_path, monkeypatch, name):
    """Compiling is only noted: what is compiled under which plan, and that it comes off."""
    noted = []
    monkeypatch.setattr(shapes, "Regions", lambda pipe: SimpleNamespace(put_on=noted.append))
    only = ["stock", "TaylorSeer, modules", "ToMe 0.5", "Interval 0.28", "DeepCache 3"]
    options = argparse.Namespace(
        out=tmp_path, tiny=True, fresh=False, budget=float("inf"), steps=None, only=only, repeats=1
    )
    path = shapes.one_shape(name, options, "cpu")
    found = json.loads(path.read_text())
    drawn = [one for one in found["rows"] if "seconds" in one]
    assert {one["mode"] for one in drawn} == {"eager", "compiled"}
    assert {"stock", "cache.TaylorSeer, modules 3"} < {one["name"] for one in drawn}
    assert all(one["finite"] and one["stock"] > 0 and one["peak"] is None for one in drawn)
    assert {None, "blocks", "modules"} == set(noted)
    text = (tmp_path / f"shapes-tiny-{name}.md").read_text()
    assert "the seconds mean nothing" in text and "| stock | eager |" in text
    assert ("is left out" in text) == (name != "sdxl")
    before = len(noted)
    assert shapes.one_shape(name, options, "cpu") == path and len(noted) == before
