"""How a picture is cut into patches of the size that a network was trained for, and put together.

A *comb* takes every k-th pixel, so that it shows the whole picture, small; the k² combs of a
picture have each pixel once. A *window* is a part of the picture as it is; windows overlap, and
each has a share in a pixel, so that the shares of a pixel sum to 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from accel.seams.canvas import Window

Span = tuple[int, int]
"""Where a window begins and ends along an axis."""


@dataclass(frozen=True)
class Comb:
    """Every ``step``-th pixel from a row and a column on.

    Attributes:
        step: Pixels from one to the next, along both axes.
        row: The first row, below ``step``.
        column: The first column, below ``step``.
    """

    step: int
    row: int
    column: int

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns that it has of a picture."""
        return -(-(height - self.row) // self.step), -(-(width - self.column) // self.step)

    def of(self, picture: Tensor) -> Tensor:
        """Its pixels of a picture ``[…, H, W]``: a view."""
        return picture[..., self.row :: self.step, self.column :: self.step]

    def shrunk(self, picture: Tensor, factor: int, height: int, width: int) -> Tensor:
        """What it has of a map of the picture at 1/factor of its size: averages, for all combs.

        Args:
            picture: ``[R, C, h, w]``.
            factor: How often smaller than the picture it is.
            height: Rows of the comb, with its padding.
            width: Columns likewise.
        """
        sides = -(-height // factor), -(-width // factor)
        return functional.interpolate(picture, sides, mode="area")


def shrinking(height: int, width: int, side: int) -> int:
    """The least k for which every k-th pixel makes a picture of no more than side² pixels."""
    return max(1, math.ceil(math.sqrt(height * width) / side - 1e-9))


def combs(step: int) -> list[Comb]:
    """All combs, the first one first."""
    return [Comb(step, row, column) for row in range(step) for column in range(step)]


def spans(length: int, side: int, overlap: float, unit: int) -> list[Span]:
    """Windows along an axis: as few as can be, spread evenly.

    Args:
        length: Pixels along it.
        side: Pixels of a window, a multiple of ``unit``; the last one may have ``unit`` − 1 more.
        overlap: Share of a window that it has in common with the next one at least, in [0, 1).
        unit: Windows begin at multiples of it.
    """
    reach = max(length - side, 0) // unit * unit
    stride = max(int(side * (1.0 - overlap)) // unit, 1) * unit
    gaps = -(-reach // stride)
    begins = [reach * place // (gaps * unit) * unit for place in range(gaps)]
    return [*((begin, begin + side) for begin in begins), (reach, length)]


def shares(along: Sequence[Span]) -> list[Tensor]:
    """What share each window of an axis has in each of its pixels.

    A share falls evenly over what the window has in common with its neighbour.

    Args:
        along: From `spans`.

    Returns:
        ``[pixels of the window]`` each, float32; those of a pixel sum to 1.
    """
    ramps = []
    for place, (begin, end) in enumerate(along):
        before = along[place - 1][1] - begin if place else 0
        after = end - along[place + 1][0] if place + 1 < len(along) else 0
        steps = torch.arange(end - begin, dtype=torch.float64)
        rising = (steps + 1) / (before + 1)
        falling = (end - begin - steps) / (after + 1)
        ramps.append(torch.minimum(rising, falling).clamp(max=1.0))
    total = torch.zeros(along[-1][1], dtype=torch.float64)
    for (begin, end), ramp in zip(along, ramps, strict=True):
        total[begin:end] += ramp
    return [
        (ramp / total[begin:end]).float() for (begin, end), ramp in zip(along, ramps, strict=True)
    ]


@dataclass(frozen=True, eq=False)
class Tiling:
    """The windows of a picture.

    Attributes:
        rows: Their spans along the height.
        columns: Their spans along the width.
    """

    rows: tuple[Span, ...]
    columns: tuple[Span, ...]

    @classmethod
    def of(cls, height: int, width: int, side: int, overlap: float, unit: int) -> Tiling:
        """Windows of side × side pixels, or as many as the picture has; see `spans`."""
        side = max(side // unit, 1) * unit
        across = (tuple(spans(length, side, overlap, unit)) for length in (height, width))
        return cls(*across)

    @property
    def windows(self) -> list[Window]:
        """All of them, row by row."""
        return [Window(*rows, *columns) for rows in self.rows for columns in self.columns]

    def merged(self, parts: Sequence[Tensor]) -> Tensor:
        """What the windows say of the picture, by their shares: in float32, in their order.

        Args:
            parts: ``[…, rows, columns]`` of each window.
        """
        like = parts[0]
        sides = self.rows[-1][1], self.columns[-1][1]
        whole = torch.zeros((*like.shape[:-2], *sides), dtype=torch.float32, device=like.device)
        weights = [
            (down[:, None] * across).to(like.device)
            for down in shares(self.rows)
            for across in shares(self.columns)
        ]
        for window, part, weight in zip(self.windows, parts, weights, strict=True):
            window.of(whole).add_(part.float() * weight)
        return whole.to(like.dtype)


def woven(parts: Sequence[Tensor], step: int) -> Tensor:
    """The picture whose combs are given, in the order of `combs`."""
    height = sum(part.shape[-2] for part in parts[::step])
    width = sum(part.shape[-1] for part in parts[:step])
    whole = parts[0].new_empty((*parts[0].shape[:-2], height, width))
    for comb, part in zip(combs(step), parts, strict=True):
        comb.of(whole).copy_(part)
    return whole


class Shuffle:
    """Pixels change places at random within cells of k × k, and go back to them.

    Pixels at a border that fill no cell stay where they are.

    Args:
        step: k.
        picture: ``[…, H, W]``, of the size and where the pictures are.
        seed: What the places are drawn from, alike on all devices.
    """

    def __init__(self, step: int, picture: Tensor, seed: int) -> None:
        self._step = step
        self._sides = picture.shape[-2] // step, picture.shape[-1] // step
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.rand((*self._sides, step * step), generator=generator)
        places = drawn.argsort(-1)
        self._there, self._back = places.to(picture.device), places.argsort(-1).to(picture.device)

    def of(self, picture: Tensor) -> Tensor:
        """The picture ``[…, H, W]`` with its pixels at other places: a copy."""
        return self._moved(picture, self._there)

    def undone(self, picture: Tensor) -> Tensor:
        """The picture with its pixels where they came from: a copy."""
        return self._moved(picture, self._back)

    def _moved(self, picture: Tensor, places: Tensor) -> Tensor:
        (rows, columns), step = self._sides, self._step
        ahead = picture.shape[:-2]
        moved = picture.clone()
        whole = moved[..., : rows * step, : columns * step]
        cells = whole.reshape(*ahead, rows, step, columns, step).transpose(-3, -2)
        cells = cells.reshape(*ahead, rows, columns, step * step)
        cells = cells.gather(-1, places.expand(cells.shape))
        cells = cells.reshape(*ahead, rows, columns, step, step).transpose(-3, -2)
        whole.copy_(cells.reshape(whole.shape))
        return moved
