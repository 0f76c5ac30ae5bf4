"""Patterns of sparse attention: masks, closed forms, composition."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accel.attention.patterns.grat import CrissCross, Surrounding
from accel.attention.patterns.neighbourhood import Neighbourhood, sliding_tile, starts
from accel.attention.patterns.pattern import Full, Partition, PerHead, all_tokens, kept_pairs
from accel.attention.patterns.radial import Radial
from accel.attention.patterns.sparse_videogen import Spatial, Temporal
from accel.errors import BadInput
from accel.seams.layout import Layout

EXAMPLES = settings(max_examples=40, deadline=None)


def mask_of(pattern, layout):
    """The whole mask of the image, straight from `keeps`."""
    tokens = all_tokens(layout)
    kept = pattern.keeps(layout, layout.places(tokens[:, None]), layout.places(tokens))
    return kept.expand(layout.image, layout.image)


@st.composite
def layouts(draw):
    sides = [draw(st.integers(1, limit)) for limit in (4, 6, 7)]
    return Layout(draw(st.integers(0, 5)), *sides, text_first=draw(st.booleans()))


def three(strategy):
    return st.tuples(strategy, strategy, strategy)


@st.composite
def neighbourhoods(draw, layout):
    chosen = []
    for length in layout.grid:
        dilation = draw(st.integers(1, length))
        window = draw(st.none() | st.integers(1, length // dilation))
        stride = draw(st.integers(1, window or length))
        chosen.append((window, stride, dilation))
    windows, strides, dilations = zip(*chosen, strict=True)
    return Neighbourhood(windows, strides, dilations, draw(three(st.booleans())))


def bands(layout):
    least = 2 * layout.text / layout.tokens
    if least >= 0.95:
        return []
    return [
        st.builds(
            kind,
            keep=st.floats(least + 0.01, 1.0),
            block=st.integers(1, 9),
            exact=st.booleans(),
            sink=st.booleans(),
        )
        for kind in (Spatial, Temporal)
    ]


@st.composite
def leaves(draw, layout):
    groups = st.none() | three(st.integers(1, 4))
    choices = [
        st.just(Full()),
        st.builds(Surrounding, group=groups, reach=st.integers(0, 2)),
        st.builds(CrissCross, group=groups),
        neighbourhoods(layout),
        st.builds(
            Radial,
            decay=st.floats(0.1, 2.0),
            block=st.integers(1, 9),
            exact=st.booleans(),
            sink=st.booleans(),
        ),
        *bands(layout),
    ]
    return draw(st.one_of(choices))


@st.composite
def patterns(draw, layout):
    """A pattern, or two joined by & or |."""
    first = draw(leaves(layout))
    match draw(st.sampled_from(["alone", "and", "or"])):
        case "and":
            return first & draw(leaves(layout))
        case "or":
            return first | draw(leaves(layout))
    return first


@st.composite
def on_layouts(draw):
    layout = draw(layouts())
    return draw(patterns(layout)), layout


# what holds for all patterns


@EXAMPLES
@given(on_layouts())
def test_every_token_attends_to_itself(case):
    assert mask_of(*case).diagonal().all()


@EXAMPLES
@given(on_layouts())
def test_density_is_the_counted_share_of_pairs(case):
    pattern, layout = case
    mask = torch.ones(layout.tokens, layout.tokens, dtype=torch.bool)
    mask[layout.image_span, layout.image_span] = mask_of(pattern, layout)
    assert pattern.density(layout) == pytest.approx(mask.double().mean().item(), abs=1e-12)


@EXAMPLES
@given(on_layouts())
def test_cells_are_what_the_pattern_cannot_tell_apart(case):
    pattern, layout = case
    cells = pattern.cells(layout, layout.places(all_tokens(layout)))
    queries, keys = (Partition.of(labels) for labels in cells)
    mask = mask_of(pattern, layout)
    alike = mask[queries.first][:, keys.first]
    assert torch.equal(alike[queries.part][:, keys.part], mask)


@EXAMPLES
@given(st.data())
def test_and_is_intersection_and_or_is_union(data):
    layout = data.draw(layouts())
    a, b = data.draw(leaves(layout)), data.draw(leaves(layout))
    assert torch.equal(mask_of(a & b, layout), mask_of(a, layout) & mask_of(b, layout))
    assert torch.equal(mask_of(a | b, layout), mask_of(a, layout) | mask_of(b, layout))


@EXAMPLES
@given(on_layouts())
def test_groups_cover_all_tokens(case):
    pattern, layout = case
    for labels in pattern.groups(layout, layout.places(all_tokens(layout))):
        assert labels.shape == (layout.image,)


@EXAMPLES
@given(on_layouts())
def test_equal_patterns_have_one_hash_and_say_their_parameters(case):
    pattern, _ = case
    again = eval(repr(pattern))  # every pattern prints as it is written
    assert again == pattern
    assert hash(again) == hash(pattern)


def test_a_pattern_for_each_head_has_the_mean_density():
    layout, near = Layout(3, 1, 8, 8), Surrounding((1, 2, 2))
    mixed = PerHead((near, Full(), near, near))
    assert mixed.density(layout) == pytest.approx((3 * near.density(layout) + 1) / 4)
    assert mixed.heads() == {near: (0, 2, 3), Full(): (1,)}


# neighbourhood attention

GOLDEN = [
    (8, 4, 2, [0, 0, 1, 1, 3, 3, 4, 4]),
    (9, 3, 1, [0, 0, 1, 2, 3, 4, 5, 6, 6]),
    (10, 4, 3, [0, 0, 0, 2, 2, 2, 5, 5, 5, 6]),
]


@pytest.mark.parametrize(("length", "window", "stride", "expected"), GOLDEN)
def test_windows_begin_where_the_paper_has_them(length, window, stride, expected):
    place = torch.arange(length)
    sizes = torch.full((2, length), window)
    sizes[0] = length
    assert starts(place, *sizes, stride, False).tolist() == expected
    table = mask_of(Neighbourhood((1, 1, window), (1, 1, stride)), Layout(0, 1, 1, length))
    assert table.int().argmax(1).tolist() == expected
    assert (table.sum(1) == window).all()


def by_the_formula(length, window, stride, dilation, causal):
    """Section 3.2 of the specification, a query and a key at a time."""
    kept = torch.zeros(length, length, dtype=torch.bool)
    for q, k in itertools.product(range(length), repeat=2):
        if q % dilation != k % dilation:
            continue
        members = len(range(q % dilation, length, dilation))
        i, j = q // dilation, k // dilation
        if causal:
            leader = min(i // stride * stride + stride - 1, members - 1)
            start = max(leader - window + 1, 0)
        else:
            leader = min(i // stride * stride + stride // 2, members - 1)
            start = min(max(leader - window // 2, 0), members - window)
        kept[q, k] = start <= j < start + window and (j <= i or not causal)
    return kept


@pytest.mark.parametrize("causal", [False, True])
def test_neighbourhoods_follow_the_formula(causal):
    for length, dilation in itertools.product(range(1, 10), range(1, 4)):
        for window in range(1, length // dilation + 1):
            for stride in range(1, window + 1):
                pattern = Neighbourhood(
                    (1, 1, window), (1, 1, stride), (1, 1, dilation), (False, False, causal)
                )
                found = mask_of(pattern, Layout(0, 1, 1, length))
                assert torch.equal(found, by_the_formula(length, window, stride, dilation, causal))


@EXAMPLES
@given(st.data())
def test_every_query_has_as_many_keys_as_the_window(data):
    layout = data.draw(layouts())
    pattern = data.draw(neighbourhoods(layout))
    pattern = Neighbourhood(tuple(w or 1 for w in pattern.window), (1, 1, 1), pattern.dilation)
    assert (mask_of(pattern, layout).sum(1) == math.prod(pattern.window)).all()


def test_windows_side_by_side_are_blocks_and_whole_windows_are_full():
    layout = Layout(0, 4, 6, 8)
    blocked = Neighbourhood((2, 3, 4), (2, 3, 4))
    assert torch.equal(mask_of(blocked, layout), mask_of(Surrounding((2, 3, 4), 0), layout))
    whole = [Neighbourhood((4, 6, 8), (2, 1, 3)), Neighbourhood((None, None, None))]
    assert all(mask_of(pattern, layout).all() for pattern in whole)


@pytest.mark.parametrize("tiles", [(1, 1, 1), (1, 3, 3), (3, 1, 3), (3, 3, 5)])
def test_sliding_tiles_keep_windows_of_tiles_around_the_clamped_middle(tiles):
    tile, layout = (1, 2, 3), Layout(2, 3, 6, 15)
    kept = torch.ones(layout.image, layout.image, dtype=torch.bool)
    for place, side, count, length in zip(
        layout.places(all_tokens(layout)), tile, tiles, layout.grid, strict=True
    ):
        at = place // side
        middle = at.clamp(count // 2, length // side - 1 - count // 2)
        kept &= (at - middle[:, None]).abs() <= count // 2
    assert torch.equal(mask_of(sliding_tile(tile, tiles), layout), kept)


# closed forms


@pytest.mark.parametrize("text", [0, 7])
def test_densities_of_groups_have_closed_forms(text):
    picture, clip = Layout(text, 1, 12, 20), Layout(text, 4, 6, 8)
    square, box = (1, 4, 4), (2, 2, 2)
    shares = {
        (CrissCross(square), picture): (3 + 5 - 1) / 15,
        (CrissCross(box), clip): 1 - (1 - 1 / 2) * (1 - 1 / 3) * (1 - 1 / 4),
        (Surrounding(square), picture): (3 * 3 - 2) * (3 * 5 - 2) / 15**2,
        (Surrounding(box), clip): 1 * (3 * 3 - 2) * (3 * 4 - 2) / 12**2,
        (Neighbourhood((3, 3, 5)), clip): 3 * 3 * 5 / clip.image,
        (Full(), clip): 1.0,
    }
    for (pattern, layout), share in shares.items():
        assert kept_pairs(pattern, layout) == pytest.approx(share * layout.image**2)
        with_text = 1 - (1 - share) * (layout.image / layout.tokens) ** 2
        assert pattern.density(layout) == pytest.approx(with_text)


def test_the_authors_numbers_of_flux_at_8192():
    layout = Layout(512, 1, 512, 512)
    assert 1 - Surrounding().density(layout) == pytest.approx(0.9903, abs=0.005)
    assert 1 - CrissCross().density(layout) == pytest.approx(0.9367, abs=0.002)


def test_the_authors_numbers_of_hunyuanvideo_at_768_by_1280():
    """128 frames, and 256 tokens of text: 94.3 % left out around, and 60.8 % across.

    Around, boxes at the borders have fewer beside them than the authors' padded grid. Across, the
    union of three planes leaves out 65.6 % of the image's pairs, and no reading of it gives theirs.
    """
    layout = Layout(256, 32, 48, 80)
    left = {kind: 1 - kind().density(layout) for kind in (Surrounding, CrissCross)}
    assert left[Surrounding] == pytest.approx(0.943, abs=0.012)
    assert left[CrissCross] == pytest.approx(0.608, abs=0.05)
    alone = Layout(0, 32, 48, 80)
    assert 1 - CrissCross().density(alone) == pytest.approx(
        (1 - 1 / 8) * (1 - 1 / 6) * (1 - 1 / 10)
    )
    assert left[CrissCross] == pytest.approx(0.65625 * (alone.tokens / layout.tokens) ** 2)


def test_an_axis_with_one_box_does_not_make_a_cross_dense():
    layout = Layout(0, 1, 8, 8)
    assert kept_pairs(CrissCross((1, 2, 2)), layout) == 64**2 * 7 // 16
    assert mask_of(CrissCross((1, 8, 8)), layout).all()


# radial attention


def test_radial_bands_follow_the_formula():
    layout, pattern = Layout(0, 12, 4, 8), Radial(block=8, exact=True)
    tokens = all_tokens(layout)
    frame, place = tokens // 32, tokens % 32
    distance, apart = (frame[:, None] - frame).abs(), (place[:, None] - place).abs()
    mask = mask_of(pattern, layout)
    assert mask[distance <= 1].all()
    for delta in range(2, 12):
        width = 2**6 / 2 ** delta.bit_length()
        kept = width >= 8 or delta % int(8 / width) == 0
        expected = (apart <= max(width, 8)) & kept
        assert torch.equal(mask[distance == delta], expected[distance == delta])


def by_the_rule(tokens, block, edges):
    """Blocks of which over 60 % of the columns that are not empty are filled by more than a third.

    Args:
        tokens: Which token attends to which, ``[N, N]``.
        block: Tokens of a block.
        edges: Where blocks begin afresh: a block that ends there is shorter.
    """
    starts = torch.cat(
        [torch.arange(a, b, block) for a, b in itertools.pairwise([*edges, len(tokens)])]
    )
    block_of = torch.zeros(len(tokens), dtype=torch.long)
    block_of[starts[1:]] = 1
    block_of = block_of.cumsum(0)
    belongs = torch.nn.functional.one_hot(block_of).T.double()
    shares = (belongs @ tokens.double()) / belongs.sum(1, keepdim=True)
    filled, present = (shares > 1 / 3).double() @ belongs.T, (shares > 0).double() @ belongs.T
    return (filled > 0.6 * present)[block_of][:, block_of]


@pytest.mark.parametrize(
    ("layout", "block"),
    [(Layout(0, 9, 8, 8), 8), (Layout(0, 5, 15, 26), 32)],
    ids=["even", "ragged"],
)
def test_whole_blocks_follow_the_authors_rule(layout, block):
    """Also where the last block of a frame is shorter: 12.2 blocks a frame, as 30 × 52 by 128."""
    tokens = mask_of(Radial(block=block, exact=True), layout)
    edges = range(0, layout.image, layout.frame)
    assert torch.equal(mask_of(Radial(block=block), layout), by_the_rule(tokens, block, edges))


def test_where_the_authors_blocks_cross_frames_little_is_another():
    """Theirs go through the whole sequence: of all pairs 4.6 % differ, in the share kept 1 %."""
    layout, block = Layout(0, 5, 15, 26), 32
    tokens = mask_of(Radial(block=block, exact=True), layout)
    ours, theirs = mask_of(Radial(block=block), layout), by_the_rule(tokens, block, [0])
    assert 0 < (ours != theirs).double().mean() < 0.06
    assert abs(ours.double().mean() - theirs.double().mean()) < 0.015


def test_what_radial_attention_keeps_grows_a_little_faster_than_the_frames():
    frames = [8, 16, 32, 64]
    kept = [kept_pairs(Radial(block=4), Layout(0, n, 8, 16)) for n in frames]
    rates = [k / (n * math.log2(n)) for k, n in zip(kept, frames, strict=True)]
    assert max(rates) / min(rates) < 1.5
    assert kept[-1] / kept[0] < 64 / 2


def test_radial_attention_looks_at_distances_only_but_for_the_sink():
    layout = Layout(0, 9, 4, 4)
    mask = mask_of(Radial(block=4, exact=True), layout)
    assert torch.equal(mask, mask.T)
    sink = mask_of(Radial(block=4, exact=True, sink=True), layout)
    assert sink[:, :16].all()
    assert torch.equal(sink[:, 16:], mask[:, 16:])


# Sparse VideoGen


def test_a_temporal_head_is_a_spatial_one_in_pixel_major_order():
    layout, turned = Layout(3, 4, 5, 6), Layout(3, 4, 5, 6)
    places = layout.places(all_tokens(layout))
    order = layout.pixel_index(places).argsort()
    for options in ({"exact": True}, {"block": 6}, {"block": 4, "sink": True}):
        temporal = mask_of(Temporal(keep=0.4, **options), layout)
        spatial = mask_of(Spatial(keep=0.4, **options), turned)
        assert torch.equal(temporal[order][:, order], spatial)


def test_a_quarter_of_wan_is_a_band_of_under_three_frames():
    layout = Layout(0, 21, 30, 52)
    assert Spatial(block=1).width(layout) / layout.frame == pytest.approx(2.81, abs=0.005)


@pytest.mark.parametrize("kind", [Spatial, Temporal])
@pytest.mark.parametrize("keep", [0.1, 0.25, 0.6])
@pytest.mark.parametrize("text", [0, 16])
def test_the_band_keeps_the_share_that_was_asked_for(kind, keep, text):
    """Of the pairs without text, however much of it there is."""
    layout = Layout(text, 8, 12, 12)
    image = layout.image_span
    kept = mask_of(kind(keep=keep, block=1), layout)[image, image]
    assert float(kept.float().mean()) == pytest.approx(keep, abs=0.01)


# what is refused, and where tokens lie


@pytest.mark.parametrize(
    ("make", "needed"),
    [
        (lambda: Layout(0, 1, 0, 4), "at least 1"),
        (lambda: Layout(-1, 1, 4, 4), "at least 0"),
        (lambda: Surrounding((1, 0, 4)), "at least 1"),
        (lambda: Surrounding(reach=-1), "at least 0"),
        (lambda: Neighbourhood((1, 3, 3), (1, 4, 1)), "at most the window"),
        (lambda: Neighbourhood((1, 0, 3)), "at least 1"),
        (lambda: kept_pairs(Neighbourhood((1, 5, 5)), Layout(0, 1, 4, 9)), "None for the whole"),
        (
            lambda: kept_pairs(Neighbourhood((1, 3, 3), dilation=(1, 2, 1)), Layout(0, 1, 5, 9)),
            "does not fit 5",
        ),
        (lambda: sliding_tile((1, 2, 2), (1, 2, 3)), "odd"),
        (lambda: Radial(decay=0), "decay is in"),
        (lambda: Spatial(keep=1.5), "at most 1"),
        (lambda: PerHead(()), "one pattern a head"),
    ],
)
def test_what_cannot_be_is_refused(make, needed):
    with pytest.raises(BadInput, match=needed):
        make()


@EXAMPLES
@given(layouts())
def test_places_and_numbers_are_each_others_inverse(layout):
    tokens = all_tokens(layout)
    places = layout.places(tokens)
    assert torch.equal(layout.index(places), tokens)
    assert sorted(layout.pixel_index(places).tolist()) == tokens.tolist()
    spans = [layout.text_span, layout.image_span]
    covered = [i for span in spans for i in range(span.start, span.stop)]
    assert sorted(covered) == list(range(layout.tokens))
    first = layout.text_span if layout.text_first else layout.image_span
    assert first.start == 0
