"""Large pictures in several processes: windows dealt out, and pictures that change their size."""

import multiprocessing
import re
import time

import pytest
import torch
from parallel_jobs import dies_at, outcome, stepped
from test_parallel import CLOSE, agree, distance
from tiny import PIPELINES

from accel import Plan, attention
from accel import tokens as merging
from accel.errors import Conflict
from accel.resolution import Bottleneck, Pixelsmith
from accel.resolution.cascade import Covering
from parallel import (
    ASG,
    CFG,
    PCPP,
    USP,
    VAE,
    AsyncDiff,
    DistriFusion,
    PipeFusion,
    Ring,
    Ulysses,
    VideoInfinity,
    Windows,
)
from parallel.launch import Lost, spread

STEPS, SIDE = 3, 8
LARGE = Pixelsmith(base=16)
"""Of the tiny pipelines' pictures of 32 pixels a side, which are 16 latents: a base picture of 8
latents a side, then one of twice the side in windows of that size."""
GRAIN, CHANNELS = {"sd15": 4, "flux_cfg": 2}, 4

EVEN = Bottleneck(steps=(1, 1, 1))
"""Of three steps each is the first of its size; of six, every second one."""


# Pixelsmith


def windows(name):
    """Windows of the last picture, by step."""
    places = [2 * index + 1 for index in range(STEPS)]
    sides = (2 * SIDE, 2 * SIDE, SIDE, SIDE, GRAIN[name])
    return [len(list(Covering(*sides, seed))) for seed in places]


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", ["sd15", "flux_cfg"])
def test_windows_dealt_out_are_the_picture_of_one_process(worlds, name, size):
    alone, calls, _ = stepped(name, [LARGE], steps=STEPS)
    found = worlds[size].run(stepped, name, [LARGE, Windows()], steps=STEPS)
    questions = [1] * STEPS + windows(name)  # the base picture has one a step
    branches = 2 if PIPELINES[name].layout != "batched" else 1
    assert calls == branches * sum(questions)
    each = CHANNELS * SIDE * SIDE * 4
    most = sum(-(-count // size) for count in questions)
    for rank, (latents, mine, details) in enumerate(found):
        assert all(torch.equal(*pair) for pair in zip(latents, alone, strict=True))
        assert mine == branches * sum(len(range(rank, count, size)) for count in questions)
        assert mine <= branches * most
        told = details["parallel.Windows"]
        sent = int(re.search(r"sent ([\d,]+) bytes", told)[1].replace(",", ""))
        assert sent == (size - 1) * most * each
        assert f"shared {sum(questions)} windows" in told
    assert found[0][1] == branches * most


@pytest.mark.parametrize("name", ["sd15", "flux_cfg"])
def test_branches_of_each_window_in_a_process_of_their_own(worlds, name):
    alone, calls, _ = stepped(name, [LARGE], steps=STEPS)
    found = worlds[2].run(stepped, name, [LARGE, CFG()], steps=STEPS)
    for latents, mine, _ in found:
        assert all(torch.equal(*pair) for pair in zip(latents, found[0][0], strict=True))
        assert distance(latents[-1], alone[-1]) <= CLOSE
        # where a branch is a call, only the very first one is not foreseen
        assert mine == (calls if PIPELINES[name].layout == "batched" else calls // 2 + 1)


@pytest.mark.laws_full
@pytest.mark.parametrize("name", ["sd15", "flux_cfg"])
def test_windows_and_branches_share_four_processes(worlds, name):
    alone, calls, _ = stepped(name, [LARGE], steps=STEPS)
    found = worlds[4].run(stepped, name, [LARGE, CFG(), Windows()], steps=STEPS)
    for latents, mine, _ in found:
        assert all(torch.equal(*pair) for pair in zip(latents, found[0][0], strict=True))
        assert distance(latents[-1], alone[-1]) <= CLOSE
        assert mine < calls
    assert [mine for _, mine, _ in found[::2]] == [mine for _, mine, _ in found[1::2]]


def test_a_process_that_dies_at_a_window_ends_all():
    begin, others = time.monotonic(), {*multiprocessing.active_children()}
    with pytest.raises(Lost, match=r"Process 1 died \(exit code -9\)"):
        spread(2, dies_at, "sd15", [LARGE, Windows()], 1, patience=60.0)
    assert time.monotonic() - begin < 59  # nobody waits out its patience
    assert {*multiprocessing.active_children()} <= others


def test_what_asks_about_no_windows_is_not_shared_and_says_so(worlds):
    for one in agree(worlds[2].run(outcome, "sd15", [Windows()], steps=2)):
        assert torch.equal(one.found[0], one.stock)
        assert "put resolution.Pixelsmith beside it" in one.details["parallel.Windows"]


def test_alone_it_asks_about_every_window_itself():
    alone, calls, details = stepped("sd15", [LARGE, Windows()], steps=STEPS)
    expected, same, _ = stepped("sd15", [LARGE], steps=STEPS)
    assert all(torch.equal(*pair) for pair in zip(alone, expected, strict=True)) and calls == same
    assert "one process" in details["parallel.Windows"]


# Bottleneck


STALE = {
    "AsyncDiff": ("flux_cfg", AsyncDiff(warmup=0), AsyncDiff(warmup=1)),
    "DistriFusion": ("sd15", DistriFusion(warmup=0), DistriFusion(warmup=1)),
    "PipeFusion": ("flux_cfg", PipeFusion(warmup=0), PipeFusion(warmup=1)),
    "VideoInfinity": (
        "wan21",
        VideoInfinity(mode="stale", warmup=0, reach=9),
        VideoInfinity(mode="stale", warmup=1, reach=9),
    ),
}
"""What works with what is a step old: a pipeline, without warm-up and with one of a step."""

EXACT = {
    "CFG": ("flux_cfg", CFG()),
    "DistriFusion": ("sd15", DistriFusion(mode="sync")),
    "PCPP": ("sd15", PCPP(warmup=0, fraction=1.0)),
    "Ring": ("flux_cfg", Ring()),
    "USP": ("wan21", USP(ulysses=2)),
    "Ulysses": ("flux_cfg", Ulysses()),
}


def off_by(worlds, name, method, steps, size=2, **call):
    """How far the latents under a method are from those of one process, at the most."""
    alone, _, _ = stepped(name, [EVEN], steps=steps, **call)
    found = worlds[size].run(stepped, name, [EVEN, method], steps=steps, **call)
    for latents, _, _ in found:
        assert all(torch.equal(*pair) for pair in zip(latents, found[0][0], strict=True))
    return max(distance(*pair) for pair in zip(found[0][0], alone, strict=True))


@pytest.mark.parametrize(("name", "cold", "warm"), STALE.values(), ids=STALE)
def test_what_is_of_another_size_is_forgotten_and_warmed_up_anew(worlds, name, cold, warm):
    assert off_by(worlds, name, warm, 6) <= CLOSE  # the second step of each size is a warm-up
    assert off_by(worlds, name, cold, 6) > CLOSE


@pytest.mark.parametrize(("name", "method"), EXACT.values(), ids=EXACT)
def test_pictures_that_change_their_size_are_those_of_one_process(worlds, name, method):
    assert off_by(worlds, name, method, 3) <= CLOSE


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("flux_cfg", Ulysses()),
        pytest.param("sd15", DistriFusion(mode="sync"), marks=pytest.mark.laws_full),
    ],
    ids=["tokens", "bands"],
)
def test_parts_of_three_processes_are_laid_out_anew(worlds, name, method):
    tall = {"height": 48, "width": 32}
    assert off_by(worlds, name, method, 3, size=3, **tall) <= CLOSE


# refused


@pytest.mark.parametrize(
    ("name", "large", "others"),
    [
        ("sd15", LARGE, (ASG(base=16), AsyncDiff(), DistriFusion(), PCPP(), VAE())),
        ("flux_cfg", LARGE, (PipeFusion(), Ring(), USP(), Ulysses())),
        ("sd15", EVEN, (ASG(base=16), attention.Neighbourhood(), merging.ToMe())),
    ],
    ids=["windows", "windows of tokens", "stages"],
)
def test_what_would_be_wrong_is_refused_by_both_names(bench, name, large, others):
    for other in others:
        with pytest.raises(Conflict) as refused:
            Plan(large, other).attach(bench.pipe(name))
        assert other.name in str(refused.value) and large.name in str(refused.value)
