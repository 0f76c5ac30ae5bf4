"""The active blocks of one edit at every level of a network, and the windows that they need.

Between convolutions only active places flow, as a picture ``[B, C, n, 1]`` of one column: all that
works place by place (activations, convolutions of size 1, time embeddings, sums, concatenations,
linear layers) runs on it as it is. A larger convolution is given *windows*: the active blocks with
a border, taken from what flows, from the recording, and from the zeros beyond the picture.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from accel.region.masks import dilated, level, touched

if TYPE_CHECKING:
    from torch import Tensor

Side = tuple[int, int]
"""Height and width."""

REACH = 1
"""How far the windows of blocks look beyond them: as far as a convolution of size 3."""


@dataclass(frozen=True)
class Pyramid:
    """How a mask is taken from level to level.

    Attributes:
        block: Side of a block.
        threshold: Mean above which a place of a coarser level is active.
        dilate: Places by which a level's mask grows.
        minimum: Levels with a shorter side than this are active everywhere.
    """

    block: int
    threshold: float
    dilate: int
    minimum: int


@dataclass(frozen=True)
class Geometry:
    """One convolution on a grid.

    Attributes:
        source: Grid of its input.
        target: Grid of its output.
        kernel: Its side.
        stride: Places from one output to the next.
        padding: Zeros around the input.
        given: What flows into it: ``active`` places, their ``children`` (four each, twice as fine),
            or ``all`` places.
    """

    source: Side
    target: Side
    kernel: int
    stride: int
    padding: int
    given: str = "active"


@dataclass(frozen=True, eq=False)
class Blocks:
    """Blocks of one size.

    Attributes:
        first: Their first rows and columns, ``[blocks, 2]``.
        height: Of each.
        width: Of each.
    """

    first: Tensor
    height: int
    width: int

    def windows(self, stride: int, kernel: int, padding: int) -> Blocks:
        """What a convolution needs of its input to compute them."""
        height, width = ((side - 1) * stride + kernel for side in (self.height, self.width))
        return Blocks(self.first * stride - padding, height, width)

    @property
    def places(self) -> tuple[Tensor, Tensor]:
        """Rows ``[blocks, height, 1]`` and columns ``[blocks, 1, width]``."""
        rows = self.first[:, 0, None] + torch.arange(self.height)
        columns = self.first[:, 1, None] + torch.arange(self.width)
        return rows[:, :, None], columns[:, None, :]

    @property
    def read(self) -> int:
        """Places of the windows that a convolution of size 3 needs for them."""
        return len(self.first) * (self.height + 2 * REACH) * (self.width + 2 * REACH)


@dataclass(frozen=True, eq=False)
class Windows:
    """Where the windows of a convolution are taken from.

    Attributes:
        given: Places of the input that flow, in their order.
        halo: Places of the recorded input that the windows need beside them.
        index: ``[blocks · height · width]`` into what flows, the halo, and one zero.
        taps: ``[places · kernel · kernel]`` into the same: what each output is a sum of.
        height: Of a window.
        width: Of a window.
        outside: Whether a window looks beyond the picture.
        count: Places of the output.
    """

    given: Tensor
    halo: Tensor
    index: Tensor
    taps: Tensor
    height: int
    width: int
    outside: bool
    count: int

    def gathered(self, given: Tensor, recorded: Tensor | None) -> Tensor:
        """The windows ``[B · blocks, C, height, width]``.

        Args:
            given: What flows, ``[B, C, …]``.
            recorded: The recorded input ``[B, H · W, C]``.
        """
        windows = self._values(given, recorded).index_select(1, self.index)
        return windows.view(-1, self.height, self.width, given.shape[1]).permute(0, 3, 1, 2)

    def columns(self, given: Tensor, recorded: Tensor | None) -> Tensor:
        """What each output is a sum of, ``[B, places, kernel · kernel · C]``."""
        columns = self._values(given, recorded).index_select(1, self.taps)
        return columns.view(len(given), self.count, -1)

    def _values(self, given: Tensor, recorded: Tensor | None) -> Tensor:
        flowing = given.flatten(2).transpose(1, 2)
        parts = [flowing]
        if len(self.halo):
            assert recorded is not None
            halo = recorded.index_select(1, self.halo.to(recorded.device))
            parts.append(halo.to(flowing))
        if self.outside:
            parts.append(flowing.new_zeros(len(flowing), 1, flowing.shape[2]))
        return torch.cat(parts, 1) if len(parts) > 1 else flowing


class Active:
    """What is active of one mask.

    Args:
        mask: ``[H, W]``, at the level of the network's input; not empty.
        pyramid: How it is taken to other levels.
        device: Where the network computes.
    """

    def __init__(self, mask: Tensor, pyramid: Pyramid, device: torch.device) -> None:
        self._mask = mask
        self._pyramid = pyramid
        self._device = device
        self._levels: dict[Side, Blocks] = {}
        self._pixels: dict[Side, Tensor] = {}
        self._windows: dict[Geometry, Windows] = {}

    @cached_property
    def finest(self) -> Tensor:
        """What is computed at the level of the mask, ``[H, W]``: the blocks."""
        return self.computed((self._mask.shape[0], self._mask.shape[1]))

    def computed(self, grid: Side) -> Tensor:
        """What is computed at a level, ``[H, W]``."""
        found = torch.zeros(grid[0] * grid[1], dtype=torch.bool)
        found[self._places(grid)] = True
        return found.view(grid)

    def pixels(self, grid: Side) -> Tensor:
        """Numbers of the active places of a level in the order in which they flow, ``[n]``."""
        if grid not in self._pixels:
            self._pixels[grid] = self._places(grid).to(self._device)
        return self._pixels[grid]

    def windows(self, geometry: Geometry) -> Windows:
        """Where the windows of a convolution come from."""
        if geometry not in self._windows:
            self._windows[geometry] = self._find(geometry)
        return self._windows[geometry]

    def _blocks(self, grid: Side) -> Blocks:
        """The active blocks of a level, or one around all of them where that reads less."""
        if grid not in self._levels:
            pyramid = self._pyramid
            mask = level(self._mask, grid, pyramid.threshold, pyramid.dilate)
            if min(grid) < pyramid.minimum:
                mask = torch.ones_like(mask)
            side = min(pyramid.block, *grid)
            blocks = Blocks(touched(mask, side, REACH), side, side)
            self._levels[grid] = min(_around(mask), blocks, key=lambda found: found.read)
        return self._levels[grid]

    def _places(self, grid: Side) -> Tensor:
        rows, columns = self._blocks(grid).places
        return (rows * grid[1] + columns).flatten()

    def _given(self, geometry: Geometry) -> Tensor:
        """Numbers of the places of the input that flow, in their order."""
        height, width = geometry.source
        if geometry.given == "all":
            return torch.arange(height * width)
        if geometry.given == "active":
            return self._places(geometry.source)
        low = self._places((height // 2, width // 2))
        rows, columns = low // (width // 2), low % (width // 2)
        two = torch.arange(2)
        rows, columns = 2 * rows[:, None] + two, 2 * columns[:, None] + two
        return (rows[:, :, None] * width + columns[:, None, :]).flatten()

    def _find(self, geometry: Geometry) -> Windows:
        height, width = geometry.source
        blocks = self._blocks(geometry.target)
        windows = blocks.windows(geometry.stride, geometry.kernel, geometry.padding)
        rows, columns = windows.places
        inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
        places = (rows * width + columns)[inside]
        given = self._given(geometry)
        found = torch.full((height * width,), -1)
        found[given] = torch.arange(len(given))
        halo = torch.unique(places[found[places] < 0])
        found[halo] = len(given) + torch.arange(len(halo))
        index = torch.full(inside.shape, len(given) + len(halo))
        index[inside] = found[places]
        taps = index
        for axis in (1, 2):
            taps = taps.unfold(axis, geometry.kernel, geometry.stride)
        return Windows(
            given=given.to(self._device),
            halo=halo.to(self._device),
            index=index.flatten().to(self._device),
            taps=taps.flatten().to(self._device),
            height=windows.height,
            width=windows.width,
            outside=not bool(inside.all()),
            count=taps[..., 0, 0].numel(),
        )


def _around(mask: Tensor) -> Blocks:
    """One block around all that a convolution of a mask may change, ``[H, W]``."""
    rows, columns = (dilated(mask, REACH).any(dim).nonzero()[:, 0] for dim in (1, 0))
    first = torch.stack([rows[0], columns[0]])[None]
    return Blocks(first, int(rows[-1] - rows[0]) + 1, int(columns[-1] - columns[0]) + 1)
