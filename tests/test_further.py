"""The table's fastest on more captions: seconds stay as they were timed, fidelity is of all."""

import json
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from accel import Plan, cache
from accel.scenes import HELD_OUT

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
import compact
import contest
import further
import measure
import peers
import table
import winners

FIGURES = ("block_rows", "psnr", "ssim", "perceptual", "attributes_right", "nfe")


def line(who, seed, ssim, **more):
    figures = dict.fromkeys(FIGURES, 1.0) | {"ssim": ssim}
    return {"stage": table.HELD, **who.named(), "seed": seed, **figures, **more}


def timed(who, seed, ssim, speed):
    return line(who, seed, ssim, seconds=1.0 / speed, stock_seconds=1.0, verdicts={})


def peer(knob):
    return contest.Contestant("p", "C", knob)


SHARES = st.lists(st.sampled_from((0.85, 0.93, 0.96, 0.99)), min_size=1, max_size=12)


def table_of(rows, lines, swept=()):
    """A table of which only what is read again is there."""
    levels = [{"level": one, "censored": ["p: C"]} for one in contest.MEETS]
    held = [{**one.named(), "seeds": 1} for one in rows]
    sums = {"levels": levels, "rows": {table.HELD: held, table.SWEEP: [*swept]}, "idle": []}
    theirs = [peers.Peer("p", "C", knob, None) for knob in (1, 2, 3)]
    return further.Table(sums, lines, None, theirs)


@given(SHARES, SHARES)
def test_fidelity_is_of_all_captions_and_seconds_of_those_that_were_timed(first, then):
    who = peer(1)
    before = [timed(who, seed, one, 1.0 + seed) for seed, one in enumerate(first)]
    more = [line(who, 100 + seed, one) for seed, one in enumerate(then)]
    row = table_of([who], before).of("p: C 1", [*more, line(peer(2), 100, 0.0)]).row()
    whole = contest.summary(who, [*before, *(timed(who, 0, one, 1.0) for one in then)])
    assert {name: row[name] for name in ("ssim", "meets")} == {
        name: whole[name] for name in ("ssim", "meets")
    }
    assert row["seeds"] == len(first) + len(then)
    assert row["speedup"] == contest.summary(who, before)["speedup"]


def test_who_falls_on_further_captions_holds_no_level_and_the_next_of_the_sweep_is_drawn():
    """On all captions; its seconds are those of the sweep."""
    fast, safe, slow = peer(3), peer(2), peer(1)
    lines = [timed(fast, seed, 0.96, 3.0) for seed in range(20)]
    swept = []
    for who, speed in ((fast, 3.0), (safe, 2.0), (slow, 1.5)):
        own = [timed(who, 900, 0.96, speed) | {"stage": table.SWEEP}]
        swept.append(contest.summary(who, own) | table.described(who))
        lines += own
    known, held = table_of([fast], lines, swept), range(40)
    name = "p: C 2"
    assert known.missing([], held) == {seed: ["p: C 3"] for seed in range(20, 40)}
    fell = [line(fast, 20 + seed, 0.91) for seed in range(20)]
    assert known.missing(fell, held) == {seed: [name] for seed in range(table.BATCH)}
    first = [line(safe, seed, 0.96) for seed in range(table.BATCH)]
    assert set(known.missing([*fell, *first], held)) == set(range(table.BATCH, 32))
    more = [*fell, *(line(safe, seed, 0.96) for seed in held)]
    assert known.missing(more, held) == {}
    found = {one["level"]: one for one in further.summed(known, more)["levels"]}
    best = {level: one["best"][winners.PEER] for level, one in found.items()}
    assert [one and one["knob"] for one in best.values()] == [3, 2, None]
    assert best[0.95]["speedup"]["median"] == pytest.approx(2.0)
    assert all(one["censored"] == ["p: C"] for one in found.values())


def test_of_a_name_that_had_several_plans_the_last_one_is_meant():
    """Also where evidence is written otherwise by now: lines are found as they were written."""
    plans = [Plan(cache.EasyCache(threshold=one)) for one in (0.1, 0.2)]
    first, last = (contest.Contestant(contest.OURS, "tuned 0.9", 0, plan=one) for one in plans)
    lines = [line(who, seed, 1.0, stage=table.HELD) for who in (first, last) for seed in (1, 2)]
    for one in lines:
        one["plan"]["cache"]["EasyCache"]["warmup"] = 3  # as by default, but not written out now
    found = table_of([], lines).of("tuned 0.9")
    assert found.who == last and found.timed == found.seen == lines[2:]


def test_a_peer_that_is_not_here_is_asked_for():
    with pytest.raises(SystemExit, match=r"p: C 9 is not here: install the extra `bench`"):
        table_of([], [line(peer(9), 0, 1.0)]).of("p: C 9")


def written(folder):
    """A table of one caption in four steps, of stock and a cache, and its sums."""
    benches = contest.Benches("scenes-unet", 4)
    plan = Plan(cache.EasyCache(threshold=1e9, warmup=2, last=False))
    who = contest.Contestant(contest.OURS, "tuned 0.9", 0, plan=plan)  # these draw all captions
    path = folder / "table-scenes-unet.jsonl"
    weights = measure.digest(benches.get(contest.STOCK)[0])
    lines = compact.Compact(
        path, {"model": "scenes-unet", "call": benches.call, "weights": weights}
    )
    drawn = [timed(one, HELD_OUT[table.UNSEEN], 1.0, 1.5) for one in (table.REFERENCE, who)]
    for one in drawn:
        lines.add(one)
    lines.pack()
    path.unlink()
    levels = [{"level": one, "censored": []} for one in contest.MEETS]
    rows = [
        contest.summary(own, [one]) | table.described(own) | {"seeds": 1}
        for own, one in zip((table.REFERENCE, who), drawn, strict=True)
    ]
    sums = {"levels": levels, "machine": measure.machine(), "idle": []}
    sums |= {"rows": {table.HELD: rows, table.SWEEP: rows}, "stock": {table.HELD: {"captions": 1}}}
    path.with_suffix(".json").write_text(json.dumps(sums))
    return path


def test_captions_that_the_table_did_not_come_to_are_drawn_once(tmp_path, monkeypatch, capsys):
    path = written(tmp_path)
    monkeypatch.setattr(further, "quiet", lambda: None)
    command = ["further.py", "--model", "scenes-unet", "--workers", "2", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [*command, "--held-out", "2", "--budget", "0"])
    further.main()
    cut = json.loads((tmp_path / "further-scenes-unet.json").read_text())
    assert cut["open"] == ["stock: stock", "tuned 0.9"]
    for count in (2, 3, 3):
        monkeypatch.setattr(sys, "argv", [*command, "--held-out", str(count)])
        further.main()
    capsys.readouterr()
    found = compact.Compact(tmp_path / "further-scenes-unet.jsonl", {}).found
    assert sorted((one["seed"], one["package"]) for one in found) == [
        (seed, package)
        for seed in HELD_OUT[table.UNSEEN + 1 : table.UNSEEN + 3]
        for package in (contest.OURS, contest.STOCK)
    ]
    assert not {*further.UNTIMED} & {name for one in found for name in one}
    assert {one["ssim"] for one in found if one["package"] == contest.STOCK} == {1.0}
    assert all(0 < one["ssim"] < 1 and one["nfe"] for one in found if "plan" in one)
    result = json.loads((tmp_path / "further-scenes-unet.json").read_text())
    assert result["open"] == result["swept"] == []
    assert result["captions"] == {"timed": 1, "further": 2}
    assert {row["seeds"] for row in result["rows"][table.HELD]} == {3}
    assert (
        "on 3 held-out captions, 1 of them timed"
        in (tmp_path / "further-scenes-unet.md").read_text()
    )
    broken = json.loads(path.read_text().partition("\n")[0]) | {"weights": "other"}
    path.write_text(json.dumps(broken) + "\n")
    with pytest.raises(SystemExit, match="is of other weights, other"):
        further.Table.read(path)
