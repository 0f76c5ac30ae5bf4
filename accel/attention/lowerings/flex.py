"""FlexAttention: one kernel that skips the blocks that nobody attends to.

Every group of queries is put in blocks of its own, filled up with slots that nobody attends to;
text comes last. The lists of blocks come straight from the table, and a mask decides inside the
blocks that are kept in part. Without CUDA, PyTorch computes all scores and applies the mask alone:
right, and slow.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from accel.attention.blocks import UNMASKED, BlockSparse
from accel.attention.lowerings.lowering import ByMask, checked

EMPTY = -1


class Flex:
    """The table as a `BlockMask`.

    Args:
        blocks: Which group attends to which cell.
        block: Queries, and keys, of a block; of the kernel's own or a multiple.
    """

    def __init__(self, blocks: BlockSparse, block: int = 128) -> None:
        self.blocks = blocks
        self.block = block
        self.slots, self._group = _slots(blocks, block)
        self._place = (self.slots != EMPTY).nonzero()[:, 0]
        self._back = self._place[self.slots[self._place].argsort()]
        self._some, self._every = self._table()
        self._masks = _Masks(blocks, self) if blocks.masks else None
        self._unpadded = self.block_mask()
        self._padded: ByMask[BlockMask] = ByMask()
        on_gpu = blocks.kept.device.type == "cuda"
        self._kernel: Any = torch.compile(flex_attention) if on_gpu else flex_attention

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float | None = None,
        text_mask: Tensor | None = None,
    ) -> Tensor:
        """As `lowering.Lowering` says."""
        checked(self.blocks, q, k, v, text_mask)
        slots = self.slots.clamp(min=0)
        slotted = (x.index_select(2, slots) for x in (q, k, v))
        mask = self._unpadded
        if text_mask is not None:
            mask = self._padded.get(text_mask, self.block_mask)
        out: Tensor = self._kernel(*slotted, block_mask=mask, scale=scale)
        return out.index_select(2, self._back)

    def block_mask(self, text_mask: Tensor | None = None) -> BlockMask:
        """The blocks that are kept, whole and in part, with the mask inside them."""
        text = self.text_slots
        whole = self._every if text_mask is None else self._every & ~text
        blocks = self._blocks(self._some).any(-1)
        full = self._blocks(whole).all(-1)
        return BlockMask.from_kv_blocks(
            *_listed(blocks & ~full),
            *_listed(full),
            BLOCK_SIZE=self.block,
            mask_mod=self._mask_mod(text_mask),
        )

    @property
    def text_slots(self) -> Tensor:
        """Which slots are text, ``[M]``."""
        span = self.blocks.layout.text_span
        found: Tensor = (self.slots >= span.start) & (self.slots < span.stop)
        return found

    def _table(self) -> tuple[Tensor, Tensor]:
        """Whether any, and whether every, query of a group attends to a slot, ``[R, T + 1, M]``.

        Group T is the text.
        """
        blocks = self.blocks
        heads, groups = blocks.kept.shape[:2]
        image = (self.slots != EMPTY) & ~self.text_slots
        token = self.slots[image] - blocks.layout.image_span.start
        some = (self.slots != EMPTY).expand(heads, groups + 1, -1).clone()
        some[:, :groups, image] = blocks.kept[:, :, blocks.cells.part[token]]
        every = some.clone()
        slot_of = torch.full((blocks.layout.image,), EMPTY, device=token.device)
        slot_of[token] = image.nonzero()[:, 0]
        for head, group in (blocks.mask_of != UNMASKED).nonzero().tolist():
            mask = blocks.masks[int(blocks.mask_of[head, group])]
            every[head, group, slot_of[blocks.keys(head, group)]] = mask.all(0)
        return some, every

    def _blocks(self, table: Tensor) -> Tensor:
        """For each block of queries the slots of each block of keys, ``[R, M/b, M/b, b]``."""
        group_of_block = self._group[:: self.block]
        rows = table[:, group_of_block]
        return rows.reshape(*rows.shape[:2], -1, self.block)

    def _mask_mod(self, text_mask: Tensor | None) -> Any:
        group, some, masks = self._group, self._some, self._masks
        one = self.blocks.heads == 1
        valid = None
        if text_mask is not None:
            valid = some.new_ones((len(text_mask), len(self.slots)))
            valid[:, self.text_slots] = text_mask.bool().to(some.device)

        def kept(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
            head = h * 0 if one else h
            found = some[head, group[q], kv]
            if masks is not None:
                found = found & masks.keeps(head, q, kv)
            return found if valid is None else found & valid[b, kv]

        return kept


class _Masks:
    """The masks of groups as look-up tables."""

    def __init__(self, blocks: BlockSparse, flex: Flex) -> None:
        device = blocks.kept.device
        count, size = len(flex.slots), int(blocks.groups.sizes.max())
        longest = max(mask.shape[1] for mask in blocks.masks)
        self._tables = torch.ones(
            (len(blocks.masks) + 1, size, longest), dtype=torch.bool, device=device
        )
        for number, mask in enumerate(blocks.masks):
            self._tables[number, : mask.shape[0], : mask.shape[1]] = mask
        heads, groups = blocks.mask_of.shape
        self._number = torch.full((heads, groups + 1), len(blocks.masks), device=device)
        self._number[:, :groups] = blocks.mask_of.where(blocks.mask_of >= 0, len(blocks.masks))
        self._group = flex._group
        self._rank = _ranks(flex._group)
        self._rank[flex.text_slots | (flex.slots == EMPTY)] = 0  # of no mask: any row will do
        self._column = torch.zeros((heads, groups + 1, count), dtype=torch.int32, device=device)
        slot_of = torch.zeros(blocks.layout.tokens, dtype=torch.long, device=device)
        slot_of[flex.slots[flex._place]] = flex._place
        for head, group in (blocks.mask_of != UNMASKED).nonzero().tolist():
            keys = blocks.keys(head, group) + blocks.layout.image_span.start
            ranks = torch.arange(len(keys), dtype=torch.int32, device=device)
            self._column[head, group, slot_of[keys]] = ranks
        self._image = ~flex.text_slots

    def keeps(self, head: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        """Whether the mask of the query's group, if it has one, keeps a slot."""
        group = self._group[q]
        number, column = self._number[head, group], self._column[head, group, kv]
        return self._tables[number, self._rank[q], column] | ~self._image[kv]


def _slots(blocks: BlockSparse, block: int) -> tuple[Tensor, Tensor]:
    """The token of each slot (-1: none), and its group (the text is group T), ``[M]`` each."""
    layout, parts = blocks.layout, blocks.groups
    sizes = [*parts.sizes.tolist(), layout.text]
    span = layout.text_span
    text = torch.arange(span.start, span.stop, device=parts.order.device)
    tokens = torch.cat([parts.order + layout.image_span.start, text])
    slots, groups = [], []
    for group, members in enumerate(torch.split(tokens, sizes)):
        room = -(-len(members) // block) * block
        slots.append(torch.nn.functional.pad(members, (0, room - len(members)), value=EMPTY))
        groups.append(torch.full((room,), group, device=tokens.device))
    return torch.cat(slots), torch.cat(groups)


def _ranks(group: Tensor) -> Tensor:
    """Each slot's place in its group, ``[M]``."""
    sizes = group.bincount()
    starts = sizes.cumsum(0) - sizes
    return torch.arange(len(group), device=group.device) - starts[group]


def _listed(table: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks are kept, and which (they come first): as `BlockMask` wants them."""
    order = table.int().argsort(dim=-1, descending=True, stable=True)
    return table.sum(-1, dtype=torch.int32)[None], order.int()[None]
