"""Masks of an edit: from two inputs or a drawn region, and at every level of a network.

A mask is boolean, ``[F, H, W]`` over what a network computes: the pixels of its latents, or the
tokens of a transformer; a picture has one frame. All of it is index work, done on the CPU.

Source: Li et al., "Efficient Spatially Sparse Inference for Conditional GANs and Diffusion Models",
arXiv 2211.02048, section 3.2 and the released code's settings.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from accel.errors import BadInput

if TYPE_CHECKING:
    from torch import Tensor

EPSILON = 1e-3
"""How far below a level's largest mean its threshold stays: no region vanishes on its way down."""

Box = tuple[float, float, float, float]
"""Left, top, width, height: shares of the sides where all are at most 1, else pixels."""


def changed(before: Tensor, after: Tensor, threshold: float) -> Tensor:
    """Where two inputs differ in any channel: ``[C, …]`` as booleans ``[…]``. Reads the device."""
    return ((before.float() - after.float()).abs() > threshold).any(0).cpu()


def boxed(box: Sequence[float], height: int, width: int) -> Tensor:
    """A rectangle of a picture, ``[height, width]``; whole pixels, at least one.

    Raises:
        BadInput: If it is empty or does not lie in the picture.
    """
    left, top, across, down = box
    shares = all(value <= 1 for value in box)
    sides = (width, height, width, height) if shares else (1, 1, 1, 1)
    x, y, w, h = (value * side for value, side in zip(box, sides, strict=True))
    inside = x >= 0 and y >= 0 and w > 0 and h > 0 and x + w <= width and y + h <= height
    if not inside or not all(map(math.isfinite, box)):
        raise BadInput(
            f"The region {left:g},{top:g},{across:g},{down:g} (left, top, width, height) does not "
            f"lie in a picture of {width}×{height} pixels: give pixels inside it, or shares of its "
            "sides from 0 to 1."
        )
    mask = torch.zeros(height, width, dtype=torch.bool)
    mask[math.floor(y) : math.ceil(y + h), math.floor(x) : math.ceil(x + w)] = True
    return mask


def drawn(mask: Any, height: int, width: int) -> Tensor:
    """A mask that somebody drew, ``[height, width]``: what is at least half white.

    Args:
        mask: A PIL picture, an array or a tensor of the picture's size: booleans, 0 to 1, or 0 to
            255 in bytes.
        height: Of the picture, in pixels.
        width: In pixels.

    Raises:
        BadInput: If it is of another size, or empty of everything.
    """
    values = _levels(mask)
    if values.shape != (height, width):
        found = "×".join(str(side) for side in reversed(values.shape))
        raise BadInput(
            f"The mask is {found} pixels and the picture {width}×{height}: give a mask of the "
            "picture's size, white where it is to change. Nothing was lost: the recording stays."
        )
    return values >= 0.5


def _levels(mask: Any) -> Tensor:
    """A mask as numbers from 0 to 1, ``[H, W]``."""
    import numpy as np

    if hasattr(mask, "convert"):
        mask = np.array(mask.convert("L"))
    values = mask.detach().cpu() if isinstance(mask, torch.Tensor) else np.array(mask)
    if isinstance(values, np.ndarray):
        if values.dtype.kind not in "bfiu":
            raise BadInput(
                f"A mask is a picture, an array or a tensor; found {type(mask).__name__}. Give one "
                "of the picture's size, white where it is to change."
            )
        values = torch.from_numpy(values)
    scale = 255.0 if values.dtype == torch.uint8 else 1.0
    values = values.float().squeeze() / scale
    return values if values.ndim == 2 else values.new_zeros(0, 0)


def onto(mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """A picture's mask ``[H, W]`` on a coarser or finer grid: every place that it touches."""
    return functional.adaptive_max_pool2d(mask[None].float(), grid)[0] > 0


def dilated(mask: Tensor, by: int) -> Tensor:
    """A mask ``[…, H, W]`` with all that lies within ``by`` places of it, diagonals too."""
    if by == 0:
        return mask
    flat = mask.reshape(-1, 1, *mask.shape[-2:]).float()
    return (functional.max_pool2d(flat, 2 * by + 1, 1, by) > 0).view(mask.shape)


def level(mask: Tensor, grid: tuple[int, int], threshold: float, dilate: int) -> Tensor:
    """A mask ``[H, W]`` at another level of a pyramid.

    On the way down a place is active where the mean of what it stands for is above the threshold
    (the authors' bilinear resize is that mean for a factor of 2, and for larger ones leaves pixels
    out); then the mask is dilated. On the way up each place has those that lie on it.
    """
    if grid == tuple(mask.shape):
        return mask
    if grid[0] > mask.shape[0]:
        found = (
            functional.interpolate(mask[None, None].float(), size=grid, mode="nearest")[0, 0] > 0
        )
    else:
        means = functional.adaptive_avg_pool2d(mask[None].float(), grid)[0]
        found = means > min(threshold, float(means.max()) - EPSILON)
    return dilated(found & bool(mask.any()), dilate)


def touched(mask: Tensor, block: int, reach: int) -> Tensor:
    """First places of the blocks whose window meets a mask ``[H, W]``, ``[blocks, 2]``.

    A window is a block and ``reach`` places around it: what a convolution needs to compute the
    block. Blocks that would stick out over the end of a side are moved in, over others.
    """
    sides = mask.shape
    counts = [-(-side // block) for side in sides]
    behind = [count * block + reach - side for count, side in zip(counts, sides, strict=True)]
    around = functional.pad(mask[None].float(), (reach, behind[1], reach, behind[0]))
    hit = functional.max_pool2d(around, block + 2 * reach, block)[0] > 0
    ends = torch.tensor([side - block for side in sides])
    return torch.minimum(hit.nonzero() * block, ends)
