"""Compiled patterns and their lowerings: all compute what a dense masked attention computes."""

import math
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_attention_patterns import EXAMPLES, layouts, leaves, mask_of, on_layouts
from torch.nn.attention.flex_attention import create_mask
from torch.nn.functional import scaled_dot_product_attention

from accel.attention.blocks import BlockSparse, compiled, compiled_by_head
from accel.attention.lowerings import NAMES, gather, lowered, refusals, xformers
from accel.attention.lowerings.flex import Flex
from accel.attention.lowerings.gather import Gather
from accel.attention.lowerings.lowering import by_text
from accel.attention.lowerings.xformers import packed, unpacked
from accel.attention.patterns.grat import CrissCross, Surrounding
from accel.attention.patterns.neighbourhood import Neighbourhood
from accel.attention.patterns.pattern import Full, Partition, Pattern, PerHead
from accel.attention.patterns.radial import Radial
from accel.attention.patterns.sparse_videogen import Spatial, Temporal
from accel.errors import BadInput
from accel.seams.layout import Layout

HEADS, DIM = 3, 16


def inputs(layout, batch=2, heads=HEADS, seed=0):
    """Queries, keys and values as a model hands them over: ``[B, S, H, D]``, transposed."""
    generator = torch.Generator().manual_seed(seed)
    shape = (3, batch, layout.tokens, heads, DIM)
    return torch.randn(shape, generator=generator).transpose(2, 3)


def attended(q, k, v, mask, layout, text_mask=None, scale=None):
    """The definition: scores, masked, softmax. ``mask``: of the image, ``[N, N]`` or by head."""
    kept = torch.ones(q.shape[1], layout.tokens, layout.tokens, dtype=torch.bool)
    kept[:, layout.image_span, layout.image_span] = mask
    kept = kept.repeat(q.shape[0], 1, 1, 1)
    if text_mask is not None:
        kept[:, :, :, layout.text_span] &= text_mask[:, None, None]
    scores = q.double() @ k.double().mT * (scale or 1 / math.sqrt(q.shape[3]))
    return (scores.masked_fill(~kept, -math.inf).softmax(-1) @ v.double()).float()


def close(found, expected):
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-5


@st.composite
def padding(draw, layout):
    """Which text of two samples is valid; none given, some, all or nothing."""
    if draw(st.booleans()):
        return None
    valid = st.lists(st.booleans(), min_size=layout.text, max_size=layout.text)
    return torch.tensor([draw(valid), draw(valid)], dtype=torch.bool).view(2, layout.text)


# what a pattern comes down to


@EXAMPLES
@given(on_layouts())
def test_tables_say_what_the_pattern_says(case):
    pattern, layout = case
    blocks = compiled(pattern, layout)
    mask = mask_of(pattern, layout)
    assert torch.equal(blocks.mask()[0], mask)
    assert blocks.density == pytest.approx(pattern.density(layout))
    assert blocks.density <= blocks.computed + 1e-12 <= 1 + 2e-12
    assert (blocks.lengths > 0).all()
    for part in (blocks.groups, blocks.cells):
        assert sorted(part.order.tolist()) == list(range(layout.image))
        assert torch.equal(
            part.part[part.order], torch.arange(len(part)).repeat_interleave(part.sizes)
        )


def test_patterns_of_whole_groups_need_no_masks():
    clip = Layout(8, 4, 16, 16)
    whole = [
        Full(),
        Surrounding((2, 4, 8)),
        CrissCross((2, 4, 8)),
        Neighbourhood((2, 8, 8), (2, 8, 8)),
        Radial(block=128),
        Spatial(keep=0.5, block=128),
        Temporal(keep=0.5, block=128),
    ]
    for pattern in whole:
        blocks = compiled(pattern, clip)
        assert not blocks.masks, pattern
        assert blocks.computed == pytest.approx(blocks.density)


def test_groups_that_look_alike_share_a_mask():
    blocks = compiled(Neighbourhood((1, 9, 9)), Layout(0, 1, 64, 64))
    assert len(blocks.masks) * 4 <= len(blocks.groups)


def test_a_pattern_that_leaves_a_token_without_keys_is_refused():
    class Others(Pattern):
        def keeps(self, layout, query, key):
            return query.column != key.column

    compiled(Others() | Full(), Layout(0, 1, 1, 1))
    with pytest.raises(BadInput, match="without any image key"):
        compiled(Others(), Layout(0, 1, 4, 1))


@pytest.mark.parametrize("count", [3, 6])
def test_a_table_is_read_by_label(count):
    """Also where every token has a label of its own."""
    labels = torch.tensor([2, 0, 1, 5, 3, 4]) % count
    kept = (torch.rand(count, count, generator=torch.Generator().manual_seed(0)) < 0.5).bool()
    kept |= torch.eye(count, dtype=torch.bool)
    blocks = BlockSparse.of_table(Layout(0, 1, 2, 3), labels, labels, kept)
    assert torch.equal(blocks.mask()[0], kept[labels][:, labels])


def test_a_table_that_does_not_fit_is_refused():
    layout, labels = Layout(0, 1, 2, 4), torch.arange(8) // 2
    with pytest.raises(BadInput, match="4 groups"):
        BlockSparse.of_table(layout, labels, labels, torch.ones(4, 3))
    with pytest.raises(BadInput, match="attends to no cell"):
        BlockSparse.of_table(layout, labels, labels, torch.eye(4).fill_diagonal_(0))


# all lowerings compute the same


@EXAMPLES
@given(st.data())
def test_dense_and_gather_are_masked_attention(data):
    pattern, layout = data.draw(on_layouts())
    text_mask = data.draw(padding(layout))
    scale = data.draw(st.none() | st.floats(0.1, 1.0))
    qkv = inputs(layout)
    blocks = compiled(pattern, layout)
    expected = attended(*qkv, mask_of(pattern, layout), layout, text_mask, scale)
    for name in ("dense", "gather"):
        close(lowered(name, blocks)(*qkv, scale, text_mask), expected)


@EXAMPLES
@given(st.data())
def test_heads_may_have_patterns_of_their_own(data):
    layout = data.draw(layouts())
    choice = [data.draw(leaves(layout)) for _ in range(2)]
    pattern = PerHead((choice[0], choice[1], choice[0]))
    text_mask = data.draw(padding(layout))
    qkv = inputs(layout)
    masks = torch.stack([mask_of(one, layout) for one in pattern.patterns])
    expected = attended(*qkv, masks, layout, text_mask)
    table = compiled_by_head(pattern, layout)
    for name in ("dense", "gather"):
        close(lowered(name, table)(*qkv, text_mask=text_mask), expected)


def by_head(layout, seed=0):
    """A table for each head, of clusters of any size, as if found at run time."""
    generator = torch.Generator().manual_seed(seed)
    groups = torch.randint(0, 4, (layout.image,), generator=generator)
    cells = torch.randint(0, 6, (layout.image,), generator=generator)
    groups[:4], cells[:6] = torch.arange(4), torch.arange(6)
    kept = torch.rand(HEADS, 4, 6, generator=generator) < 0.4
    kept[:, :, 0] |= ~kept.any(2)
    return groups, cells, kept


@EXAMPLES
@given(st.data())
def test_tables_by_head_are_served(data):
    layout = data.draw(layouts().filter(lambda one: one.image >= 6))
    text_mask = data.draw(padding(layout))
    groups, cells, kept = by_head(layout, data.draw(st.integers(0, 99)))
    blocks = BlockSparse.of_table(layout, groups, cells, kept)
    mask = kept[:, groups][:, :, cells]
    assert torch.equal(blocks.mask(), mask)
    qkv = inputs(layout)
    expected = attended(*qkv, mask, layout, text_mask)
    for name in ("dense", "gather"):
        close(lowered(name, blocks)(*qkv, text_mask=text_mask), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_masks_out_as_well(dtype):
    layout, pattern = Layout(3, 1, 12, 12), Neighbourhood((1, 3, 3))
    qkv = inputs(layout).to(dtype)
    blocks = compiled(pattern, layout)
    assert blocks.masks
    expected = attended(*qkv, mask_of(pattern, layout), layout)
    found = Gather(blocks)(*qkv)
    assert found.dtype == dtype
    assert (found - expected).abs().max() < 0.03


def test_chunks_change_nothing(monkeypatch):
    layout = Layout(5, 3, 8, 8)
    for pattern in (Surrounding((1, 2, 2)), Neighbourhood((1, 3, 3))):
        blocks, qkv = compiled(pattern, layout), inputs(layout)
        at_once = Gather(blocks)(*qkv)
        monkeypatch.setattr(gather, "BUDGET", 1)
        monkeypatch.setattr(gather, "EXPANDED", 1)
        close(Gather(blocks)(*qkv), at_once)
        monkeypatch.undo()


def test_groups_are_served_in_few_calls(monkeypatch):
    layout = Layout(4, 1, 64, 64)
    lowering = Gather(compiled(Surrounding((1, 4, 4)), layout))
    calls = []

    def counted(*args, **kwargs):
        calls.append(args[0].shape)
        return scaled_dot_product_attention(*args, **kwargs)

    monkeypatch.setattr(gather, "scaled_dot_product_attention", counted)
    lowering(*inputs(layout, batch=1, heads=1))
    assert len(calls) == 4  # corners, borders, the inside, the text; of 256 groups


@pytest.mark.parametrize("text_first", [True, False])
def test_a_full_pattern_is_plain_attention(text_first):
    layout = Layout(5, 2, 4, 6, text_first)
    qkv = inputs(layout)
    expected = scaled_dot_product_attention(*qkv)
    for name in ("dense", "gather"):
        close(lowered(name, compiled(Full(), layout))(*qkv), expected)


# FlexAttention: it compiles at every new table, so there are few

FLEX = {
    "whole groups": (Surrounding((1, 2, 4)), Layout(3, 2, 4, 8)),
    "masks": (Neighbourhood((1, 3, 3)) | CrissCross((1, 2, 5)), Layout(5, 2, 5, 5, False)),
    "no text": (Temporal(keep=0.5, block=4), Layout(0, 3, 4, 4)),
}


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", FLEX)
def test_flex_is_masked_attention(name):
    pattern, layout = FLEX[name]
    torch.compiler.reset()
    text_mask = torch.arange(layout.text) < torch.tensor([[2], [3]]) if layout.text else None
    qkv = inputs(layout)
    lowering = Flex(compiled(pattern, layout), block=16)
    for given_mask in {id(m): m for m in (None, text_mask)}.values():
        found = lowering(*qkv, text_mask=given_mask)
        close(found, attended(*qkv, mask_of(pattern, layout), layout, given_mask))


HEADED = Layout(3, 2, 3, 4, text_first=False)
HALVES = PerHead((Surrounding((1, 2, 2)), CrissCross((1, 1, 2)), Neighbourhood((1, 3, 3))))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_takes_a_table_for_each_head():
    torch.compiler.reset()
    groups, cells, kept = by_head(HEADED)
    blocks = BlockSparse.of_table(HEADED, groups, cells, kept)
    text_mask = torch.tensor([[1, 1, 0], [1, 0, 0]], dtype=torch.bool)
    qkv = inputs(HEADED)
    found = Flex(blocks, block=8)(*qkv, text_mask=text_mask)
    close(found, attended(*qkv, kept[:, groups][:, :, cells], HEADED, text_mask))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_takes_a_pattern_for_each_head():
    torch.compiler.reset()
    qkv = inputs(HEADED)
    masks = torch.stack([mask_of(one, HEADED) for one in HALVES.patterns])
    table = compiled_by_head(HALVES, HEADED)
    close(lowered("flex", table)(*qkv), attended(*qkv, masks, HEADED))


def test_flex_has_more_text_than_a_group_has_queries():
    """Text has no mask, and no row in the table of masks either."""
    layout = Layout(3, 1, 1, 2, text_first=False)
    blocks = compiled(Full() & CrissCross((1, 1, 1)), layout)
    qkv = inputs(layout)
    close(Flex(blocks, block=16)(*qkv), attended(*qkv, blocks.mask(), layout, None))


@EXAMPLES
@given(st.data())
def test_flex_lists_the_blocks_that_its_mask_keeps(data):
    pattern, layout = data.draw(on_layouts())
    text_mask = data.draw(padding(layout))
    blocks = compiled(pattern, layout)
    lowering = Flex(blocks, block=8)
    found = lowering.block_mask(text_mask)
    size = len(lowering.slots)
    mask = create_mask(found.mask_mod, 2, 1, size, size, device="cpu")
    tiles = mask.unflatten(3, (-1, 8)).unflatten(2, (-1, 8)).transpose(3, 4).flatten(4)
    listed = found.to_dense().bool()
    assert not (tiles.any(-1) & ~listed).any()
    full = torch.zeros_like(listed)
    for block, (count, order) in enumerate(
        zip(found.full_kv_num_blocks[0, 0], found.full_kv_indices[0, 0], strict=True)
    ):
        full[0, 0, block, order[:count]] = True
    assert (tiles.all(-1) | ~full).all()
    if text_mask is None and not blocks.masks:
        assert torch.equal(listed[0], tiles.any(-1)[0])
    tokens = lowering.slots[lowering.slots >= 0]
    assert sorted(tokens.tolist()) == list(range(layout.tokens))


# xformers: without CUDA, what is packed and what is refused


@EXAMPLES
@given(st.data())
def test_packed_groups_are_masked_attention(data):
    layout = data.draw(layouts().filter(lambda one: one.image >= 6))
    text_mask = data.draw(padding(layout))
    groups, cells, kept = by_head(layout)
    kept = kept if data.draw(st.booleans()) else kept[0]
    blocks = BlockSparse.of_table(layout, groups, cells, kept)
    qkv = inputs(layout)
    valid = torch.ones(2, layout.text, dtype=torch.bool) if text_mask is None else text_mask
    text = torch.arange(layout.text) + layout.text_span.start
    plan = packed(blocks, [text[row] for row in valid])
    q, k, v = (x.unflatten(1, (blocks.heads, -1)).transpose(2, 3).flatten(0, 2) for x in qkv)
    segments = zip(
        q[plan.queries].split(plan.query_counts),
        k[plan.keys].split(plan.key_counts),
        v[plan.keys].split(plan.key_counts),
        strict=True,
    )
    done = [
        scaled_dot_product_attention(*(x.transpose(0, 1) for x in segment)) for segment in segments
    ]
    found = unpacked(torch.cat(done, dim=1).transpose(0, 1), plan, qkv[0].shape, blocks.heads)
    close(found, attended(*qkv, blocks.mask(), layout, text_mask))


@pytest.mark.skipif(
    not torch.cuda.is_available() or find_spec("xformers") is None, reason="needs CUDA and xformers"
)
@pytest.mark.parametrize("padded", [False, True])
def test_xformers_is_masked_attention(padded):
    """On its device, in half precision as well; what it keeps for the kernel is made once."""
    text_mask = torch.tensor([[1, 1, 0], [1, 0, 0]], dtype=torch.bool) if padded else None
    groups, cells, kept = by_head(HEADED)
    table = BlockSparse.of_table(HEADED, groups, cells, kept).to("cuda")
    qkv = inputs(HEADED).cuda()
    expected = lowered("dense", table)(*qkv, text_mask=text_mask.cuda() if padded else None)
    lowering = lowered("xformers", table)
    close(lowering(*qkv, text_mask=text_mask), expected)
    half = lowering(*qkv.bfloat16(), text_mask=text_mask)
    assert (half - expected).abs().max() < 0.03


def test_the_mask_of_a_packed_batch_is_made_once(monkeypatch):
    """With a kernel that is not there: it is given each group's queries and keys."""
    made, given = [], []

    class Diagonal:
        @staticmethod
        def from_seqlens(queries, keys, *, device):
            made.append((queries, keys, str(device)))
            return made[-1]

    def attend(q, k, v, *, attn_bias, scale):
        given.append(attn_bias)
        queries, keys, _ = attn_bias
        parts = zip(q[0].split(queries), k[0].split(keys), v[0].split(keys), strict=True)
        heads_first = (tuple(x.transpose(0, 1) for x in part) for part in parts)
        done = [scaled_dot_product_attention(*part) for part in heads_first]
        return torch.cat(done, dim=1).transpose(0, 1)[None]

    ops = SimpleNamespace(
        fmha=SimpleNamespace(attn_bias=SimpleNamespace(BlockDiagonalMask=Diagonal)),
        memory_efficient_attention=attend,
    )
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    monkeypatch.setitem(sys.modules, "xformers", SimpleNamespace(ops=ops))
    monkeypatch.setattr(xformers, "refusal", lambda blocks, device: None)
    layout = Layout(3, 1, 4, 4)
    blocks, qkv = compiled(Surrounding((1, 2, 2), 0), layout), inputs(layout)
    lowering = lowered("xformers", blocks)
    for _ in range(2):
        close(lowering(*qkv), attended(*qkv, blocks.mask(), layout))
    lowering(*qkv, text_mask=torch.tensor([[1, 1, 0], [1, 0, 0]], dtype=torch.bool))
    assert len(made) == 2 and len(given) == 3


def test_what_cannot_serve_says_so():
    blocks = compiled(Surrounding((1, 2, 2)), Layout(2, 1, 4, 4))
    found = refusals(blocks, "cpu")
    assert set(found) == {"flex", "xformers"}
    assert "needs CUDA" in found["xformers"]
    with pytest.raises(BadInput, match="take gather"):
        lowered("xformers", blocks)
    with pytest.raises(BadInput, match="one of dense, gather, flex, xformers"):
        lowered("sage", blocks)
    assert (
        "kernel on CUDA"
        in refusals(compiled_by_head(PerHead((Full(),)), blocks.layout), "cpu")["flex"]
    )
    masked = compiled(Neighbourhood((1, 3, 3)), Layout(2, 1, 16, 16))
    assert set(refusals(masked, "cuda")) == {"xformers"}
    assert set(NAMES) == {"dense", "gather", "flex", "xformers"}


# who reaches whom


@EXAMPLES
@given(st.data())
def test_keys_that_are_not_attended_to_change_nothing(data):
    pattern, layout = data.draw(on_layouts())
    key = data.draw(st.integers(0, layout.image - 1))
    q, k, v = inputs(layout)
    lowering = Gather(compiled(pattern, layout))
    before = lowering(q, k, v)
    at = layout.image_span.start + key
    k[:, :, at] += 3.0
    v[:, :, at] += 3.0
    changed = (lowering(q, k, v) != before).any(-1)
    attending = mask_of(pattern, layout)[:, key]
    assert torch.equal(changed[:, :, layout.image_span].all(0).all(0), attending)
    assert torch.equal(changed[:, :, layout.image_span].any(0).any(0), attending)
    assert changed[:, :, layout.text_span].all()


@EXAMPLES
@given(st.data())
def test_text_reaches_every_row_and_padding_none(data):
    pattern, layout = data.draw(on_layouts().filter(lambda case: case[1].text))
    token = data.draw(st.integers(0, layout.text - 1))
    text_mask = torch.ones(2, layout.text, dtype=torch.bool)
    text_mask[1, token] = False
    q, k, v = inputs(layout)
    lowering = Gather(compiled(pattern, layout))
    before = lowering(q, k, v, text_mask=text_mask)
    k[:, :, layout.text_span.start + token] += 3.0
    v[:, :, layout.text_span.start + token] += 3.0
    changed = (lowering(q, k, v, text_mask=text_mask) != before).any(-1)
    assert changed[0].all()
    assert not changed[1].any()


TABLES = {"masks": (*FLEX["masks"], compiled), "by head": (HALVES, HEADED, compiled_by_head)}


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("case", TABLES)
@pytest.mark.parametrize("name", ["dense", "gather", "flex"])
def test_by_every_lowering_a_key_reaches_whom_the_pattern_says(name, case):
    """A masked key nobody, a key of the text everybody, a padded one none of its sample."""
    torch.compiler.reset()
    pattern, layout, make = TABLES[case]
    masks = [mask_of(one, layout) for one in getattr(pattern, "patterns", (pattern,) * HEADS)]
    text_mask = torch.ones(2, layout.text, dtype=torch.bool)
    text_mask[1, 0] = False
    q, k, v = inputs(layout)
    lowering = lowered(name, make(pattern, layout))
    before = lowering(q, k, v, text_mask=text_mask)

    def reached(token):
        """Which rows change with a key, ``[B, H, S]``."""
        keys, values = k.clone(), v.clone()
        keys[:, :, token] += 3.0
        values[:, :, token] += 3.0
        return (lowering(q, keys, values, text_mask=text_mask) != before).any(-1)

    for key in (0, layout.image // 2):
        found = reached(layout.image_span.start + key)
        expected = torch.stack([mask[:, key] for mask in masks]).expand(2, -1, -1)
        assert torch.equal(found[:, :, layout.image_span], expected)
        assert found[:, :, layout.text_span].all()
        assert not expected.all()
    padded = reached(layout.text_span.start)
    assert padded[0].all() and not padded[1].any()
    assert reached(layout.text_span.stop - 1).all()


def test_samples_with_equal_padding_are_served_together():
    layout = Layout(3, 1, 2, 2, text_first=False)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 0]], dtype=torch.bool)
    found = {
        tuple(samples.tolist()): text.tolist() for samples, text in by_text(layout, mask, "cpu")
    }
    assert found == {(0, 2): [4, 5], (1,): [4]}
    [(samples, text)] = by_text(layout, mask[:1], "cpu")
    assert samples is None
    assert text.tolist() == [4, 5]


@pytest.mark.parametrize("name", ["dense", "gather", "flex"])
def test_what_does_not_fit_the_table_is_refused(name):
    layout = Layout(2, 1, 4, 4)
    q, k, v = inputs(layout)
    lowering = lowered(name, compiled(Surrounding((1, 2, 2)), layout))
    with pytest.raises(BadInput, match=r"needs all three as \[B, H, 18, D\]"):
        lowering(q[:, :, 1:], k, v)
    with pytest.raises(BadInput, match=r"needs to be \[2, 2\]"):
        lowering(q, k, v, text_mask=torch.ones(1, 2, dtype=torch.bool))
    labels = Partition.of(torch.arange(16) // 8).part
    by_head = BlockSparse.of_table(layout, labels, labels, torch.ones(5, 2, 2))
    with pytest.raises(BadInput, match="for 5 heads"):
        lowered(name, by_head)(q, k, v)
    with pytest.raises(BadInput, match="for 1 heads"):
        lowered(name, compiled_by_head(PerHead((Full(),)), layout))(q, k, v)
