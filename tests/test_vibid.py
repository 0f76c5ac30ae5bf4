"""A clip between two pictures: the passes are the paper's, and an exact network gives the clip."""

from contextlib import contextmanager
from itertools import pairwise, permutations

import diffusers
import pytest
import torch
from roster import LEADERS, ROSTER, full
from test_laws_counts import counting
from test_laws_memory import aborted, callback_raises, layer_raises
from tiny import PIPELINES, TINIES, Ask

import samplers
from accel import Plan, errors, hooks
from accel.loop import ViBiD
from accel.seams.seeding import seeded, seeds_of

NAME = "svd_keys"
STILL = {"noise_aug_strength": 0.0}
"""Without the pipeline's own noise on the pictures, which depends on their places."""


@pytest.fixture
def pictures():
    """Two pictures ``[2, 3, H, W]``."""
    return TINIES[NAME].inputs(Ask(["a fox", "a boat"], [0, 0], guidance=True))["image"]


@pytest.fixture
def latents():
    """What a call begins with: the noise of both of its clips, ``[2, F, C, H, W]``."""
    return torch.randn(2, 4, 4, 8, 8, generator=torch.Generator().manual_seed(5))


def asked(bench, **call):
    """What the stock pipeline gives its network at the first step, and its levels."""
    kept = []

    def listen(inner, *args, **kwargs):
        kept.append((args, kwargs))
        return inner(*args, **kwargs)

    pipe = bench.pipe(NAME)
    undo = hooks.wrap(pipe.unet, "forward", listen)
    bench.call(NAME, **call)
    undo()
    (sample, _), arguments = kept[0]
    return sample[:, :, 4:], arguments, pipe.scheduler.sigmas.tolist()


def told(pipe, clip, level, key, beside, arguments):
    """The clean clip and ε, by branch (uncond, cond), under one of the two pictures."""
    rows = [key, 2 + key]
    given = clip / (1 + level**2) ** 0.5
    answer = pipe.unet(
        torch.cat([given.expand(2, *clip.shape[1:]), beside[rows]], 2),
        torch.tensor(0.25).mul(torch.tensor(level).log()),
        encoder_hidden_states=arguments["encoder_hidden_states"][rows],
        added_time_ids=arguments["added_time_ids"][rows],
    ).sample
    clean = clip / (1 + level**2) - level / (1 + level**2) ** 0.5 * answer
    return clean, (clip - clean) / level


@torch.no_grad()
def by_hand(bench, latents, passes, fresh, method, call):
    """The paper's loop over the network alone.

    Args:
        passes: Pictures in the order of their passes; under the second one (1) time runs back.
        fresh: Noise of a step, in the time of the clip.
    """
    beside, arguments, levels = asked(bench, **call)
    pipe, clip = bench.pipe(NAME), latents[:1] * (levels[0] ** 2 + 1) ** 0.5
    ends = [beside[2 + key, :1] * pipe.vae.config.scaling_factor for key in (0, 1)]
    for index, (level, after) in enumerate(pairwise(levels)):
        for turn, key in enumerate(passes):
            if turn:
                clip = clip + (level**2 - after**2) ** 0.5 * fresh(index)
            seen = clip.flip(1) if key else clip
            clean, noise = told(pipe, seen, level, key, beside, arguments)
            guided = clean[:1] + method.scale * (clean[1:] - clean[:1])
            if method.replace:
                guided[:, -1] = ends[1 - key]
            seen = guided + after * noise[:1]
            clip = seen.flip(1) if key else seen
    return clip


@contextmanager
def scheduled(pipe, kind):
    """The pipeline with another scheduler, for as long as it is entered; ``None``: its own."""
    before = pipe.scheduler
    try:
        if kind is not None:
            pipe.scheduler = kind.from_config(before.config)
        yield pipe
    finally:
        pipe.scheduler = before


def noises(latents, scheduler):
    """The noise that a run adds, told by what it began with."""
    begun = seeds_of(latents[:1] * scheduler.init_noise_sigma)
    return lambda index: torch.randn(1, 4, 4, 8, 8, generator=seeded(begun, index, "cpu")[0])


def near(a, b):
    return (a - b).abs().max() <= 1e-4 * b.abs().max()


PAPER = {
    "as published": (ViBiD(), None),
    "less of the picture, ends left alone": (ViBiD(scale=0.6, replace=False), None),
    "latents in another scale": (ViBiD(), samplers.DPMSolverPPScheduler),
}


@pytest.mark.parametrize(("method", "scheduler"), PAPER.values(), ids=PAPER)
def test_a_step_is_the_papers(bench, pictures, latents, method, scheduler):
    call = {"steps": 3, "image": pictures, "latents": latents}  # fewer levels are 700 and 0.002
    with scheduled(bench.pipe(NAME), scheduler) as pipe:
        with Plan(method).attach(pipe):
            found = bench.call(NAME, **call)
        fresh = noises(latents, pipe.scheduler)
        expected = by_hand(bench, latents, (0, 1), fresh, method, call)
        assert found.shape == expected.shape
        assert near(found, expected)


def test_swapped_pictures_give_the_path_in_the_mirror(bench, pictures, latents):
    """From turned noise, the same path turned round, with the pass of the other end first."""
    turned = latents.flip(1)
    with Plan(ViBiD()).attach(bench.pipe(NAME)):
        call = {"steps": 2, "image": pictures.flip(0), "latents": turned, **STILL}
        mirrored = bench.call(NAME, **call)
    drawn = noises(turned, bench.pipe(NAME).scheduler)
    call = {"steps": 2, "image": pictures, "latents": latents, **STILL}
    expected = by_hand(bench, latents, (1, 0), lambda at: drawn(at).flip(1), ViBiD(), call)
    assert near(mirrored.flip(1), expected)
    assert not near(expected, by_hand(bench, latents, (0, 1), drawn, ViBiD(), call))


def encoded(pipe, pictures):
    """Latents ``[N, C, H, W]`` of pictures in the scale of clips."""
    pixels = pipe.video_processor.preprocess(pictures, height=16, width=16)
    return pipe.vae.encode(pixels).latent_dist.mode() * pipe.vae.config.scaling_factor


@torch.no_grad()
def test_a_clip_begins_with_the_latents_of_its_first_picture(bench, pictures):
    ends = encoded(bench.pipe(NAME), pictures)
    for replace in (True, False):
        with Plan(ViBiD(replace=replace)).attach(bench.pipe(NAME)):
            found = bench.call(NAME, steps=3, image=pictures, **STILL)
        assert near(found[0, 0], ends[0]) == replace


@pytest.mark.parametrize(("steps", "guidance"), [(1, True), (3, False)])
def test_there_are_two_evaluations_a_step(bench, steps, guidance):
    pipe, branches = bench.pipe(NAME), 2 if guidance else 1
    with counting(pipe) as counts, Plan(ViBiD()).attach(pipe) as run:
        found = bench.call(NAME, steps=steps, guidance=guidance)
    assert (run.report.steps, run.report.calls) == (steps, 2 * steps)
    assert (counts["network calls"], counts["network"]) == (2 * steps, 2 * steps * branches)
    assert len(found) == 1 and torch.isfinite(found).all()


class Exact:
    """What a perfect network says that knows a set of clips: the mean of those that it may be.

    Args:
        ends: The latents of some pictures. For each two there is a clip from one to the other, and
            the same clip turned round.
    """

    def __init__(self, ends):
        share = torch.linspace(0, 1, 4).view(-1, 1, 1, 1)
        draw = torch.Generator().manual_seed(3)
        self.clips = {}
        for i, j in permutations(range(len(ends)), 2):
            way = (1 - share) * ends[i] + share * ends[j]
            way[1:3] += torch.randn(way[1:3].shape, generator=draw)  # between them, its own
            self.clips[i, j] = way if i < j else self.clips[j, i].flip(0)
        self.ends = ends

    def __call__(self, sample, timestep, return_dict, **_):
        level = (4 * timestep.double()).exp()
        clips = torch.stack([*self.clips.values()]).double()
        given, shown = sample.double().split(4, 2)
        answers = []
        for row, picture in zip(given, shown, strict=True):
            place = row * (1 + level**2).sqrt()
            fit = -(place - clips).flatten(1).square().sum(1) / (2 * level**2)
            if picture.any():
                own = (self.ends - picture[0] * 0.18215).flatten(1).abs().sum(1).argmin()
                fit[torch.tensor([i != own for i, _ in self.clips])] = -torch.inf
            clean = torch.einsum("n,n...->...", fit.softmax(0), clips)
            answers.append((place / (1 + level**2) - clean) * (1 + level**2).sqrt() / level)
        return (torch.stack(answers).float(),)


@pytest.mark.parametrize("method", [ViBiD(), ViBiD(replace=False)], ids=str)
def test_an_exact_network_gives_the_clip_from_the_first_to_the_last_picture(method):
    """Of all that it knows the one that begins and ends so; stock cares only how it begins."""
    pipe = TINIES[NAME].build()
    several = TINIES[NAME].inputs(Ask(["a", "b", "c"], [0] * 3, guidance=True))["image"]
    with torch.no_grad():
        exact = Exact(encoded(pipe, several))
    pipe.unet.forward = exact
    ended = set()
    for first, last in exact.clips:
        call = {"steps": 12, "image": several[[first, last]], **STILL}
        with Plan(method).attach(pipe):
            found = TINIES[NAME].call(pipe, **call)[0]
        assert near(found, exact.clips[first, last])
        stock = TINIES[NAME].call(pipe, **call)[0]
        ended |= {near(stock, exact.clips[first, last]).item()}
    assert False in ended


TWICE = {"num_videos_per_prompt": 2}


@pytest.mark.parametrize(
    ("count", "more", "found"),
    [(1, {}, "1"), (3, {}, "3"), *((n, TWICE, f"{n}, 2 clips of each") for n in (1, 2))],
)
def test_another_number_of_pictures_than_two_is_bad_input(bench, pictures, count, more, found):
    call = {"image": pictures.repeat(2, 1, 1, 1)[:count], "generator": torch.Generator()} | more
    said = rf"between two pictures.* was given {found}: pass .*image=\[first, last\]"
    with Plan(ViBiD()).attach(bench.pipe(NAME)), pytest.raises(errors.BadInput, match=said):
        bench.call(NAME, steps=2, **call)


def wan_from_a_picture():
    """Its latent frames stand for several frames each, but for the first."""
    parts = PIPELINES["wan21"].build().components
    more = dict.fromkeys(("image_encoder", "image_processor"))
    return diffusers.WanImageToVideoPipeline(**(parts | more))


OTHERS = {name: PIPELINES[name].build for name in ("sd_img2img", "animatediff", "cogvideox")}


@pytest.mark.parametrize("build", [*OTHERS.values(), wan_from_a_picture], ids=[*OTHERS, "wan_i2v"])
def test_other_pipelines_are_refused_by_name(build):
    pipe = build()
    said = rf"loop\.ViBiD does not fit {type(pipe).__name__}: .*Use StableVideoDiffusionPipeline"
    with pytest.raises(errors.UnsupportedModel, match=said):
        Plan(ViBiD()).attach(pipe)


SCHEDULERS = {
    "two evaluations": diffusers.HeunDiscreteScheduler,
    "noise of its own": diffusers.EulerAncestralDiscreteScheduler,
    "a flow": diffusers.FlowMatchEulerDiscreteScheduler,
}


@pytest.mark.parametrize("kind", SCHEDULERS.values(), ids=SCHEDULERS)
def test_schedulers_whose_levels_do_not_fit_are_refused_by_name(bench, kind):
    said = rf"loop\.ViBiD does not fit.*{kind.__name__}.* Give the pipeline its own EulerDiscrete"
    with (
        scheduled(bench.pipe(NAME), kind) as pipe,
        pytest.raises(errors.UnsupportedModel, match=said),
    ):
        Plan(ViBiD()).attach(pipe)


INSIDE = ("memory", "weights")
"""Layers that see modules of the network alone: `make laws-full` has them."""

BESIDE = [
    pytest.param(
        row.active,
        id=name,
        marks=full(name not in LEADERS.values() or row.active.layer in INSIDE),
    )
    for name, row in ROSTER.items()
    if row.serves(PIPELINES["svd"]) and name != ViBiD.name
]


@pytest.mark.parametrize("other", BESIDE)
def test_another_method_goes_with_it_or_is_refused_by_both_names(bench, same, other):
    """Those that go together count what ran, give the same bits again, and leave no trace."""
    pipe, plan = bench.pipe(NAME), Plan(ViBiD(), other)
    with counting(pipe) as counts:
        try:
            run = plan.attach(pipe)
        except errors.Conflict as conflict:
            assert other.name in str(conflict) and ViBiD.name in str(conflict)
            return
        outputs = [bench.call(NAME, steps=2) for _ in range(2)]
        run.detach()
    assert same(*outputs)
    assert run.report.verdicts[ViBiD.name].state == "ACTIVE"
    assert run.report.calls == counts["network calls"] / 2
    if ROSTER[other.name].lossless:
        assert near(outputs[0], bench.under(NAME, Plan(ViBiD()), steps=2)[0])


@pytest.mark.parametrize("way", [callback_raises, layer_raises(0.6)], ids=["callback", "layer"])
def test_a_run_after_an_aborted_one_is_fresh(bench, same, way):
    fresh, _ = bench.under(NAME, Plan(ViBiD()), steps=2)
    with Plan(ViBiD()).attach(bench.pipe(NAME)):
        assert aborted(bench, NAME, way, 2)
        assert same(bench.call(NAME, steps=2), fresh)
    assert same(bench.call(NAME, steps=2), bench.stock(NAME, steps=2))


def test_a_clip_follows_from_its_seed(bench, same):
    with Plan(ViBiD()).attach(bench.pipe(NAME)):
        one, again, other = (bench.call(NAME, steps=1, seed=seed) for seed in (1, 1, 2))
    assert same(one, again)
    assert not near(one, other)
