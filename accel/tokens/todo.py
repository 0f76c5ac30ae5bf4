"""ToDo: attend to a down-sampled grid of keys and values; queries stay as they are.

Nothing is matched and nothing unmerged, so that it costs next to nothing under any attention
kernel. Where positions are rotary, pool the keys behind their norm but before the rotation, and
rotate them by ``reduction.rows(rotary)``: pooled rotated keys would belong to no position.

Source: Smith et al., "ToDo: Token Downsampling for Efficient Generation of High-Resolution Images",
arXiv 2402.13573.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from accel.errors import BadInput
from accel.tokens.exclusive import Pooling, exclusive
from accel.tokens.reduction import Reduction, identity

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from accel.seams.layout import Grid, Layout


def downsampled(
    layout: Layout,
    factor: Grid = (1, 2, 2),
    pooling: Pooling = "nearest",
    device: torch.device | str | None = None,
) -> Reduction:
    """One token for each tile of ``factor``; tiles at the end of a ragged axis are smaller.

    The middle of a tile stands for it (of four tokens: the upper left), with its position. Softmax
    attention over a grid that is constant in every tile stays exact if all tiles are full, and
    with `Reduction.key_bias` for any grid.

    Args:
        layout: Of the image tokens.
        factor: Tokens that become one, along frames, height and width; 1 on all axes is off. The
            authors use 2 at the highest resolution of the UNet, and more above 1024².
        pooling: ``nearest``, as the authors do, or ``average``.
        device: Of the indices.

    Raises:
        BadInput: For a factor below 1.
    """
    if min(factor) < 1:
        raise BadInput(f"a factor of {factor}: give at least 1 token on each axis.")
    if factor == (1, 1, 1):
        return identity(layout.image, device)
    axes = [_axis(length, side, device) for length, side in zip(layout.grid, factor, strict=True)]
    tiles, middles = zip(*axes, strict=True)
    target = _joined(tiles, [len(middle) for middle in middles])
    return exclusive(target[None], _joined(middles, layout.grid)[None], pooling)


def _axis(length: int, side: int, device: torch.device | str | None) -> tuple[Tensor, Tensor]:
    """Along one axis: the tile of each token, and the middle of each tile."""
    import torch

    start = torch.arange(0, length, side, device=device)
    middle = start + ((length - start).clamp(max=side) - 1) // 2
    return torch.arange(length, device=device) // side, middle


def _joined(axes: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    """Numbers on a grid of ``shape`` of all combinations of places along its axes."""
    frame, row, column = axes
    _, height, width = shape
    return ((frame[:, None, None] * height + row[:, None]) * width + column).flatten()
