"""Sparse attention that is found at run time: masses, selections, clusters and tables alone."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_attention_lowerings import attended, close, inputs, padding
from test_attention_patterns import EXAMPLES, layouts
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from accel.attention import masses
from accel.attention.blocks import BlockSparse
from accel.attention.clusters import Centroids, clustered, counts
from accel.attention.lowerings import lowered
from accel.attention.masses import Exact, Heads, LowBit, Pooled, centred, exact_mass, runs
from accel.attention.selection import Cumulative, TopK, ranks, recall
from accel.attention.tables import Found, by_padding, joined
from accel.seams.layout import Layout

HEADS, TOKENS, DIM = 3, 37, 8
SIZES = st.integers(1, 50)


class Without64(TorchFunctionMode):
    """A device without double precision, as Apple's."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        assert not isinstance(found, Tensor) or found.dtype != torch.float64
        return found


def heads(seed=0, tokens=TOKENS, text=0, padded=False, spread=1.0):
    """Queries and keys of some heads."""
    generator = torch.Generator().manual_seed(seed)
    q, k = spread * torch.randn(2, HEADS, tokens, DIM, generator=generator)
    words = spread * torch.randn(HEADS, text, DIM, generator=generator)
    valid = torch.arange(text).expand(HEADS, text) < max(1, text // 2) if padded else None
    return Heads(q, k, words, valid, DIM**-0.5)


def shares(given):
    """What each image query pays to each image key, the text's share left out: `[P, N, N]`."""
    scores = torch.cat([given.query @ given.key.mT, given.query @ given.text.mT], -1)
    scores = scores.double() * given.scale
    if given.valid is not None:
        hidden = ~given.valid[:, None].expand(-1, scores.shape[1], -1)
        scores[..., given.key.shape[1] :].masked_fill_(hidden, -math.inf)
    return scores.softmax(-1)[..., : given.key.shape[1]]


def blocked(table, groups, cells):
    """Sums over blocks, by plain loops."""
    found = table.new_zeros(len(table), int(groups.max()) + 1, int(cells.max()) + 1)
    for q, group in enumerate(groups):
        for k, cell in enumerate(cells):
            found[:, group, cell] += table[:, q, k]
    return found


# masses


@EXAMPLES
@given(SIZES, SIZES, st.integers(0, 9), st.booleans(), st.integers(1, 10_000))
def test_the_mass_is_the_attention_summed_up(block, cell, text, padded, budget):
    given = heads(text=text, padded=padded)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masses, "SCORES", budget)
        found = Exact(block, cell)(given, {})
    expected = shares(given)
    assert torch.allclose(
        found.mass.double(), blocked(expected, found.groups, found.cells), atol=1e-5
    )
    rows = torch.bincount(found.groups).double()
    left = blocked(1 - expected.sum(-1, keepdim=True), found.groups, torch.zeros(1).int())
    assert torch.allclose(found.mass.double().sum(-1), rows - left[..., 0], atol=1e-4)


def test_without_text_a_row_of_masses_sums_to_the_queries_of_its_block():
    found = Exact(8, 5)(heads(), {})
    rows = torch.tensor([8.0, 8, 8, 8, 5])
    assert torch.allclose(found.mass.sum(-1), rows.expand(HEADS, 5), atol=1e-5)


@EXAMPLES
@given(SIZES, SIZES, st.integers(0, 9), st.booleans())
def test_the_sums_of_an_earlier_search_give_the_same_mass_for_the_same_tokens(
    block, cell, text, padded
):
    given, indicator = heads(text=text, padded=padded), Exact(block, cell)
    first = indicator(given, {})
    again = indicator(given, first.memory)
    assert torch.equal(again.memory["lse"], first.memory["lse"])
    assert torch.allclose(again.mass, first.mass, atol=1e-6)
    assert not Exact(block, cell, cached=False)(given, {}).memory


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_large_queries_and_keys_do_not_overflow_the_search(dtype):
    """Products above float16's range, whose scaled scores attention itself would take."""
    given = heads()
    far = replace(given, query=given.query + 100, key=given.key + 100, scale=1e-3)
    half = replace(far, query=far.query.to(dtype), key=far.key.to(dtype), text=far.text.to(dtype))
    assert (far.query @ far.key.mT).min() > torch.finfo(torch.float16).max
    assert torch.allclose(Exact(8, 5)(half, {}).mass, Exact(8, 5)(far, {}).mass, atol=2.0)


def test_the_sums_are_not_computed_again():
    given = heads()
    far = torch.full((HEADS, TOKENS), 100.0)
    mass, lse = exact_mass(given, 8, 8, far)
    assert lse is far
    assert mass.max() < 1e-20


@EXAMPLES
@given(SIZES, st.integers(0, 9))
def test_queries_and_keys_of_many_bits_are_the_queries_and_keys(block, text):
    given = heads(text=text)
    exact = Exact(block, block)(given, {}).mass
    errors = [
        (LowBit(block, block, bits)(given, {}).mass - exact).abs().max() for bits in (2, 4, 8, 16)
    ]
    assert errors[3] < 1e-3 * block
    assert errors[2] < 0.05 * block


def test_four_bits_find_nearly_what_all_bits_find():
    given = heads(tokens=256, spread=2.0)
    exact = Exact(16, 16)(given, {}).mass[None]
    best = recall(exact, TopK(0.25)(exact))
    for bits, least in ((2, 0.6), (4, 0.97), (8, 0.999)):
        coarse = LowBit(16, 16, bits)(given, {}).mass[None]
        assert (recall(exact, TopK(0.25)(coarse)) >= least * best).all()


@EXAMPLES
@given(st.integers(0, 99))
def test_centred_keys_give_the_same_attention(seed):
    given = heads(seed)
    v = torch.randn(HEADS, TOKENS, DIM)
    dense = scaled_dot_product_attention(given.query, given.key, v)
    assert (
        scaled_dot_product_attention(given.query, centred(given.key), v) - dense
    ).abs().max() < 1e-5


def test_pooled_masses_are_those_of_blocks_of_equal_tokens():
    """Where all tokens of a block are one, its mean is each of them."""
    once = heads(tokens=12)
    q, k = (x.repeat_interleave(4, dim=1)[:, :46] for x in (once.query, once.key))
    given = replace(once, query=q, key=k)
    found = Pooled(4, 8, likeness=-1)(given, {})
    coarse = Pooled(4, 4, likeness=0.99)(given, {})
    assert not coarse.needed.any()
    exact = Exact(4, 4)(given, {}).mass
    assert torch.allclose(coarse.mass, exact / exact.sum(-1, keepdim=True), atol=1e-5)
    assert torch.allclose(found.mass.sum(-1), torch.ones(HEADS, 12))


def test_blocks_that_are_not_like_themselves_are_kept_whole():
    alike = torch.ones(1, 16, DIM) + 0.01 * torch.randn(1, 16, DIM)
    apart = torch.randn(1, 16, DIM)
    apart -= apart.mean(1, keepdim=True)
    q, k = torch.cat([alike, apart, alike], 1), torch.cat([apart, 5 * alike, -5 * alike], 1)
    given = Heads(q, k, k[:, :0], None, 1.0)
    found = Pooled(16, 16, likeness=0.6)(given, {})
    some = [True, False, False]
    assert found.needed[0].tolist() == [some, [True, True, True], some]
    assert found.mass[0, :, 0].tolist() == [0, 0, 0]
    nothing = Pooled(16, 16, likeness=2.0)(given, {})
    assert nothing.needed.all()
    assert torch.equal(nothing.mass, torch.zeros_like(nothing.mass))


@EXAMPLES
@given(st.sampled_from([Exact(8, 4), LowBit(8, 4), Pooled(8, 4), Centroids(5, 6, 3, 1)]))
def test_a_head_is_looked_at_as_if_alone(indicator):
    given = heads(text=4, padded=True)
    together = indicator(given, {})
    alone = indicator(
        Heads(given.query[1:2], given.key[1:2], given.text[1:2], given.valid[1:2], given.scale), {}
    )
    assert torch.allclose(together.mass[1:2], alone.mass, atol=1e-5)


# selections


def weights(seed, *shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@EXAMPLES
@given(st.integers(0, 99), st.integers(1, 20), st.floats(0.01, 1))
def test_top_k_keeps_the_cells_with_the_most_mass(seed, cells, keep):
    mass = weights(seed, 2, 3, 4, cells)
    kept = TopK(keep)(mass)
    assert set(kept.sum(-1).flatten().tolist()) == {max(1, math.ceil(keep * cells - 1e-9))}
    least = mass.masked_fill(~kept, 2).amin(-1)
    assert (least >= mass.masked_fill(kept, -1).amax(-1)).all()


@EXAMPLES
@given(st.integers(0, 99), st.integers(1, 20))
def test_recall_grows_with_what_is_kept(seed, cells):
    mass = weights(seed, 2, 3, 4, cells)
    found = [recall(mass, TopK(keep)(mass)) for keep in (0.1, 0.3, 0.6, 1.0)]
    assert all((more >= less - 1e-6).all() for less, more in pairwise(found))
    assert torch.allclose(found[-1], torch.ones(2, 3))
    assert TopK(1.0)(mass).all()


@EXAMPLES
@given(st.integers(0, 99), st.integers(1, 20), st.floats(0.02, 1), st.floats(0, 0.5))
def test_budgets_by_head_keep_the_mean_of_each_sample(seed, cells, keep, moved):
    mass = weights(seed, 2, 7, 4, cells) ** 8
    plain, adapted = TopK(keep)(mass), TopK(keep, moved)(mass)
    assert torch.equal(adapted.sum((1, 2, 3)), plain.sum((1, 2, 3)))
    assert torch.equal(adapted.any(-1), torch.ones(2, 7, 4, dtype=torch.bool))
    change = adapted.sum((2, 3)) - plain.sum((2, 3))
    assert ((change < 0).sum(1) <= int(moved * 7)).all()
    found = recall(mass, plain)
    for sample in range(2):
        fewer, more = found[sample, change[sample] < 0], found[sample, change[sample] > 0]
        assert not len(fewer) or fewer.min() >= more.max() - 1e-6


def test_heads_keep_half_as_much_or_half_as_much_again():
    mass = torch.ones(1, 4, 1, 20)
    mass[0, torch.arange(4), 0, :4] = torch.tensor([[9.0], [3], [27], [1]])
    assert TopK(0.2, moved=0.25)(mass).sum((2, 3)).tolist() == [[4, 4, 2, 6]]


@EXAMPLES
@given(st.integers(0, 99), st.integers(1, 20), st.floats(0.01, 0.999), st.floats(0, 1))
def test_the_prefix_is_the_smallest_that_reaches_the_share(seed, cells, share, floor):
    mass = weights(seed, 2, 3, 4, cells) ** 4
    kept = Cumulative(share, floor)(mass)
    least = max(1, math.ceil(floor * cells - 1e-9))
    counted = kept.sum(-1)
    held = (mass * kept).sum(-1)
    assert (held >= share * mass.sum(-1) - 1e-5).all()
    last = mass.masked_fill(~kept, 2).amin(-1)
    assert ((counted == least) | (held - last < share * mass.sum(-1) + 1e-5)).all()
    assert (counted >= least).all()
    assert (kept == (ranks(mass) < counted[..., None])).all()


def test_the_cell_with_which_the_share_is_reached_is_kept():
    mass = torch.tensor([[[[0.1, 0.5, 0.3, 0.1]]]])
    assert Cumulative(0.5)(mass).tolist() == [[[[False, True, False, False]]]]
    assert Cumulative(0.6)(mass).tolist() == [[[[False, True, True, False]]]]
    assert Cumulative(1.0)(mass).all()


@pytest.mark.parametrize("selection", [TopK(0.1), TopK(0.1, 0.5), Cumulative(0.5)])
def test_what_is_no_number_keeps_everything(selection):
    mass = weights(0, 2, 2, 3, 10)
    mass[0, 1, 2, 4] = math.nan
    kept = selection(mass)
    assert kept[0, 1, 2].all()
    assert not kept[1].all(-1).any()


# clusters


def test_k_means_ends_where_each_token_is_nearest_to_its_mean():
    centres = 20 * torch.eye(DIM)[:5]
    x = centres.repeat(8, 1)[None] + 0.1 * torch.randn(1, 40, DIM)
    label, centroids = clustered(x, 5, 10)
    assert all(len(set(label[0, group::5].tolist())) == 1 for group in range(5))
    assert sorted(counts(label, 5)[0].tolist()) == [8] * 5
    for group in range(5):
        assert torch.allclose(centroids[0, label[0, group]], x[0, group::5].mean(0), atol=1e-5)


@EXAMPLES
@given(st.integers(0, 99), st.integers(1, 60), st.integers(1, 5))
def test_k_means_never_gets_worse_and_is_the_same_again(seed, count, rounds):
    x = heads(seed).query

    def spread(rounds):
        label, centroids = clustered(x, count, rounds)
        own = centroids.gather(1, label[..., None].expand_as(x))
        return (x - own).square().sum()

    assert spread(rounds + 1) <= spread(rounds) + 1e-3
    first, again = clustered(x, count, rounds), clustered(x, count, rounds)
    assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))
    on = clustered(x, count, 1, clustered(x, count, rounds)[1])
    assert torch.equal(on[0], clustered(x, count, rounds + 1)[0])


def test_empty_clusters_are_no_part_of_anything():
    given = heads()
    start = torch.cat([given.key[:, :4], torch.full((HEADS, 2, DIM), 1e3)], 1)
    indicator = Centroids(4, 6, 1, 1)
    found = indicator(given, {"queries": given.query[:, :4], "keys": start})
    assert torch.equal(found.mass[:, :, 4:], torch.zeros(HEADS, 4, 2))
    assert torch.equal(found.memory["keys"][:, 4:], start[:, 4:])
    layout = Layout(0, 1, 1, TOKENS)
    kept = Cumulative(0.5, floor=1.0)(found.mass[None])[0]
    table = Found(found.groups, found.cells, kept).table(layout)
    assert all(one.kept.shape[2] == 4 for _, one in table.parts)


@EXAMPLES
@given(st.integers(0, 99))
def test_names_of_clusters_do_not_matter(seed):
    layout = Layout(4, 1, 1, TOKENS)
    q, k, v = inputs(layout, batch=1, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    start = {"queries": q[0, :, 4:9], "keys": k[0, :, 4:11]}
    orders = {name: torch.randperm(x.shape[1], generator=generator) for name, x in start.items()}
    renamed = {name: x[:, orders[name]] for name, x in start.items()}
    outputs = []
    for memory in (start, renamed):
        given = Heads(q[0, :, 4:], k[0, :, 4:], k[0, :, :4], None, 0.25)
        found = Centroids(5, 7, 1, 2)(given, memory)
        kept = Cumulative(0.6)(found.mass[None])[0]
        table = Found(found.groups, found.cells, kept).table(layout)
        outputs.append(lowered("gather", table)(q, k, v))
    close(*outputs)


# tables


@st.composite
def tables(draw):
    """A layout, and tables for two samples of three heads, shared parts or not."""
    layout = draw(layouts().filter(lambda one: one.image >= 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    shared = draw(st.booleans())
    shape = (layout.image,) if shared else (2 * HEADS, layout.image)
    groups, cells = (torch.randint(0, n, shape, generator=generator) for n in (4, 6))
    if shared:
        groups[:4], cells[:6] = torch.arange(4), torch.arange(6)
    kept = torch.rand(2 * HEADS, 4, 6, generator=generator) < 0.4
    kept |= ~(kept.float() @ _present(cells, 6).float().mT).bool().any(-1, keepdim=True)
    return layout, Found(groups, cells, kept)


def _present(cells, count):
    """Which cells have a key, `[1 or P, 1, C]`: a group is to have one of them."""
    rows = cells if cells.ndim == 2 else cells[None]
    return torch.stack([torch.bincount(row, minlength=count) > 0 for row in rows])[:, None]


def masks(found, layout):
    """What a table says, token by token: `[P, N, N]`."""
    groups, cells = (x.expand(len(found.kept), -1) for x in (found.groups, found.cells))
    return torch.stack(
        [kept[g][:, c] for kept, g, c in zip(found.kept, groups, cells, strict=True)]
    )


@EXAMPLES
@given(st.data())
def test_each_sample_and_head_has_its_own_table(data):
    layout, found = data.draw(tables())
    text_mask = data.draw(padding(layout))
    q, k, v = inputs(layout)
    mask = masks(found, layout)
    for name in ("dense", "gather"):

        def serve(heads, q, k, v, valid, name=name):
            return lowered(name, found.of(heads).table(layout))(q, k, v, text_mask=valid)

        out = by_padding(q, k, v, text_mask, serve)
        for sample in range(2):
            here = slice(sample, sample + 1)
            valid = None if text_mask is None else text_mask[here]
            own = mask[sample * HEADS : (sample + 1) * HEADS]
            close(out[here], attended(q[here], k[here], v[here], own, layout, valid))
    pairs = mask.double().mean(0).sum()
    density = 1 - (layout.image**2 - float(pairs)) / layout.tokens**2
    with Without64():
        assert found.density(layout) == pytest.approx(density)
    halves = [found.of(slice(0, HEADS)), found.of(slice(HEADS, None))]
    assert torch.equal(masks(joined(halves), layout), mask)


INDICATORS = [Exact(5, 4), LowBit(5, 4), Pooled(5, 4), Pooled(5, 4, -1.0), Centroids(6, 7, 3, 1)]
ALL = [TopK(1.0), Cumulative(1.0)]


@pytest.mark.parametrize("selection", ALL, ids=repr)
@pytest.mark.parametrize("indicator", INDICATORS, ids=repr)
def test_everything_kept_is_dense_attention(indicator, selection):
    layout = Layout(4, 1, 4, 7, text_first=False)
    q, k, v = inputs(layout, batch=1)
    image, text = layout.image_span, layout.text_span
    found = indicator(Heads(q[0, :, image], k[0, :, image], k[0, :, text], None, 0.25), {})
    kept = selection(found.mass[None])[0]
    table = Found(found.groups, found.cells, kept)
    close(lowered("gather", table.table(layout))(q, k, v), scaled_dot_product_attention(q, k, v))
    assert table.density(layout) == 1.0


def test_runs_are_blocks_of_equal_size_but_for_the_last():
    assert runs(7, 3, torch.device("cpu")).tolist() == [0, 0, 0, 1, 1, 1, 2]
    table = BlockSparse.of_table(
        Layout(0, 1, 1, 7), runs(7, 3, "cpu"), runs(7, 4, "cpu"), torch.ones(3, 2)
    )
    assert table.density == 1.0
