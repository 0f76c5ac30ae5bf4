"""Token reduction on pipelines: what is attended to, by whom, and that it is what theory says."""

import math
from collections import Counter
from itertools import pairwise
from types import SimpleNamespace
from typing import ClassVar

import diffusers
import pytest
import torch
from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from roster import ROSTER, pipelines
from roster.tokens import REFERENCES, UNKNOWN
from test_slicing import ask, text_to_video
from tiny import PIPELINES, PROMPTS
from torch.nn.functional import normalize, scaled_dot_product_attention

from accel import Plan, cache, tokens
from accel.attach import Accelerator
from accel.errors import Conflict, UnsupportedModel
from accel.seams.attention import answer_attention
from accel.seams.blocks import wrap_call
from accel.seams.denoisers import Row, find_denoisers
from accel.seams.layout import Layout
from accel.seams.modules import find_modules
from accel.seams.rotary import kept_positions, shared_positions
from accel.seams.token_stream import Stream, with_bias
from accel.tokens.exclusive import exclusive
from accel.tokens.fields import Merging
from accel.tokens.importance import Ranked
from accel.tokens.joint import beside_text
from accel.tokens.layers import Visit
from accel.tokens.matching import cells
from accel.tokens.merging import Merger, Stateless
from accel.tokens.pruning import Pruning
from accel.tokens.toma import Covering

ALL = 8
MASKED = ("chroma", "hunyuanvideo", "qwenimage")
CI = ("sd15", "animatediff", "sd35_skip_layer", "flux", "flux_cfg", "chroma", "qwenimage")
CI += ("pixart_sigma", "sana", "cogview4", "wan22", "ltx", "cogvideox", "hunyuanvideo")


def served(ci=CI, without=()):
    """Every tiny pipeline whose tokens are known."""
    return pipelines(ci, where=lambda t: t.name not in {*UNKNOWN, *REFERENCES, *without})


def layers(pipe):
    """The self-attentions of all networks of a pipeline."""
    return [
        module
        for denoiser in find_denoisers(pipe)
        for module in find_modules(denoiser)
        if module.kind == "self"
    ]


class Probe(Accelerator):
    """Looks at every attention below all others."""

    name: ClassVar[str] = "test.Probe"
    layer: ClassVar[str] = "attention"
    seam: ClassVar[str] = "attention"
    supports: ClassVar[str] = "tests"
    source: ClassVar[str] = "here"

    @classmethod
    def off(cls):
        return None

    def why_off(self):
        return None

    def attach(self, site):
        site.tally.change = "looked"
        SEEN.clear()
        for denoiser in site.denoisers:
            for module in find_modules(denoiser):
                if module.kind == "self":
                    yield answer_attention(module, look)


SEEN: list[tuple[int, int]] = []


def look(asked):
    SEEN.append((asked.query.shape[2], asked.key.shape[2]))
    return asked.dense()


def seen(bench, name, *methods, **call):
    """Queries and keys of every self-attention of a run, in order."""
    with Plan(Probe(), *methods).attach(bench.pipe(name)):
        bench.call(name, **call)
    return list(SEEN)


# What goes through attention: closed forms.


@served(without=("sana",))
def test_so_many_tokens_go_through_attention(bench, name):
    steps = {"steps": 2, "guidance": False}
    before = seen(bench, name, **steps)
    merged = seen(bench, name, tokens.ToMe(ratio=0.4, max_downsample=ALL), **steps)
    pooled = seen(bench, name, tokens.ToDo(factor=3, next_factor=2), **steps)
    assert len(before) == len(merged) == len(pooled)
    for (queries, keys), fewer, pools in zip(before, merged, pooled, strict=True):
        text, grid, level = grid_of(name, queries)
        image = math.prod(grid)
        left = text + image - int(0.4 * image)
        assert fewer == (left, left)
        side = {1: 3, 2: 2}.get(level, 1)
        few = grid[0] * math.prod(-(-length // side) for length in grid[1:])
        assert pools == (queries, text + few)
        assert keys == queries


def grid_of(name, queries):
    """Text, grid and downsampling of an attention, from the size of the picture alone."""
    if PIPELINES[name].blocks == "unet":
        side = 12 if PIPELINES[name].media == "video" else 16
        level = math.isqrt(side**2 // queries)
        return 0, (1, side // level, side // level), level
    grid = (3, 8, 8) if PIPELINES[name].media == "video" else (1, 8, 8)
    return queries - math.prod(grid), grid, 1


# The order of tokens is nothing, if their positions go with them.


NOTHING = pytest.mark.filterwarnings(r"ignore:test\.Shuffled did nothing")


class Shuffled(Merging):
    """A reduction that leaves no token out: each sample's tokens in an order of its own."""

    name: ClassVar[str] = "test.Shuffled"
    source: ClassVar[str] = "here"

    def reducer(self):
        def reduce(x, wanted):
            generator = torch.Generator().manual_seed(wanted.step.index)
            rows = len(wanted.samples) * wanted.entries
            order = [torch.randperm(wanted.layout.image, generator=generator) for _ in range(rows)]
            anchor = torch.stack(order)
            return exclusive(anchor.argsort(1), anchor)

        return Stateless(reduce)


@NOTHING
@served()
def test_tokens_in_any_order_with_their_positions_are_the_same_picture(bench, name):
    call = {"steps": 2, "batch": 2 if PIPELINES[name].batchable else 1}
    with Plan(Shuffled(max_downsample=ALL)).attach(bench.pipe(name)):
        found = bench.call(name, **call)
    torch.testing.assert_close(found, bench.stock(name, **call), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("extra", [(), (6,), (6, 5)])
def test_what_modulates_each_token_goes_with_it(extra):
    """A modulation ``[B, N, 6, D]`` follows its tokens; one for all of them stays as it is."""
    layout = Layout(0, 1, 3, 4)
    hidden, own, whole = table(2, 12, 5), table(2, 12, *extra), table(2, 6, 5)
    stream = Stream(
        "test", ("hidden_states", "temb", "shift"), (hidden, own, whole), 3, layout, layout
    )
    order = torch.stack([torch.arange(12).flip(0), torch.arange(12).roll(5)])[:, :7]
    some = SimpleNamespace(
        merge=lambda x: torch.stack([row[kept] for row, kept in zip(x, order, strict=True)])
    )
    (kept, modulation, shift), _ = stream.reduced(some, some, some)
    assert torch.equal(kept, some.merge(hidden)) and shift is whole
    assert torch.equal(modulation, some.merge(own) if extra else own)


def timed_by_token():
    """Wan TI2V: every token has a time of its own, here from a tenth of the step's to all of it."""
    pipe = PIPELINES["wan21"].build()
    pipe.register_to_config(expand_timesteps=True)

    def ramp(network, args, kwargs):
        time = kwargs["timestep"]
        assert time.ndim == 2
        return args, kwargs | {"timestep": time * torch.linspace(0.1, 1.0, time.shape[1])}

    pipe.transformer.register_forward_pre_hook(ramp, with_kwargs=True)
    return pipe


@pytest.mark.parametrize("blocks", [True, False])
def test_tokens_with_a_time_of_their_own_in_any_order_are_the_same_clip(monkeypatch, blocks):
    """In whole blocks, which modulate them, and at the attention, which is given them modulated."""

    def permuted(pruning, call, layout, sample):
        generator = torch.Generator().manual_seed(call.step.index + sample)
        return torch.randperm(layout.image, generator=generator)

    monkeypatch.setattr(Pruning, "_choose", permuted)
    pipe = timed_by_token()
    stock = PIPELINES["wan21"].call(pipe, steps=3)
    run = Plan(tokens.SADA() if blocks else Shuffled(max_downsample=ALL)).attach(pipe)
    found = PIPELINES["wan21"].call(pipe, steps=3)
    run.detach()
    assert not blocks or run.report.verdicts["tokens.SADA"].state == "ACTIVE"
    torch.testing.assert_close(found, stock, rtol=1e-3, atol=1e-3)


def test_some_tokens_with_a_time_of_their_own_are_left_out():
    pipe = timed_by_token()
    with Plan(tokens.SADA(most=8)).attach(pipe) as run:
        found = PIPELINES["wan21"].call(pipe, steps=6)
    assert run.report.verdicts["tokens.SADA"].state == "ACTIVE"
    assert torch.as_tensor(found).isfinite().all()


FORMS = {
    "pair of the joint sequence": lambda n, s: (table(s, 4), table(s, 4)),
    "pair of the image": lambda n, s: (table(n, 4), table(n, 4)),
    "one table": lambda n, s: table(s, 4),
    "with axes of batch and head": lambda n, s: (table(1, s, 1, 4), table(1, s, 1, 4)),
    "by row": lambda n, s: [table(2, n, 4), table(2, n, 4)],
    "by head": lambda n, s: table(2, 5, s, 4),
    "complex, image and text": lambda n, s: (table(n, 2) * 1j, table(s - n, 2) * 1j),
}


def table(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("text", [0, 3])
@pytest.mark.parametrize("form", FORMS)
def test_positions_of_kept_tokens_are_their_own(form, text, first):
    layout = Layout(text, 1, 3, 4, text_first=first)
    x = table(1, layout.image, 6)
    image = cells(layout).match(x, 0.5)
    joint = beside_text(layout, image)
    value = FORMS[form](layout.image, layout.tokens)
    found = kept_positions(value, layout, image, joint, "Network")
    assert type(found) is type(value)
    before, after = ([v] if isinstance(v, torch.Tensor) else list(v) for v in (value, found))
    for place, (old, new) in enumerate(zip(before, after, strict=True)):
        if old.is_complex() and place:
            assert new is old
            continue
        lengths = (layout.image, layout.tokens)
        axis = next(a for a, length in enumerate(old.shape[:-1]) if length in lengths)
        anchor = (image if old.shape[axis] == layout.image else joint).anchor[0]
        assert torch.equal(new, old.index_select(axis, anchor))
        assert shared_positions(value, layout, "Network") == (axis == 0)


@pytest.mark.parametrize(
    "value",
    [
        ((table(12, 4), table(12, 4)), (table(12, 4), table(12, 4))),  # a pair for each axis
        (table(12, 4), table(12, 4) * 1j),
        table(7, 4),
        table(12, 12, 4),
        [table(12, 4)] * 3,
    ],
    ids=["nested", "mixed", "another length", "two axes", "three"],
)
def test_positions_of_an_unknown_form_are_refused_by_name(value):
    layout = Layout(0, 1, 3, 4)
    image = cells(layout).match(table(1, 12, 6), 0.5)
    with pytest.raises(UnsupportedModel, match="Network hands its attention rotary positions"):
        kept_positions(value, layout, image, image, "Network")


# Plain references, written down independently.


def plain_pattern(x, layout, ratio, seed):
    """W and U of ToMe for one sample, by loops; only the draws are shared."""
    drawn = cells(layout, torch.Generator().manual_seed(seed))
    unit = normalize(x, dim=-1)
    targets = drawn.destination[0].tolist()
    best = {
        s: max(targets, key=lambda d: float(unit[s] @ unit[d])) for s in drawn.source[0].tolist()
    }
    alike = sorted(best, key=lambda s: -float(unit[s] @ unit[best[s]]))
    gone = set(alike[: int(len(x) * ratio)])
    kept = [n for n in range(len(x)) if n not in gone]
    unmerge = torch.zeros(len(x), len(kept))
    for n in range(len(x)):
        unmerge[n, kept.index(best[n] if n in gone else n)] = 1
    return unmerge.T / unmerge.sum(0)[:, None], unmerge, kept


def draws(seed, step, layer):
    return (seed * 1_000_003 + step) * 1_009 + layer


def test_a_unet_under_tome_is_the_plain_reference(bench):
    ratio, undos, step = 0.5, [], Counter()
    pipe = bench.pipe("sd15")

    for rank, module in enumerate(layers(pipe)):

        def plain(inner, hidden, *args, rank=rank, **kwargs):
            step[rank] += 1
            if hidden.shape[1] != 256:
                return inner(hidden, *args, **kwargs)
            _, cond = hidden.chunk(2)  # the unconditional half comes first
            layout = Layout(0, 1, 16, 16)
            merge, unmerge, _ = plain_pattern(
                cond[0], layout, ratio, draws(3, step[rank] - 1, rank)
            )
            return unmerge @ inner(merge @ hidden, *args, **kwargs)

        undos.append(wrap_call(module.module, plain))
    expected = bench.call("sd15", steps=3)
    for undo in undos:
        undo()
    with Plan(tokens.ToMe(ratio=ratio, seed=3)).attach(pipe) as run:
        found = bench.call("sd15", steps=3)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert "256 → 128 tokens in 3 layers; 4 layers left" in str(run.report)


def rotated(x, cos, sin):
    """``x[B, S, H, D]`` turned by ``cos[S, D]``: pairs of neighbours."""
    even, odd = x[..., ::2], x[..., 1::2]
    turned = torch.stack([-odd, even], dim=-1).flatten(-2)
    return x * cos[None, :, None] + turned * sin[None, :, None]


def plain_flux(module, hidden, text, rotary, merge, unmerge, kept):
    """Flux's attention on merged tokens: two streams, or one of text and image."""
    words = text.shape[1] if text is not None else hidden.shape[1] - merge.shape[1]
    picture = hidden if text is not None else hidden[:, words:]
    few = merge @ picture
    stream = few if text is not None else torch.cat([hidden[:, :words], few], dim=1)
    parts = [
        p(stream).unflatten(-1, (module.heads, -1)) for p in (module.to_q, module.to_k, module.to_v)
    ]
    query, key, value = module.norm_q(parts[0]), module.norm_k(parts[1]), parts[2]
    if text is not None:
        more = (module.add_q_proj, module.add_k_proj, module.add_v_proj)
        q, k, v = (p(text).unflatten(-1, (module.heads, -1)) for p in more)
        query = torch.cat([module.norm_added_q(q), query], dim=1)
        key = torch.cat([module.norm_added_k(k), key], dim=1)
        value = torch.cat([v, value], dim=1)
    places = torch.tensor([*range(words), *(words + n for n in kept)])
    cos, sin = (part[places] for part in rotary)
    query, key = rotated(query, cos, sin), rotated(key, cos, sin)
    heads = [x.transpose(1, 2) for x in (query, key, value)]
    found = scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
    words_out, picture_out = found[:, :words], found[:, words:]
    if text is None:
        return torch.cat([words_out, unmerge @ picture_out], dim=1)
    return unmerge @ module.to_out[0](picture_out), module.to_add_out(words_out)


def test_flux_under_tome_is_the_plain_reference(bench):
    ratio, undos, patterns = 0.5, [], {}
    pipe = bench.pipe("flux_cfg")
    layout, calls = Layout(0, 1, 8, 8), Counter()

    for rank, module in enumerate(layers(pipe)):

        def plain(inner, hidden_states, encoder_hidden_states=None, image_rotary_emb=None, *,
                  rank=rank, module=module.module):  # fmt: skip
            step, call = divmod(calls[rank], 2)
            calls[rank] += 1
            if call == 0:  # cond comes first, and leads
                picture = hidden_states[0, -layout.image :]
                patterns[rank] = plain_pattern(picture, layout, ratio, draws(0, step, rank))
            return plain_flux(
                module, hidden_states, encoder_hidden_states, image_rotary_emb, *patterns[rank]
            )

        undos.append(wrap_call(module.module, plain))
    expected = bench.call("flux_cfg", steps=3)
    for undo in undos:
        undo()
    with Plan(tokens.ToMe(ratio=ratio)).attach(pipe):
        found = bench.call("flux_cfg", steps=3)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


# Content that is constant in the tiles loses nothing.


def tiled(pipe):
    """Make what every self-attention is given constant in tiles of 2 × 2; the undo."""

    def around(inner, hidden, *args, **kwargs):
        side = math.isqrt(hidden.shape[1])
        if side * side != hidden.shape[1] or side % 2:
            return inner(hidden, *args, **kwargs)
        grid = hidden.unflatten(1, (side, side))[:, ::2, ::2]
        same = grid.repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1, 2)
        return inner(same, *args, **kwargs)

    def by_name(inner, *args, **kwargs):
        if args:
            return around(inner, *args, **kwargs)
        return around(
            lambda h, **k: inner(hidden_states=h, **k), kwargs.pop("hidden_states"), **kwargs
        )

    undos = [wrap_call(module.module, by_name) for module in layers(pipe)]
    return lambda: [undo() for undo in undos]


CONSTANT = [
    ("sd15", tokens.ToDo()),
    ("sd15", tokens.ToDo(pooling="average", next_factor=2)),
    ("sd15", tokens.ToMe(ratio=0.75, proportional=True, max_downsample=2)),
    ("animatediff", tokens.ToDo(next_factor=2)),
    ("pixart_sigma", tokens.ToDo(pooling="average")),
    ("sd3", tokens.ToDo(proportional=True)),
    ("sd3", tokens.ToMe(ratio=0.75, proportional=True)),
]


@pytest.mark.parametrize(("name", "method"), CONSTANT, ids=lambda x: getattr(x, "name", x))
def test_what_is_constant_in_the_tiles_is_exact(bench, name, method):
    pipe = bench.pipe(name)
    undo = tiled(pipe)
    stock = bench.call(name, steps=2)
    undo()
    with Plan(method).attach(pipe) as run:
        undo = tiled(pipe)
        found = bench.call(name, steps=2)
        undo()
    assert run.report.verdicts[method.name].state == "ACTIVE"
    torch.testing.assert_close(found, stock, rtol=1e-3, atol=1e-3)


# Patterns: who makes them, for whom, and for how long.

MADE: list[tuple] = []


class Recorded(Merging):
    """ToMe that writes down for what its patterns are made, and from what."""

    name: ClassVar[str] = "test.Recorded"
    source: ClassVar[str] = "here"

    def reducer(self):
        MADE.clear()

        def reduce(x, wanted):
            MADE.append(
                (wanted.denoiser, wanted.step.index, wanted.layer, wanted.samples, x.clone())
            )
            drawn = cells(wanted.layout, wanted.generator(0))
            return drawn.match(x, self.ratio)

        return Stateless(reduce)


@pytest.mark.parametrize(("steps", "group"), [(1, 1), (2, 2), (3, 0)])
@pytest.mark.parametrize("name", ["sd3", "flux_cfg", "wan21"])
def test_branches_share_a_pattern_and_it_serves_steps_and_layers(bench, name, steps, group):
    with Plan(Recorded(steps=steps, layers=group)).attach(bench.pipe(name)):
        bench.call(name, steps=5, batch=2)
    count = len(layers(bench.pipe(name)))
    groups = -(-count // group) if group else 1
    made = Counter((step, layer) for _, step, layer, *_ in MADE)
    assert made == {(s, g): 1 for s in range(0, 5, steps) for g in range(groups)}
    assert all(samples == (0, 1) and len(x) == 2 for *_, samples, x in MADE)


def test_the_leader_is_cond(bench):
    """Another negative prompt changes no pattern of the first step; another prompt does."""
    pipe, found = bench.pipe("sd15"), []
    for call in ({}, {"negative_prompt": ["a violet whale"]}, {"prompts": ["nine ladders"]}):
        with Plan(Recorded()).attach(pipe):
            bench.call("sd15", steps=1, **call)
        found.append([x for *_, x in MADE])
    assert len(found[0]) == 3
    assert all(torch.equal(a, b) for a, b in zip(found[0], found[1], strict=True))
    assert not torch.equal(found[0][2], found[2][2])


@pytest.mark.parametrize("name", ["sd15", "flux_cfg"])
def test_a_cache_may_leave_samples_out(bench, name, gauged, monkeypatch):
    """A sub-batch is served by the patterns of its own samples."""
    counts, dial, batch = set(), ROSTER["cache.EasyCache"].dial, 3

    def serve(merger, visit, run, *, inner=Merger.serve):
        counts.add(len(visit.rows))
        return inner(merger, visit, run)

    monkeypatch.setattr(Merger, "serve", serve)
    run = Plan(dial(1e-12), Recorded(steps=2)).attach(bench.pipe(name))
    bench.call(name, steps=6, batch=batch)
    run.detach()
    whole = max(counts)
    assert counts == {whole}
    values = sorted(gauged[:batch])  # at the first decision; the widest gap parts the samples
    gap, low = max((high - low, low) for low, high in pairwise(values))
    with Plan(dial(low + gap / 2), Recorded(steps=2)).attach(bench.pipe(name)):
        together = bench.call(name, steps=6, batch=batch)
        assert min(counts) < whole, "no sub-batch occurred"
        for k in range(batch):
            alone = bench.call(name, steps=6, prompts=[PROMPTS[k]], seeds=[k])
            torch.testing.assert_close(together[k : k + 1], alone, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["plain", "ToMA"])
def test_a_pattern_is_of_one_device(kind):
    """Where a network is spread over devices, layers that share a pattern may be on several."""
    made, layout, tally = [], Layout(0, 1, 4, 4), SimpleNamespace()

    def reduce(x, wanted):
        made.append(x.device.type)
        return cells(wanted.layout, device=x.device).match(x, 0.5)

    reducer = Stateless(reduce) if kind == "plain" else Covering(tokens.ToMA(window=2))
    merger = Merger(tally, reducer, steps=2, layers=0, proportional=False)
    call = SimpleNamespace(step=SimpleNamespace(index=0), denoiser=SimpleNamespace(name="net"))
    for rank, device in enumerate(("cpu", "meta", "cpu", "meta")):
        x = torch.randn(1, 16, 8).to(device)
        stream = Stream("Network", ("hidden",), (x,), 1, layout, layout)
        visit = Visit(call, (Row("cond", 0),), 1, stream, rank, "attn")
        (pattern,) = merger._made(visit).values()
        assert pattern.reduction.anchor.device.type == device
    assert made == (["cpu", "meta"] if kind == "plain" else [])


@pytest.mark.parametrize("name", ["sd15", "sd3"])
def test_two_evaluations_a_step_are_two_steps(bench, same, name):
    heun = {
        "sd15": diffusers.HeunDiscreteScheduler,
        "sd3": diffusers.FlowMatchHeunDiscreteScheduler,
    }
    pipe = bench.pipe(name)
    before = pipe.scheduler
    try:
        pipe.scheduler = heun[name].from_config(before.config)
        with Plan(Recorded()).attach(pipe):
            found = bench.call(name, steps=3)
            assert {step for _, step, *_ in MADE} == set(range(5))
            assert same(bench.call(name, steps=3), found)
        with (
            pytest.raises(UnsupportedModel, match=r"tokens\.SADA does not fit.*Heun"),
            Plan(tokens.SADA()).attach(pipe),
        ):
            pass
    finally:
        pipe.scheduler = before


@pytest.mark.parametrize("sides", [(15, 11), (13, 16)])
def test_ragged_levels_of_a_unet(bench, sides):
    pipe = bench.pipe("sd15")
    scale = pipe.vae_scale_factor
    height, width = (scale * side for side in sides)
    levels = {(-(-sides[0] // d)) * -(-sides[1] // d) for d in (1, 2, 4)}
    if height % 8 or width % 8:
        pytest.skip("the stock pipeline takes multiples of 8 alone")
    call = {"steps": 2, "height": height, "width": width}
    found = seen(bench, "sd15", tokens.ToMe(max_downsample=ALL), **call)
    assert {keys for _, keys in found} == {n - n // 2 for n in levels}
    pooled = seen(bench, "sd15", tokens.ToDo(), **call)
    assert -(-sides[0] // 2) * -(-sides[1] // 2) in {keys for _, keys in pooled}


# Importance, ToMA, biases.


def test_importance_lags_one_step_and_says_where_it_was_drawn(bench):
    _, report = bench.under("sd15", Plan(tokens.Importance()), steps=4)
    assert report.verdicts["tokens.Importance"].detail.endswith(
        "; 3 of 12 patterns drawn, for want of both branches before"
    )
    _, report = bench.under("flux", Plan(tokens.Importance()), steps=3)
    assert "12 of 12 patterns drawn" in report.verdicts["tokens.Importance"].detail


def test_answers_are_counted_once_and_while_they_are_held():
    """Guidance that ends leaves the last pair and what ``cond`` answered since."""
    ranked, held = Ranked(tokens.Importance()), []
    for index, branches in enumerate((["cond", "uncond"], ["cond", "uncond"], ["cond"], ["cond"])):
        rows = tuple(Row(branch, 0) for branch in branches)
        call = SimpleNamespace(rows=rows, step=SimpleNamespace(index=index))
        ranked.observe(call, SimpleNamespace(value=torch.zeros(len(rows), 6, 2)))
        held.append(ranked.bytes / torch.zeros(6, 2).nbytes)
    assert held == [2, 2, 3, 3]


def test_what_is_important_is_what_both_branches_answered(bench, monkeypatch):
    from accel.tokens import importance as module

    pairs, answers = [], {}

    def kept(cond, uncond, layout, *, inner=module.importance):
        pairs.append((cond[0], uncond[0]))
        return inner(cond, uncond, layout)

    monkeypatch.setattr(module, "importance", kept)
    pipe = bench.pipe("sd15")
    with Plan(tokens.Importance()).attach(pipe):

        def write(inner, *args, **kwargs):
            native = inner(*args, **kwargs)
            answers[len(answers)] = native[0].clone()
            return native

        undo = wrap_call(pipe.unet, write)
        bench.call("sd15", steps=3)
        undo()
    assert len(pairs) == 2 * 3  # steps but the first × layers of the highest level
    for step in (1, 2):
        uncond, cond = answers[step - 1]
        for pair in pairs[3 * (step - 1) : 3 * step]:
            assert torch.equal(pair[0], cond)
            assert torch.equal(pair[1], uncond)


@pytest.mark.parametrize("name", [*MASKED, "sd15", "wan21"])
def test_keys_are_counted_beside_masks(bench, name):
    output, report = bench.under(name, Plan(tokens.ToMe(proportional=True)), steps=2)
    plain, _ = bench.under(name, Plan(tokens.ToMe()), steps=2)
    assert torch.isfinite(output).all()
    assert not torch.equal(output, plain)
    assert report.verdicts["tokens.ToMe"].state == "ACTIVE"


def test_a_bias_beside_a_mask():
    bias, hidden = table(1, 1, 1, 6), torch.tensor([True, False, True, True, False, True])
    logits = table(2, 3, 4, 6)
    expected = torch.where(hidden, logits + bias, -torch.inf)
    assert torch.equal(logits + with_bias(hidden, bias), expected)
    assert with_bias(None, bias) is bias
    assert torch.equal(with_bias(logits, bias), logits + bias)


# Whole blocks on some tokens.


@pytest.mark.parametrize("name", ["sd15", "flux_cfg", "chroma", "wan21"])
def test_blocks_keep_their_last_full_answer_where_they_compute_nothing(bench, name):
    pipe, steps, refresh = bench.pipe(name), 8, 3
    method = tokens.SADA(most=5, refresh=refresh)
    block = {"sd15": lambda: pipe.unet.down_blocks[0].attentions[0].transformer_blocks[0]}
    block = block.get(name, lambda: pipe.transformer.single_transformer_blocks[0]
                      if name == "chroma" else blocks_of(pipe)[0])()  # fmt: skip
    answers = []

    def write(inner, *args, **kwargs):
        returned = inner(*args, **kwargs)
        hidden = returned if isinstance(returned, torch.Tensor) else returned[-1]
        answers.append(hidden[-1:].clone())
        return returned

    undos = [wrap_call(block, write)]
    with Plan(method).attach(pipe) as run:
        undos[0]()
        undos[0] = wrap_call(block, write)  # above the plan
        bench.call(name, steps=steps)
        undos[0]()
    assert run.report.verdicts["tokens.SADA"].state == "ACTIVE"
    calls = len(answers) // steps
    last = answers[calls - 1 :: calls]
    words = last[0].shape[1] - 64 if name == "chroma" else 0
    image = last[0].shape[1] - words
    latest = None
    for step, answer in enumerate(last):
        if latest is None or step < 3 or step - latest[0] >= refresh:
            latest = (step, answer)
            continue
        changed = (answer != latest[1]).any(-1)[0, words:]
        assert 0 < changed.sum() < image


def blocks_of(pipe):
    return getattr(pipe.transformer, "transformer_blocks", None) or pipe.transformer.blocks


# Verdicts and refusals.


def test_too_few_tokens_to_merge_is_stock_and_said(bench, same):
    with pytest.warns(UserWarning, match="did nothing"):
        run = Plan(tokens.ToMe(ratio=0.001)).attach(bench.pipe("flux"))
        with run:
            found = bench.call("flux", steps=2)
    assert same(found, bench.stock("flux", steps=2))
    verdict = run.report.verdicts["tokens.ToMe"]
    assert verdict.state == "INACTIVE"
    assert verdict.detail == "4 layers left: 4 with nothing to merge at this ratio"


@pytest.mark.parametrize(
    "method",
    [
        tokens.ToMe(cell=1),
        tokens.ToMA(window=1),
        tokens.ToMA(window=2, ratio=0.2),
        tokens.Transforming(window=1),
    ],
    ids=repr,
)
def test_what_can_never_merge_is_off(method):
    side = getattr(method, "window", None) or method.cell
    assert method.why_off() in ("cell is 1", f"a ratio of {method.ratio:g} merges no token of a "
                                f"window of {side} × {side}")  # fmt: skip
    assert type(method)().why_off() is None
    assert type(method).off().why_off() == "ratio is 0"


def test_windows_that_are_too_small_here_are_said(bench):
    """A picture of fewer tokens than a window."""
    _, report = bench.under("flux", Plan(tokens.ToMA(window=16, ratio=0.01)), steps=2)
    verdict = report.verdicts["tokens.ToMA"]
    assert verdict.state == "INACTIVE"
    assert verdict.detail == "4 layers left: 4 with nothing to merge at this ratio"


def test_attention_that_is_not_torchs_is_said():
    pipe = PIPELINES["sd15"].build()
    pipe.enable_attention_slicing()
    with (
        pytest.warns(UserWarning, match="did nothing"),
        Plan(tokens.ToDo()).attach(pipe) as run,
    ):
        PIPELINES["sd15"].call(pipe, steps=1)
    verdict = run.report.verdicts["tokens.ToDo"]
    assert verdict.state == "INACTIVE"
    assert "3 whose attention does not go through torch's function" in verdict.detail


def test_pruning_that_did_nothing_says_all_of_why(bench):
    _, report = bench.under("sd15", Plan(tokens.SADA()), steps=3)
    verdict = report.verdicts["tokens.SADA"]
    assert verdict.state == "INACTIVE"
    assert "three computed steps to judge; 4 layers left" in verdict.detail
    assert "downsampled 2× (max_downsample is 1)" in verdict.detail


def test_levels_that_are_left_are_said(bench):
    _, report = bench.under("sdxl", Plan(tokens.ToMe()), steps=2)
    verdict = report.verdicts["tokens.ToMe"]
    assert verdict.state == "INACTIVE"
    assert "downsampled 2× (max_downsample is 1)" in verdict.detail


def test_what_a_run_cannot_be_served_is_refused_by_name(bench):
    refused = [
        ("flux", tokens.ToDo(pooling="average"), "pooling = 'nearest'"),
        ("sana", tokens.ToMe(proportional=True), "proportional = false"),
        ("flux_kontext", tokens.ToMe(), "order is not known"),
    ]
    for name, method, match in refused:
        with (
            Plan(method).attach(bench.pipe(name)),
            pytest.raises(UnsupportedModel, match=match),
        ):
            bench.call(name, steps=2)


def test_blocks_that_cut_the_first_frame_off_are_refused_by_name():
    """HunyuanVideo's for a picture in the place of the first frame; its others are not."""
    pipe = PIPELINES["hunyuanvideo"].build()
    config = {k: v for k, v in pipe.transformer.config.items() if not k.startswith("_")}
    pipe.transformer = type(pipe.transformer)(
        **(config | {"image_condition_type": "token_replace"})
    )
    with pytest.raises(UnsupportedModel, match=r"SADA does not fit Hunyuan.*first frame's tokens"):
        Plan(tokens.SADA()).attach(pipe)


def ltx(kind):
    """Another pipeline of the tiny LTX, and its call."""
    pipe = kind(**PIPELINES["ltx"].build().components)
    pipe.set_progress_bar_config(disable=True)
    return pipe, {
        "prompt": PROMPTS[0],
        "height": 32,
        "width": 32,
        "num_frames": 9,
        "max_sequence_length": 48,
        "num_inference_steps": 6,
        "output_type": "latent",
        "generator": torch.Generator().manual_seed(0),
    }


def test_a_part_of_the_clip_that_is_stepped_is_refused_by_name():
    pipe, call = ltx(diffusers.LTXImageToVideoPipeline)
    with (
        pytest.raises(UnsupportedModel, match=r"SADA does not fit: the scheduler steps latents"),
        Plan(tokens.SADA(most=8)).attach(pipe),
    ):
        pipe(image=torch.rand(1, 3, 32, 32), **call)


def test_a_clip_of_unknown_sizes_is_refused_by_name():
    pipe, call = ltx(diffusers.LTXConditionPipeline)
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    with (
        Plan(tokens.ToMe()).attach(pipe),
        pytest.raises(UnsupportedModel, match="order in the picture is not known"),
    ):
        pipe(**call)


def test_frames_in_pieces_are_refused_by_name():
    """Of 6 entries, two rows of three frames, 4: 2 for each row would be the wrong ones."""
    pipe = PIPELINES["animatediff"].build()
    pipe.enable_free_noise_split_inference(temporal_split_size=4)
    with (
        Plan(tokens.ToMe()).attach(pipe),
        pytest.raises(UnsupportedModel, match=r"4 entries where 2 rows of 3 are"),
    ):
        PIPELINES["animatediff"].call(pipe, steps=1)


def test_compiled_blocks_are_refused_without_talk_of_caches_of_modules():
    pipe = PIPELINES["flux"].build()
    pipe.transformer.compile_repeated_blocks()
    with pytest.raises(UnsupportedModel, match="this method cannot reach them") as refused:
        Plan(tokens.ToMe()).attach(pipe)
    assert "module caches" not in str(refused.value)


def test_masks_over_the_grid_are_refused_by_name(bench):
    masks = {"ip_adapter_masks": [torch.ones(1, 1, 32, 32)]}
    with (
        Plan(tokens.SADA()).attach(bench.pipe("sd15")),
        pytest.raises(UnsupportedModel, match=r"SADA does not fit .* with ip_adapter_masks"),
    ):
        bench.call("sd15", steps=2, cross_attention_kwargs=masks)


class InTime(Probe):
    """Looks at the attention along time in front of a UNet's first block."""

    name: ClassVar[str] = "test.InTime"

    def attach(self, site):
        site.tally.change = "looked"
        SEEN.clear()
        for module in find_modules(site.denoisers[0]):
            if "transformer_in" in module.path and module.kind != "mlp":
                yield answer_attention(module, look)


@pytest.mark.parametrize("method", [tokens.ToMe(), tokens.ToDo()], ids=lambda m: m.name)
def test_attention_along_time_keeps_all_frames(method):
    pipe = text_to_video()
    pipe.set_progress_bar_config(disable=True)
    with Plan(InTime(), method).attach(pipe) as run:
        ask(pipe)
    assert run.report.verdicts[method.name].state == "ACTIVE"
    assert {*SEEN} == {(3, 3)}


@NOTHING
@pytest.mark.parametrize("batch", [1, 2])
def test_what_an_adapter_adds_to_the_picture_is_unmerged(batch):
    """Flux's IP-Adapter answers a third stream, of as many tokens as the picture's."""
    tiny = PIPELINES["flux"]
    pipe = tiny.build()
    torch.manual_seed(1)
    core, kind = pipe.transformer, FluxIPAdapterAttnProcessor
    core.encoder_hid_proj = MultiIPAdapterImageProjection(
        [ImageProjection(image_embed_dim=8, cross_attention_dim=32, num_image_text_embeds=4)]
    )
    for block in core.transformer_blocks:
        block.attn.set_processor(kind(hidden_size=32, cross_attention_dim=32))
    embeds = torch.randn(batch, 1, 8)
    call = {
        "steps": 2,
        "batch": batch,
        "ip_adapter_image_embeds": [embeds],
        "negative_ip_adapter_image_embeds": [embeds],
    }
    stock = tiny.call(pipe, **call)
    assert not torch.equal(stock, tiny.call(tiny.build(), steps=2, batch=batch))
    with Plan(Shuffled()).attach(pipe):
        torch.testing.assert_close(tiny.call(pipe, **call), stock, rtol=1e-3, atol=1e-3)
    for method in (tokens.ToMe(), tokens.ToMA(), tokens.Importance(), tokens.Transforming()):
        with Plan(method).attach(pipe) as run:
            assert torch.isfinite(tiny.call(pipe, **call)).all()
        assert run.report.verdicts[method.name].state == "ACTIVE"


def test_two_reducers_are_a_conflict(bench):
    with pytest.raises(Conflict, match=r"tokens\.ToMA and tokens\.ToDo"):
        Plan(tokens.ToMA(), tokens.ToDo()).attach(bench.pipe("sd15"))
    with pytest.raises(Conflict, match=r"tokens\.SADA and cache\.FORA|cache\.FORA"):
        Plan(tokens.SADA(), cache.FORA()).attach(bench.pipe("sd15"))


@NOTHING
@pytest.mark.parametrize("name", ["sd15", "flux_cfg"])
def test_what_module_caches_keep_is_for_all_tokens(bench, name):
    """Were merged tokens kept, an order of tokens that changes at each step would spoil them."""
    plan, call = Plan(cache.FORA(interval=3)), {"steps": 4}
    alone, _ = bench.under(name, plan, **call)
    with Plan(*plan, Shuffled(max_downsample=ALL)).attach(bench.pipe(name)):
        found = bench.call(name, **call)
    torch.testing.assert_close(found, alone, rtol=1e-3, atol=1e-3)
