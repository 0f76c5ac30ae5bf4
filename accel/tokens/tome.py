"""ToMe: merge the tokens that are most alike before a layer, and copy them back behind it.

One token of each cell of the grid is a destination, the others are sources; the sources that are
most like a destination are merged into it. ``cells(grid, generator).match(x, ratio)`` is a whole
ToMe; both objects can be kept for further layers and steps.

Source: Bolya and Hoffman, "Token Merging for Fast Stable Diffusion", arXiv 2303.17604, sections 3
and 4. The authors merge before self-attention only, at the highest resolution of the UNet.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from accel.tokens.reduction import Grid, Partition, Size, one_of_each

if TYPE_CHECKING:
    import torch


def cells(
    grid: Grid,
    generator: torch.Generator | None = None,
    size: Size = (1, 2, 2),
    device: torch.device | str | None = None,
) -> Partition:
    """One destination in each full cell; the rest of it, and a ragged border, are sources.

    The partition is drawn once for all rows, whatever their number: branches and samples share it.
    Where guidance makes two calls, keep it for the second, or start the generator alike.

    Args:
        grid: Of the image tokens.
        generator: Draws the destinations; the first token of each cell without one.
        size: Of a cell. An axis shorter than a cell is one cell long.
        device: Of the indices.

    Returns:
        A partition of which a ratio of up to 1 − 1/(tokens of a cell) can be merged: 0.75.

    Raises:
        BadInput: For a cell without tokens.
    """
    import torch

    frames, height, width = size
    clipped = (min(frames, grid.frames), min(height, grid.height), min(width, grid.width))
    full, *border = grid.tiles(clipped, device)
    place = one_of_each(full, generator)
    side = full.shape[1]
    others = (place + torch.arange(1, side, device=full.device)) % side
    sources = [full.gather(1, others).flatten(), *(tiles.flatten() for tiles in border)]
    return Partition(grid.tokens, torch.cat(sources)[None], full.gather(1, place).T)
