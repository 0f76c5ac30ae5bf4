"""xformers: one kernel call for groups of any number of queries and keys.

The gathered keys of all groups lie one after the other, and a block-diagonal mask says where one
group ends. No buckets are needed; groups with a mask cannot be served.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from accel.attention.blocks import UNMASKED, BlockSparse
from accel.attention.lowerings.lowering import ByMask, checked
from accel.errors import BadInput


@dataclass(frozen=True, eq=False)
class Packed:
    """Groups one after the other; tokens are counted through all samples and heads of the table.

    Attributes:
        queries: The groups' tokens, ``[ΣG]``.
        keys: The tokens that they attend to, ``[ΣL]``.
        query_counts: G of each group; text queries of a sample are a group too.
        key_counts: L of each group.
    """

    queries: Tensor
    keys: Tensor
    query_counts: list[int]
    key_counts: list[int]

    @cached_property
    def diagonal(self) -> Any:
        """The kernel's mask: a group's queries attend to its own keys alone. Made once, on them."""
        xops: Any = import_module("xformers.ops")
        kind = xops.fmha.attn_bias.BlockDiagonalMask
        return kind.from_seqlens(self.query_counts, self.key_counts, device=self.keys.device)


def packed(blocks: BlockSparse, texts: Sequence[Tensor]) -> Packed:
    """All groups of a batch.

    Args:
        blocks: Which group attends to which cell; no masks.
        texts: Valid text tokens of each sample, numbers among all tokens.
    """
    layout, device = blocks.layout, blocks.kept.device
    image = torch.arange(layout.image, device=device) + layout.image_span.start
    span = layout.text_span
    all_text = torch.arange(span.start, span.stop, device=device)
    members = torch.split(blocks.groups.order, blocks.groups.sizes.tolist())
    pairs: list[tuple[Tensor, Tensor]] = []
    for sample, text in enumerate(texts):
        for head in range(blocks.heads):
            shift = (sample * blocks.heads + head) * layout.tokens
            for group, queries in enumerate(members):
                keys = torch.cat([image[blocks.keys(head, group)], text])
                pairs.append((image[queries] + shift, keys + shift))
            if layout.text:
                pairs.append((all_text + shift, torch.cat([image, text]) + shift))
    asking, asked = [queries for queries, _ in pairs], [keys for _, keys in pairs]
    counts = [len(part) for part in asking], [len(part) for part in asked]
    return Packed(torch.cat(asking), torch.cat(asked), *counts)


def refusal(blocks: BlockSparse, device: torch.device) -> str | None:
    """Why xformers cannot serve a table on a device; None where it can."""
    if device.type != "cuda":
        return f"xformers needs CUDA, and attention is on {device.type}: take gather there"
    if find_spec("xformers") is None:
        return "xformers is not installed: pip install 'diffusers-accel[xformers]', or take gather"
    if bool((blocks.mask_of != UNMASKED).any()):
        return (
            "xformers attends to all keys of a group, and this pattern has groups that need a "
            "mask: take gather or flex, or a pattern whose groups share all keys"
        )
    return None


class XFormers:
    """Block-diagonal attention on packed keys.

    Args:
        blocks: Which group attends to which cell.

    Raises:
        BadInput: Without CUDA or the package, or for a table with masks.
    """

    def __init__(self, blocks: BlockSparse) -> None:
        reason = refusal(blocks, blocks.kept.device)
        if reason:
            raise BadInput(f"{reason}.")
        self.blocks = blocks
        self._known: ByMask[Packed] = ByMask()

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float | None = None,
        text_mask: Tensor | None = None,
    ) -> Tensor:
        """As `lowering.Lowering` says. Reads the device where a mask of the text is given."""
        xops: Any = import_module("xformers.ops")
        checked(self.blocks, q, k, v, text_mask)
        plan = self._packed(q.shape[0], text_mask)
        flat = [_flat(x, self.blocks.heads) for x in (q, k, v)]
        out = xops.memory_efficient_attention(
            flat[0][plan.queries][None],
            flat[1][plan.keys][None],
            flat[2][plan.keys][None],
            attn_bias=plan.diagonal,
            scale=scale,
        )
        return unpacked(out[0], plan, q.shape, self.blocks.heads)

    def _packed(self, samples: int, text_mask: Tensor | None) -> Packed:
        layout = self.blocks.layout
        if text_mask is None:
            text_mask = torch.ones(samples, layout.text, dtype=torch.bool)
        return self._known.get(text_mask, self._made)

    def _made(self, text_mask: Tensor) -> Packed:
        span = self.blocks.layout.text_span
        tokens = torch.arange(span.start, span.stop)
        texts = [tokens[row].to(self.blocks.kept.device) for row in text_mask.bool().cpu()]
        return packed(self.blocks, texts)


def _flat(x: Tensor, heads: int) -> Tensor:
    """``[B, H, S, D]`` as ``[B·R·S, H/R, D]``."""
    samples, every, tokens, dim = x.shape
    split = x.reshape(samples, heads, every // heads, tokens, dim)
    return split.transpose(2, 3).flatten(0, 2)


def unpacked(out: Tensor, plan: Packed, shape: torch.Size, heads: int) -> Tensor:
    """The answers of packed queries, ``[ΣG, H/R, D]``, as ``[B, H, S, D]``."""
    flat = torch.empty_like(out)
    flat[plan.queries] = out
    split = flat.view(shape[0], heads, shape[2], shape[1] // heads, shape[3])
    return split.transpose(2, 3).reshape(shape)
