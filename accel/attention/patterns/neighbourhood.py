"""Neighbourhood attention, generalized: a window of keys that moves in strides.

Hassani et al., arXiv 2504.16922 (GNA), and 2204.07143 (NA, stride 1). Along every axis, queries of
a stride share the window of their leader; a window keeps its length at the borders. Sliding-tile
attention (STA, arXiv 2502.04507) is the same with strides of a tile and windows of an odd number
of tiles. The authors measure 28 to 46 % less time end to end (Cosmos-7B, HunyuanVideo, FLUX; B200).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from accel.attention.patterns.pattern import GROUPS, ByAxis, grown, joined
from accel.errors import BadInput
from accel.seams.layout import AXES, Grid, Layout, Places

if TYPE_CHECKING:
    from torch import Tensor

Window = tuple[int | None, int | None, int | None]
Flags = tuple[bool, bool, bool]


@dataclass(frozen=True)
class Neighbourhood(ByAxis):
    """A window of keys for every query, of the same size for all.

    Attributes:
        window: Keys along frames, height and width; None for the whole axis.
        stride: Neighbouring queries that share a window, along each axis; from 1 (every query its
            own) to the window (windows side by side). Only strides of some tokens save time.
        dilation: Every how many tokens a window takes one; window times dilation fits the axis.
        causal: Axes along which no key comes after its query.

    Raises:
        BadInput: For a window, stride or dilation below 1, or a stride above its window; with a
            layout also for a window, dilated, that is longer than its axis.
    """

    window: Window
    stride: Grid = (1, 1, 1)
    dilation: Grid = (1, 1, 1)
    causal: Flags = (False, False, False)

    def __post_init__(self) -> None:
        for axis, w, s, d in zip(AXES, self.window, self.stride, self.dilation, strict=True):
            if min(1 if w is None else w, s, d) < 1 or (w is not None and s > w):
                raise BadInput(
                    f"Neighbourhood along {axis}: window {w}, stride {s}, dilation {d}. All are at "
                    "least 1, and the stride is at most the window."
                )

    def tables(self, layout: Layout) -> list[Tensor]:
        """The windows along each axis."""
        return [self._table(layout, axis) for axis in range(3)]

    def groups(self, layout: Layout, places: Places) -> Sequence[Tensor]:
        """Boxes of whole strides, apart by what dilation sets apart."""
        apart = [place % d for place, d in zip(places, self.dilation, strict=True)]
        near = [place // d for place, d in zip(places, self.dilation, strict=True)]
        found = []
        for size in GROUPS:
            sides = grown(self.stride, layout.grid, size)
            found.append(
                joined([*apart, *(n // side for n, side in zip(near, sides, strict=True))])
            )
        return found

    def _table(self, layout: Layout, axis: int) -> Tensor:
        import torch

        length = layout.grid[axis]
        every, causal = self.dilation[axis], self.causal[axis]
        window = self._fitting(length, axis)
        token = torch.arange(length)
        place = token // every
        members = length // every + (token % every < length % every)
        start = starts(place, members, window, self.stride[axis], causal)[:, None]
        kept = (place >= start) & (place < start + window[:, None])
        if causal:
            kept &= place <= place[:, None]
        return kept & (token % every == token[:, None] % every)

    def _fitting(self, length: int, axis: int) -> Tensor:
        """The window of each query along an axis, ``[L]``."""
        import torch

        window, every = self.window[axis], self.dilation[axis]
        if every > length or (window or 1) * every > length:
            raise BadInput(
                f"A window of {window} every {every} tokens does not fit {length} tokens of "
                f"{AXES[axis]}: take a smaller one, or None for the whole axis."
            )
        if window is not None:
            return torch.full((length,), window)
        return length // every + (torch.arange(length) % every < length % every).long()


def starts(place: Tensor, length: Tensor, window: Tensor, stride: int, causal: bool) -> Tensor:
    """Where the windows of queries begin.

    Args:
        place: Of the queries along the axis.
        length: Of the axis.
        window: Keys of a window.
        stride: Queries that share a window.
        causal: Whether a window ends with its stride's last query, or has its leader in the middle.
    """
    first = place // stride * stride
    if causal:
        leader = (first + stride - 1).minimum(length - 1)
        return (leader - window + 1).clamp(min=0)
    leader = (first + stride // 2).minimum(length - 1)
    return (leader - window // 2).clamp(min=0).minimum(length - window)


def sliding_tile(tile: Grid, tiles: Grid) -> Neighbourhood:
    """Sliding-tile attention: windows of whole tiles.

    Args:
        tile: Frames, rows and columns of a tile; the authors' kernel has 6×8×8.
        tiles: Tiles of a window along each axis: odd, so that the query's tile is in the middle.

    Raises:
        BadInput: For an even number of tiles, or none.
    """
    if any(count < 1 or count % 2 == 0 for count in tiles):
        raise BadInput(f"A window of {tiles} tiles has no middle: give odd numbers.")
    window = (tile[0] * tiles[0], tile[1] * tiles[1], tile[2] * tiles[2])
    return Neighbourhood(window=window, stride=tile)
