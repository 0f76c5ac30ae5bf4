"""Matchings: which tokens are most alike, and so merged. Source: ToMe, arXiv 2303.17604."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from accel.errors import BadInput
from accel.tokens.exclusive import absorbed
from accel.tokens.reduction import Reduction, checked, gathered, identity, picked
from accel.tokens.tiles import one_of_each, tiles

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from accel.seams.layout import Grid, Layout

ROWS = 1024
"""Sources that are compared at a time: what bounds the memory of a matching."""


@dataclass(frozen=True, eq=False)
class Partition:
    """Which tokens may be merged into which: the part of a matching that needs no content.

    Attributes:
        tokens: N.
        source: Tokens that may be merged, ``[B, S]``.
        destination: Tokens that others may be merged into, ``[B, D]``. A token in neither stays.
    """

    tokens: int
    source: Tensor
    destination: Tensor

    def match(self, x: Tensor, ratio: float) -> Reduction:
        """Merge the ``r`` sources that are most like a destination, each into its most similar one.

        ``r = min(int(N·ratio), S)``; similarity is the cosine, in the dtype of ``x``. Takes
        S·D·C multiply-adds a row – (3/16)N²C with a quarter of destinations, next to the 2N²C of
        the attention – and the memory of `ROWS` · D scores. Every row has a matching of its own.
        Does not read the device.

        Args:
            x: What is compared, ``[B, N, …]``.
            ratio: Share of the tokens to merge, in [0, 1); 0 is off.

        Raises:
            BadInput: For a ratio outside of [0, 1), or an ``x`` without N tokens.
        """
        import torch
        from torch.nn.functional import normalize

        flat = checked(x, self.tokens, self.source).reshape(*x.shape[:2], -1)
        count = min(merged_of(self.tokens, ratio), self.source.shape[1])
        if count == 0:
            return identity(self.tokens, x.device)
        sources = gathered(flat, self.source)
        destinations = normalize(gathered(flat, self.destination), dim=-1).mT
        best = [(part @ destinations).max(dim=-1) for part in torch.split(sources, ROWS, dim=1)]
        # A source's own length does not change which destination is best: divided out only here.
        length = torch.linalg.vector_norm(sources, dim=-1).clamp_min(torch.finfo(x.dtype).tiny)
        value = torch.cat([found.values for found in best], dim=1) / length
        index = torch.cat([found.indices for found in best], dim=1)
        chosen = value.topk(count, dim=1, sorted=False).indices
        gone = self.source.expand(len(chosen), -1).gather(1, chosen)
        into = self.destination.expand(len(chosen), -1).gather(1, index.gather(1, chosen))
        return absorbed(gone, into, self.tokens)

    def take(self, rows: Sequence[int]) -> Partition:
        """The partition of some rows; one that all rows share stays as it is."""
        return Partition(self.tokens, picked(self.source, rows), picked(self.destination, rows))


def cells(
    layout: Layout,
    generator: torch.Generator | None = None,
    size: Grid = (1, 2, 2),
    device: torch.device | str | None = None,
) -> Partition:
    """One destination in each full cell; the rest of it, and a ragged border, are sources.

    The partition is drawn once for all rows, whatever their number: branches and samples share it.
    Where guidance makes two calls, keep it for the second, or start the generator alike.

    Args:
        layout: Of the image tokens.
        generator: Draws the destinations; the first token of each cell without one.
        size: Of a cell. An axis shorter than a cell is one cell long.
        device: Of the indices.

    Returns:
        A partition of which a ratio of up to 1 − 1/(tokens of a cell) can be merged: 0.75.

    Raises:
        BadInput: For a cell without tokens.
    """
    import torch

    frames, height, width = (min(pair) for pair in zip(size, layout.grid, strict=True))
    full, *border = tiles(layout, (frames, height, width), device)
    place = one_of_each(full, generator)
    side = full.shape[1]
    others = (place + torch.arange(1, side, device=full.device)) % side
    sources = [full.gather(1, others).flatten(), *(tile.flatten() for tile in border)]
    return Partition(layout.image, torch.cat(sources)[None], full.gather(1, place).T)


def merged_of(tokens: int, ratio: float) -> int:
    """How many of some tokens a ratio merges: ``int(tokens·ratio)``.

    Raises:
        BadInput: For a ratio outside of [0, 1).
    """
    if not 0.0 <= ratio < 1.0:
        raise BadInput(f"a ratio of {ratio}: give the share of tokens to merge, in [0, 1).")
    return int(tokens * ratio)
