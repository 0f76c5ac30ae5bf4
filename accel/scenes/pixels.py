"""Pictures and clips in any usual form become one float array, or a clear error.

Legend: N pictures or clips, F frames, H height, W width. Does not import torch: a tensor is
known by its `detach` method.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from accel.errors import BadInput

Floats = NDArray[np.float32]


def as_floats(images: Any) -> Floats:
    """Pictures as `[N, H, W, 3]` float32 in [0, 1].

    Takes a PIL image, an array `[..., H, W, 3]` (uint8, or float in [0, 1]), a tensor
    `[..., 3, H, W]` or `[..., H, W, 3]`, or a sequence of those, all of one size and dtype.
    Synchronises with the device of a tensor.

    Raises:
        BadInput: no pictures, sizes or dtypes that differ, or values out of range.
    """
    return _scaled(as_array(images))


def as_clips(clips: Any) -> Floats:
    """Clips as `[N, F, H, W, 3]` float32 in [0, 1], F at least 2.

    Takes an array or tensor of five dimensions, or a sequence of what `as_floats` takes.

    Raises:
        BadInput: no clips, lengths or sizes that differ, or values out of range.
    """
    if not are_clips(clips):
        raise BadInput("found no clips, needed are [N, F, H, W, 3] of at least two frames")
    found = [as_floats(clip) for clip in clips]
    shapes = sorted({clip.shape for clip in found})
    if len(shapes) > 1:
        raise BadInput(f"clips of one set differ: {shapes}; cut or resize them first")
    return np.stack(found)


def are_clips(images: Any) -> bool:
    """Whether this is a set of clips: `[N, F, H, W, 3]`, or a sequence of sequences of frames.

    One clip alone `[F, H, W, 3]` cannot be told from a set of pictures, and counts as such.
    """
    if isinstance(images, Sequence):
        return bool(images) and _frames(images[0]) >= 2
    shape: Sequence[int] = getattr(images, "shape", ())
    return len(shape) == 5 and shape[1] >= 2


def _frames(clip: Any) -> int:
    """Frames of what may be one clip; 0 for a picture."""
    if isinstance(clip, Sequence):
        return 0 if isinstance(clip, str) else len(clip)
    return len(clip) if getattr(clip, "ndim", 0) == 4 else 0


def _scaled(array: np.ndarray) -> Floats:
    if array.dtype == np.uint8:
        return array.astype(np.float32) / np.float32(255)
    floats = array.astype(np.float32)
    low, high = float(floats.min()), float(floats.max())
    if not (low >= -1e-4 and high <= 1 + 1e-4):
        raise BadInput(
            f"float pictures hold values in [{low:.3g}, {high:.3g}], needed are values in [0, 1]: "
            "rescale them, or pass uint8"
        )
    return floats.clip(0.0, 1.0)


def as_array(images: Any) -> np.ndarray:
    """Pictures as `[N, H, W, 3]`, dtype kept (uint8, or floating point).

    Raises:
        BadInput: no pictures, sizes or dtypes that differ, or a form that is no picture.
    """
    if isinstance(images, Sequence) and not isinstance(images, str):
        return _stack([as_array(image) for image in images])
    if isinstance(images, Image.Image):
        return np.asarray(images.convert("RGB"))[None]
    array = _channels_last(images) if hasattr(images, "detach") else np.asarray(images)
    if array.ndim < 3 or array.shape[-1] != 3 or array.size == 0:
        raise BadInput(f"found shape {array.shape}, needed are RGB pictures [..., H, W, 3]")
    if array.dtype != np.uint8 and not np.issubdtype(array.dtype, np.floating):
        raise BadInput(f"found dtype {array.dtype}, needed is uint8 or floating point")
    return array.reshape(-1, *array.shape[-3:])


def _channels_last(tensor: Any) -> np.ndarray:
    values = tensor.detach().cpu()
    if values.dtype.is_floating_point:
        values = values.float()
    array: np.ndarray = values.numpy()
    if array.ndim >= 3 and array.shape[-3] == 3:
        return np.moveaxis(array, -3, -1)
    return array


def _stack(arrays: list[np.ndarray]) -> np.ndarray:
    if not arrays:
        raise BadInput("found no pictures, needed is at least one")
    kinds = {(array.shape[1:], str(array.dtype)) for array in arrays}
    if len(kinds) > 1:
        found = ", ".join(f"{shape} {dtype}" for shape, dtype in sorted(kinds))
        raise BadInput(f"pictures of one set differ: {found}; resize or convert them first")
    return np.concatenate(arrays)
