"""Tiles of a layout: the image tokens that lie together, and draws from them."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING

from accel.errors import BadInput

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from accel.seams.layout import Grid, Layout


def average(layout: Layout, picture: Tensor) -> Tensor:
    """What a picture or clip ``[B, (F,) H, W]`` has on each image token's area, ``[B, N]``."""
    from torch.nn.functional import adaptive_avg_pool3d

    clip = picture.reshape(len(picture), 1, -1, *picture.shape[-2:])
    return adaptive_avg_pool3d(clip, layout.grid).flatten(1)


def tiles(layout: Layout, size: Grid, device: torch.device | str | None = None) -> list[Tensor]:
    """The image tokens of each tile, as ``[tiles, tokens of a tile]``, one tensor a shape of tile.

    Tiles start at the first token; where the grid does not end with a tile, the last ones are
    smaller, so that there are up to 8 shapes. Full tiles come first, if there are any.

    Raises:
        BadInput: For a tile without tokens.
    """
    import torch

    if min(size) < 1:
        raise BadInput(f"tiles of {size} tokens: give at least 1 on each axis.")
    ids = torch.arange(layout.image, device=device).reshape(layout.grid)
    axes = [_spans(length, side) for length, side in zip(layout.grid, size, strict=True)]
    found = []
    for (f, h, w), (tf, th, tw) in (zip(*spans, strict=True) for spans in product(*axes)):
        block = ids[f, h, w]
        count = [length // side for length, side in zip(block.shape, (tf, th, tw), strict=True)]
        cut = block.reshape(count[0], tf, count[1], th, count[2], tw)
        found.append(cut.permute(0, 2, 4, 1, 3, 5).reshape(-1, tf * th * tw))
    return found


def _spans(length: int, side: int) -> list[tuple[slice, int]]:
    """The part of an axis that full tiles cover and the rest, each with the side of its tiles."""
    full = length - length % side
    spans = [(slice(0, full), side), (slice(full, length), length % side)]
    return [(span, part) for span, part in spans if span.stop > span.start]


def one_of_each(tiles: Tensor, generator: torch.Generator | None) -> Tensor:
    """The place in each tile of a token drawn from it, ``[tiles, 1]``.

    Args:
        tiles: As `tiles` gives them.
        generator: Draws, on its own device. ``None`` takes the first token of each tile.
    """
    import torch

    count, side = tiles.shape
    if generator is None:
        return torch.zeros(count, 1, dtype=torch.long, device=tiles.device)
    drawn = torch.randint(side, (count, 1), generator=generator, device=generator.device)
    return drawn.to(tiles.device)
