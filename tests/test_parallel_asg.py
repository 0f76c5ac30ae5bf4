"""ASGDiffusion: a large picture of patches, the same whoever computes them, and held together."""

import inspect
import itertools
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from parallel_jobs import Outcome, outcome
from roster import ROSTER, full
from tiny import PIPELINES

from accel import Plan, attention, cache, guidance
from accel import tokens as merging
from accel.errors import BadInput, Conflict, UnsupportedModel
from accel.seams.spaces import convert
from parallel import ASG, CFG, AsyncDiff, DistriFusion, Ulysses
from parallel.heat import Heat
from parallel.tiles import Shuffle, Tiling, combs, shares, shrinking, spans, woven

BASE = 16
"""Of the tiny pipelines' pictures of 32 pixels a side: four combs, nine windows."""

SERVED = [name for name, tiny in PIPELINES.items() if ROSTER["parallel.ASG"].serves(tiny)]
CI = ("sd15", "sdxl", "sd_controlnet", "flux_controlnet", "sd3_controlnet", "chroma", "cogview4")
FEW = ("sd15", "sd_controlnet", "flux_cfg", "sd3")


def every(in_ci):
    """The pipelines that it serves; those that CI leaves out are `laws_full`."""
    return [pytest.param(name, marks=full(name not in in_ci)) for name in SERVED]


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, in units of the largest number."""
    return float((found - expected).abs().max() / expected.abs().max())


def agree(outcomes: list[Outcome]) -> list[Outcome]:
    """Check what holds for all: the ranks see the same, and detaching leaves no trace."""
    for one in outcomes:
        assert all(torch.equal(a, b) for a, b in zip(one.found, outcomes[0].found, strict=True))
        assert torch.equal(one.after, one.stock)
    return outcomes


def made(name, method, **call):
    """The picture of a tiny pipeline in this process, and its report."""
    tiny = PIPELINES[name]
    pipe = tiny.build()
    run = Plan(method).attach(pipe)
    picture = torch.as_tensor(tiny.call(pipe, **call))
    run.detach()
    return picture, run.report


def sized(name, side):
    """Arguments of a call for a picture of so many pixels a side."""
    size = {} if name == "sd_img2img" else {"height": side, "width": side}
    image = {
        "sd_controlnet": "image",
        "sd_img2img": "image",
        "flux_img2img": "image",
        "sd3_controlnet": "control_image",
        "flux_controlnet": "control_image",
    }
    given = {image[name]: torch.rand(1, 3, side, side)} if name in image else {}
    return size | given | {"steps": 4}


def spied(pipe, tiny, change=None):
    """Keep the arguments of every call of the network itself, and maybe answer in its place."""
    network = getattr(pipe, tiny.denoisers[0])
    inner, signature = network.forward, inspect.signature(type(network).forward)
    calls = []

    def forward(*args, **kwargs):
        calls.append(dict(signature.bind(None, *args, **kwargs).arguments))
        return inner(*args, **kwargs) if change is None else change(calls[-1])

    network.forward = forward
    return calls


# patches


LENGTHS, SIDES = st.integers(1, 90), st.integers(1, 12)


@given(LENGTHS, SIDES, st.floats(0.0, 0.95), st.sampled_from([1, 2, 4, 8]))
def test_windows_cover_an_axis_and_their_shares_sum_to_one(length, side, overlap, unit):
    side *= unit
    along = spans(length, side, overlap, unit)
    assert along[0][0] == 0 and along[-1][1] == length
    for begin, end in along:
        assert begin % unit == 0
        assert end - begin == side or (end == length < side) or side < end - begin < side + unit
    for before, after in itertools.pairwise(along):
        assert before[0] < after[0] <= before[1]
    stride = max(int(side * (1 - overlap)) // unit, 1) * unit
    assert len(along) == -(-(max(length - side, 0) // unit * unit) // stride) + 1
    total = torch.zeros(length)
    for (begin, end), share in zip(along, shares(along), strict=True):
        assert share.min() > 0 and len(share) == end - begin
        total[begin:end] += share
    assert torch.allclose(total, torch.ones(length), atol=1e-6)


@given(LENGTHS, LENGTHS, SIDES, st.floats(0.0, 0.9), st.sampled_from([1, 2, 4]))
def test_windows_of_a_picture_are_merged_to_it(height, width, side, overlap, unit):
    picture = torch.randn(1, 2, height, width)
    tiling = Tiling.of(height, width, side, overlap, unit)
    merged = tiling.merged([window.of(picture) for window in tiling.windows])
    assert torch.allclose(merged, picture, atol=1e-5)


@given(st.integers(4, 40), st.integers(4, 40), st.integers(1, 4))
def test_combs_of_a_picture_are_woven_to_it(height, width, step):
    picture = torch.randn(2, 3, height, width)
    parts = [comb.of(picture) for comb in combs(step)]
    sizes = [comb.size(height, width) for comb in combs(step)]
    assert [tuple(part.shape[-2:]) for part in parts] == sizes
    assert torch.equal(woven(parts, step), picture)


@given(st.integers(4, 40), st.integers(4, 40), st.integers(1, 4), st.integers(0, 99))
def test_pixels_stay_in_their_cells_and_go_back(height, width, step, seed):
    picture = torch.arange(height * width).reshape(1, 1, height, width)
    shuffle = Shuffle(step, picture, seed)
    moved = shuffle.of(picture)
    assert torch.equal(shuffle.undone(moved), picture)
    row, column = moved[0, 0] // width, moved[0, 0] % width
    places = picture[0, 0] // width, picture[0, 0] % width
    for found, place in zip((row, column), places, strict=True):
        assert torch.equal(found // step, place // step)


@given(st.integers(1, 400), st.integers(1, 400), st.integers(1, 100))
def test_combs_are_as_large_as_the_base_allows(height, width, side):
    step = shrinking(height, width, side)
    assert height * width <= (step * side) ** 2 * (1 + 1e-6)
    assert step == 1 or height * width > ((step - 1) * side) ** 2


# what the network is asked


@pytest.mark.parametrize("name", every(CI))
def test_to_the_network_a_patch_is_a_picture_of_the_base_size(name):
    """Shapes of all arguments, and positions and sizes that it is told, are those of stock calls.

    The pictures are twice as high and wide as the base, which whole tokens and levels divide.
    """
    tiny = PIPELINES[name]
    pipe = tiny.build()
    side = BASE if name not in ("lumina2", "sana") else 4 * BASE
    calls = spied(pipe, tiny)
    tiny.call(pipe, **sized(name, side))
    told = len(calls)
    with Plan(ASG(base=side, overlap=0.5)).attach(pipe):
        tiny.call(pipe, **sized(name, 2 * side))
    usual, patches = [dict(flat(call)) for call in calls[:told]], calls[told:]
    assert len(patches) > 5 * told
    for patch in patches:
        for argument, found in flat(patch):
            known = [call[argument] for call in usual if argument in call]
            if isinstance(found, torch.Tensor):
                if argument.endswith(("img_ids", "time_ids", "_size", "resolution")):
                    assert any(torch.equal(found, value) for value in known), argument
                shapes = [value.shape for value in known]
                assert found.shape in shapes or argument.startswith("encoder"), argument
            elif argument.startswith("img_shapes"):
                assert found in known


def flat(arguments, before=""):
    """Names and values of arguments, and of those within them."""
    for name, value in arguments.items():
        if isinstance(value, dict):
            yield from flat(value, f"{before}{name}.")
        elif isinstance(value, (list, tuple)) and value and isinstance(value[0], torch.Tensor):
            yield from ((f"{before}{name}.{place}", one) for place, one in enumerate(value))
        else:
            yield before + name, value


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_network_of_single_pixels_does_not_notice(shuffle):
    tiny = PIPELINES["sd15"]
    pipe = tiny.build()
    spied(pipe, tiny, lambda given: ((given["sample"] * 0.3).tanh(),))
    size = {"height": 40, "width": 56}
    stock = tiny.call(pipe, batch=2, **size)
    with Plan(ASG(base=BASE, strength=0.0, shuffle=shuffle)).attach(pipe):
        assert distance(tiny.call(pipe, batch=2, **size), stock) < 1e-6


@pytest.mark.parametrize("name", ["sd15", "sd15_v", "flux_schnell"])
def test_at_full_strength_all_combs_make_for_one_clean_picture(name):
    tiny = PIPELINES[name]
    pipe = tiny.build()
    seen = []
    inner = pipe.scheduler.step

    def step(*args, **kwargs):
        seen.append((args[0], args[2]))
        return inner(*args, **kwargs)

    pipe.scheduler.step = step
    method = ASG(base=BASE, decay=0.0, until=0.5, mask=False, shuffle=False)
    with Plan(method).attach(pipe) as run:
        steps = []
        run.trajectory.observers.append(lambda step, _: steps.append(step))
        tiny.call(pipe, guidance=False)
    network = type(getattr(pipe, tiny.denoisers[0])).__name__

    def cells(place):
        clean = convert(*seen[place], steps[place], "x0", network)
        if name == "flux_schnell":  # 8 × 8 tokens of 2 × 2 pixels
            clean = clean.reshape(1, 8, 8, 4, 2, 2).permute(0, 3, 1, 4, 2, 5).flatten(4)
            clean = clean.reshape(1, 4, 16, 16)
        first = clean[..., ::2, ::2]
        return max(distance(comb.of(clean), first) for comb in combs(2))

    assert cells(0) < 1e-4 and cells(1) < 1e-4 and cells(2) > 1e-2 and cells(3) > 1e-2


def test_the_structure_counts_where_attention_tells_places_apart():
    tiny = PIPELINES["sd15"]
    pipe = tiny.build()
    found = []
    inner = Heat.map

    def kept(self, call, height, width):
        found.append((call.rows, inner(self, call, height, width)))
        return found[-1][1]

    with pytest.MonkeyPatch.context() as patch, Plan(ASG(base=BASE)).attach(pipe):
        patch.setattr(Heat, "map", kept)
        tiny.call(pipe, batch=2, height=32, width=40)
    assert len(found) == 2 * 9  # the combs of two steps: 40 pixels a side take 3 × 3
    for rows, heat in found:
        assert heat.shape[:2] == (4, 1) and heat.min() >= 0
        assert torch.allclose(heat.amax((1, 2, 3)), torch.ones(4)) and heat.std() > 0
        by_row = dict(zip(rows, heat, strict=True))
        for row in rows:
            assert torch.equal(by_row[row], by_row[row._replace(branch="cond")])


# one process


@pytest.mark.parametrize("name", every(FEW))
def test_a_picture_of_the_base_size_is_left_alone(name):
    tiny = PIPELINES[name]
    pipe = tiny.build()
    stock = torch.as_tensor(tiny.call(pipe))
    side = 32 if name != "lumina2" else 128
    run = Plan(ASG(base=side)).attach(pipe)
    assert torch.equal(torch.as_tensor(tiny.call(pipe)), stock)
    assert "no larger than the base" in run.report.verdicts["parallel.ASG"].detail
    run.detach()


def test_the_base_is_the_networks_own_by_default():
    assert made("sd15", ASG(), height=32, width=32)[1].rows == 4 * 2
    assert made("sd15", ASG(), height=64, width=64)[1].rows == (2 * 4 + 2 * 9) * 2


@pytest.mark.parametrize(
    ("height", "width", "overlap", "until", "steps"),
    [(32, 32, 0.5, 0.5, 4), (48, 32, 0.0, 0.25, 5), (40, 24, 0.25, 1.0, 3), (40, 56, 0.7, 0.0, 3)],
)
def test_patches_are_as_many_as_were_counted(height, width, overlap, until, steps):
    method = ASG(base=BASE, overlap=overlap, until=until)
    _, report = made("sd15", method, height=height, width=width, steps=steps, batch=2)
    sides = height // 2, width // 2  # of the latents
    guided = sum(step < until * steps for step in range(steps))
    count = 1
    for side in sides:
        stride = max(int(8 * (1 - overlap)) // 4, 1) * 4
        count *= -(-(max(side - 8, 0) // 4 * 4) // stride) + 1
    patches = guided * shrinking(*sides, 8) ** 2 + (steps - guided) * count
    assert report.calls == patches and report.rows == 4 * patches
    assert f"computed {patches} patches" in report.verdicts["parallel.ASG"].detail


@pytest.mark.parametrize("name", FEW)
def test_a_warm_up_as_long_as_the_run_is_sync_and_a_shorter_one_near(name):
    call = {"steps": 8, "height": 48, "width": 48}
    options = {"base": BASE, "until": 1.0, "decay": 0.0}
    sync, _ = made(name, ASG(mode="sync", **options), **call)
    errors = []
    for warmup in (0, 3, 7):
        found, report = made(name, ASG(mode="stale", warmup=warmup, **options), **call)
        errors.append(distance(found, sync))
        assert report.tallies[0].peak > 0
    assert errors[0] > 0 and errors[2] == 0
    assert errors == sorted(errors, reverse=True)


def test_a_structure_of_no_weight_is_none():
    options = {"base": BASE, "strength": 0.0}
    fresh, _ = made("sd15", ASG(**options))
    stale, report = made("sd15", ASG(mode="stale", warmup=0, **options))
    assert torch.equal(fresh, stale) and report.tallies[0].peak == 0
    assert not torch.equal(fresh, made("sd15", ASG(base=BASE))[0])


@pytest.mark.parametrize("space", ["clean", "output"])
def test_what_is_kept_is_the_run_s_alone(space):
    tiny = PIPELINES["sd15"]
    pipe = tiny.build()
    with Plan(ASG(base=BASE, mode="stale", warmup=0, space=space)).attach(pipe) as run:
        first = tiny.call(pipe)
        other = tiny.call(pipe, seed=5, height=40, width=48, batch=2)
        assert torch.equal(tiny.call(pipe), first) and other.isfinite().all()
    assert run.report.tallies[0].memory() == 0


# several processes


GRAIN = {"lumina2": 16, "cogview4": 16, "sana": 32}
"""Pixels that a pipeline's sides are multiples of; 8 of the others."""


def odd(name):
    """Two pictures of a size that combs and windows do not divide."""
    grain = GRAIN.get(name, 8)
    return {"height": 5 * grain, "width": 6 * grain, "batch": 2}


@pytest.mark.parametrize("name", every(FEW))
def test_the_picture_does_not_depend_on_the_number_of_processes(worlds, name):
    """To the bit, in either mode, at a size that combs and windows do not divide."""
    for method in (ASG(base=BASE), ASG(base=BASE, mode="stale", warmup=0)):
        call = {"steps": 3, **odd(name)}
        one, *others = [
            agree(worlds[processes].run(outcome, name, [method], **call)) for processes in (1, 2, 3)
        ]
        for several in others:
            assert torch.equal(several[0].found[0], one[0].found[0])
        for several in (one, *others):
            assert [each.calls for each in several] == [
                [shared(several, rank, one[0])] for rank in range(len(several))
            ]


def shared(several, rank, alone):
    """Patches that a process computes, by those that one alone does: 4 or 9 combs, 4 windows…"""
    told = re.search(r"(\d+) calls in (\d+) combs, (\d+) in windows", alone.details["parallel.ASG"])
    calls, combs_, others = (int(number) for number in told.groups())
    windows = (alone.calls[0] - calls * combs_) // others
    size = len(several)
    return sum(
        calls_ * max((count - rank + size - 1) // size, 1)
        for calls_, count in ((calls, combs_), (others, windows))
    )


def test_a_process_that_has_no_patch_computes_one_all_the_same(worlds):
    method = ASG(base=24, until=0.0, overlap=0.0)  # two windows for three processes
    found = agree(worlds[3].run(outcome, "sd15", [method], height=40, width=24, steps=2))
    assert [one.calls for one in found] == [[2], [2], [2]]
    assert torch.equal(found[0].found[0], made("sd15", method, height=40, width=24, steps=2)[0])


def test_what_is_sent_is_what_was_counted(worlds):
    """A round of patches a time, as long as its longest, to each of the others."""
    found = agree(worlds[2].run(outcome, "sd15", [ASG(base=BASE, mask=False)], steps=4))
    patch = 2 * 4 * 8 * 8 * 4  # rows, channels, sides and bytes of a number
    for one in found:
        assert f"sent {2 * (2 + 5) * patch:,} bytes" in one.details["parallel.ASG"]


@pytest.mark.parametrize("beside", [cache.EasyCache(threshold=0.3), guidance.Interval(high=0.6)])
@pytest.mark.parametrize("name", ["sd15", "flux_cfg"])
def test_patches_are_shared_out_below_caches_and_guidance(worlds, name, beside):
    runs = [
        agree(worlds[size].run(outcome, name, [ASG(base=BASE), beside], steps=6)) for size in (1, 2)
    ]
    assert torch.equal(runs[0][0].found[0], runs[1][0].found[0])


# refusals


@pytest.mark.parametrize("name", [name for name in PIPELINES if name not in SERVED])
def test_pictures_that_cannot_be_cut_are_refused_by_name(name):
    pipe = PIPELINES[name].build()
    with pytest.raises(UnsupportedModel, match="does not fit"):
        Plan(ASG()).attach(pipe)


@pytest.mark.parametrize(
    "other",
    [CFG(), DistriFusion(), AsyncDiff(), merging.ToMe(ratio=0.5), cache.FORA(interval=2)],
    ids=lambda other: other.name,
)
def test_what_works_inside_of_the_network_is_refused_beside_it(other):
    with pytest.raises(Conflict, match=r"parallel\.ASG"):
        Plan(ASG(base=BASE), other).attach(PIPELINES["sd15"].build())
    for inside in (Ulysses(), attention.Backend()):
        with pytest.raises(Conflict, match=r"parallel\.ASG"):
            Plan(ASG(base=BASE), inside).attach(PIPELINES["flux_cfg"].build())


def test_a_base_below_a_level_or_a_token_is_refused():
    with pytest.raises(BadInput, match="at least 8"):
        Plan(ASG(base=4)).attach(PIPELINES["sd15"].build())
    with pytest.raises(BadInput, match="there are 1"):
        made("sd15", ASG(base=BASE, degree=2))
