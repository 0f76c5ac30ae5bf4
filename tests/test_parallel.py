"""One picture in several processes: that of one process where it is promised, near it elsewhere."""

import itertools
import math
import re

import pytest
import torch
from accelerate import cpu_offload
from hypothesis import given
from hypothesis import strategies as st
from parallel_jobs import Outcome, exchanged, fails, outcome
from roster import ROSTER, full
from tiny import PIPELINES
from worlds import Failed, World

from accel import Plan, cache, guidance, memory
from accel.errors import BadInput, Conflict, UnsupportedModel
from accel.seams.denoisers import find_denoisers
from parallel import CFG, PCPP, VAE, AsyncDiff, DistriFusion, VideoInfinity
from parallel.bands import Bands
from parallel.components import Components, cut
from parallel.mesh import AXES, sizes

CLOSE = 1e-5
WORLDS = [2, 3, pytest.param(4, marks=pytest.mark.laws_full)]
TWO_BRANCHES = ["sd15", "sd3", "flux_cfg", "wan22"]
UNETS = ["sd15", "sdxl", "sd_controlnet"]


def every(in_ci, method):
    """The pipelines that a method serves; those that CI leaves out are `laws_full`."""
    served = [name for name, tiny in PIPELINES.items() if ROSTER[method].serves(tiny)]
    return [pytest.param(name, marks=full(name not in in_ci)) for name in served]


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, in units of the largest number."""
    return float((found - expected).abs().max() / expected.abs().max())


def agree(outcomes: list[Outcome]) -> list[Outcome]:
    """Check what holds for all: the ranks see the same, and detaching leaves no trace."""
    first = outcomes[0]
    for one in outcomes:
        assert all(torch.equal(a, b) for a, b in zip(one.found, first.found, strict=True))
        assert torch.equal(one.after, one.stock)
    return outcomes


# bands and meshes


@given(
    height=st.integers(1, 200),
    width=st.integers(1, 40),
    unit=st.sampled_from([1, 2, 4, 8]),
    count=st.integers(1, 9),
)
def test_bands_are_whole_rows_at_every_level(height, width, unit, count):
    if -(-height // unit) < count:
        with pytest.raises(BadInput, match="times as high, or start"):
            Bands.of(height, width, unit, count)
        return
    bands = Bands.of(height, width, unit, count)
    for factor in bands.factors:
        lengths = bands.lengths(factor)
        assert sum(lengths) == -(-height // factor) and min(lengths) > 0
        assert max(lengths) - min(lengths[:-1] or lengths) <= unit // factor
        for rank, length in enumerate(lengths):
            begin = bands.span(rank).start
            assert begin % factor == 0 and sum(lengths[:rank]) == begin // factor
            assert bands.of_rows(rank, length, bands.columns(factor)) is not None
            tokens = bands.of_tokens(rank, length * bands.columns(factor))
            assert tokens is not None and tokens[rank] == length * bands.columns(factor)


@given(
    degrees=st.dictionaries(st.sampled_from(AXES), st.integers(1, 4), max_size=4),
    rest=st.integers(1, 5),
    processes=st.integers(1, 40),
)
def test_axes_multiply_to_the_processes(degrees, rest, processes):
    fixed = math.prod(degrees.values())
    assert sizes(degrees, fixed) == degrees
    if processes % fixed:
        with pytest.raises(BadInput, match=f"there are {processes}"):
            sizes(degrees, processes)
    free = next(name for name in AXES if name not in degrees)
    assert sizes({**degrees, free: 0}, fixed * rest) == {**degrees, free: rest}
    if rest > 1:
        with pytest.raises(BadInput, match=r"keeps .* busy"):
            sizes(degrees, fixed * rest)


def test_two_methods_on_one_axis_are_refused():
    with pytest.raises(Conflict, match=r"parallel.PCPP and parallel.DistriFusion|parallel.Distri"):
        Plan(DistriFusion(), PCPP()).attach(PIPELINES["sd15"].build())


def test_alone_it_does_nothing_and_says_so():
    pipe = PIPELINES["sd15"].build()
    stock = PIPELINES["sd15"].call(pipe)
    with pytest.warns(match="one process: start more"), Plan(DistriFusion()).attach(pipe):
        assert torch.equal(PIPELINES["sd15"].call(pipe), stock)
    with Plan(CFG()).attach(pipe), pytest.raises(BadInput, match="--devices 2"):
        PIPELINES["sd15"].call(pipe)
    assert torch.equal(PIPELINES["sd15"].call(pipe), stock)


def test_what_is_no_unet_is_refused():
    with pytest.raises(UnsupportedModel, match="is no UNet"):
        Plan(DistriFusion()).attach(PIPELINES["flux_cfg"].build())


IN_LAYERS = {"sd15": (DistriFusion(), PCPP(), VAE()), "animatediff": (VideoInfinity(),)}
"""Methods that read the weights of layers, by a pipeline that they serve."""


@pytest.mark.parametrize("name", IN_LAYERS)
def test_weights_that_come_layer_by_layer_are_not_read(name):
    here = {"onload_device": "cpu", "offload_device": "cpu", "vae": True}
    leaves, blocks = (
        memory.GroupOffload(offload_type=each, **here) for each in ("leaf_level", "block_level")
    )
    for method in IN_LAYERS[name]:
        pipe = PIPELINES[name].build()
        with pytest.raises(Conflict, match=rf"{method.name} and memory\.GroupOffload"):
            Plan(method, leaves).attach(pipe)
        Plan(method, blocks).attach(pipe).detach()
        pipe.enable_model_cpu_offload(device="cpu")
        Plan(method).attach(pipe).detach()
        pipe.remove_all_hooks()
        for network in (pipe.unet, pipe.vae):
            cpu_offload(network, torch.device("cpu"), offload_buffers=True)
        with pytest.raises(UnsupportedModel, match=r"take pipe\.enable_model_cpu_offload"):
            Plan(method).attach(pipe)


# exchange


@pytest.mark.parametrize("size", WORLDS)
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_tensors_of_any_length_are_gathered_and_counted(worlds, size, dim):
    shapes = [tuple(2 + rank if axis == dim else 3 for axis in range(3)) for rank in range(size)]
    found = worlds[size].run(exchanged, shapes, dim)
    for rank, one in enumerate(found):
        assert torch.equal(one["gathered"], found[0]["gathered"])
        start = 0
        for other, shape in enumerate(shapes):
            part = one["gathered"].narrow(dim, start, shape[dim])
            assert torch.equal(part.floor(), torch.full(shape, float(other)))
            start += shape[dim]
        assert one["gathered"].shape[dim] == start
        assert one["gather_bytes"] == (size - 1) * (size + 1) * 9 * 4  # as long as the longest
        neighbours = (rank > 0) + (rank < size - 1)
        assert one["border_bytes"] == neighbours * 6 * 4
        assert (one["before"] is None) == (rank == 0) and (one["after"] is None) == (
            rank == size - 1
        )
        if rank:
            assert (one["before"] == rank - 0.5).all()


def test_a_rank_that_fails_ends_the_world():
    world = World(2)
    with pytest.raises(Failed, match="on purpose"):
        world.run(fails, 1)
    world.close()


# CFG


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", TWO_BRANCHES)
def test_branches_in_two_processes_are_those_of_one(worlds, name, batch):
    steps = 4
    found = agree(worlds[2].run(outcome, name, [CFG()], runs=2, batch=batch, steps=steps))
    tiny = PIPELINES[name]
    for one in found:
        exact = tiny.layout != "batched"
        for each in one.found:
            assert torch.equal(each, one.stock) if exact else distance(each, one.stock) <= CLOSE
        networks = len(tiny.denoisers)
        alone = batch * steps if tiny.layout == "batched" else batch * (steps + networks)
        assert one.rows == [alone, alone]
        assert "a branch each" in one.details["parallel.CFG"]


@pytest.mark.parametrize("name", ["sd15", "flux_cfg"])
def test_branches_are_shared_out_below_caches_and_guidance(worlds, name):
    for method in (cache.EasyCache(threshold=0.3), guidance.Interval(low=0.2, high=0.8)):
        for one in agree(worlds[2].run(outcome, name, [CFG()], beside=[method], steps=6)):
            assert distance(one.found[0], one.stock) <= CLOSE


def test_without_guidance_there_is_nothing_to_share_out(worlds):
    for one in agree(worlds[2].run(outcome, "sd15", [CFG()], guidance=False)):
        assert torch.equal(one.found[0], one.stock)
        assert "one guidance branch" in one.details["parallel.CFG"]


# DistriFusion


@pytest.mark.parametrize("size", WORLDS)
@pytest.mark.parametrize("name", every(UNETS, "parallel.DistriFusion"))
def test_in_sync_bands_are_the_picture(worlds, name, size):
    for one in agree(worlds[size].run(outcome, name, [DistriFusion(mode="sync")])):
        assert distance(one.found[0], one.stock) <= CLOSE


def test_a_warm_up_as_long_as_the_run_is_sync(worlds):
    for one in agree(worlds[2].run(outcome, "sd15", [DistriFusion(warmup=3)], runs=2)):
        assert all(distance(each, one.stock) <= CLOSE for each in one.found)


def test_what_is_a_step_old_costs_less_the_later_it_begins(worlds):
    def error(method):
        found = agree(worlds[2].run(outcome, "sd15", [method], steps=8))
        return distance(found[0].found[0], found[0].stock)

    errors = [error(DistriFusion(warmup=warmup)) for warmup in (0, 2, 4, 7)]
    assert CLOSE < errors[0] < 0.5 and errors[-1] <= CLOSE
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("size", WORLDS)
def test_what_is_read_a_step_later_goes_in_few_messages(worlds, size):
    """A call that reads what is a step old sends once to all, to each neighbour, and its answer."""

    def messages(steps):
        method = DistriFusion(warmup=0)
        found = agree(worlds[size].run(outcome, "sd15", [method], steps=steps))
        told = [one.details[method.name] for one in found]
        return [int(re.search(r"in ([\d,]+) messages", each)[1].replace(",", "")) for each in told]

    once, often = messages(1), messages(5)
    for rank, (fresh, all_steps) in enumerate(zip(once, often, strict=True)):
        neighbours = (rank > 0) + (rank < size - 1)
        assert all_steps - fresh == 4 * (2 + neighbours) and fresh > 20


@pytest.mark.parametrize("norm", ["corrected", "stale", "local"])
def test_runs_do_not_know_of_each_other(worlds, norm):
    found = agree(worlds[2].run(outcome, "sd15", [DistriFusion(warmup=1, norm=norm)], runs=2))
    for one in found:
        assert torch.equal(one.found[0], one.found[1])


# PCPP


def test_two_that_see_each_other_whole_are_exact(worlds):
    for one in agree(worlds[2].run(outcome, "sd15", [PCPP(mode="sync", fraction=1.0)])):
        assert distance(one.found[0], one.stock) <= CLOSE


def test_neighbours_alone_take_fewer_bytes(worlds):
    def sent(method):
        found = agree(worlds[3].run(outcome, "sd15", [method]))
        told = [one.details[method.name].split("sent ")[1].split(" ")[0] for one in found]
        return sum(int(number.replace(",", "")) for number in told)

    assert sent(PCPP(warmup=0)) < sent(DistriFusion(warmup=0))


# AsyncDiff


@given(costs=st.lists(st.floats(0.1, 9.0), min_size=1, max_size=8), count=st.integers(1, 5))
def test_components_are_cut_as_evenly_as_can_be(costs, count):
    if count > len(costs):
        with pytest.raises(BadInput, match=f"start {len(costs)} at most"):
            cut(costs, count)
        return
    ends = cut(costs, count)
    assert len(ends) == count and ends[-1] == len(costs) and list(ends) == sorted({*ends})

    def dearest(ends):
        return max(sum(costs[a:b]) for a, b in itertools.pairwise((0, *ends)))

    others = itertools.combinations(range(1, len(costs)), count - 1)
    assert dearest(ends) <= min(dearest((*each, len(costs))) for each in others) + 1e-9


BLOCKS = ["sd15", "sd3", "flux_cfg", "wan22", "sd_controlnet"]


@pytest.mark.parametrize("size", WORLDS)
@pytest.mark.parametrize("name", every(BLOCKS, "parallel.AsyncDiff"))
def test_components_are_exact_while_they_warm_up(worlds, name, size):
    if not enough_blocks(name, size):
        with pytest.raises(Failed, match="at most"):
            worlds[size].run(outcome, name, [AsyncDiff(warmup=0)])
        return
    for one in agree(worlds[size].run(outcome, name, [AsyncDiff(warmup=3)], runs=2, steps=4)):
        assert all(torch.equal(each, one.stock) for each in one.found)
        assert "no step after the warm-up" in one.details["parallel.AsyncDiff"]


ALIKE = ("sd15_v", "hunyuanimage", "wan21", "mochi")
"""On these random weights steps in the middle count for as much as those at the beginning."""


@pytest.mark.parametrize("size", WORLDS)
@pytest.mark.parametrize("name", every(BLOCKS, "parallel.AsyncDiff"))
def test_components_a_step_old_are_near_and_nearer_the_later_they_begin(worlds, name, size):
    if not enough_blocks(name, size):
        with pytest.raises(Failed, match="at most"):
            worlds[size].run(outcome, name, [AsyncDiff(warmup=0)])
        return
    errors = []
    for warmup in (0, 4, 7):
        method = AsyncDiff(warmup=warmup)
        found = agree(worlds[size].run(outcome, name, [method], runs=2, steps=8))
        assert torch.equal(*found[0].found)
        errors.append(distance(found[0].found[0], found[0].stock))
    slack = 1.2 if name in ALIKE else 1
    assert 0 < errors[0] < 1 and errors[1] < slack * errors[0] and errors[2] == 0


def enough_blocks(name, count):
    """Whether every network of a tiny pipeline has as many blocks."""
    pipe = PIPELINES[name].build()
    found = [Components(one, None, 0, None) for one in find_denoisers(pipe)]
    return all(len(each._units) >= count for each in found)


# VAE


@pytest.mark.parametrize("size", WORLDS)
@pytest.mark.parametrize("name", every(["sd15", "flux_cfg"], "parallel.VAE"))
def test_bands_are_decoded_as_the_whole(worlds, name, size):
    for one in agree(worlds[size].run(outcome, name, [VAE()], steps=2, output_type="pt")):
        assert distance(one.found[0], one.stock) <= CLOSE
        assert "a band each" in one.details["parallel.VAE"]


def test_a_decoder_goes_with_what_shares_the_network_out(worlds):
    plan = [VAE(), CFG()]
    for one in agree(worlds[2].run(outcome, "sd15", plan, steps=2, output_type="pt")):
        assert distance(one.found[0], one.stock) <= CLOSE
