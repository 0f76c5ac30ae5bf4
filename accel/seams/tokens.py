"""Where the tokens lie that an attention of a network is given.

A UNet attends to one level of its pyramid at a time; a transformer to patches of its latents, and
where its attention is joint, to the text before or behind them.

Not served, though their tokens are in order: Flux-Kontext, whose picture of reference lies behind
the picture's own tokens on a grid of its own, so that there is no one `Layout`; for sparse
attention, Chroma, whose mask adds 1 to the scores of valid pairs where others hide the rest: stock
attends to padded text, a little less than to valid, so that to read the mask as padding would draw
another picture (`attention.valid_text`); and, for what shares a pattern between rows, Mochi
(`ROW_BY_ROW`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from accel.errors import UnsupportedModel
from accel.seams.denoisers import Call, Denoiser
from accel.seams.grids import grid_of
from accel.seams.layout import Grid, Layout

TEXT_FIRST = (
    "ChromaTransformer2DModel",
    "CogVideoXTransformer3DModel",
    "CogView4Transformer2DModel",
    "FluxTransformer2DModel",
    "QwenImageTransformer2DModel",
)
TEXT_LAST = (
    "HunyuanVideoTransformer3DModel",
    "MochiTransformer3DModel",
    "SD3Transformer2DModel",
)
"""Networks of joint attention, by the place of their text."""

IMAGE_ALONE = (
    "DiTTransformer2DModel",
    "LTXVideoTransformer3DModel",
    "PixArtTransformer2DModel",
    "SanaTransformer2DModel",
    "WanTransformer3DModel",
)
"""Networks whose text has an attention of its own, or is none."""

FRAMES_SECOND = ("CogVideoXTransformer3DModel",)
"""Networks whose clips are ``[B, F, C, H, W]`` rather than ``[B, C, F, H, W]``."""

PICTURES = (
    "ChromaTransformer2DModel",
    "CogView4Transformer2DModel",
    "FluxTransformer2DModel",
    "HunyuanImageTransformer2DModel",
    "Lumina2Transformer2DModel",
    "PixArtTransformer2DModel",
    "QwenImageTransformer2DModel",
    "SD3Transformer2DModel",
    "SanaTransformer2DModel",
)
"""Transformers over pictures whose positions follow from the size of what they are given."""

FRAME_BY_FRAME = (
    "CogVideoXTransformer3DModel",
    "HunyuanVideoTransformer3DModel",
    "LTXVideoTransformer3DModel",
    "WanTransformer3DModel",
    "WanVACETransformer3DModel",
)
"""Networks whose tokens are frame after frame; text may lie beside them."""

PADDED = ("HunyuanVideoTransformer3DModel",)
"""Of them, those whose masks hide padded text, and nothing else."""

NEEDS_TEXT = ("HunyuanVideoTransformer3DModel", "QwenImageTransformer2DModel")
"""Networks whose blocks cannot run on a picture without any text."""

MASKED_BY_QUERY = ("ChromaTransformer2DModel",)
"""Networks that attend under a mask that differs between queries."""

ROW_BY_ROW = ("MochiTransformer3DModel",)
"""Networks that attend to one row after the other, each with its valid text alone."""

APART = (
    "it attends to one row after the other, each with its valid text alone, so that the rows of an "
    "attention are not of one length"
)
"""Why `ROW_BY_ROW` is refused where it is."""


def refuse_unknown(denoiser: Denoiser, method: str) -> None:
    """Refuse a network whose order of tokens is not known, by its class.

    Raises:
        UnsupportedModel: Names the method and the network.
    """
    name = type(denoiser.core).__name__
    known = (*TEXT_FIRST, *TEXT_LAST, *IMAGE_ALONE)
    if name not in known and not hasattr(denoiser.core, "down_blocks"):
        raise UnsupportedModel(
            f"{method} does not fit {name}: the order of its tokens in attention is not known. "
            f"Known are UNets and {', '.join(sorted(known))}; others are added in "
            "accel/seams/tokens.py."
        )


def refuse_row_by_row(denoiser: Denoiser, method: str) -> None:
    """Refuse a network whose rows attend apart, by its class.

    Raises:
        UnsupportedModel: Names the method and the network.
    """
    name = type(denoiser.core).__name__
    if name in ROW_BY_ROW:
        raise UnsupportedModel(
            f"{method} does not fit {name}: {APART}. Leave the method out of the plan."
        )


def layout_of(call: Call, tokens: int) -> Layout:
    """The layout of ``tokens`` tokens in one attention of a call. May read the device.

    Raises:
        UnsupportedModel: If the network's order of tokens is not known.
    """
    core = call.denoiser.core
    name = type(core).__name__
    if hasattr(core, "down_blocks"):
        return Layout(0, *_level(call, tokens))
    grid = patches_of(call)
    text = tokens - math.prod(grid)
    if text == 0:
        return Layout(0, *grid)
    if text < 0 or name not in (*TEXT_FIRST, *TEXT_LAST):
        raise _unknown(name, tokens, f"a grid of {' × '.join(map(str, grid))}")
    return Layout(text, *grid, text_first=name in TEXT_FIRST)


class Layouts:
    """The layouts of a run: each is read once."""

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], Layout] = {}

    def of(self, call: Call, tokens: int) -> Layout:
        """The layout of ``tokens`` tokens in one attention of a call. May read the device."""
        key = (call.denoiser.name, tokens, tuple(call.sample.shape[1:]))
        if key not in self._known:
            self._known[key] = layout_of(call, tokens)
        return self._known[key]


def _level(call: Call, tokens: int) -> Grid:
    """The level of a UNet's pyramid that has so many tokens in a frame."""
    height, width = call.sample.shape[-2:]
    while height * width > tokens:
        height, width = -(-height // 2), -(-width // 2)
    if height * width != tokens:
        shape = tuple(call.sample.shape)
        raise _unknown(type(call.denoiser.core).__name__, tokens, f"latents of {shape}")
    return 1, height, width


def patches_of(call: Call) -> Grid:
    """Frames, rows and columns of the patches of a transformer's latents. May read the device.

    Raises:
        UnsupportedModel: If it is not known where they lie.
    """
    core, shape = call.denoiser.core, call.sample.shape
    if len(shape) == 3:
        grid = grid_of(call)
        if grid.tokens != shape[1]:
            raise _unknown(type(core).__name__, shape[1], f"a picture of {grid.tokens} and others")
        return max(grid.frames, 1), grid.height, grid.width
    if "patch_size" not in core.config:
        raise _unknown(type(core).__name__, "some", f"latents of {tuple(shape)}")
    time, rows, columns = _patch(core.config)
    axis = 1 if type(core).__name__ in FRAMES_SECOND else 2
    frames = shape[axis] if len(shape) == 5 else 1
    return frames // time, shape[-2] // rows, shape[-1] // columns


def _patch(config: Any) -> Grid:
    """A patch's frames, rows and columns."""
    patch = config.patch_size
    if isinstance(patch, int):
        return getattr(config, "patch_size_t", None) or 1, patch, patch
    return (1, *patch) if len(patch) == 2 else tuple(patch)


@dataclass(frozen=True)
class Span:
    """What of a picture or clip a token stands for.

    Attributes:
        height: Pixels.
        width: Pixels.
        latents: Latent frames; 0 where an attention is given each frame apart.
        frames: Frames that a latent one stands for; the first one stands for one alone.
    """

    height: int
    width: int
    latents: int
    frames: int

    def size(self, layout: Layout) -> str:
        """The picture or clip of a layout: ``480 × 832 pixels × 81 frames``."""
        picture = f"{layout.height * self.height:,} × {layout.width * self.width:,} pixels"
        if not self.latents:
            return picture
        return f"{picture} × {(layout.frames * self.latents - 1) * self.frames + 1} frames"


SPATIAL = (
    "vae_scale_factor_spatial",
    "vae_spatial_compression_ratio",
    "vae_spatial_scale_factor",
    "vae_scale_factor",
)
TEMPORAL = (
    "vae_scale_factor_temporal",
    "vae_temporal_compression_ratio",
    "vae_temporal_scale_factor",
)
"""Attributes of pipelines that say how many pixels, or frames, an autoencoder makes one of."""


def pixels_of(pipe: Any) -> int:
    """Pixels of the picture for one of the latents, along a side."""
    return next(int(getattr(pipe, name)) for name in SPATIAL if hasattr(pipe, name))


def span_of(pipe: Any, call: Call, layout: Layout) -> Span | None:
    """What a token of a layout stands for; ``None`` for pipelines that do not say it."""
    pixels, frames = (
        next((int(getattr(pipe, name)) for name in names if hasattr(pipe, name)), None)
        for names in (SPATIAL, TEMPORAL)
    )
    if pixels is None:
        return None
    core, shape = call.denoiser.core, call.sample.shape
    if hasattr(core, "down_blocks"):
        rows, columns = -(-shape[-2] // layout.height), -(-shape[-1] // layout.width)
        return Span(pixels * rows, pixels * columns, 0, 1)
    if len(shape) == 3:
        patch = grid_of(call).patch
        return Span(pixels * patch, pixels * patch, int(frames is not None), frames or 1)
    latents, rows, columns = _patch(core.config)
    return Span(pixels * rows, pixels * columns, latents if len(shape) == 5 else 0, frames or 1)


def _unknown(network: str, tokens: int | str, beside: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"{network} gives its attention {tokens} tokens beside {beside}, and their order is not "
        "known: leave the method out of the plan, or add the network to accel/seams/tokens.py."
    )
