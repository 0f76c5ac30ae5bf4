"""Dense attention with a mask: the reference. Nothing is saved, and the mask has S² booleans."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from accel.attention.blocks import BlockSparse
from accel.attention.lowerings.lowering import checked


class Dense:
    """All scores, most of them masked out.

    Args:
        blocks: Which group attends to which cell.
    """

    def __init__(self, blocks: BlockSparse) -> None:
        size, span = blocks.layout.tokens, blocks.layout.image_span
        self.blocks = blocks
        shape = (blocks.heads, size, size)
        self._mask = torch.ones(shape, dtype=torch.bool, device=blocks.kept.device)
        self._mask[:, span, span] = blocks.mask()

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
        mask = self._mask[None]
        if text_mask is not None:
            valid = mask.new_ones(q.shape[0], 1, 1, q.shape[2])
            valid[:, 0, 0, self.blocks.layout.text_span] = text_mask.bool()
            mask = mask & valid
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
