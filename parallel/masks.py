"""Masks of attention, of whose tokens each process has a part.

A process has the block of a mask that belongs to its own queries and its own keys. What other
processes have is known from it where a mask has to do with tokens, not with pairs of them: every
query sees the keys that all see, or (padding, in networks that multiply masks of queries and keys)
is told nothing of any of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from accel.seams.attention import HIDDEN, Asked

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from parallel.exchange import Exchange

NONE, MASKED, BY_QUERY, ADDED, OTHER = 0, 1, 2, 4, -1
"""What is known of an attention's mask: none, or the sum of what holds; other: not served."""


def agreed(kinds: Iterable[int]) -> int:
    """What holds in a process holds for all."""
    found = NONE
    for kind in kinds:
        if OTHER in (kind, found):
            return OTHER
        found |= kind
    return found


@dataclass(frozen=True, eq=False)
class Mask:
    """A mask of tokens.

    Attributes:
        keys: ``[B, K]``: booleans (seen), or numbers that are added to scores.
        queries: ``[B, Q]``: which of them are under the mask of keys; False (or 0) stands for
            every key of the others. ``None``: all are.
    """

    keys: Tensor
    queries: Tensor | None = None

    def block(self) -> Tensor:
        """As torch takes it: ``[B, 1, 1, K]`` or ``[B, 1, Q, K]``."""
        keys = self.keys[:, None, None, :]
        if self.queries is None:
            return keys
        return torch.where(self.queries[:, None, :, None], keys, torch.zeros_like(keys))

    def bias(self, keys: Tensor, dtype: torch.dtype) -> Tensor:
        """The block for other keys, as finite numbers to add: no part of all keys is without one.

        Args:
            keys: ``[B, K]``, of the process whose keys are here at the moment.
            dtype: That of queries.
        """
        block = replace(self, keys=keys).block()
        if block.dtype != torch.bool:
            return block.clamp(min=HIDDEN).to(dtype)
        return torch.zeros_like(block, dtype=dtype).masked_fill(~block, HIDDEN)

    def blank(self, found: Tensor) -> Tensor:
        """An answer ``[B, H, Q, D]``, zero for queries that see no key, as torch's is."""
        if self.queries is None or self.keys.dtype != torch.bool:
            return found
        return found.masked_fill(~self.queries[:, None, :, None], 0.0)

    def gathered(self, exchange: Exchange, lengths: Sequence[tuple[int, ...]]) -> Mask:
        """That of the tokens of all processes.

        Args:
            exchange: The processes.
            lengths: Queries and keys (and more) of each.
        """
        queries = self.queries
        if queries is not None:
            queries = exchange.gather(queries, [one[0] for one in lengths], 1)
        return Mask(exchange.gather(self.keys, [one[1] for one in lengths], 1), queries)


def kind_of(asked: Asked) -> int:
    """What is known of the mask of an attention to own tokens. May read the device."""
    if asked.is_causal:
        return OTHER
    if asked.attn_mask is None:
        return NONE
    block = _block(asked)
    if block is None:
        return OTHER
    kind = MASKED | (0 if block.dtype == torch.bool else ADDED)
    if block.shape[1] == 1 or bool((block == block[:, :1]).all()):
        return kind
    found = _by_query(block).block()[:, 0]
    return kind | BY_QUERY if torch.equal(found, block) else OTHER


def mask_of(asked: Asked, kind: int) -> Mask | None:
    """The mask of own tokens.

    Args:
        asked: The attention to own tokens.
        kind: What holds for the masks of all processes, not `OTHER`.
    """
    if kind == NONE:
        return None
    batch, _, count, _ = asked.query.shape
    block = _block(asked)
    if block is None:
        keys = asked.key.new_zeros((1, 1, asked.key.shape[2]))
        block = keys if kind & ADDED else keys == 0
    if not kind & BY_QUERY:
        return Mask(block[:, 0].expand(batch, -1))
    return _by_query(block.expand(batch, count, -1))


def _block(asked: Asked) -> Tensor | None:
    """A mask as ``[B or 1, Q or 1, K]``; ``None`` if there is none, or it is for other tokens."""
    if asked.attn_mask is None:
        return None
    mask = asked.attn_mask
    mask = mask.reshape((1,) * (4 - mask.ndim) + tuple(mask.shape))
    batch, _, count, _ = asked.query.shape
    fits = (
        mask.shape[0] in (1, batch)
        and mask.shape[1] == 1
        and mask.shape[2] in (1, count)
        and mask.shape[3] == asked.key.shape[2]
    )
    return mask[:, 0] if fits else None


def _by_query(block: Tensor) -> Mask:
    """A mask ``[B, Q, K]`` taken apart.

    Where all queries are told the same they are under the mask, whatever it is: which of them are
    told nothing shows in a block only if some others are told something.
    """
    alike = (block == block[:, :1]).all(2).all(1)
    queries = (block != 0).any(2) | alike[:, None]
    first = queries.int().argmax(1)
    keys = block.take_along_dim(first[:, None, None], 1)[:, 0]
    return Mask(keys, queries)
