"""Tables that were found at run time, one for each sample and head, and attention by them.

Lowerings take a table for each head; here a sample's heads are heads like any other, so that B
samples of H heads are one sample of B·H. Samples whose text is padded otherwise are served apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from accel.attention.blocks import BlockSparse, ByHead
from accel.attention.patterns.pattern import Partition
from accel.seams.layout import Layout
from accel.seams.memory import bytes_of


@dataclass(frozen=True, eq=False)
class Found:
    """Who attends to whom, by head.

    Attributes:
        groups: The group of each image query, ``[N]`` where all heads share them, or ``[P, N]``:
            then some may be empty.
        cells: The cell of each image key, likewise.
        kept: Which group attends to which cell, ``[P, T, C]``.
    """

    groups: Tensor
    cells: Tensor
    kept: Tensor

    @property
    def bytes(self) -> int:
        """Memory of it."""
        return bytes_of(self.groups, self.cells, self.kept)

    def of(self, heads: Tensor | slice) -> Found:
        """That of some heads."""
        groups, cells = (x if x.ndim == 1 else x[heads] for x in (self.groups, self.cells))
        return Found(groups, cells, self.kept[heads])

    def table(self, layout: Layout) -> BlockSparse | ByHead:
        """What lowerings take."""
        if self.groups.ndim == 1:
            return BlockSparse.of_table(layout, self.groups, self.cells, self.kept)
        parts = zip(self.groups, self.cells, self.kept, strict=True)
        return ByHead(tuple(((p,), _of_head(layout, *part)) for p, part in enumerate(parts)))

    def density(self, layout: Layout) -> float:
        """Share of all pairs of tokens that is kept, text included. Reads the device."""
        heads, groups, cells = self.kept.shape
        queries, keys = _counts(self.groups, groups), _counts(self.cells, cells)
        seen = torch.where(self.kept, keys[:, None], 0).sum(-1)
        inside = (queries * seen).sum().item() / heads
        return 1.0 - (layout.image**2 - inside) / layout.tokens**2


def joined(found: Sequence[Found]) -> Found:
    """The heads of all, one after the other."""
    first = found[0]
    if len(found) == 1:
        return first
    kept = torch.cat([one.kept for one in found])
    if first.groups.ndim == 1:
        return Found(first.groups, first.cells, kept)
    groups, cells = (torch.cat([getattr(one, n) for one in found]) for n in ("groups", "cells"))
    return Found(groups, cells, kept)


def _of_head(layout: Layout, groups: Tensor, cells: Tensor, kept: Tensor) -> BlockSparse:
    """Without the groups and cells that are empty."""
    table = kept[torch.unique(groups)][:, torch.unique(cells)]
    return BlockSparse.of_table(layout, Partition.of(groups).part, Partition.of(cells).part, table)


Serve = Callable[[Tensor, Tensor, Tensor, Tensor, "Tensor | None"], Tensor]
"""From the numbers of P heads among all B·H, on the CPU, their queries, keys and values
``[1, P, S, D]`` and a mask of the text ``[1, text]`` or ``None`` to their answer."""


def by_padding(q: Tensor, k: Tensor, v: Tensor, text_mask: Tensor | None, serve: Serve) -> Tensor:
    """Attention of all samples as heads of one, those with equal text together: ``[B, H, S, D]``.

    Args:
        q: Queries ``[B, H, S, D]``; keys and values likewise.
        k: Keys.
        v: Values.
        text_mask: Which text is valid, ``[B, text]``; ``None``: all.
        serve: Computes those of equal text.
    """
    numbers = torch.arange(q.shape[0] * q.shape[1]).view(q.shape[:2])
    if text_mask is None or not text_mask.shape[1]:
        whole = serve(numbers.flatten(), _as_one(q), _as_one(k), _as_one(v), None)
        return whole.view(q.shape)
    kinds, kind = torch.unique(text_mask.bool(), dim=0, return_inverse=True)
    if len(kinds) == 1:
        whole = serve(numbers.flatten(), _as_one(q), _as_one(k), _as_one(v), kinds)
        return whole.view(q.shape)
    out = torch.empty_like(q)
    for number, mask in enumerate(kinds):
        some = kind == number
        heads = numbers[some].flatten()
        part = serve(heads, _as_one(q[some]), _as_one(k[some]), _as_one(v[some]), mask[None])
        out[some] = part.view(-1, *q.shape[1:])
    return out


def _as_one(x: Tensor) -> Tensor:
    """``[B, H, …]`` as one sample of B·H heads."""
    return x.reshape(1, -1, *x.shape[2:])


def _counts(labels: Tensor, count: int) -> Tensor:
    """Tokens of each part, ``[1 or P, K]``."""
    rows = labels if labels.ndim == 2 else labels[None]
    found = rows.new_zeros((len(rows), count))
    return found.scatter_add_(1, rows, torch.ones_like(rows))
