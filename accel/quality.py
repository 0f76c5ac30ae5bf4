"""How near two pictures, clips or sets of pictures are.

Pairs: `psnr`, `ssim`, `perceptual` compare picture with picture, frame with frame, and return
the mean; `flicker` compares what changes between frames. Sets: `frechet` and `kernel` compare
distributions and need no pairing. Everything takes PIL images, arrays `[..., H, W, 3]` and tensors
`[..., 3, H, W]`, uint8 or float in [0, 1]; uint8 is converted before any difference is taken, so
nothing wraps around.

`perceptual`, `frechet` and `kernel` use the features of the scenes oracle: they are meaningful
for scenes, and only among each other (no LPIPS, no Inception). Given sets of clips
`[N, F, H, W, 3]` (F ≥ 2), these three take the clip oracle, which sees motion too; one clip alone
is a set of pictures.

Source: SSIM, Wang et al. 2004 (through scikit-image); Fréchet distance, arXiv 1706.08500 §3;
kernel distance, arXiv 1801.01401 §4. Legend: N pictures, D features.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from skimage.metrics import structural_similarity

from accel.errors import BadInput
from accel.scenes.pixels import Floats, are_clips, as_array, as_clips, as_floats

if TYPE_CHECKING:
    from torch import Tensor

    from accel.scenes.motion import ClipOracle
    from accel.scenes.oracle import Oracle

Doubles = NDArray[np.float64]


def psnr(a: Any, b: Any) -> float:
    """Peak signal-to-noise ratio in dB, mean over pictures; infinite for equal ones.

    Raises:
        BadInput: shapes or dtypes differ, or something is no picture.
    """
    first, second = _pair(a, b)
    errors = np.square(first.astype(np.float64) - second).mean(axis=(1, 2, 3))
    with np.errstate(divide="ignore"):
        return float(np.mean(-10.0 * np.log10(errors)))


def ssim(a: Any, b: Any) -> float:
    """Structural similarity in [-1, 1], mean over pictures; 1 for equal ones.

    Gaussian window of σ 1.5, as its authors define it; pictures of at least 11 px.

    Raises:
        BadInput: shapes or dtypes differ, or something is no picture.
    """
    first, second = _pair(a, b)
    if min(first.shape[1:3]) < 11:
        raise BadInput(f"SSIM needs pictures of at least 11 x 11 px, found {first.shape[1:3]}")
    values = [
        structural_similarity(
            one,
            other,
            data_range=1.0,
            channel_axis=-1,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        for one, other in zip(first, second, strict=True)
    ]
    return float(np.mean(values))


def flicker(a: Any, b: Any) -> float:
    """Mean absolute change of the difference from frame to frame, in [0, 2]; 0 for equal clips.

    A difference that stands still does not count: it is what comes and goes that the eye catches.

    Raises:
        BadInput: shapes or dtypes differ, something is no clip, or there is one frame only.
    """
    first, second = _pair(a, b)
    if len(first) < 2:
        raise BadInput("flicker needs clips of at least 2 frames, found 1")
    return float(np.abs(np.diff(second.astype(np.float64) - first, axis=0)).mean())


def perceptual(a: Any, b: Any, oracle: "Oracle | ClipOracle | None" = None) -> float:
    """Distance of the oracle's normalised feature maps, mean over pictures; 0 for equal ones.

    Raises:
        BadInput: shapes or dtypes differ, or something is no picture.
    """
    import torch

    _pair(a, b)
    judge = oracle or _judge(a)
    with torch.no_grad():
        ours, theirs = _maps(a, judge), _maps(b, judge)
        layers = [
            (torch.nn.functional.normalize(one) - torch.nn.functional.normalize(other))
            .square()
            .sum(1)
            .mean()
            for one, other in zip(ours, theirs, strict=True)
        ]
        return float(torch.stack(layers).mean())


def frechet(a: Any, b: Any, oracle: "Oracle | ClipOracle | None" = None) -> float:
    """Fréchet distance between two sets of pictures or clips, in the oracle's features; at least 0.

    Biased upwards for small sets: compare only figures of equal set sizes, of 128 or more.

    Raises:
        BadInput: a set has fewer than two pictures, or something is no picture.
    """
    ours, theirs = _features(a, oracle), _features(b, oracle)
    gap = ours.mean(0) - theirs.mean(0)
    first, second = np.cov(ours.T), np.cov(theirs.T)
    root = _root(first)
    cross = np.linalg.eigvalsh(root @ second @ root).clip(0)
    spread = np.trace(first) + np.trace(second) - 2 * np.sqrt(cross).sum()
    return float(max(0.0, gap @ gap + spread))


def kernel(a: Any, b: Any, oracle: "Oracle | ClipOracle | None" = None) -> float:
    """Unbiased squared kernel distance (cubic kernel) between two sets of pictures or clips.

    Expected to be 0 for two sets of one distribution, so single figures may be negative.

    Raises:
        BadInput: a set has fewer than two pictures, or something is no picture.
    """
    ours, theirs = _features(a, oracle), _features(b, oracle)
    within = _off_diagonal_mean(_cubic(ours, ours)) + _off_diagonal_mean(_cubic(theirs, theirs))
    return float(within - 2 * _cubic(ours, theirs).mean())


def difference(a: Any, b: Any, gain: float = 8.0) -> Image.Image:
    """Absolute difference times `gain` as a picture to look at; frames side by side.

    Raises:
        BadInput: shapes or dtypes differ, or something is no picture.
    """
    first, second = _pair(a, b)
    shown = np.clip(np.abs(first - second) * gain, 0.0, 1.0)
    return Image.fromarray((np.concatenate(list(shown), axis=1) * 255 + 0.5).astype(np.uint8))


def _pair(a: Any, b: Any) -> tuple[Floats, Floats]:
    first, second = as_array(a), as_array(b)
    if first.shape != second.shape:
        raise BadInput(
            f"found pictures [N, H, W, 3] of shapes {first.shape} and {second.shape}, needed are "
            "equal ones: resize or cut one of them"
        )
    if (first.dtype == np.uint8) != (second.dtype == np.uint8):
        raise BadInput(
            f"found dtypes {first.dtype} and {second.dtype}, needed are two of one scale: "
            "divide the uint8 one by 255"
        )
    return as_floats(first), as_floats(second)


def _features(images: Any, oracle: "Oracle | ClipOracle | None") -> Doubles:
    from accel.scenes import motion
    from accel.scenes.oracle import Oracle, features

    judge = oracle or _judge(images)
    found = features(images, judge) if isinstance(judge, Oracle) else motion.features(images, judge)
    if len(found) < 2:
        raise BadInput("found one picture or clip, needed are sets of at least two")
    return found


def _judge(images: Any) -> "Oracle | ClipOracle":
    """The bundled oracle for what there is: pictures or clips."""
    from accel.scenes import motion, oracle

    return motion.load() if are_clips(images) else oracle.load()


def _maps(images: Any, judge: "Oracle | ClipOracle") -> "list[Tensor]":
    """Feature maps of all pictures or frames, and of the motion if a clip oracle judges."""
    from accel.scenes.motion import ClipOracle, small
    from accel.scenes.oracle import pixels

    if isinstance(judge, ClipOracle):
        moves = judge.motion.maps(small(as_clips(images)))
        return [*judge.picture.maps(pixels(images)), *moves]
    return judge.maps(pixels(images))


def _root(matrix: Doubles) -> Doubles:
    """Square root of a symmetric positive semi-definite matrix."""
    values, vectors = np.linalg.eigh(matrix)
    root: Doubles = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    return root


def _cubic(a: Doubles, b: Doubles) -> Doubles:
    result: Doubles = (a @ b.T / a.shape[1] + 1.0) ** 3
    return result


def _off_diagonal_mean(gram: Doubles) -> float:
    count = len(gram)
    return float((gram.sum() - np.trace(gram)) / (count * (count - 1)))
