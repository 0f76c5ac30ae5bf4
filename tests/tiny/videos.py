"""Video families with a transformer."""

from typing import Any

import diffusers
from diffusers import DiffusionPipeline, UniPCMultistepScheduler

from tiny import text
from tiny.base import Ask, Tiny
from tiny.parts import seeded

SIDE = 32
FRAMES = 5  # of the video: 3 latent frames
HEADS = {"attention_head_dim": 16, "num_attention_heads": 2}


def _guided(ask: Ask) -> dict[str, Any]:
    return {
        "prompt": ask.prompts,
        "height": SIDE,
        "width": SIDE,
        "num_frames": FRAMES,
        "negative_prompt": ask.negatives,
        "guidance_scale": 5.0 if ask.guidance else 1.0,
        "max_sequence_length": 48,
    }


def _wan_transformer() -> diffusers.WanTransformer3DModel:
    return diffusers.WanTransformer3DModel(
        in_channels=4,
        out_channels=4,
        text_dim=text.WIDTH,
        freq_dim=32,
        ffn_dim=64,
        num_layers=3,
        rope_max_seq_len=32,
        **HEADS,
    )


def _wan(**more: Any) -> DiffusionPipeline:
    tokenizer = text.t5_tokenizer()
    return diffusers.WanPipeline(
        tokenizer=tokenizer,
        text_encoder=text.t5_encoder(tokenizer, kind="UMT5"),
        vae=diffusers.AutoencoderKLWan(
            base_dim=8,
            z_dim=4,
            dim_mult=[1, 1],
            num_res_blocks=1,
            temperal_downsample=[True],
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
            scale_factor_temporal=2,
            scale_factor_spatial=2,
        ),
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        transformer=_wan_transformer(),
        **more,
    )


def _wan22() -> DiffusionPipeline:
    return _wan(transformer_2=_wan_transformer(), boundary_ratio=0.875)


TRUE_CFG = ("cond", "uncond")

FAMILIES = (
    Tiny(
        name="wan21",
        build=seeded(_wan),
        layout="two_calls",
        order=TRUE_CFG,
        blocks="hidden",
        media="video",
        inputs=_guided,
    ),
    Tiny(
        name="wan22",
        build=seeded(_wan22),
        layout="two_calls",
        order=TRUE_CFG,
        blocks="hidden",
        media="video",
        inputs=_guided,
        denoisers=("transformer", "transformer_2"),
    ),
)
