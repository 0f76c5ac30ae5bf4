"""The parts of a UNet, or of an autoencoder's decoder, that look beyond one place of the picture.

Convolutions larger than 1, norms over groups of channels, and self-attention: all else in these
networks works place by place, so that it runs on any set of places, laid out as a picture of one
column. Networks with parts of another kind (frames, resampling inside of resnets, filters) are
refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from diffusers import UNet2DConditionModel
from diffusers.models.attention import GatedSelfAttentionDense
from diffusers.models.attention_processor import Attention
from diffusers.models.autoencoders.vae import Decoder
from diffusers.models.downsampling import Downsample2D
from diffusers.models.normalization import AdaGroupNorm
from diffusers.models.resnet import ResnetBlock2D, ResnetBlockCondNorm2D
from diffusers.models.upsampling import Upsample2D
from torch import nn

from accel import hooks
from accel.errors import UnsupportedModel
from accel.seams.attention import Answer, Interception
from accel.seams.blocks import wrap_call

Kind = Literal["convolution", "norm", "attention"]

FREEU = ("s1", "s2", "b1", "b2")
"""Attributes of up blocks by which FreeU filters pictures."""

RESIDUALS = (
    "down_block_additional_residuals",
    "mid_block_additional_residual",
    "down_intrablock_additional_residuals",
)
"""Arguments of a UNet that are added to its levels: pictures, or tuples of them."""


@dataclass(frozen=True, eq=False)
class Part:
    """One part that looks beyond a place.

    Attributes:
        path: Where it is in the network.
        module: What stands there.
        kind: What it does.
        first: Whether it takes the network's input.
    """

    path: str
    module: Any
    kind: Kind
    first: bool = False

    @property
    def hooked(self) -> bool:
        """Whether somebody else works on it (offloading, casting): then only its call counts."""
        chain = vars(self.module).get("forward")
        links = len(chain.links) if isinstance(chain, hooks.Chain) else 0
        below = chain.original if isinstance(chain, hooks.Chain) else self.module.forward
        return links > 1 or getattr(below, "__func__", None) is not nn.Conv2d.forward

    def wrap(self, around: Callable[..., Any]) -> Callable[[], None]:
        """Put ``around(inner, *args, **kwargs)`` around it; returns the undo."""
        return wrap_call(self.module, around)


def is_unet(core: Any) -> bool:
    """Whether a network is a UNet over pictures."""
    return isinstance(core, UNet2DConditionModel)


def decoder_of(pipe: Any) -> Any:
    """The decoder of a pipeline's autoencoder; ``None`` for one that is not known here."""
    decoder = getattr(getattr(pipe, "vae", None), "decoder", None)
    return decoder if isinstance(decoder, Decoder) else None


def levels_of(core: Any) -> int:
    """How often a network halves, or doubles, the sides of its pictures."""
    return sum(isinstance(module, Downsample2D | Upsample2D) for module in core.modules()) // (
        2 if is_unet(core) else 1
    )


def find_parts(core: Any, method: str) -> tuple[Part, ...]:
    """The parts of a network of `is_unet` or `decoder_of`.

    Raises:
        UnsupportedModel: For parts that are not known here, or compiled.
    """
    network = type(core).__name__
    found = []
    for path, module in core.named_modules():
        why = _why_not(module)
        if why:
            raise UnsupportedModel(
                f"{method} does not fit {network}: {path or network} {why}. Leave the method out "
                "of the plan."
            )
        kind = _kind_of(module)
        if kind is not None:
            found.append(Part(path, module, kind, path.startswith("conv_in")))
    return tuple(found)


def _kind_of(module: Any) -> Kind | None:
    if isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1):
        return "convolution"
    if isinstance(module, nn.GroupNorm):
        return "norm"
    if isinstance(module, Attention) and not module.is_cross_attention:
        return "attention"
    return None


def _why_not(module: Any) -> str | None:
    """Why a module does not run on some places alone; ``None``: it does, or is known here."""
    checks = {
        "is compiled": getattr(module, "_compiled_call_impl", None) is not None
        or hasattr(module, "_orig_mod"),
        "resamples inside of a resnet": isinstance(module, ResnetBlock2D | ResnetBlockCondNorm2D)
        and (module.up or module.down),
        "norms by another picture": isinstance(module, AdaGroupNorm),
        "is no convolution of stride 2": isinstance(module, Downsample2D)
        and not isinstance(getattr(module, "conv", None), nn.Conv2d),
        "upsamples otherwise than to the nearest": isinstance(module, Upsample2D)
        and (module.use_conv_transpose or not module.interpolate or not module.use_conv),
        "attends to more than the picture": isinstance(module, GatedSelfAttentionDense)
        or (isinstance(module, Attention) and _attends_to_more(module)),
        "convolves otherwise than by an odd square with zeros around": isinstance(module, nn.Conv2d)
        and not _plain(module),
        "works along time, or filters": isinstance(module, nn.Conv3d | nn.ConvTranspose2d)
        or type(module).__name__.startswith(("Fir", "Temporal", "KUp", "KDown", "AlphaBlender")),
    }
    return next((why for why, found in checks.items() if found), None)


def _attends_to_more(module: Any) -> bool:
    return module.spatial_norm is not None or module.added_kv_proj_dim is not None


def _plain(conv: nn.Conv2d) -> bool:
    side, stride = conv.kernel_size[0], conv.stride[0]
    square = conv.kernel_size == (side, side) and conv.stride == (stride, stride)
    zeros = conv.padding_mode == "zeros" and conv.padding == (side // 2, side // 2)
    return square and zeros and side in (1, 3) and stride <= side and conv.dilation == (1, 1)


def refuse_filters(core: Any, method: str) -> None:
    """Refuse what was switched on in a UNet meanwhile: FreeU filters whole pictures.

    Raises:
        UnsupportedModel: Says how to switch it off.
    """
    for block in getattr(core, "up_blocks", ()):
        if all(getattr(block, name, None) for name in FREEU):
            raise UnsupportedModel(
                f"{method} does not go with FreeU, which filters whole pictures: call "
                "pipe.disable_freeu() first."
            )


@contextmanager
def unpadded(parts: tuple[Part, ...]) -> Iterator[None]:
    """While it is entered, convolutions add no zeros: what they are given are windows."""
    convs = [part.module for part in parts if part.kind == "convolution"]
    before = [conv.padding for conv in convs]
    try:
        for conv in convs:
            vars(conv)["padding"] = (0, 0)
        yield
    finally:
        for conv, padding in zip(convs, before, strict=True):
            vars(conv)["padding"] = padding


def answering(inner: Callable[..., Any], answer: Answer, *args: Any, **kwargs: Any) -> Any:
    """Call an attention module, its attention answered by ``answer``."""
    with Interception(answer):
        return inner(*args, **kwargs)


Moments = tuple[Any, Any]
"""Variance, without Bessel's correction, and mean of each group of channels, ``[B, groups]``."""


def group_moments(norm: nn.GroupNorm, x: Any) -> Moments:
    """Of pictures ``[B, C, …]``, in float32."""
    import torch

    groups = x.unflatten(1, (norm.num_groups, -1)).float()
    variance, mean = torch.var_mean(groups, tuple(range(2, groups.ndim)), correction=0)
    return variance, mean


def moved(norm: nn.GroupNorm, moments: Moments, before: Any, after: Any, places: int) -> Moments:
    """Moments of pictures of which some places have changed, from sums over these alone.

    Squares are taken around the mean as it was, so that no digits are lost on large means.

    Args:
        norm: Which channels are groups.
        moments: Of all places as they were.
        before: What the changed places had, ``[B, n, C]``.
        after: What they have.
        places: How many places the pictures have.
    """
    import torch

    if after.shape[1] == places:
        return group_moments(norm, after.transpose(1, 2))
    variance, mean = moments
    groups = (norm.num_groups, norm.num_channels // norm.num_groups)
    before, after = before.float(), after.float()
    centre = mean.repeat_interleave(groups[1], 1)[:, None]
    step = after - before
    first = step.sum(1)
    second = torch.linalg.vecdot(step, after + before - 2 * centre, dim=1)
    shift, squares = (
        sums.unflatten(1, groups).sum(2) / (places * groups[1]) for sums in (first, second)
    )
    return (variance + squares - shift**2).clamp_min(0), mean + shift


def group_scaling(norm: nn.GroupNorm, variance: Any, mean: Any, dtype: Any) -> tuple[Any, Any]:
    """Scale and shift ``[B, C]`` by which a norm over groups acts where it finds these moments."""
    groups = (norm.num_groups, -1)
    scale, centre = (variance + norm.eps).rsqrt()[..., None], mean[..., None]
    if not norm.affine:
        width = norm.num_channels // norm.num_groups
        scale = scale.expand(-1, -1, width)
        return scale.flatten(1).to(dtype), (-centre * scale).flatten(1).to(dtype)
    scale = scale * norm.weight.view(groups)
    shift = norm.bias.view(groups).addcmul(centre, scale, value=-1)
    return scale.flatten(1).to(dtype), shift.flatten(1).to(dtype)
