"""Parallel methods beside caches: refused by name, or every rank decides as one process does."""

import pytest
import torch
from pair_jobs import together
from roster import ROSTER, STEPS, full
from tiny import PIPELINES
from worlds import World

from accel import Accelerator
from parallel import CFG, PCPP, USP, AsyncDiff, DistriFusion, PipeFusion, Ring, Ulysses

CLOSE = 2e-4
ROUNDED = 1e-3
"""Caches that keep bfloat16 turn what is rounding in float32 into rounding of theirs."""
AT_ONCE = 8
"""Caches that are tried in one run of a world."""
NUDGE = 1e-6

EXACT: dict[str, Accelerator] = {
    "CFG": CFG(),
    "DistriFusion": DistriFusion(mode="sync"),
    "PCPP": PCPP(mode="sync", fraction=1.0),
    "AsyncDiff": AsyncDiff(warmup=STEPS),
    "PipeFusion": PipeFusion(warmup=STEPS),
    "Ulysses": Ulysses(),
    "Ring": Ring(),
    "USP": USP(ulysses=2),
}
"""In the form in which two processes are one."""

STALE: dict[str, Accelerator] = {
    "DistriFusion": DistriFusion(warmup=1),
    "PCPP": PCPP(warmup=1),
    "AsyncDiff": AsyncDiff(warmup=1),
    "PipeFusion": PipeFusion(warmup=1),
}
CI = {("CFG", "flux_cfg"), ("Ulysses", "flux_cfg")}
PLACES = ("sd15", "flux_cfg", "wan22")


def cases(methods, ci=()):
    """Every method on every one of ``PLACES`` that it serves."""
    return pytest.mark.parametrize(
        ("name", "method"),
        [
            pytest.param(name, method, id=f"{label}-{name}", marks=full((label, name) not in ci))
            for label, method in methods.items()
            for name in PLACES
            if ROSTER[method.name].serves(PIPELINES[name])
        ],
    )


def caches(name):
    """Every cache that acts on a pipeline, and every form of it."""
    rows = [row for key, row in ROSTER.items() if key.startswith("cache.")]
    rows = [row for row in rows if row.acts(PIPELINES[name])]
    return [form for row in rows for form in (row.active, *row.variants)]


@pytest.fixture(scope="module")
def world():
    found = World(2)
    yield found
    found.close()


def pairs(world, name, method, nudge=0.0):
    """By cache, what each rank saw; what was refused was so by both names."""
    others, ranks, found = caches(name), [[], []], []
    for begin in range(0, len(others), AT_ONCE):
        some = others[begin : begin + AT_ONCE]
        told = world.run(together, name, method, some, nudge, STEPS)
        for rank, more in zip(ranks, told, strict=True):
            rank.extend(more)
    for other, each in zip(others, zip(*ranks, strict=True), strict=True):
        if each[0].refused:
            said = {one.refused for one in each}
            assert len(said) == 1
            [said] = said
            assert (other.name in said and method.name in said) or "fit" in said
            continue
        found.append((other, each))
    return found


def agree(ranks):
    """Whether all ranks have the same picture, to the bit."""
    return all(torch.equal(one.found, ranks[0].found) for one in ranks)


def distance(one):
    """How far the picture is from that of one process under the same cache."""
    return float((one.found - one.alone).abs().max() / one.alone.abs().max())


@cases(EXACT, CI)
def test_caches_decide_as_in_one_process(world, name, method):
    for other, ranks in pairs(world, name, method):
        assert agree(ranks), other
        close = ROUNDED if getattr(other, "keep", "native") == "bfloat16" else CLOSE
        assert all(distance(one) <= close for one in ranks), other


@cases(STALE)
def test_what_is_a_step_old_is_so_in_every_process(world, name, method):
    for other, ranks in pairs(world, name, method):
        assert agree(ranks), other


@cases({"CFG": CFG(), "DistriFusion": DistriFusion()}, {("CFG", "flux_cfg")})
def test_processes_that_differ_by_rounding_go_on_with_the_same_bits(world, name, method):
    """All that caches of steps decide by is what a process has been told, or has told."""
    for other, ranks in pairs(world, name, method, NUDGE):
        assert agree(ranks), other
