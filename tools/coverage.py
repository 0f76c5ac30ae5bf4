"""Which denoisers of diffusers block caches and the deep-branch cache serve: docs/coverage.md.

Every denoiser of the installed diffusers is built at toy size with random weights where that works
offline. Its blocks are found by structure; a run records what they add, and a second run leaves
them out and adds just that: the output must be the same. UNets are cut at every layer instead.

Run from the root of the project: ``.venv/bin/python tools/coverage.py``.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.models import transformers, unets
from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache
from torch import Tensor, nn

from accel.cache.block_range import Sum
from accel.errors import AccelError
from accel.seams.blocks import Block, crosses_long_skips, find_blocks
from accel.seams.denoisers import Denoiser
from accel.seams.modules import KINDS, find_modules
from accel.seams.unet import DeepBranch

ROOT = Path(__file__).resolve().parent.parent
ROWS = 2
CLOSE = 1e-4
"""Largest error, relative to the largest output, of a sum of gains against the blocks' own sums."""

NO_DENOISERS = {
    "MiniMaxMusic3RVQDepthDecoder": "a decoder of audio tokens",
    "MotionAdapter": "weights that are merged into a UNetMotionModel",
    "DualTransformer2DModel": "a part of UNets",
    "Transformer2DModel": "a part of UNets",
    "DreamLiteTransformer2DModel": "a part of UNets",
    "TransformerTemporalModel": "a part of UNets",
}
"""Models in diffusers' folders that no pipeline calls to denoise."""


def noise(*shape: int) -> Tensor:
    """Normal values that the shape alone decides."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def ids(tokens: int, axes: int = 3) -> Tensor:
    """Positions of tokens in a grid, the last axis counting."""
    table = torch.zeros(tokens, axes)
    table[:, -1] = torch.arange(tokens)
    return table


def ones(*shape: int) -> Tensor:
    """A mask that hides nothing."""
    return torch.ones(*shape, dtype=torch.long)


@dataclass(frozen=True)
class Toy:
    """How to build and call one class at toy size.

    Attributes:
        config: Arguments of the class.
        call: Arguments of its ``forward`` for `ROWS` rows.
    """

    config: dict[str, Any] = field(default_factory=dict)
    call: Callable[[], dict[str, Any]] = dict


TIME = torch.tensor([500.0, 500.0])
HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
WAN = {
    **HEADS,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 3,
}


def video(channels: int = 4) -> Tensor:
    """Latents of three frames."""
    return noise(ROWS, channels, 3, 8, 8)


def words(width: int = 16) -> Tensor:
    """A text of seven tokens."""
    return noise(ROWS, 7, width)


def prompted(latents: Callable[[], Tensor], **more: Any) -> Callable[[], dict[str, Any]]:
    """Arguments of most networks: latents, a time and a text."""
    return lambda: {
        "hidden_states": latents(),
        "timestep": TIME,
        "encoder_hidden_states": words(),
        **more,
    }


def picture(channels: int = 4) -> Callable[[], Tensor]:
    """Latents of a picture."""
    return partial(noise, ROWS, channels, 8, 8)


def packed(width: int = 4) -> Callable[[], Tensor]:
    """Latents of a picture as 16 tokens."""
    return partial(noise, ROWS, 16, width)


FLUX = {**HEADS, "in_channels": 4, "num_layers": 2, "num_single_layers": 2}
ROPE = {"axes_dims_rope": (4, 6, 6)}
PLACES = {"img_ids": ids(16), "txt_ids": ids(7)}
HUNYUAN = {
    **HEADS,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "num_refiner_layers": 1,
    "text_embed_dim": 16,
    "rope_axes_dim": (4, 6, 6),
}
MASK = {"encoder_attention_mask": ones(ROWS, 7)}
POOLED = {"pooled_projections": noise(ROWS, 16)}

TOYS: dict[str, Toy] = {
    "AceStepTransformer1DModel": Toy(
        {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "in_channels": 12,
            "audio_acoustic_hidden_dim": 4,
            "encoder_hidden_size": 16,
        },
        lambda: {
            "hidden_states": noise(ROWS, 16, 4),
            "timestep": TIME / 1000,
            "timestep_r": TIME / 1000,
            "encoder_hidden_states": words(),
            "context_latents": noise(ROWS, 16, 8),
        },
    ),
    "AuraFlowTransformer2DModel": Toy(
        {
            **HEADS,
            "sample_size": 8,
            "num_mmdit_layers": 2,
            "num_single_dit_layers": 2,
            "joint_attention_dim": 16,
            "caption_projection_dim": 32,
            "pos_embed_max_size": 64,
        },
        prompted(picture()),
    ),
    "CogVideoXTransformer3DModel": Toy(
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 3,
            "text_embed_dim": 16,
            "time_embed_dim": 8,
            "max_text_seq_length": 7,
            "sample_width": 8,
            "sample_height": 8,
            "sample_frames": 9,
        },
        prompted(partial(noise, ROWS, 3, 4, 8, 8)),
    ),
    "ConsisIDTransformer3DModel": Toy(
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 3,
            "text_embed_dim": 16,
            "time_embed_dim": 8,
            "max_text_seq_length": 7,
            "sample_width": 8,
            "sample_height": 8,
            "sample_frames": 9,
        },
        prompted(partial(noise, ROWS, 3, 4, 8, 8)),
    ),
    "DiTTransformer2DModel": Toy(
        {**HEADS, "in_channels": 4, "num_layers": 3, "sample_size": 8, "num_embeds_ada_norm": 10},
        lambda: {
            "hidden_states": noise(ROWS, 4, 8, 8),
            "timestep": torch.tensor([500, 500]),
            "class_labels": torch.tensor([1, 2]),
        },
    ),
    "HunyuanDiT2DModel": Toy(
        {
            **HEADS,
            "in_channels": 4,
            "patch_size": 2,
            "sample_size": 8,
            "hidden_size": 32,
            "num_layers": 4,
            "cross_attention_dim": 16,
            "cross_attention_dim_t5": 16,
            "pooled_projection_dim": 16,
            "text_len": 7,
            "text_len_t5": 7,
            "use_style_cond_and_image_meta_size": False,
        },
        lambda: {
            "hidden_states": noise(ROWS, 4, 8, 8),
            "timestep": TIME,
            "encoder_hidden_states": words(),
            "text_embedding_mask": ones(ROWS, 7),
            "encoder_hidden_states_t5": words(),
            "text_embedding_mask_t5": ones(ROWS, 7),
            "image_rotary_emb": (noise(16, 16), noise(16, 16)),
        },
    ),
    "LatteTransformer3DModel": Toy(
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "sample_size": 8,
            "patch_size": 2,
            "cross_attention_dim": 32,
            "caption_channels": 16,
            "video_length": 3,
            "norm_type": "ada_norm_single",
            "norm_elementwise_affine": False,
            "num_embeds_ada_norm": 10,
        },
        prompted(video),
    ),
    "LuminaNextDiT2DModel": Toy(
        {
            "sample_size": 8,
            "hidden_size": 32,
            "num_layers": 3,
            "num_attention_heads": 2,
            "num_kv_heads": 2,
            "multiple_of": 8,
            "cross_attention_dim": 16,
        },
        prompted(
            picture(),
            encoder_mask=ones(ROWS, 7),
            image_rotary_emb=torch.polar(torch.ones(4, 4, 8), torch.rand(4, 4, 8)),
            cross_attention_kwargs={},
        ),
    ),
    "PixArtTransformer2DModel": Toy(
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": 3,
            "sample_size": 8,
            "cross_attention_dim": 32,
            "caption_channels": 16,
            "use_additional_conditions": False,
        },
        prompted(picture(), added_cond_kwargs={"resolution": None, "aspect_ratio": None}),
    ),
    "PriorTransformer": Toy(
        {**HEADS, "num_layers": 3, "embedding_dim": 16, "num_embeddings": 7},
        lambda: {
            "hidden_states": noise(ROWS, 16),
            "timestep": TIME,
            "proj_embedding": noise(ROWS, 16),
            "encoder_hidden_states": words(),
        },
    ),
    "SanaTransformer2DModel": Toy(
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 3,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 16,
            "cross_attention_dim": 32,
            "caption_channels": 16,
            "sample_size": 8,
        },
        prompted(picture()),
    ),
    "StableAudioDiTModel": Toy(
        {
            **HEADS,
            "sample_size": 16,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 3,
            "num_key_value_attention_heads": 2,
            "cross_attention_dim": 16,
            "cross_attention_input_dim": 16,
            "global_states_input_dim": 16,
            "time_proj_dim": 16,
        },
        lambda: {
            "hidden_states": noise(ROWS, 4, 16),
            "timestep": TIME,
            "encoder_hidden_states": words(),
            "global_hidden_states": noise(ROWS, 1, 16),
            "rotary_embedding": (noise(17, 8), noise(17, 8)),
        },
    ),
    "T5FilmDecoder": Toy(
        {
            "input_dims": 4,
            "targets_length": 16,
            "d_model": 16,
            "num_layers": 3,
            "num_heads": 2,
            "d_kv": 8,
            "d_ff": 32,
        },
        lambda: {
            "encodings_and_masks": [(words(), torch.ones(ROWS, 7))],
            "decoder_input_tokens": noise(ROWS, 16, 4),
            "decoder_noise_time": TIME / 1000,
        },
    ),
    "AllegroTransformer3DModel": Toy(
        {
            **HEADS,
            "num_layers": 3,
            "cross_attention_dim": 32,
            "sample_height": 8,
            "sample_width": 8,
            "sample_frames": 3,
            "caption_channels": 16,
        },
        prompted(
            video,
            attention_mask=torch.ones(ROWS, 3, 8, 8),
            encoder_attention_mask=torch.ones(ROWS, 7),
            image_rotary_emb=None,
        ),
    ),
    "AnyFlowTransformer3DModel": Toy(
        WAN,
        lambda: {
            "hidden_states": noise(ROWS, 3, 4, 8, 8),
            "timestep": TIME[:, None].expand(ROWS, 3),
            "r_timestep": TIME[:, None].expand(ROWS, 3) / 2,
            "encoder_hidden_states": words(),
        },
    ),
    "AnyFlowFARTransformer3DModel": Toy(
        WAN,
        lambda: {
            "hidden_states": noise(ROWS, 3, 4, 8, 8),
            "timestep": TIME[:, None].expand(ROWS, 3),
            "r_timestep": TIME[:, None].expand(ROWS, 3) / 2,
            "encoder_hidden_states": words(),
            "chunk_partition": (1, 2),
        },
    ),
    "BriaTransformer2DModel": Toy(
        {**FLUX, "joint_attention_dim": 16, "axes_dims_rope": [4, 6, 6]},
        prompted(packed(), **PLACES),
    ),
    "BriaFiboTransformer2DModel": Toy(
        {**FLUX, "joint_attention_dim": 16, "axes_dims_rope": [4, 6, 6], "text_encoder_dim": 16},
        prompted(packed(), **PLACES, text_encoder_layers=[noise(ROWS, 7, 16)] * 4),
    ),
    "BriaFibo2Transformer2DModel": Toy(
        {
            "in_channels": 4,
            "dim": 32,
            "n_layers": 3,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "cap_feat_dim": 16,
            "injection_layer_ids": (1,),
            "perceiver_num_layers": 1,
            "min_num_gist_tokens": 4,
            "max_num_gist_tokens": 8,
            "gist_step": 4,
            "gist_min_text_len": 4,
            "gist_max_text_len": 16,
            "axes_dims": (4, 6, 6),
            "axes_lens": (64, 32, 32),
        },
        lambda: {
            "hidden_states": noise(ROWS, 4, 8, 8),
            "timestep": TIME / 1000,
            "encoder_hidden_states": noise(ROWS, 2, 7, 16),
        },
    ),
    "ChromaTransformer2DModel": Toy(
        {
            **FLUX,
            **ROPE,
            "joint_attention_dim": 16,
            "approximator_num_channels": 8,
            "approximator_hidden_dim": 16,
            "approximator_layers": 1,
        },
        prompted(packed(), **PLACES),
    ),
    "ChronoEditTransformer3DModel": Toy(WAN, prompted(video)),
    "CogView3PlusTransformer2DModel": Toy(
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 3,
            "text_embed_dim": 16,
            "time_embed_dim": 8,
            "condition_dim": 4,
            "pos_embed_max_size": 8,
            "sample_size": 8,
        },
        prompted(
            picture(),
            original_size=noise(ROWS, 2),
            target_size=noise(ROWS, 2),
            crop_coords=noise(ROWS, 2),
        ),
    ),
    "CogView4Transformer2DModel": Toy(
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 3,
            "text_embed_dim": 16,
            "time_embed_dim": 8,
            "condition_dim": 4,
            "rope_axes_dim": (64, 64),
            "sample_size": 8,
        },
        prompted(
            picture(),
            original_size=noise(ROWS, 2),
            target_size=noise(ROWS, 2),
            crop_coords=noise(ROWS, 2),
        ),
    ),
    "CosmosTransformer3DModel": Toy(
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 3,
            "text_embed_dim": 16,
            "adaln_lora_dim": 4,
            "max_size": (4, 16, 16),
            "concat_padding_mask": False,
        },
        prompted(video, fps=24),
    ),
    "EasyAnimateTransformer3DModel": Toy(
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "patch_size": 2,
            "sample_width": 8,
            "sample_height": 8,
            "num_layers": 3,
            "mmdit_layers": 2,
            "time_embed_dim": 8,
            "text_embed_dim": 16,
        },
        prompted(video),
    ),
    "ErnieImageTransformer2DModel": Toy(
        {
            "hidden_size": 32,
            "num_attention_heads": 2,
            "num_layers": 3,
            "ffn_hidden_size": 64,
            "in_channels": 4,
            "out_channels": 4,
            "text_in_dim": 16,
            "rope_axes_dim": (4, 6, 6),
        },
        lambda: {
            "hidden_states": noise(ROWS, 4, 8, 8),
            "timestep": TIME,
            "text_bth": words(),
            "text_lens": torch.tensor([7, 7]),
        },
    ),
    "FluxTransformer2DModel": Toy(
        {
            **FLUX,
            **ROPE,
            "joint_attention_dim": 16,
            "pooled_projection_dim": 16,
            "guidance_embeds": False,
        },
        prompted(packed(), **PLACES, **POOLED),
    ),
    "Flux2Transformer2DModel": Toy(
        {
            **FLUX,
            "joint_attention_dim": 16,
            "timestep_guidance_channels": 16,
            "axes_dims_rope": (4, 4, 4, 4),
        },
        prompted(packed(), img_ids=ids(16, 4), txt_ids=ids(7, 4), guidance=torch.ones(ROWS)),
    ),
    "Flux3Transformer2DModel": Toy(
        {
            **FLUX,
            "cond_in_channels": 4,
            "joint_attention_dim": 16,
            "timestep_channels": 16,
            "axes_dims_rope": (4, 4, 4, 4),
        },
        prompted(packed(), img_ids=ids(16, 4), txt_ids=ids(7, 4)),
    ),
    "GlmImageTransformer2DModel": Toy(
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 3,
            "text_embed_dim": 16,
            "time_embed_dim": 8,
            "condition_dim": 4,
            "prior_vq_quantizer_codebook_size": 8,
        },
        prompted(
            picture(),
            prior_token_id=ones(ROWS, 16),
            prior_token_drop=torch.zeros(ROWS, 16, dtype=torch.bool),
            target_size=noise(ROWS, 2),
            crop_coords=noise(ROWS, 2),
        ),
    ),
    "HeliosTransformer3DModel": Toy(
        {**WAN, "rope_dim": (4, 6, 6), "has_multi_term_memory_patch": False},
        prompted(video, indices_hidden_states=torch.arange(3).expand(ROWS, 3)),
    ),
    "HiDreamImageTransformer2DModel": Toy(
        {
            **HEADS,
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "num_single_layers": 2,
            "caption_channels": [16, 16],
            "text_emb_dim": 16,
            "axes_dims_rope": (8, 4, 4),
            "max_resolution": (8, 8),
            "llama_layers": (0, 1, 0, 1),
            "force_inference_output": True,
        },
        lambda: {
            "hidden_states": noise(ROWS, 4, 8, 8),
            "timesteps": TIME,
            "encoder_hidden_states_t5": words(),
            "encoder_hidden_states_llama3": noise(2, ROWS, 7, 16),
            "pooled_embeds": noise(ROWS, 16),
        },
    ),
    "HunyuanVideoTransformer3DModel": Toy(
        {
            **HUNYUAN,
            "num_single_layers": 2,
            "pooled_projection_dim": 16,
            "guidance_embeds": False,
        },
        prompted(video, **MASK, **POOLED),
    ),
    "HunyuanVideo15Transformer3DModel": Toy(
        {**HUNYUAN, "text_embed_2_dim": 16, "image_embed_dim": 16},
        prompted(
            video,
            **MASK,
            encoder_hidden_states_2=words(),
            encoder_attention_mask_2=ones(ROWS, 7),
            image_embeds=noise(ROWS, 5, 16),
        ),
    ),
    "HunyuanVideoFramepackTransformer3DModel": Toy(
        {
            **HUNYUAN,
            "num_single_layers": 2,
            "pooled_projection_dim": 16,
            "guidance_embeds": False,
            "has_image_proj": True,
            "image_proj_dim": 16,
            "has_clean_x_embedder": True,
        },
        prompted(
            video,
            **MASK,
            **POOLED,
            image_embeds=noise(ROWS, 5, 16),
            indices_latents=torch.arange(3),
            latents_clean=noise(ROWS, 4, 1, 8, 8),
            indices_latents_clean=torch.arange(1),
            latents_history_2x=noise(ROWS, 4, 2, 8, 8),
            indices_latents_history_2x=torch.arange(2),
            latents_history_4x=noise(ROWS, 4, 4, 8, 8),
            indices_latents_history_4x=torch.arange(4),
        ),
    ),
    "HunyuanImageTransformer2DModel": Toy(
        {
            **HUNYUAN,
            "num_single_layers": 2,
            "patch_size": (2, 2),
            "rope_axes_dim": (8, 8),
            "text_embed_2_dim": None,
        },
        prompted(picture(), **MASK),
    ),
    "Ideogram4Transformer2DModel": Toy(
        {
            **HEADS,
            "in_channels": 4,
            "num_layers": 3,
            "intermediate_size": 32,
            "adaln_dim": 8,
            "llm_features_dim": 16,
            "mrope_section": (4, 2, 2),
        },
        lambda: {
            "hidden_states": noise(ROWS, 23, 4),
            "timestep": TIME / 1000,
            "encoder_hidden_states": noise(ROWS, 23, 16),
            "position_ids": torch.arange(23)[None, :, None].expand(ROWS, 23, 3),
            "segment_ids": ones(ROWS, 23),
            "indicator": torch.tensor([3] * 7 + [2] * 16).expand(ROWS, 23),
        },
    ),
    "JoyImageEditTransformer3DModel": Toy(
        {
            "in_channels": 4,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "text_dim": 16,
            "num_layers": 3,
            "rope_dim_list": [4, 6, 6],
        },
        prompted(lambda: noise(ROWS, 1, 4, 3, 8, 8)),
    ),
    "JoyImageEditPlusTransformer3DModel": Toy(
        {
            "in_channels": 4,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "text_dim": 16,
            "num_layers": 3,
            "rope_dim_list": [4, 6, 6],
        },
        prompted(lambda: noise(ROWS, 16, 4, 1, 2, 2), shape_list=[[(1, 4, 4)]] * ROWS),
    ),
    "Kandinsky6Transformer3DModel": Toy(
        {
            "in_visual_dim": 4,
            "out_visual_dim": 4,
            "in_text_dim": 16,
            "in_text_dim2": 16,
            "time_dim": 16,
            "model_dim": 32,
            "ff_dim": 64,
            "num_text_blocks": 1,
            "num_visual_blocks": 3,
            "axes_dims": (4, 6, 6),
            "visual_cond": False,
            "in_audio_dim": 4,
            "out_audio_dim": 4,
        },
        prompted(partial(noise, ROWS, 3, 8, 8, 4), **POOLED, audio_hidden_states=noise(ROWS, 6, 4)),
    ),
    "Kandinsky6SRTransformer3DModel": Toy(
        {
            "in_visual_dim": 4,
            "out_visual_dim": 4,
            "time_dim": 16,
            "model_dim": 32,
            "ff_dim": 64,
            "num_visual_blocks": 3,
            "axes_dims": (4, 6, 6),
        },
        lambda: {"hidden_states": noise(ROWS, 1, 8, 8, 9), "timestep": TIME},
    ),
    "Kandinsky5Transformer3DModel": Toy(
        {
            "in_text_dim": 16,
            "in_text_dim2": 16,
            "time_dim": 16,
            "model_dim": 32,
            "ff_dim": 64,
            "num_text_blocks": 1,
            "num_visual_blocks": 3,
            "axes_dims": (4, 6, 6),
        },
        prompted(
            partial(noise, ROWS, 3, 8, 8, 4),
            **POOLED,
            visual_rope_pos=[torch.arange(3), torch.arange(4), torch.arange(4)],
            text_rope_pos=torch.arange(7),
        ),
    ),
    "Krea2Transformer2DModel": Toy(
        {
            **HEADS,
            "in_channels": 4,
            "num_layers": 3,
            "num_key_value_heads": 2,
            "intermediate_size": 32,
            "timestep_embed_dim": 16,
            "text_hidden_dim": 16,
            "num_text_layers": 2,
            "text_num_attention_heads": 2,
            "text_num_key_value_heads": 2,
            "text_intermediate_size": 32,
            "num_layerwise_text_blocks": 1,
            "num_refiner_text_blocks": 1,
            "axes_dims_rope": (4, 6, 6),
        },
        lambda: {
            "hidden_states": noise(ROWS, 16, 4),
            "timestep": TIME / 1000,
            "encoder_hidden_states": noise(ROWS, 7, 2, 16),
            "position_ids": ids(23),
        },
    ),
    "LongCatAudioDiTTransformer": Toy(
        {
            "dit_dim": 32,
            "dit_depth": 3,
            "dit_heads": 2,
            "dit_text_dim": 16,
            "latent_dim": 4,
            "use_latent_condition": False,
        },
        prompted(
            partial(noise, ROWS, 16, 4),
            encoder_attention_mask=torch.ones(ROWS, 7, dtype=torch.bool),
        ),
    ),
    "LongCatImageTransformer2DModel": Toy(
        {
            **FLUX,
            "joint_attention_dim": 16,
            "pooled_projection_dim": 16,
            "axes_dims_rope": [4, 6, 6],
        },
        prompted(packed(), **PLACES),
    ),
    "LTXVideoTransformer3DModel": Toy(
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 3,
            "cross_attention_dim": 32,
            "caption_channels": 16,
        },
        prompted(partial(noise, ROWS, 12, 4), **MASK, num_frames=3, height=2, width=2),
    ),
    "LTX2VideoTransformer3DModel": Toy(
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "cross_attention_dim": 32,
            "audio_in_channels": 4,
            "audio_out_channels": 4,
            "audio_num_attention_heads": 2,
            "audio_attention_head_dim": 8,
            "audio_cross_attention_dim": 16,
            "num_layers": 3,
            "caption_channels": 16,
        },
        lambda: {
            "hidden_states": noise(ROWS, 12, 4),
            "audio_hidden_states": noise(ROWS, 6, 4),
            "encoder_hidden_states": words(),
            "audio_encoder_hidden_states": words(),
            "timestep": TIME[:, None],
            "encoder_attention_mask": ones(ROWS, 7),
            "audio_encoder_attention_mask": ones(ROWS, 7),
            "num_frames": 3,
            "height": 2,
            "width": 2,
            "audio_num_frames": 6,
        },
    ),
    "Lumina2Transformer2DModel": Toy(
        {
            "sample_size": 8,
            "in_channels": 4,
            "hidden_size": 32,
            "num_layers": 3,
            "num_refiner_layers": 1,
            "num_attention_heads": 2,
            "num_kv_heads": 2,
            "multiple_of": 8,
            "axes_dim_rope": (4, 6, 6),
            "axes_lens": (64, 32, 32),
            "cap_feat_dim": 16,
        },
        prompted(picture(), **MASK),
    ),
    "MiniMaxMusic3Transformer1DModel": Toy(
        {
            **HEADS,
            "in_channels": 4,
            "condition_dim": 16,
            "num_layers": 3,
            "ff_inner_dim": 32,
            "rotary_dim": 8,
            "fourier_embedding_dim": 16,
        },
        lambda: {
            "hidden_states": noise(ROWS, 4, 16),
            "timestep": TIME / 1000,
            "encoder_hidden_states": noise(ROWS, 16, 16),
        },
    ),
    "MiniMaxH3Transformer3DModel": Toy(
        {
            **HEADS,
            "hidden_size": 32,
            "num_layers": 3,
            "num_refiner_layers": 1,
            "ffn_dim": 64,
            "in_channels": 4,
            "audio_in_channels": 4,
            "text_dim": 16,
            "freq_dim": 16,
            "time_embed_hidden_dim": 32,
            "time_embed_dim": 16,
            "rope_freq_dim": 2,
        },
        lambda: {
            "hidden_states": noise(ROWS, 4, 16),
            "audio_hidden_states": noise(ROWS, 3, 4),
            "encoder_hidden_states": noise(ROWS, 2, 16),
            "timestep": torch.tensor([0.5]),
            "timestep_indices": torch.zeros(9, dtype=torch.long),
            "token_tags": torch.tensor([1, 1, 0, 0, 0, 0, 2, 2, 2]),
            "position_ids": torch.arange(9)[:, None].expand(9, 3),
            "video_indices": torch.arange(2, 6),
            "audio_indices": torch.arange(6, 9),
            "text_indices": torch.arange(2),
        },
    ),
    "MochiTransformer3DModel": Toy(
        {
            **HEADS,
            "in_channels": 4,
            "num_layers": 3,
            "pooled_projection_dim": 16,
            "text_embed_dim": 16,
            "time_embed_dim": 16,
            "max_sequence_length": 7,
        },
        prompted(video, encoder_attention_mask=torch.ones(ROWS, 7, dtype=torch.bool)),
    ),
    "MotifVideoTransformer3DModel": Toy(
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "num_single_layers": 3,
            "num_decoder_layers": 1,
            "text_embed_dim": 16,
            "rope_axes_dim": (4, 6, 6),
        },
        prompted(video),
    ),
    "NucleusMoEImageTransformer2DModel": Toy(
        {
            **HEADS,
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 3,
            "joint_attention_dim": 16,
            "axes_dims_rope": (4, 6, 6),
            "moe_enabled": False,
            "capacity_factors": [1.0] * 3,
        },
        prompted(
            packed(16),
            img_shapes=[(1, 4, 4)] * ROWS,
            encoder_hidden_states_mask=torch.ones(ROWS, 7, dtype=torch.bool),
        ),
    ),
    "OmniGenTransformer2DModel": Toy(
        {
            "hidden_size": 32,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "intermediate_size": 32,
            "num_layers": 3,
            "pad_token_id": 0,
            "vocab_size": 10,
            "max_position_embeddings": 64,
            "original_max_position_embeddings": 64,
            "rope_scaling": {"long_factor": [1.0] * 8, "short_factor": [1.0] * 8},
            "pos_embed_max_size": 64,
            "time_step_dim": 16,
        },
        lambda: {
            "hidden_states": noise(ROWS, 4, 8, 8),
            "timestep": TIME / 1000,
            "input_ids": ones(ROWS, 7),
            "input_img_latents": [],
            "input_image_sizes": {},
            "attention_mask": torch.ones(ROWS, 24, 24),
            "position_ids": torch.arange(24).expand(ROWS, 24),
        },
    ),
    "OvisImageTransformer2DModel": Toy(
        {**FLUX, **ROPE, "out_channels": 4, "joint_attention_dim": 16},
        prompted(packed(), **PLACES),
    ),
    "PRXTransformer2DModel": Toy(
        {
            "in_channels": 4,
            "context_in_dim": 16,
            "hidden_size": 32,
            "num_heads": 2,
            "depth": 3,
            "axes_dim": [8, 8],
        },
        prompted(picture()),
    ),
    "QwenImageTransformer2DModel": Toy(
        {
            **HEADS,
            **ROPE,
            "in_channels": 4,
            "out_channels": 1,
            "num_layers": 3,
            "joint_attention_dim": 16,
        },
        prompted(
            packed(), img_shapes=[[(1, 4, 4)]] * ROWS, encoder_hidden_states_mask=ones(ROWS, 7)
        ),
    ),
    "QwenImage21Transformer2DModel": Toy(
        {
            **HEADS,
            **ROPE,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 3,
            "context_in_dim": 16,
        },
        prompted(
            packed(),
            img_shapes=[[(1, 4, 4)]] * ROWS,
            img_mask=torch.tensor([[False] * 7 + [True] * 4] * ROWS),
        ),
    ),
    "SanaWMLTX2RefinerTransformer3DModel": Toy(
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "cross_attention_dim": 32,
            "num_layers": 3,
            "caption_channels": 16,
        },
        lambda: {
            "hidden_states": noise(ROWS, 12, 4),
            "timestep": TIME[:, None].expand(ROWS, 12),
            "encoder_hidden_states": words(),
            "video_rotary_emb": (noise(ROWS, 12, 32), noise(ROWS, 12, 32)),
        },
    ),
    "SanaVideoTransformer3DModel": Toy(
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 3,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 16,
            "cross_attention_dim": 32,
            "caption_channels": 16,
            "sample_size": 8,
        },
        prompted(video),
    ),
    "SanaWMTransformer3DModel": Toy(
        {
            "in_channels": 4,
            "num_layers": 3,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "softmax_every_n": 2,
            "linear_head_dim": 16,
            "chunk_plucker_channels": 4,
            "chunk_plucker_post_attn_blocks": 0,
            "use_chunk_plucker_post_attn": False,
            "image_size": 64,
            "caption_channels": 16,
        },
        lambda: {
            "hidden_states": video(),
            "timestep": TIME[:, None, None].expand(ROWS, 1, 3),
            "encoder_hidden_states": noise(ROWS, 1, 7, 16),
            "encoder_attention_mask": ones(ROWS, 7),
        },
    ),
    "SD3Transformer2DModel": Toy(
        {
            **HEADS,
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 3,
            "joint_attention_dim": 16,
            "caption_projection_dim": 32,
            "pooled_projection_dim": 16,
            "pos_embed_max_size": 8,
        },
        prompted(picture(), **POOLED),
    ),
    "SkyReelsV2Transformer3DModel": Toy(WAN, prompted(video)),
    "StableAudio3DiTModel": Toy(
        {
            "io_channels": 4,
            "embed_dim": 64,
            "depth": 3,
            "num_heads": 2,
            "cond_token_dim": 16,
            "global_cond_dim": 16,
            "local_add_cond_dim": 5,
            "timestep_features_dim": 16,
            "num_memory_tokens": 2,
        },
        lambda: {
            "hidden_states": noise(ROWS, 4, 16),
            "timestep": TIME / 1000,
            "encoder_hidden_states": words(),
            "global_hidden_states": noise(ROWS, 16),
        },
    ),
    "WanTransformer3DModel": Toy(WAN, prompted(video)),
    "WanAnimate2Transformer3DModel": Toy(
        {
            "in_dim": 12,
            "dim": 32,
            "ffn_dim": 32,
            "freq_dim": 16,
            "text_dim": 16,
            "text_len": 7,
            "out_dim": 4,
            "num_heads": 2,
            "num_layers": 3,
        },
        lambda: {  # the pass over the reference: that over the video needs a compiled FlexAttention
            "hidden_states": [*noise(ROWS, 4, 3, 8, 8)],
            "timestep": TIME,
            "encoder_hidden_states": [*words()],
            "condition_latents": [*noise(ROWS, 8, 3, 8, 8)],
            "kv_cache": WanAnimate2KVCache(3),
            "kv_cache_mode": "extract",
            "seq_len": 48,
            "encoder_hidden_states_image": noise(ROWS, 5, 1280),
            "offset_grid_sizes": torch.tensor([[3, 4, 4]] * ROWS),
        },
    ),
    "WanAnimateTransformer3DModel": Toy(
        {
            **WAN,
            "in_channels": 12,
            "latent_channels": 4,
            "image_dim": 16,
            "motion_encoder_channel_sizes": {"4": 16, "8": 16, "16": 16},
            "motion_encoder_size": 16,
            "motion_style_dim": 8,
            "motion_dim": 4,
            "motion_encoder_dim": 16,
            "face_encoder_hidden_dim": 16,
            "face_encoder_num_heads": 2,
            "inject_face_latents_blocks": 3,
        },
        prompted(
            partial(noise, ROWS, 12, 3, 8, 8),
            encoder_hidden_states_image=noise(ROWS, 5, 16),
            pose_hidden_states=noise(ROWS, 4, 2, 8, 8),
            face_pixel_values=noise(ROWS, 3, 5, 16, 16),
        ),
    ),
    "WanVACETransformer3DModel": Toy(
        {**WAN, "num_layers": 4, "vace_layers": [0, 2], "vace_in_channels": 8},
        prompted(video, control_hidden_states=noise(ROWS, 8, 3, 8, 8)),
    ),
    "ZImageTransformer2DModel": Toy(
        {
            "in_channels": 4,
            "dim": 32,
            "n_layers": 3,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "n_kv_heads": 2,
            "cap_feat_dim": 16,
            "axes_dims": [4, 6, 6],
            "axes_lens": [64, 32, 32],
        },
        lambda: {
            "x": [noise(4, 1, 8, 8), noise(4, 1, 8, 8)],
            "t": TIME / 1000,
            "cap_feats": [noise(7, 16), noise(7, 16)],
        },
    ),
}

SMALL = {"norm_num_groups": 4, "block_out_channels": (8, 16), "layers_per_block": 2}
TEXT = {"cross_attention_dim": 16, "attention_head_dim": 4}


def paths(down: str, up: str) -> dict[str, Any]:
    """Two blocks down and up, the outer ones with attention."""
    return {
        "down_block_types": (f"CrossAttn{down}", down),
        "up_block_types": (up, f"CrossAttn{up}"),
        **SMALL,
        **TEXT,
    }


TOYS |= {
    "UNet2DModel": Toy(
        {
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
            **SMALL,
        },
        lambda: {"sample": noise(ROWS, 3, 8, 8), "timestep": 500},
    ),
    "UNet2DConditionModel": Toy(
        paths("DownBlock2D", "UpBlock2D"),
        lambda: {
            "sample": noise(ROWS, 4, 8, 8),
            "timestep": 500,
            "encoder_hidden_states": words(),
        },
    ),
    "DreamLiteUNetModel": Toy(
        {
            "down_block_types": ("DreamLiteCrossAttnNoSelfAttnDownBlock2D", "DreamLiteDownBlock2D"),
            "up_block_types": ("DreamLiteUpBlock2D", "DreamLiteCrossAttnNoSelfAttnUpBlock2D"),
            "ff_mult": 2,
            **SMALL,
            **TEXT,
        },
        lambda: {
            "sample": noise(ROWS, 4, 8, 8),
            "timestep": 500,
            "encoder_hidden_states": words(),
        },
    ),
    "UNet3DConditionModel": Toy(
        paths("DownBlock3D", "UpBlock3D"),
        lambda: {"sample": video(), "timestep": 500, "encoder_hidden_states": words()},
    ),
    "I2VGenXLUNet": Toy(
        paths("DownBlock3D", "UpBlock3D"),
        lambda: {
            "sample": video(),
            "timestep": 500,
            "fps": torch.tensor([4, 8]),
            "image_latents": video(),
            "image_embeddings": noise(ROWS, 16),
            "encoder_hidden_states": words(),
        },
    ),
    "UNetMotionModel": Toy(
        {
            "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
            "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion"),
            "cross_attention_dim": 16,
            "num_attention_heads": 2,
            "motion_num_attention_heads": 2,
            **SMALL,
        },
        lambda: {
            "sample": video(),
            "timestep": 500,
            "encoder_hidden_states": noise(ROWS * 3, 7, 16),
        },
    ),
    "UNetSpatioTemporalConditionModel": Toy(
        {
            "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
            "in_channels": 4,
            "out_channels": 4,
            "block_out_channels": (32, 64),
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 24,
            "cross_attention_dim": 16,
            "num_attention_heads": (2, 2),
        },
        lambda: {
            "sample": noise(ROWS, 3, 4, 8, 8),
            "timestep": 500,
            "encoder_hidden_states": noise(ROWS, 1, 16),
            "added_time_ids": noise(ROWS, 3),
        },
    ),
}


TOYS |= {
    "UNet1DModel": Toy(
        {
            "sample_size": 64,
            "in_channels": 4,
            "out_channels": 4,
            "extra_in_channels": 64,
            "block_out_channels": (32, 32, 64),
        },
        lambda: {"sample": noise(ROWS, 4, 64), "timestep": TIME},
    ),
    "StableCascadeUNet": Toy(
        {
            "in_channels": 4,
            "out_channels": 4,
            "timestep_ratio_embedding_dim": 8,
            "patch_size": 1,
            "conditioning_dim": 16,
            "block_out_channels": (16, 32),
            "num_attention_heads": (0, 2),
            "down_num_layers_per_block": (1, 1),
            "up_num_layers_per_block": (1, 1),
            "down_blocks_repeat_mappers": (1, 1),
            "up_blocks_repeat_mappers": (1, 1),
            "block_types_per_layer": (
                ("SDCascadeResBlock", "SDCascadeTimestepBlock"),
                ("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"),
            ),
            "clip_text_in_channels": 16,
            "clip_text_pooled_in_channels": 16,
            "clip_image_in_channels": 16,
            "clip_seq": 4,
            "effnet_in_channels": None,
            "pixel_mapper_in_channels": None,
            "self_attn": True,
            "dropout": (0.0, 0.0),
            "switch_level": (True,),
        },
        lambda: {
            "sample": noise(ROWS, 4, 8, 8),
            "timestep_ratio": TIME / 1000,
            "clip_text_pooled": noise(ROWS, 1, 16),
            "clip_text": noise(ROWS, 7, 16),
            "clip_img": noise(ROWS, 1, 16),
        },
    ),
}


@dataclass(frozen=True)
class Finding:
    """What holds for one class.

    Attributes:
        name: Of the class.
        blocks: What is skipped, in the order of execution.
        streams: What a block hands on, in the order in which it returns it.
        error: Largest error of a bypass, relative to the largest output.
        effect: What leaving the blocks out without their gains changes, on the same scale.
        reason: Why it is not served.
        modules: The attention and feed-forward modules that caches of modules find, by kind.
    """

    name: str
    blocks: str = ""
    streams: str = ""
    error: float | None = None
    effect: float | None = None
    reason: str = ""
    modules: str = ""

    @property
    def served(self) -> bool:
        """Whether leaving blocks out and adding what they gave is the network itself."""
        return not self.reason and self.error is not None and self.error <= CLOSE


def classes() -> dict[str, type[ModelMixin]]:
    """Every model in diffusers' folders of transformers and UNets."""
    found = {}
    for package in (transformers, unets):
        for info in pkgutil.iter_modules(package.__path__):
            module = importlib.import_module(f"{package.__name__}.{info.name}")
            for name, kind in vars(module).items():
                here = inspect.isclass(kind) and kind.__module__ == module.__name__
                if here and issubclass(kind, ModelMixin):
                    found[name] = kind
    return dict(sorted(found.items()))


def build(name: str, **other: Any) -> nn.Module:
    """A network of toy size, every weight of which matters, with other settings if given."""
    torch.manual_seed(0)
    config = TOYS[name].config | other
    network = classes()[name](**config).eval().requires_grad_(requires_grad=False)
    for weight in network.parameters():
        if not weight.any():  # many blocks begin as the identity
            nn.init.normal_(weight, std=0.1)
    return network.float()


def output(network: nn.Module, name: str) -> Tensor:
    """The answer of a toy to its call."""
    answer = network(**TOYS[name].call(), return_dict=False) if _wraps(network) else None
    if answer is None:
        answer = network(**TOYS[name].call())
    while not isinstance(answer, Tensor):
        answer = torch.cat([part.flatten() for part in _tensors(answer)])
    return answer


def _wraps(network: nn.Module) -> bool:
    return "return_dict" in inspect.signature(type(network).forward).parameters


def _tensors(answer: Any) -> Iterator[Tensor]:
    for part in answer:
        if isinstance(part, Tensor):
            yield part
        elif part is not None:
            yield from _tensors(part)


def examine(name: str) -> Finding:
    """Find and check the blocks of one class, and find its modules.

    Raises:
        Exception: Whatever the class raises where its toy does not fit it.
    """
    if name in NO_DENOISERS:
        return Finding(name, reason=f"no denoiser: {NO_DENOISERS[name]}")
    if name not in TOYS:
        return _unbuilt(name)
    network = build(name)
    stock = output(network, name)
    try:
        denoiser = Denoiser("transformer", network)
    except AccelError as refusal:
        return Finding(name, reason=str(refusal))
    check = _cut if hasattr(network, "up_blocks") else _bypass
    try:
        finding = check(name, denoiser, stock)
    except AccelError as refusal:
        finding = Finding(name, reason=str(refusal))
    return replace(finding, modules=_modules(denoiser))


def _modules(denoiser: Denoiser) -> str:
    """How many modules of each kind there are; nothing where caches of modules are refused."""
    try:
        kinds = [module.kind for module in find_modules(denoiser)]
    except AccelError:
        return ""
    return ", ".join(f"{kind} × {kinds.count(kind)}" for kind in KINDS if kind in kinds)


def _unbuilt(name: str) -> Finding:
    """A class without a toy: what its ``forward`` and its structure at full size tell."""
    kind = classes()[name]
    try:
        Denoiser("transformer", kind.__new__(kind))
        with torch.device("meta"):
            denoiser = Denoiser("transformer", kind())
    except AccelError as refusal:
        return Finding(name, reason=str(refusal))
    finding = Finding(name, reason="found, but not run: it has no toy", modules=_modules(denoiser))
    try:
        if hasattr(denoiser.core, "up_blocks"):
            DeepBranch(denoiser, 0)
            return replace(finding, blocks="deep branch")
        blocks = find_blocks(denoiser)
    except AccelError as refusal:
        return replace(finding, reason=str(refusal))
    return replace(finding, blocks=_describe(denoiser.core, blocks), streams=_order(blocks))


def _relative(value: Tensor, stock: Tensor) -> float:
    return ((value - stock).abs().max() / stock.abs().max()).item()


def _cut(name: str, denoiser: Denoiser, stock: Tensor) -> Finding:
    """Cut a UNet at every layer: a shallow pass behind a full one's feature."""
    errors, effects = [], []
    DeepBranch(denoiser, 0)
    run = partial(output, denoiser.core, name)
    layers = sum(len(block.resnets) for block in denoiser.core.up_blocks)
    for branch in range(layers):
        deep = DeepBranch(denoiser, branch)
        with ExitStack() as stack:
            for undo in deep.attach():
                stack.callback(undo)
            _, feature = deep.full(ROWS, run)
            assert feature is not None
            errors.append(_relative(deep.shallow(feature, run), stock))
            effects.append(_relative(deep.shallow(feature * 0.0, run), stock))
    return Finding(
        name,
        f"deep branch, {layers} cuts",
        "feature",
        max(errors),
        min(effects),
    )


def _bypass(name: str, denoiser: Denoiser, stock: Tensor) -> Finding:
    """Leave out all blocks but the first, then the rear half of them, then the front half."""
    blocks = find_blocks(denoiser)
    errors, effects = [], []
    count = len(blocks)
    for span in (range(1, count), range(count // 2, count), range(count // 2)):
        if crosses_long_skips(blocks, span):  # refused where a cache asks for it
            continue
        gains = _record(name, denoiser, blocks, span)
        errors.append(_relative(_leave_out(name, denoiser, blocks, span, gains), stock))
        effects.append(_relative(_leave_out(name, denoiser, blocks, span, {}), stock))
    streams = dict.fromkeys(stream for stream, _ in gains)
    return Finding(
        name,
        _describe(denoiser.core, blocks),
        _order(blocks) or ", ".join(streams),
        max(errors),
        min(effects),
    )


def _record(name: str, denoiser: Denoiser, blocks: Any, span: range) -> dict[Any, Tensor]:
    total, seen = Sum(), []

    def follow(block: Block, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        entering = block.inputs(block.bind(args, kwargs))
        _check_rows(denoiser, block, entering)
        total.enter(entering)
        returned = inner(*args, **kwargs)
        total.leave(block.outputs(returned))
        seen.append(block.index)
        return returned

    _run(name, denoiser, [blocks[index] for index in span], follow)
    if seen != list(span):
        raise AccelError(f"its blocks run in another order than they are found in: {seen}")
    return dict(total.total())


def _check_rows(denoiser: Denoiser, block: Block, entering: dict[str, Tensor]) -> None:
    if any(len(value) != ROWS for value in entering.values()):
        raise AccelError(
            f"{type(denoiser.core).__name__} gives its {block.kind} {len(entering['hidden'])} rows "
            f"where the call has {ROWS}"
        )


def _leave_out(
    name: str, denoiser: Denoiser, blocks: Any, span: range, gains: dict[Any, Tensor]
) -> Tensor:
    pending = dict(gains)

    def skip(block: Block, _: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        streams = block.inputs(block.bind(args, kwargs))
        for stream, value in streams.items():
            gain = pending.pop((stream, value.shape[1]), None)
            streams[stream] = value if gain is None else value + gain
        return block.returns(streams)

    return _run(name, denoiser, [blocks[index] for index in span], skip)


def _run(name: str, denoiser: Denoiser, blocks: Any, around: Callable[..., Any]) -> Tensor:
    with ExitStack() as stack:
        for block in blocks:
            stack.callback(block.wrap(partial(around, block)))
        return output(denoiser.core, name)


def _describe(core: nn.Module, blocks: Any) -> str:
    names = {id(part): name for name, part in core.named_modules()}
    lists = [names[id(block.module)].rpartition(".")[0] for block in blocks]
    return ", ".join(f"`{name}` × {len([*run])}" for name, run in groupby(lists))


def _order(blocks: Any) -> str:
    orders = dict.fromkeys(", ".join(block.streams) for block in blocks)
    return "; then ".join(orders)


def table(findings: list[Finding]) -> str:
    """The page docs/coverage.md."""
    served = [finding for finding in findings if finding.served]
    parts = [finding for finding in findings if finding.name in NO_DENOISERS]
    rows = "\n".join(
        f"| {f.name} | {f.blocks or '–'} | {f.streams or '–'} | {f.modules or '–'} | "
        f"{'–' if f.error is None else f'{f.error:.1e}'} | "
        f"{'yes' if f.served else _no(f)} |"
        for f in findings
        if f not in parts
    )
    return (
        HEAD.format(served=len(served), total=len(findings) - len(parts), torch=torch.__version__)
        + f"{rows}\n\n## No denoisers\n\n"
        + "\n".join(f"* {finding.name}: {NO_DENOISERS[finding.name]}" for finding in parts)
        + "\n"
    )


def _no(finding: Finding) -> str:
    return f"no: {finding.reason or 'a bypass is not exact'}"


HEAD = """# Which denoisers block caches serve

Generated by `.venv/bin/python tools/coverage.py`; not to be edited. {served} of {total} denoisers
of the installed diffusers are served.

Each class is built at toy size with random weights. One run records what its blocks add to each
stream; a second run leaves them out and adds just that: *error* is the largest difference between
the two outputs, relative to the largest output (over three ranges: all blocks but the first, the
rear half, the front half – but for HunyuanDiT, whose long skips refuse the last). UNets are cut at
each layer of their up path, and a pass of the shallow part runs behind the feature of a full pass.
Caches of the whole network (cache.EasyCache and others) do not look at blocks: they serve whatever
can be called with ``hidden_states``, ``sample`` or ``x``.

*Modules* are what caches of modules (cache.FORA, cache.PAB, cache.TaylorSeer, cache.Table) find
inside the blocks, by kind; where there are none (–), these caches refuse the network.

| denoiser | blocks, in the order of execution | streams, as returned | modules | error | served |
|---|---|---|---|---|---|
"""


def main() -> None:
    """Examine every class and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="classes to examine; all, and write the page")
    names = parser.parse_args().names
    torch.set_num_threads(1)
    findings = []
    for name in names or classes():
        try:
            finding = examine(name)
        except Exception as error:  # a toy that does not fit its class is a finding
            finding = Finding(name, reason=f"the toy fails: {type(error).__name__}: {error}")
        findings.append(finding)
        print(
            f"{name:44} {'yes' if finding.served else 'NO '} {finding.blocks:50.50} "
            f"{finding.streams:30.30} {finding.error} {finding.effect} {finding.reason[:300]}",
            flush=True,
        )
    if not names:
        (ROOT / "docs" / "coverage.md").write_text(table(findings))


if __name__ == "__main__":
    with torch.no_grad():
        main()
