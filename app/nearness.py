"""How near two results are: the figures of ``accel.quality``, for pictures and clips alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from accel.errors import BadInput

if TYPE_CHECKING:
    from PIL import Image

Pictures = list["Image.Image"]
Distance = Callable[[Pictures, Pictures], float]


def measure(stock: Pictures, fast: Pictures) -> dict[str, float | str]:
    """PSNR in dB, SSIM, perceptual distance, and flicker of clips; where there is none, why."""
    from accel import quality

    figures = {"psnr": psnr, "ssim": quality.ssim, "perceptual": quality.perceptual}
    if len(stock) > 1:
        figures["flicker"] = quality.flicker
    return {name: _figure(distance, stock, fast) for name, distance in figures.items()}


def by_frame(stock: Pictures, fast: Pictures) -> dict[str, list[float | str]]:
    """PSNR in dB, SSIM and perceptual distance of each frame, flicker of each two in a row.

    Where there is none, the reason. The oracle of pictures judges, as it does the clip as a whole.
    """
    from accel import quality
    from accel.scenes import oracle

    frames, changes = (_windows(stock, fast, length) for length in (1, 2))
    perceptual = partial(quality.perceptual, oracle=oracle.load())
    figures: dict[str, Distance] = {
        "psnr": psnr,
        "ssim": quality.ssim,
        "perceptual": perceptual,
    }
    return {
        **{name: [_figure(figure, *pair) for pair in frames] for name, figure in figures.items()},
        "flicker": [_figure(quality.flicker, *pair) for pair in changes],
    }


def _windows(stock: Pictures, fast: Pictures, length: int) -> list[tuple[Pictures, Pictures]]:
    """So many frames in a row of both clips, from every frame on from which there are as many."""
    starts = range(len(stock) - length + 1)
    return [(stock[at : at + length], fast[at : at + length]) for at in starts]


def motion(prompt: str, clips: Sequence[Pictures]) -> list[dict[str, bool]]:
    """By clip, whether what moves, where to and how fast are as the prompt says.

    The clip oracle of the scenes judges, so this is for captions of the scenes alone: for others
    there is no answer.
    """
    from accel.scenes import motion_of
    from accel.scenes.motion import read

    wanted = motion_of(prompt)
    if wanted is None:
        return []
    return [
        {name: answer[name] == value for name, value in asdict(wanted).items()}
        for answer in read(list(clips))
    ]


def psnr(one: Pictures, other: Pictures) -> float:
    """PSNR in dB over all pixels of all frames: infinite only if every frame is equal.

    Raises:
        BadInput: If sizes or numbers of frames differ.
    """
    from accel import quality

    return quality.psnr(_joined(one), _joined(other))


def _joined(pictures: Pictures) -> Any:
    return np.concatenate([np.asarray(picture.convert("RGB")) for picture in pictures])


def _figure(distance: Distance, stock: Pictures, fast: Pictures) -> float | str:
    try:
        return distance(stock, fast)
    except BadInput as error:
        return f"not measured: {error}"
