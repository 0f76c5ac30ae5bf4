"""ToMe: merge the tokens that are most alike before a layer, and copy them back behind it.

One token of each cell of the grid is a destination, the others are sources; the sources that are
most like a destination are merged into it. ``cells(layout, generator).match(x, ratio)`` is a whole
ToMe; both objects can be kept for further layers and steps.

Source: Bolya and Hoffman, "Token Merging for Fast Stable Diffusion", arXiv 2303.17604, sections 3
and 4. The authors merge before self-attention only, at the highest resolution of the UNet.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from accel.tokens.matching import Partition
from accel.tokens.tiles import one_of_each, tiles

if TYPE_CHECKING:
    import torch

    from accel.seams.layout import Grid, Layout


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
