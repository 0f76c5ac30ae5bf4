"""Dense attention on gathered keys: what serves everywhere, and the default on the CPU.

Groups of queries that attend to equally many keys make a *bucket*: their keys and values are
gathered side by side, and one dense call attends for all of them, a chunk of groups at a time.
Text queries attend to everything in a call of their own. Samples whose text is padded otherwise are
served apart, so that padding is never gathered and needs no mask.

Where all heads share the table, heads are a batch of their own; otherwise a head's group is one
more group, and the tokens of all heads lie in one row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from accel.attention.blocks import UNMASKED, BlockSparse
from accel.attention.lowerings.lowering import ByMask, by_text, checked

BUDGET = 1 << 25
"""Bytes of keys and values that are gathered at once, where one group has no more."""

EXPANDED = 1 << 26
"""Booleans that are looked at at once when the keys of groups are listed."""


@dataclass(frozen=True, eq=False)
class Bucket:
    """Groups with equally many queries and equally many image keys.

    Attributes:
        queries: The groups' tokens, ``[n, G]``, counted through all heads of the table.
        keys: The image tokens that they attend to, ``[n, L]``, likewise.
        shift: Where the tokens of the group's head begin, ``[n, 1]``.
        hidden: Which keys are hidden from which queries, ``[U, G, L]``; None where none is.
        mask_of: Which of these a group has, ``[n]``.
    """

    queries: Tensor
    keys: Tensor
    shift: Tensor
    hidden: Tensor | None
    mask_of: Tensor


class Gather:
    """Few large dense calls, each on the keys that its queries attend to.

    Args:
        blocks: Which group attends to which cell.
    """

    def __init__(self, blocks: BlockSparse) -> None:
        self.blocks = blocks
        self.buckets = list(buckets(blocks))
        layout, heads, device = blocks.layout, blocks.heads, blocks.kept.device
        image = torch.cat([bucket.queries.flatten() for bucket in self.buckets])
        span = layout.text_span
        text = torch.arange(span.start, span.stop, device=device)
        head = torch.arange(heads, device=device)[:, None] * layout.tokens
        self._image = image
        self._unpadded = self._alike()
        self._padded: ByMask[list[tuple[Tensor | None, Tensor]]] = ByMask()
        self._back = torch.cat([image, (head + text).flatten()]).argsort()

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float | None = None,
        text_mask: Tensor | None = None,
    ) -> Tensor:
        """As `lowering.Lowering` says. Reads a mask of the text where it is."""
        checked(self.blocks, q, k, v, text_mask)
        alike = self._unpadded
        if text_mask is not None:
            alike = self._padded.get(text_mask, self._alike)
        if len(alike) == 1:
            return self._attend(q, k, v, scale, alike[0][1])
        out = torch.empty_like(q)
        for samples, text in alike:
            out[samples] = self._attend(q[samples], k[samples], v[samples], scale, text)
        return out

    def _alike(self, text_mask: Tensor | None = None) -> list[tuple[Tensor | None, Tensor]]:
        return by_text(self.blocks.layout, text_mask, self.blocks.kept.device)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None, text: Tensor) -> Tensor:
        """With the valid text tokens, the same for all samples."""
        rows = q.shape[0] * q.shape[1] // self.blocks.heads
        flat = (rows, self.blocks.heads * q.shape[2], q.shape[3])
        keys, values = k.reshape(flat), v.reshape(flat)
        queries = q.reshape(flat).index_select(1, self._image)
        done = q.new_empty(flat)
        start = 0
        for bucket in self.buckets:
            for chunk in self._chunks(bucket, rows * q.shape[3] * q.element_size(), len(text)):
                stop = start + bucket.queries[chunk].numel()
                done[:, start:stop] = _served(
                    bucket, chunk, queries[:, start:stop], keys, values, text, scale
                )
                start = stop
        if self.blocks.layout.text:
            done[:, start:] = self._text(q, k, v, scale, text).reshape(rows, -1, q.shape[3])
        return done.index_select(1, self._back).reshape(q.shape)

    def _chunks(self, bucket: Bucket, bytes_a_key: int, text: int) -> Iterator[slice]:
        count, length = bucket.keys.shape
        step = max(1, BUDGET // (2 * bytes_a_key * (length + text)))
        return (slice(part, min(part + step, count)) for part in range(0, count, step))

    def _text(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None, text: Tensor) -> Tensor:
        layout = self.blocks.layout
        if len(text) < layout.text:
            span = layout.image_span
            image = torch.arange(span.start, span.stop, device=q.device)
            valid = torch.cat([text, image])
            k, v = k.index_select(2, valid), v.index_select(2, valid)
        return scaled_dot_product_attention(q[:, :, layout.text_span], k, v, scale=scale)


def _served(
    bucket: Bucket,
    chunk: slice,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    text: Tensor,
    scale: float | None,
) -> Tensor:
    """Some groups of a bucket, ``[P, n·G, D]``."""
    some = bucket.keys[chunk]
    if len(text):
        some = torch.cat([some, bucket.shift[chunk] + text], dim=1)
    rows, dim = queries.shape[0], queries.shape[2]
    k, v = (x.index_select(1, some.flatten()).view(rows, *some.shape, dim) for x in (keys, values))
    out = scaled_dot_product_attention(
        queries.view(rows, len(some), -1, dim),
        k,
        v,
        attn_mask=_bias(bucket, chunk, len(text), queries.dtype),
        scale=scale,
    )
    return out.flatten(1, 2)


def _bias(bucket: Bucket, chunk: slice, text: int, dtype: torch.dtype) -> Tensor | None:
    """What is added to the scores, ``[1, n, G, L + text]``; made here faster than from booleans."""
    if bucket.hidden is None:
        return None
    hidden = bucket.hidden[bucket.mask_of[chunk]]
    bias = hidden.new_zeros((*hidden.shape[:2], hidden.shape[2] + text), dtype=dtype)
    bias[..., : hidden.shape[2]].copy_(hidden).mul_(torch.finfo(dtype).min)
    return bias[None]


def buckets(blocks: BlockSparse) -> Iterator[Bucket]:
    """Groups by how many queries and keys they have, and whether they have a mask."""
    sizes = blocks.groups.sizes.expand_as(blocks.lengths)
    kinds = torch.stack([sizes, blocks.lengths, (blocks.mask_of != UNMASKED).long()], dim=-1)
    found, kind = torch.unique(kinds.flatten(0, 1), dim=0, return_inverse=True)
    count = len(blocks.groups)
    for number, (size, length, masked) in enumerate(found.tolist()):
        rows = (kind == number).nonzero()[:, 0]
        yield _bucket(blocks, rows // count, rows % count, size, length, bool(masked))


def _bucket(
    blocks: BlockSparse, head: Tensor, group: Tensor, size: int, length: int, masked: bool
) -> Bucket:
    layout, groups = blocks.layout, blocks.groups
    shift = head[:, None] * layout.tokens
    begin = shift + layout.image_span.start
    places = groups.starts[group][:, None] + torch.arange(size, device=group.device)
    mask_of, hidden = blocks.mask_of[head, group], None
    if masked:
        used, mask_of = torch.unique(mask_of, return_inverse=True)
        hidden = ~torch.stack([blocks.masks[number] for number in used.tolist()])
    keys = _keys(blocks, head, group, length)
    return Bucket(groups.order[places] + begin, keys + begin, shift, hidden, mask_of)


def _keys(blocks: BlockSparse, head: Tensor, group: Tensor, length: int) -> Tensor:
    """Image keys of groups that have equally many, ``[n, L]``, cell after cell."""
    cell = blocks.cells.part[blocks.cells.order]
    found = []
    step = max(1, EXPANDED // len(cell))
    for part in range(0, len(group), step):
        some = slice(part, part + step)
        kept = blocks.kept[head[some], group[some]][:, cell]
        found.append(blocks.cells.order[kept.nonzero()[:, 1].view(-1, length)])
    return torch.cat(found)
