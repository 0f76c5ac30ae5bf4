"""Half of a picture's layout in another one: phases of its Fourier transform, and its pixels."""

from __future__ import annotations

import torch
from torch import Tensor


def with_phases(picture: Tensor, guide: Tensor) -> Tensor:
    """A picture with its phases half way to those of a guide: e^{iφ} + e^{iφ'}, as an angle.

    How much there is of each frequency stays. Where two phases are opposite, or one transform has
    nothing, the picture's own stay. In float32, since there is no transform of half precision.

    Args:
        picture: ``[…, H, W]``.
        guide: Likewise.
    """
    own, other = torch.fft.fft2(picture.float()), torch.fft.fft2(guide.float())
    both = torch.sgn(own) + torch.sgn(other)
    found = torch.where(both.abs() > 1e-6, torch.sgn(both), torch.sgn(own))
    mixed: Tensor = torch.fft.ifft2(own.abs() * found).real
    return mixed.to(picture.dtype)


def chequered(picture: Tensor, guide: Tensor, shift: int) -> Tensor:
    """A picture with every other pixel of a guide.

    Args:
        picture: ``[…, H, W]``.
        guide: Likewise.
        shift: Which half: those whose row, column and shift have an even sum.
    """
    height, width = picture.shape[-2:]
    rows = torch.arange(height, device=picture.device)[:, None]
    columns = torch.arange(width, device=picture.device)
    return torch.where((rows + columns + shift) % 2 == 0, guide.to(picture.dtype), picture)
