"""Layers of UNets over clips that know of frames beyond those that they are given."""

from __future__ import annotations

from typing import Any

from diffusers.models.attention import FreeNoiseTransformerBlock
from diffusers.models.embeddings import SinusoidalPositionalEmbedding
from diffusers.models.transformers.transformer_temporal import TransformerSpatioTemporalModel
from torch import Tensor, nn

UNETS = {
    "UNet3DConditionModel": 2,
    "UNetMotionModel": 2,
    "UNetSpatioTemporalConditionModel": 1,
}
"""Networks, and the axis of their sample that counts frames."""


def cuts_clips(module: nn.Module) -> bool:
    """Whether a layer cuts the clip into windows by itself (FreeNoise)."""
    return isinstance(module, FreeNoiseTransformerBlock)


def positions_in(module: nn.Module) -> Tensor | None:
    """The positions ``[1, frames, C]`` that a layer adds to frames, if that is what it does."""
    return module.pe if isinstance(module, SinusoidalPositionalEmbedding) else None


def numbered_by(module: nn.Module) -> Any | None:
    """The part of a layer that is given the numbers of its frames, from 0 on, if it has one."""
    return module.time_proj if isinstance(module, TransformerSpatioTemporalModel) else None
