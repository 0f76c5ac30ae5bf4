"""Theorems about token reductions: every reducer on every grid."""

import math
from dataclasses import dataclass, replace
from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize, scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from accel.errors import BadInput
from accel.seams.layout import Layout
from accel.tokens.exclusive import Exclusive, exclusive
from accel.tokens.importance import importance, partition
from accel.tokens.joint import beside_text, join, split
from accel.tokens.matching import Partition, cells, merged_of
from accel.tokens.reduction import Identity, gathered, matrices
from accel.tokens.sada import instability, kept, refreshes, unstable
from accel.tokens.tiles import tiles
from accel.tokens.todo import downsampled
from accel.tokens.toma import Destinations, destinations, facility_location, reduction
from accel.tokens.transforming import transformed

CHANNELS = 6
LAW = settings(max_examples=10, deadline=None)  # times 13 reducers
THEOREM = settings(max_examples=25, deadline=None)


def Grid(height, width, frames=1):
    """A layout without text."""
    return Layout(0, frames, height, width)


@dataclass(frozen=True)
class Case:
    """One problem: a grid, a ratio and a seed for all that is random."""

    grid: Layout
    ratio: float
    seed: int
    batch: int

    def draw(self, *shape, salt=0):
        generator = torch.Generator().manual_seed(self.seed + 7919 * salt)
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    @property
    def generator(self):
        return torch.Generator().manual_seed(self.seed)

    @property
    def x(self):
        return self.draw(self.batch, self.grid.tokens, CHANNELS)

    def y(self, length):
        return self.draw(self.batch, length, CHANNELS, salt=1)


GRIDS = st.builds(Grid, st.integers(1, 7), st.integers(1, 7), st.integers(1, 3))
RATIOS = st.one_of(st.just(0.0), st.floats(0.0, 0.95))
CASES = st.builds(Case, GRIDS, RATIOS, st.integers(0, 10**6), st.integers(1, 3))


def tome(x, case):
    return cells(case.grid, case.generator).match(x, case.ratio)


def tome_video(x, case):
    return cells(case.grid, case.generator, size=(2, 2, 2)).match(x, case.ratio)


def important(x, case):
    pool = partition(x.norm(dim=-1), cells(case.grid, case.generator), share=0.3)
    return pool.match(x, case.ratio)


def important_at_first(x, case):
    return partition(None, cells(case.grid, case.generator)).match(x, case.ratio)


def factor(case):
    return (1, 1, 1) if case.ratio == 0 else (1, 2, 3)


def todo_nearest(x, case):
    return downsampled(case.grid, factor(case))


def todo_average(x, case):
    return downsampled(case.grid, factor(case), "average")


def toma(x, case):
    return reduction(x, case.grid, case.ratio, window=(1, 3, 3))


def toma_whole(x, case):
    return reduction(x, case.grid, case.ratio, window=(3, 8, 8), temperature=0.3)


def transforming(x, case):
    return transformed(x, case.grid, case.ratio, window=(2, 4, 3))


def transforming_by_what_matters(x, case):
    return transformed(x, case.grid, case.ratio, matters=x.norm(dim=-1), temperature=0.3)


def joint(case, first, text=2):
    return replace(case.grid, text=text, text_first=first)


def text_first(x, case):
    return beside_text(joint(case, first=True), tome(x[:, 2:], case))


def text_last(x, case):
    return beside_text(joint(case, first=False), toma(x[:, :-2], case))


MATCHED = [tome, tome_video, important, important_at_first]
EXCLUSIVE = [*MATCHED, todo_nearest, todo_average, text_first]
DENSE = [toma, toma_whole, transforming, transforming_by_what_matters, text_last]
REDUCERS = [*EXCLUSIVE, *DENSE]
JOINT = [text_first, text_last]


def content(reducer, case, batch=None):
    """Tokens for the reducer: with two of a text where it has one."""
    text = 2 if reducer in JOINT else 0
    return case.draw(batch or case.batch, case.grid.tokens + text, CHANNELS)


def reduced(reducer, case):
    x = content(reducer, case)
    return x, reducer(x, case)


def attention(q, k, v, bias=None):
    return scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], attn_mask=bias)[:, 0]


# Laws of every reducer.


@pytest.mark.parametrize("reducer", REDUCERS)
@LAW
@given(case=CASES)
def test_rows_of_both_matrices_sum_to_one(reducer, case):
    _, r = reduced(reducer, case)
    merge, unmerge = matrices(r, torch.float64)
    assert merge.shape[1:] == (r.length, r.tokens) == unmerge.mT.shape[1:]
    assert min(merge.min(), unmerge.min()) >= 0
    torch.testing.assert_close(merge.sum(-1), torch.ones_like(merge[..., 0]))
    torch.testing.assert_close(unmerge.sum(-1), torch.ones_like(unmerge[..., 0]))
    size = unmerge.sum(-2).expand(len(r.size), -1)
    torch.testing.assert_close(r.size.double(), size, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("reducer", REDUCERS)
@LAW
@given(case=CASES)
def test_merge_and_unmerge_are_their_matrices(reducer, case):
    x, r = reduced(reducer, case)
    merge, unmerge = matrices(r, torch.float64)
    y = case.y(r.length)
    torch.testing.assert_close(r.merge(x), merge @ x)
    torch.testing.assert_close(r.unmerge(y), unmerge @ y)


@pytest.mark.parametrize("reducer", REDUCERS)
@LAW
@given(case=CASES)
def test_constants_stay(reducer, case):
    x, r = reduced(reducer, case)
    constant = x[:, :1].expand_as(x)
    torch.testing.assert_close(r.merge(constant), constant[:, : r.length])
    torch.testing.assert_close(r.unmerge(constant[:, : r.length]), constant)


@pytest.mark.parametrize("reducer", REDUCERS)
@LAW
@given(case=CASES)
def test_a_ratio_of_zero_is_the_identity_to_the_bit(reducer, case):
    off = Case(case.grid, 0.0, case.seed, case.batch)
    x, r = reduced(reducer, off)
    assert torch.equal(r.merge(x), x)
    assert torch.equal(r.unmerge(x), x)
    assert torch.equal(r.rows(x, 1), x)
    assert not r.key_bias(torch.float64).any()
    if reducer not in JOINT:
        assert r.merge(x) is x
        assert r.unmerge(x) is x


@pytest.mark.parametrize("reducer", REDUCERS)
@LAW
@given(case=CASES)
def test_the_length_depends_on_grid_and_ratio_alone(reducer, case):
    x, r = reduced(reducer, case)
    assert reducer(case.draw(*x.shape, salt=5), case).length == r.length
    assert r.tokens == x.shape[1]
    assert 1 <= r.length <= r.tokens


@pytest.mark.parametrize("reducer", REDUCERS)
@LAW
@given(case=CASES)
def test_anchors_are_different_tokens_and_lend_their_own_rows(reducer, case):
    _, r = reduced(reducer, case)
    assert all(len(set(row.tolist())) == r.length for row in r.anchor)
    table = case.draw(r.tokens, 4, salt=2)
    found = r.rows(table)
    assert torch.equal(found.expand(len(r.anchor), -1, -1), table[r.anchor])
    heads = case.draw(case.batch, 2, r.tokens, 4, salt=3)
    rows = r.rows(heads, dim=-2)
    for b in range(case.batch):
        anchor = r.anchor[b % len(r.anchor)]
        assert torch.equal(rows[b], heads[b][:, anchor])
    assert torch.equal(
        r.rows(table[None, :, None], dim=1)[0, :, 0], table[r.anchor[0]]
    )  # [1, N, 1, D], as Wan has it


@pytest.mark.parametrize("reducer", REDUCERS)
@LAW
@given(case=CASES)
def test_a_sample_does_not_depend_on_its_company(reducer, case):
    x, r = reduced(reducer, case)
    together = r.merge(x)
    for row in range(case.batch):
        alone = reducer(x[row : row + 1], case)
        torch.testing.assert_close(together[row], alone.merge(x[row : row + 1])[0])
        torch.testing.assert_close(together[row], r.take([row]).merge(x[row : row + 1])[0])


@pytest.mark.parametrize("reducer", REDUCERS)
@LAW
@given(case=CASES)
def test_rows_can_be_taken_more_than_once(reducer, case):
    x, r = reduced(reducer, case)
    last = case.batch - 1
    both = r.take([last, 0, last])
    y = both.merge(x[[last, 0, last]])
    assert torch.equal(y[0], y[2])
    torch.testing.assert_close(y, r.merge(x)[[last, 0, last]])
    torch.testing.assert_close(both.unmerge(y), r.unmerge(r.merge(x))[[last, 0, last]])
    assert torch.equal(both.rows(x[[last, 0, last]], 1)[1], r.rows(x, 1)[0])


@pytest.mark.parametrize("reducer", REDUCERS)
@LAW
@given(case=CASES)
def test_no_global_generator_is_touched(reducer, case):
    x = content(reducer, case)
    before = torch.get_rng_state()
    first = reducer(x, case).merge(x)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(reducer(x, case).merge(x), first)


class Reads(TorchDispatchMode):
    """Counts what waits for the device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        waits = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        self.count += func in waits
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("reducer", REDUCERS)
def test_no_reducer_waits_for_the_device(reducer):
    case = Case(Grid(5, 4, 2), 0.5, 1, 2)
    x = content(reducer, case)
    with Reads() as reads:
        r = reducer(x, case)
        r.unmerge(r.merge(x))
        r.key_bias(x.dtype)
        r.rows(x, 1)
        r.take([1, 0])
    assert reads.count == 0
    with Reads() as reads:
        unstable(x[0, : case.grid.tokens, 0], case.grid, 9, case.generator)
    assert reads.count == 1


@pytest.mark.parametrize("reducer", REDUCERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes_and_further_axes_are_kept(reducer, dtype):
    case = Case(Grid(4, 5, 2), 0.4, 1, 2)
    x = content(reducer, case).to(dtype)
    r = reducer(x, case)
    y = r.merge(x)
    assert y.dtype == r.unmerge(y).dtype == r.key_bias(dtype).dtype == dtype
    heads = x.reshape(*x.shape[:2], 2, 3)
    assert torch.equal(r.merge(heads), y.reshape(2, r.length, 2, 3))
    assert torch.equal(r.unmerge(r.merge(heads)), r.unmerge(y).reshape(heads.shape))
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), r.merge(x.double()), rtol=tolerance, atol=2 * tolerance)


@pytest.mark.parametrize("reducer", REDUCERS)
def test_what_does_not_fit_is_refused(reducer):
    case = Case(Grid(4, 4), 0.5, 1, 2)
    x, r = reduced(reducer, case)
    with pytest.raises(BadInput, match="one grid only"):
        r.merge(x[:, 1:])
    with pytest.raises(BadInput, match="one grid only"):
        r.unmerge(x[:, : r.length - 1])
    with pytest.raises(BadInput, match="leave the text's rows out"):
        r.rows(x[0, 1:])
    if len(r.anchor) > 1:
        with pytest.raises(BadInput, match="take"):
            r.merge(x.repeat(2, 1, 1))


# Exclusive merges.


@pytest.mark.parametrize("reducer", EXCLUSIVE)
@LAW
@given(case=CASES)
def test_exclusive_merges_are_projections(reducer, case):
    _, r = reduced(reducer, case)
    y = case.y(r.length)
    torch.testing.assert_close(r.merge(r.unmerge(y)), y)
    merge, unmerge = matrices(r, torch.float64)
    project = unmerge @ merge
    torch.testing.assert_close(project @ project, project)
    assert ((unmerge == 0) | (unmerge == 1)).all()


@pytest.mark.parametrize("reducer", [*MATCHED, todo_average, text_first])
@LAW
@given(case=CASES)
def test_counted_keys_are_attention_with_duplicates(reducer, case):
    """A merged key with log(size) is that key, and its value, once for each of its tokens."""
    x, r = reduced(reducer, case)
    q, k, v = (case.draw(*x.shape, salt=s) for s in (2, 3, 4))
    few = attention(q, r.merge(k), r.merge(v), r.key_bias(torch.float64))
    many = attention(q, r.unmerge(r.merge(k)), r.unmerge(r.merge(v)))
    torch.testing.assert_close(few, many, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("reducer", MATCHED)
@LAW
@given(case=CASES)
def test_attention_follows_a_permutation_of_tokens_with_their_positions(reducer, case):
    """Where the tokens are stored is nothing: rotated queries and keys, merged and unmerged."""
    x = case.x
    whole = cells(case.grid, case.generator)
    plain = whole.match(x, case.ratio)
    order = torch.randperm(case.grid.tokens, generator=case.generator)
    place = order.argsort()
    moved = Partition(whole.tokens, place[whole.source], place[whole.destination])
    permuted = moved.match(x[:, order], case.ratio)
    angles = case.draw(case.grid.tokens, CHANNELS // 2, salt=2)
    expected = _rotary_attention(x, plain, angles)[:, order]
    torch.testing.assert_close(_rotary_attention(x[:, order], permuted, angles[order]), expected)


def _rotary_attention(x, r, angles):
    few = r.merge(x)
    angle = r.rows(angles).expand(len(x), -1, -1)
    turned = _rotated(few, angle)
    return r.unmerge(attention(turned, turned, few, r.key_bias(x.dtype)))


def _rotated(x, angle):
    even, odd = x[..., ::2], x[..., 1::2]
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([even * cos - odd * sin, even * sin + odd * cos], dim=-1)


# ToMe.


PARTITIONS = [
    lambda case: cells(case.grid, case.generator),
    lambda case: cells(case.grid, case.generator, size=(2, 3, 1)),
    lambda case: partition(case.x.norm(dim=-1), cells(case.grid), share=0.4),
]


@pytest.mark.parametrize("drawn", PARTITIONS)
@THEOREM
@given(case=CASES)
def test_matchings_merge_what_the_ratio_says(drawn, case):
    found = drawn(case)
    r = found.match(case.x, case.ratio)
    count = min(int(case.grid.tokens * case.ratio), found.source.shape[1])
    assert r.tokens - r.length == count
    assert torch.equal(r.anchor, r.anchor.sort().values)
    for row in range(case.batch):
        anchors = set(r.anchor[row % len(r.anchor)].tolist())
        assert set(found.destination[row % len(found.destination)].tolist()) <= anchors


@THEOREM
@given(CASES)
def test_tome_is_the_plain_loop(case):
    x = case.x
    drawn = cells(case.grid, case.generator)
    r = drawn.match(x, case.ratio)
    for row in range(case.batch):
        merged, unmerged = plain_tome(
            x[row], drawn.source[0].tolist(), drawn.destination[0].tolist(), case.ratio
        )
        torch.testing.assert_close(r.merge(x)[row], merged)
        torch.testing.assert_close(r.unmerge(r.merge(x))[row], unmerged)


def plain_tome(x, sources, targets, ratio):
    """Token by token: (merged in the order of the anchors, unmerged)."""
    unit = [token / token.norm() for token in x]
    best = {}
    for s in sources:
        scores = {d: float(unit[s] @ unit[d]) for d in targets}
        d = max(scores, key=scores.__getitem__)
        best[s] = (scores[d], d)
    count = min(int(len(x) * ratio), len(sources))
    gone = sorted(sources, key=lambda s: -best[s][0])[:count]
    groups = {i: [i] for i in range(len(x)) if i not in gone}
    for s in gone:
        groups[best[s][1]].append(s)
    means = {i: torch.stack([x[j] for j in group]).mean(0) for i, group in groups.items()}
    unmerged = x.clone()
    for i, group in groups.items():
        for j in group:
            unmerged[j] = means[i]
    return torch.stack([means[i] for i in sorted(means)]), unmerged


@THEOREM
@given(GRIDS, st.integers(0, 99), st.sampled_from([(1, 2, 2), (2, 2, 2), (1, 3, 2), (1, 1, 1)]))
def test_a_partition_has_one_destination_a_full_cell(grid, seed, size):
    found = cells(grid, torch.Generator().manual_seed(seed), size)
    both = torch.cat([found.source, found.destination], dim=1)[0]
    assert both.sort().values.tolist() == list(range(grid.tokens))
    sides = [min(a, b) for a, b in zip(size, (grid.frames, grid.height, grid.width), strict=True)]
    seen = set()
    for token in found.destination[0].tolist():
        frame, rest = divmod(token, grid.height * grid.width)
        place = (frame, *divmod(rest, grid.width))
        seen.add(tuple(p // side for p, side in zip(place, sides, strict=True)))
    axes = (grid.frames, grid.height, grid.width)
    full = math.prod(length // side for length, side in zip(axes, sides, strict=True))
    assert len(seen) == found.destination.shape[1] == full


def test_every_token_of_a_cell_can_be_drawn_and_none_without_a_generator():
    grid, generator = Grid(2, 2), torch.Generator().manual_seed(0)
    drawn = {int(cells(grid, generator).destination) for _ in range(64)}
    assert drawn == {0, 1, 2, 3}
    assert cells(Grid(4, 4)).destination.tolist() == [[0, 2, 8, 10]]


@THEOREM
@given(CASES, st.integers(1, 4))
def test_branches_and_batches_share_one_partition(case, batch):
    """Drawn without content: the same for any batch, and for a second call that starts alike."""
    first, second = (cells(case.grid, case.generator) for _ in range(2))
    assert torch.equal(first.destination, second.destination)
    x = case.draw(1, case.grid.tokens, CHANNELS)
    once = first.match(x, case.ratio)
    many = first.match(x.repeat(batch, 1, 1), case.ratio)
    assert all(torch.equal(row, once.anchor[0]) for row in many.anchor)


@THEOREM
@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 10**6))
def test_duplicated_cells_are_exact_at_three_quarters(rows, columns, seed):
    case = Case(Grid(2 * rows, 2 * columns), 0.75, seed, 2)
    small = case.draw(2, rows, columns, CHANNELS)
    x = small.repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1, 2)
    r = tome(x, case)
    assert r.length == rows * columns
    torch.testing.assert_close(r.unmerge(r.merge(x)), x)
    torch.testing.assert_close(r.merge(x), gathered(x, r.anchor))


@THEOREM
@given(CASES)
def test_a_matching_serves_other_content(case):
    """Reuse over layers and steps: what is kept is indices, of no channels and no dtype."""
    r = tome(case.x, case)
    deeper = case.draw(case.batch, case.grid.tokens, 9, salt=8)
    merge, _ = matrices(r, torch.float64)
    torch.testing.assert_close(r.merge(deeper), merge @ deeper)


def test_a_long_matching_is_done_in_pieces(monkeypatch):
    case = Case(Grid(8, 8), 0.5, 3, 2)
    whole = tome(case.x, case)
    monkeypatch.setattr("accel.tokens.matching.ROWS", 5)
    assert torch.equal(tome(case.x, case).merge(case.x), whole.merge(case.x))


@pytest.mark.parametrize("ratio", [-0.1, 1.0, math.nan])
def test_ratios_outside_are_refused(ratio):
    x = torch.ones(1, 16, 2)
    with pytest.raises(BadInput, match="in \\[0, 1\\)"):
        cells(Grid(4, 4)).match(x, ratio)
    with pytest.raises(BadInput, match="in \\[0, 1\\)"):
        reduction(x, Grid(4, 4), ratio)
    with pytest.raises(BadInput, match="in \\[0, 1\\)"):
        transformed(x, Grid(4, 4), ratio)


# ToDo.


@THEOREM
@given(GRIDS, st.tuples(*[st.integers(1, 4)] * 3))
def test_todo_groups_are_the_tiles_of_the_grid(grid, factor):
    r = downsampled(grid, factor)
    axes = (grid.frames, grid.height, grid.width)
    assert r.length == math.prod(-(-a // f) for a, f in zip(axes, factor, strict=True))
    if factor == (1, 1, 1):
        assert isinstance(r, Identity)
        return
    places = torch.cartesian_prod(*(torch.arange(a) for a in axes)).reshape(-1, 3)
    tile = places // torch.tensor(factor)
    same = (tile[:, None] == tile[None]).all(-1)
    group = r.target[0]
    assert torch.equal(group[:, None] == group[None], same)
    assert group[r.anchor[0]].tolist() == list(range(r.length))
    middle = places[r.anchor[0]] - tile[r.anchor[0]] * torch.tensor(factor)
    last = torch.stack([(places[group == g] - places[group == g].amin(0)).amax(0) for g in group])
    assert torch.equal(middle[group], last // 2)


@pytest.mark.parametrize("pooling", ["nearest", "average"])
@THEOREM
@given(
    st.integers(1, 4), st.integers(1, 4), st.integers(0, 1), st.integers(0, 1), st.integers(0, 999)
)
def test_todo_is_exact_on_a_grid_of_constant_tiles(pooling, rows, columns, less, fewer, seed):
    """Without a bias for even sizes; with it where the last row or column is cut off."""
    grid = Grid(2 * rows - less, 2 * columns - fewer)
    case = Case(grid, 0.5, seed, 2)
    k, v = (_blown(case, rows, columns, salt) for salt in (1, 2))
    q, r = case.x, downsampled(grid, pooling=pooling)
    angles = case.draw(grid.tokens, CHANNELS // 2, salt=3)[:1].expand(grid.tokens, -1)
    turned = _rotated(r.merge(k), r.rows(angles)[None])
    bias = None if less == fewer == 0 else r.key_bias(q.dtype)
    dense = attention(q, _rotated(k, angles[None]), v)
    torch.testing.assert_close(attention(q, turned, r.merge(v), bias), dense)


def _blown(case, rows, columns, salt):
    small = case.draw(case.batch, rows, columns, CHANNELS, salt=salt)
    whole = small.repeat_interleave(2, 1).repeat_interleave(2, 2)
    return whole[:, : case.grid.height, : case.grid.width].flatten(1, 2)


def test_todo_refuses_a_factor_below_one():
    with pytest.raises(BadInput, match="at least 1"):
        downsampled(Grid(4, 4), (1, 0, 2))


# Importance.


@THEOREM
@given(CASES, st.floats(0.05, 0.9))
def test_the_most_important_are_never_merged(case, share):
    seen = case.draw(case.batch, case.grid.tokens, salt=4).abs()
    found = partition(seen, cells(case.grid, case.generator), share)
    count = max(1, int(case.grid.tokens * share))
    top = seen.topk(count).indices
    assert torch.equal(found.destination.sort().values, top.sort().values)
    r = found.match(case.x, case.ratio)
    for row in range(case.batch):
        assert set(top[row].tolist()) <= set(r.anchor[row % len(r.anchor)].tolist())


@THEOREM
@given(GRIDS, st.integers(1, 3), st.integers(0, 99))
def test_importance_is_the_guidance_on_the_token(grid, patch, seed):
    case = Case(grid, 0.0, seed, 2)
    shape = (grid.frames, grid.height * patch, grid.width * patch)
    cond, uncond = (case.draw(2, 4, *shape, salt=s) for s in (1, 2))
    found = importance(cond, uncond, grid)
    areas = (cond - uncond).square().mean(1)
    areas = areas.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))
    expected = areas.mean((3, 5)).flatten(1).sqrt()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    if grid.frames == 1:
        assert torch.equal(importance(cond[:, :, 0], uncond[:, :, 0], grid), found)


def test_importance_of_tokens():
    case = Case(Grid(3, 4), 0.0, 1, 2)
    cond, uncond = case.x, case.y(12)
    expected = (cond - uncond).norm(dim=-1) / CHANNELS**0.5
    torch.testing.assert_close(importance(cond, uncond, case.grid).double(), expected)
    with pytest.raises(BadInput, match="12 tokens on"):
        importance(cond, uncond, Grid(4, 4))


def test_without_importance_the_cells_are_used():
    whole = cells(Grid(4, 4))
    assert partition(None, whole) is whole
    with pytest.raises(BadInput, match="never to merge"):
        partition(torch.ones(1, 16), whole, share=1.0)


# ToMA.


@THEOREM
@given(st.integers(1, 8), st.integers(0, 10**6), st.data())
def test_facility_location_meets_its_bound(tokens, seed, data):
    count = data.draw(st.integers(1, tokens))
    unit = normalize(Case(Grid(1, tokens), 0.0, seed, 1).x[0], dim=-1)
    similarity = unit @ unit.T

    def covered(chosen):
        return float((similarity[:, list(chosen)].amax(1) + 1).sum())

    chosen = facility_location(similarity, tokens).tolist()
    assert facility_location(similarity, count).tolist() == chosen[:count]
    values = [covered(chosen[:n]) for n in range(1, tokens + 1)]
    gains = [b - a for a, b in zip([0.0, *values], values, strict=False)]
    assert all(later <= earlier + 1e-9 for earlier, later in pairwise(gains))
    assert all(gain >= -1e-9 for gain in gains)
    best = max(covered(choice) for choice in combinations(range(tokens), count))
    assert values[count - 1] >= (1 - 1 / math.e) * best - 1e-9
    assert values[0] == pytest.approx(max(covered([i]) for i in range(tokens)))


@THEOREM
@given(st.integers(2, 6), st.integers(0, 999))
def test_copies_are_not_chosen_twice(tokens, seed):
    same = torch.ones(tokens, tokens, dtype=torch.float64)
    assert sorted(facility_location(same, tokens).tolist()) == list(range(tokens))


def test_facility_location_is_the_plain_loop_in_large_windows():
    """In float32 as close to all tokens as in float64, and the same tokens are not named twice."""
    x = torch.randn(1024, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    unit, count = normalize(x, dim=-1), 192
    similarity = unit @ unit.T
    best, plain = torch.full((1024,), -1.0, dtype=torch.float64), []
    for _ in range(count):
        gain = (similarity - best[:, None]).clamp_min(0).sum(0)
        plain.append(int(gain.argmax()))
        best = torch.maximum(best, similarity[plain[-1]])
    found = facility_location(similarity.float(), count).tolist()
    assert len({*found}) == count
    left, least = (float((1 - similarity[:, c].amax(1)).sum()) for c in (found, plain))
    assert left <= 1.01 * least


@pytest.mark.parametrize("value", [1.0, torch.nan])
def test_facility_location_names_tokens_that_are_there(value):
    chosen = facility_location(torch.full((2, 9, 9), value), 5)
    assert chosen.shape == (2, 5) and 0 <= chosen.min() <= chosen.max() < 9


@THEOREM
@given(CASES)
def test_toma_is_the_plain_formula_in_each_window(case):
    x, ratio, window = case.x, case.ratio, (1, 3, 3)
    r = toma(x, case)
    if r.length == r.tokens:
        return
    expected_merge = torch.zeros(case.batch, r.length, r.tokens, dtype=torch.float64)
    expected_unmerge = expected_merge.mT.clone()
    first = 0
    for index in tiles(case.grid, window):
        for tokens in index:
            unit = normalize(x[:, tokens], dim=-1)
            side = len(tokens)
            count = side - merged_of(side, ratio)
            d = gathered(unit, facility_location(unit @ unit.mT, count)[:, :])
            given_to = (d @ unit.mT / 0.02).softmax(1)
            if count == side:
                given_to = torch.eye(side, dtype=x.dtype).expand(case.batch, -1, -1)
            rows = torch.arange(first, first + count)
            expected_merge[:, rows[:, None], tokens] = given_to / given_to.sum(2, keepdim=True)
            expected_unmerge[:, tokens[:, None], rows] = given_to.mT
            first += count
    assert first == r.length
    merge, unmerge = matrices(r, torch.float64)
    torch.testing.assert_close(merge, expected_merge.expand_as(merge))
    torch.testing.assert_close(unmerge, expected_unmerge.expand_as(unmerge))


@THEOREM
@given(CASES)
def test_a_cold_toma_is_an_exclusive_merge(case):
    """Each token goes to the destination most like it; the destinations are those chosen."""
    r = reduction(case.x, case.grid, case.ratio, window=(3, 7, 7), temperature=1e-7)
    _, unmerge = matrices(r, torch.float64)
    unit = normalize(case.x, dim=-1)
    few = gathered(unit, r.anchor)
    nearest = (unit @ few.mT).argmax(-1)
    assert torch.equal(unmerge.argmax(-1).expand_as(nearest), nearest)
    y = case.y(r.length)
    grouped = exclusive(nearest, r.anchor.expand(case.batch, -1))
    torch.testing.assert_close(r.unmerge(y), grouped.unmerge(y))
    torch.testing.assert_close(r.merge(case.x), grouped.merge(case.x))


@THEOREM
@given(CASES)
def test_destinations_serve_other_content(case):
    kept_longer = destinations(case.x, case.grid, case.ratio, (1, 3, 3))
    later = case.y(case.grid.tokens)
    r = kept_longer.weighed(later)
    again = kept_longer.take(range(case.batch)).weighed(later)
    torch.testing.assert_close(r.merge(later), again.merge(later))
    if r.length < r.tokens:
        assert torch.equal(r.anchor, kept_longer.weighed(case.x).anchor)


@pytest.mark.parametrize("reduce", [reduction, transformed])
def test_temperatures_are_above_zero(reduce):
    with pytest.raises(BadInput, match="temperature"):
        reduce(torch.ones(1, 16, 2), Grid(4, 4), 0.5, temperature=0.0)


# Token Transforming.


@THEOREM
@given(CASES)
def test_transforming_keeps_what_matters_and_mixes_many(case):
    r = transforming_by_what_matters(case.x, case)
    side = case.grid.height * case.grid.width  # a frame is one window
    assert r.length == case.grid.frames * (side - merged_of(side, case.ratio))
    if r.length == r.tokens or case.grid.frames > 1:
        return
    top = case.x.norm(dim=-1).topk(r.length).indices
    assert torch.equal(r.anchor.sort().values, top.sort().values)
    merge, unmerge = matrices(r, torch.float64)
    unit = normalize(case.x, dim=-1)
    logits = gathered(unit, r.anchor) @ unit.mT / 0.3
    torch.testing.assert_close(merge, logits.softmax(-1))
    torch.testing.assert_close(unmerge, logits.mT.softmax(-1))
    assert (merge > 0).all()
    assert (unmerge > 0).all()


@THEOREM
@given(CASES)
def test_a_cold_transformation_keeps_the_centres(case):
    r = transformed(case.x, case.grid, case.ratio, temperature=1e-7)
    torch.testing.assert_close(r.merge(case.x), gathered(case.x, r.anchor))


@THEOREM
@given(CASES)
def test_without_what_matters_centres_are_even(case):
    line = Grid(1, case.grid.tokens)
    r = transformed(case.x, line, case.ratio, window=(1, 1, line.tokens))
    gaps = r.anchor.diff(dim=1, append=r.anchor[:, :1] + line.tokens)
    assert gaps.max() - gaps.min() <= 1


@THEOREM
@given(CASES)
def test_dense_reductions_follow_a_permutation(case):
    """Inside one window the order of the tokens is nothing."""
    line = Case(Grid(1, case.grid.tokens), case.ratio, case.seed, case.batch)
    order = torch.randperm(line.grid.tokens, generator=case.generator)
    whole = (1, 1, line.grid.tokens)
    x, moved = line.x, line.x[:, order]
    far = x.norm(dim=-1)
    chosen = destinations(x, line.grid, line.ratio, whole)
    same = Destinations(chosen.windows, (order.argsort()[chosen.chosen[0]],))
    pairs = [
        (chosen.weighed(x), same.weighed(moved)),
        (
            transformed(x, line.grid, line.ratio, matters=far, window=whole),
            transformed(moved, line.grid, line.ratio, matters=far[:, order], window=whole),
        ),
    ]
    for plain, other in pairs:
        expected = plain.unmerge(plain.merge(x))[:, order]
        torch.testing.assert_close(other.unmerge(other.merge(moved)), expected)


# SADA.

MOST = st.integers(0, 200)


@THEOREM
@given(GRIDS, MOST, st.integers(0, 999))
def test_unstable_tokens_are_kept_up_to_the_cap(grid, most, seed):
    case = Case(grid, 0.0, seed, 1)
    score = case.draw(grid.tokens)
    index = unstable(score, grid, most, case.generator)
    assert index.tolist() == sorted(set(index.tolist()))
    above = [i for i in score.argsort(descending=True).tolist() if score[i] >= 0][:most]
    assert set(above) <= set(index.tolist())
    cells = [set(row.tolist()) for tile in tiles(grid, (1, 3, 3)) for row in tile]
    extra = set(index.tolist()) - set(above)
    assert all(len(extra & tile) <= 1 for tile in cells)
    assert all(tile & set(index.tolist()) for tile in cells)
    assert len(index) <= len(above) + len(cells)


def test_a_score_of_zero_and_one_of_nan_must_be_computed():
    score = torch.tensor([0.0, -1.0, -1.0, -1.0])
    assert unstable(score, Grid(2, 2), 4, cell=(1, 1, 4)).tolist() == [0, 2]
    assert unstable(score, Grid(1, 4), 4, cell=(1, 1, 4)).tolist() == [0]
    unknown = torch.tensor([-1.0, -1.0, math.nan, -1.0])
    assert unstable(unknown, Grid(1, 4), 1, cell=(1, 1, 4)).tolist() == [0, 2]


@THEOREM
@given(CASES)
def test_kept_tokens_go_over_what_all_had(case):
    x, full = case.x, case.y(case.grid.tokens)
    index = unstable(case.draw(case.grid.tokens, salt=3), case.grid, 9, case.generator)
    r, before = kept(index, full), full.clone()
    few = r.merge(x)
    assert torch.equal(few, x[:, index])
    answer = r.unmerge(2 * few)
    others = [i for i in range(case.grid.tokens) if i not in index.tolist()]
    assert torch.equal(answer[:, index], 2 * x[:, index])
    assert torch.equal(answer[:, others], full[:, others])
    assert torch.equal(full, before)
    assert torch.equal(r.merge(answer), 2 * few)
    assert torch.equal(r.rows(x[0]), x[0][index])
    last = case.batch - 1
    assert torch.equal(r.take([last]).unmerge(few[[last]])[0], r.unmerge(few)[last])


@THEOREM
@given(CASES)
def test_all_tokens_kept_is_the_identity_to_the_bit(case):
    score = torch.zeros(case.grid.tokens)
    index = unstable(score, case.grid, case.grid.tokens, case.generator)
    r = kept(index, case.y(case.grid.tokens))
    assert torch.equal(r.merge(case.x), case.x)
    assert torch.equal(r.unmerge(case.x), case.x)
    assert torch.equal(r.rows(case.x[0]), case.x[0])


@THEOREM
@given(GRIDS, st.integers(1, 3))
def test_instability_is_the_mean_over_channels_and_area(grid, patch):
    sides = (grid.frames, grid.height * patch, grid.width * patch)
    criterion = Case(grid, 0.0, 1, 2).draw(2, 4, *sides)
    found = instability(criterion, grid)
    assert found.shape == (2, grid.tokens)
    corner = criterion[:, :, 0, :patch, :patch].mean((1, 2, 3))
    torch.testing.assert_close(found[:, 0].double(), corner, rtol=1e-5, atol=1e-6)


def test_every_token_is_refreshed_in_time():
    latest, computed = None, []
    for step in range(10):
        if refreshes(step, latest, every=4):
            latest = step
            computed.append(step)
    assert computed == [0, 4, 8]
    assert all(refreshes(step, step - 1, every=1) for step in range(1, 5))


def test_kept_tokens_refuse_another_layout():
    r = kept(torch.tensor([0, 3]), torch.ones(2, 9, 4))
    with pytest.raises(BadInput, match="refresh"):
        r.merge(torch.ones(2, 8, 4))
    with pytest.raises(BadInput, match="refresh"):
        r.unmerge(torch.ones(1, 2, 4))
    with pytest.raises(BadInput, match="one sample's"):
        unstable(torch.ones(2, 9), Grid(3, 3), 4)


# Text.


@THEOREM
@given(CASES, st.integers(0, 4), st.booleans())
def test_text_is_never_merged(case, text, first):
    layout = joint(case, first, text)
    x = case.draw(case.batch, layout.tokens, CHANNELS)
    words, picture = split(layout, x)
    assert words.shape[1] == text
    assert torch.equal(join(layout, words, picture), x)
    assert torch.equal(words, x[:, layout.text_span])
    assert torch.equal(picture, x[:, layout.image_span])
    image = tome(picture, case)
    r = beside_text(layout, image)
    for both, few in ((r.merge(x), image.merge(picture)), (r.rows(x, 1), image.rows(picture, 1))):
        assert torch.equal(split(layout, both)[0], words)
        assert torch.equal(split(layout, both)[1], few)
    y = case.y(r.length)
    assert torch.equal(split(layout, r.unmerge(y))[0], split(layout, y)[0])
    assert torch.equal(split(layout, r.unmerge(y))[1], image.unmerge(split(layout, y)[1]))
    assert not split(layout, r.key_bias(torch.float64), dim=-1)[0].any()
    heads = x[:, None].expand(-1, 2, -1, -1)
    assert torch.equal(join(layout, *split(layout, heads, 2), 2), heads)


def test_another_layout_is_refused():
    with pytest.raises(BadInput, match="cannot hold"):
        split(Layout(5, 1, 1, 1), torch.ones(1, 4, 2))
    with pytest.raises(BadInput, match="make one for this layout"):
        beside_text(Layout(5, 1, 2, 2), tome(torch.ones(1, 9, 2), Case(Grid(3, 3), 0.5, 0, 1)))


# Grids.


@THEOREM
@given(GRIDS, st.tuples(*[st.integers(1, 5)] * 3))
def test_tiles_cover_every_token_once(grid, size):
    found = tiles(grid, size)
    assert torch.cat([t.flatten() for t in found]).sort().values.tolist() == [*range(grid.tokens)]
    sides = {tile.shape[1] for tile in found}
    assert max(sides) <= math.prod(size)
    assert len(found) <= 8


@pytest.mark.parametrize("sides", [(0, 1, 1), (1, -1, 1), (1, 1, 0)])
def test_a_tile_has_tokens(sides):
    with pytest.raises(BadInput, match="at least 1"):
        tiles(Grid(2, 2), sides)


def test_groups_are_summed_in_one_order():
    """Sorted by group: the same bits each time, whatever the order of the groups' tokens."""
    case = Case(Grid(6, 6), 0.6, 1, 1)
    r = tome(case.x, case)
    assert isinstance(r, Exclusive)
    x = case.x.float()
    for row in range(r.length):
        tokens = (r.target[0] == row).nonzero()[:, 0]
        assert r.order[0, r.start[0, row] :][: len(tokens)].tolist() == tokens.tolist()
        torch.testing.assert_close(r.merge(x)[0, row], x[0, tokens].mean(0))
