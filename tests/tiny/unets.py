"""Families around a UNet: guidance stacks `[uncond, cond]` in one call without a context."""

from collections.abc import Callable
from typing import Any

from diffusers import (
    DiffusionPipeline,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)

from tiny import text
from tiny.base import Ask, Tiny
from tiny.parts import ddim, image_vae, seeded

SIDE = 32  # of the image: latents of 16 x 16
CHANNELS = (16, 32, 32)


def _unet(**changes: Any) -> UNet2DConditionModel:
    settings = {
        "sample_size": SIDE // 2,
        "block_out_channels": CHANNELS,
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": text.WIDTH,
        "attention_head_dim": 2,
        "norm_num_groups": 8,
    }
    return UNet2DConditionModel(**(settings | changes))


def _sd15_parts(**scheduler: Any) -> dict[str, Any]:
    tokenizer = text.clip_tokenizer()
    return {
        "vae": image_vae(),
        "text_encoder": text.clip_encoder(tokenizer, pooled=False),
        "tokenizer": tokenizer,
        "unet": _unet(),
        "scheduler": ddim(**scheduler),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


def _guided(ask: Ask) -> dict[str, Any]:
    return {
        "prompt": ask.prompts,
        "negative_prompt": ask.negatives,
        "guidance_scale": 5.0 if ask.guidance else 1.0,
    }


def _sized(ask: Ask) -> dict[str, Any]:
    return _guided(ask) | {"height": SIDE, "width": SIDE}


def _sd15() -> DiffusionPipeline:
    return StableDiffusionPipeline(**_sd15_parts())


def _sd15_v() -> DiffusionPipeline:
    return StableDiffusionPipeline(
        **_sd15_parts(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    )


def _sdxl() -> DiffusionPipeline:
    tokenizer = text.clip_tokenizer()
    return StableDiffusionXLPipeline(
        vae=image_vae(),
        text_encoder=text.clip_encoder(tokenizer, pooled=False),
        text_encoder_2=text.clip_encoder(tokenizer, pooled=True),
        tokenizer=tokenizer,
        tokenizer_2=text.clip_tokenizer(),
        unet=_unet(
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 1, 2),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + text.WIDTH,
            cross_attention_dim=2 * text.WIDTH,
        ),
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            steps_offset=1,
            timestep_spacing="leading",
        ),
    )


def _unet_tiny(
    name: str,
    build: Callable[[], DiffusionPipeline],
    inputs: Callable[[Ask], dict[str, Any]] = _sized,
    **more: Any,
) -> Tiny:
    return Tiny(
        name=name,
        build=seeded(build),
        layout="batched",
        order=("uncond", "cond"),
        blocks="unet",
        media=more.pop("media", "image"),
        inputs=inputs,
        denoisers=("unet",),
        **more,
    )


FAMILIES = (
    _unet_tiny("sd15", _sd15),
    _unet_tiny("sd15_v", _sd15_v),
    _unet_tiny("sdxl", _sdxl),
)
