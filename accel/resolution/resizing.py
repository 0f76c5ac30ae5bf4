"""Pictures in another size: of latents, and of pixels."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional


def resized(picture: Tensor, height: int, width: int) -> Tensor:
    """Latents ``[B, C, H, W]``, or of a clip ``[B, C, F, H, W]``, in another size.

    Bicubic, smoothed first where it becomes smaller; what is constant stays so.
    """
    if tuple(picture.shape[-2:]) == (height, width):
        return picture
    frames = picture.float() if picture.ndim == 4 else picture.float().transpose(1, 2).flatten(0, 1)
    found = functional.interpolate(frames, (height, width), mode="bicubic", antialias=True)
    if picture.ndim == 5:
        found = found.reshape(len(picture), -1, *found.shape[1:]).transpose(1, 2)
    return found.to(picture.dtype)


def lanczos(pixels: Tensor, height: int, width: int) -> Tensor:
    """Pixels ``[B, C, H, W]`` in another size, by Pillow's Lanczos filter in float32."""
    planes = pixels.detach().float().cpu().flatten(0, 1).numpy()
    size = width, height
    found = [
        np.asarray(Image.fromarray(plane).resize(size, Image.Resampling.LANCZOS))
        for plane in planes
    ]
    return torch.from_numpy(np.stack(found)).reshape(*pixels.shape[:2], height, width).to(pixels)
