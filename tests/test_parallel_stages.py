"""Patches of a picture that flow through the stages of a network: exact where it is promised."""

import re

import pytest
import torch
from parallel_jobs import outcome, weights_in_memory
from test_parallel import CLOSE, WORLDS, agree, distance, enough_blocks, every
from tiny import PIPELINES
from worlds import Failed

from accel import Plan, cache, guidance
from accel.errors import BadInput, UnsupportedModel
from parallel import CFG, PipeFusion

IN_CI = ["sd3", "flux_cfg", "wan22", "pixart_sigma", "flux_controlnet"]
NAME = "parallel.PipeFusion"
ALIKE = ("flux_schnell", "lumina2")
"""On these random weights steps in the middle count for as much as those at the beginning."""


@pytest.mark.parametrize("size", WORLDS)
@pytest.mark.parametrize("name", every(IN_CI, NAME))
@pytest.mark.parametrize(
    "method", [PipeFusion(patches=1, warmup=0), PipeFusion(patches=3, warmup=4)]
)
def test_a_picture_that_flows_whole_is_exact(worlds, name, method, size):
    """One patch, or a warm-up as long as the run; in the first run as in the second."""
    if not enough_blocks(name, size):
        with pytest.raises(Failed, match="at most"):
            worlds[size].run(outcome, name, [method])
        return
    for one in agree(worlds[size].run(outcome, name, [method], runs=2, batch=2, steps=4)):
        assert all(distance(each, one.stock) <= CLOSE for each in one.found)
        assert "stages of" in one.details[NAME]


@pytest.mark.parametrize("name", every([*IN_CI, "qwenimage", "hunyuanvideo"], NAME))
def test_patches_are_near_and_nearer_the_later_they_begin(worlds, name):
    errors = []
    for warmup in (0, 4, 7):
        method = PipeFusion(patches=3, warmup=warmup)
        found = agree(worlds[2].run(outcome, name, [method], runs=2, steps=8))
        assert torch.equal(*found[0].found)
        errors.append(distance(found[0].found[1], found[0].stock))
    slack = 1.1 if name in ALIKE else 1
    assert CLOSE < errors[0] < 1 and errors[1] < slack * errors[0] and errors[2] <= CLOSE


@pytest.mark.parametrize("name", [name for name in IN_CI if enough_blocks(name, 3)])
def test_where_the_stages_are_cut_does_not_matter(worlds, name):
    """Two processes and three make the same picture of the same patches."""
    plan = [PipeFusion(patches=4, warmup=0)]
    two, three = (agree(worlds[size].run(outcome, name, plan, steps=5)) for size in (2, 3))
    assert torch.equal(two[0].found[0], three[0].found[0])


@pytest.mark.parametrize("patches", [1, 2, 5])
def test_what_is_sent_does_not_grow_with_patches(worlds, patches):
    """The tokens of the picture and the text once from stage to stage, and the answer."""

    def sent(count):
        plan = [PipeFusion(patches=count, warmup=0)]
        found = agree(worlds[2].run(outcome, "flux_cfg", plan, runs=2, steps=4))
        return [
            int(re.search(r"sent ([\d,]+)", one.details[NAME])[1].replace(",", "")) for one in found
        ]

    assert sent(patches) == sent(3)


@pytest.mark.parametrize("beside", [cache.EasyCache(threshold=0.3), guidance.Interval(high=0.6)])
def test_stages_go_below_caches_and_guidance(worlds, beside):
    plan = [PipeFusion(warmup=6)]
    for one in agree(worlds[2].run(outcome, "flux_cfg", plan, beside=[beside], steps=6)):
        assert distance(one.found[0], one.stock) <= CLOSE


def test_branches_and_stages_take_four(worlds):
    for one in agree(worlds[4].run(outcome, "flux_cfg", [CFG(), PipeFusion(warmup=4)], steps=4)):
        assert distance(one.found[0], one.stock) <= CLOSE


@pytest.mark.parametrize("name", ["flux_cfg", "wan22"])
def test_weights_of_other_stages_leave_the_memory_and_come_back(worlds, name):
    """While the plan is on, a process has those of its own blocks; all together have them once."""
    found = worlds[2].run(weights_in_memory, name, PipeFusion(weights="split", warmup=1))
    away = [one["before"] - one["during"] for one in found]
    assert sum(away) == found[0]["blocks"] and min(away) > 0
    for one, bytes_away in zip(found, away, strict=True):
        assert one["told"] * len(PIPELINES[name].denoisers) == bytes_away
        assert one["after"] == one["before"] and one["same"]
    assert all(torch.equal(one["picture"], found[0]["picture"]) for one in found)


@pytest.mark.parametrize("name", ["sd15", "animatediff"])
def test_what_has_no_blocks_is_refused(name):
    with pytest.raises(UnsupportedModel, match="fit"):
        Plan(PipeFusion()).attach(PIPELINES[name].build())


def test_more_processes_than_blocks_are_refused():
    with pytest.raises(BadInput, match="--devices 2"):
        pipe = PIPELINES["flux_cfg"].build()
        with Plan(PipeFusion(degree=2)).attach(pipe):
            PIPELINES["flux_cfg"].call(pipe)
