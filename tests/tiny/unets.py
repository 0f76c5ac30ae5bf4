"""Families around a UNet: guidance stacks `[uncond, cond]` in one call without a context."""

from collections.abc import Callable
from typing import Any

import diffusers
import torch
import transformers
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
FRAMES = 3
VIDEO_SIDE = 24
KEY_SIDE, KEY_FRAMES = 16, 4  # of a clip between two pictures
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
        "norm_num_groups": 4,
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
        **_sd15_parts(
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            timestep_spacing="trailing",
        )
    )


def _sd_controlnet() -> DiffusionPipeline:
    parts = _sd15_parts()
    controlnet = diffusers.ControlNetModel.from_unet(
        parts["unet"], conditioning_embedding_out_channels=(8, 8), conditioning_channels=3
    )
    # one stride fewer than published: pictures are twice, not eight times, the latents' size
    return diffusers.StableDiffusionControlNetPipeline(controlnet=controlnet, **parts)


def _sd_img2img() -> DiffusionPipeline:
    return diffusers.StableDiffusionImg2ImgPipeline(**_sd15_parts())


def _sd_inpaint() -> DiffusionPipeline:
    parts = _sd15_parts() | {"unet": _unet(in_channels=9)}
    return diffusers.StableDiffusionInpaintPipeline(**parts)


def _with_control(ask: Ask) -> dict[str, Any]:
    return _sized(ask) | {"image": ask.pictures(SIDE, SIDE)}


def _from_image(ask: Ask) -> dict[str, Any]:
    return _guided(ask) | {"image": ask.pictures(SIDE, SIDE), "strength": 0.75}


def _masked(ask: Ask) -> dict[str, Any]:
    mask = torch.zeros(len(ask.prompts), 1, SIDE, SIDE)
    mask[..., SIDE // 4 : -SIDE // 4, SIDE // 4 : -SIDE // 4] = 1.0
    return _sized(ask) | {"image": ask.pictures(SIDE, SIDE), "mask_image": mask, "strength": 1.0}


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


def _animatediff() -> DiffusionPipeline:
    parts = _sd15_parts(beta_schedule="linear")
    del parts["safety_checker"], parts["requires_safety_checker"]
    adapter = diffusers.MotionAdapter(
        block_out_channels=CHANNELS,
        motion_layers_per_block=1,
        motion_num_attention_heads=2,
        motion_norm_num_groups=4,
        motion_max_seq_length=8,
    )
    return diffusers.AnimateDiffPipeline(motion_adapter=adapter, **parts)


def _frames(ask: Ask) -> dict[str, Any]:
    return _guided(ask) | {"height": VIDEO_SIDE, "width": VIDEO_SIDE, "num_frames": FRAMES}


def _svd() -> DiffusionPipeline:
    vision = transformers.CLIPVisionConfig(
        hidden_size=text.WIDTH,
        intermediate_size=text.WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=text.WIDTH,
        image_size=VIDEO_SIDE,
        patch_size=8,
    )
    unet = diffusers.UNetSpatioTemporalConditionModel(
        sample_size=SIDE // 2,
        in_channels=8,
        out_channels=4,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        # 32 groups are built in: with 32 channels the norms would take the time out again
        block_out_channels=(64, 64),
        addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=96,
        layers_per_block=1,
        cross_attention_dim=text.WIDTH,
        num_attention_heads=2,
        num_frames=FRAMES,
    )
    return diffusers.StableVideoDiffusionPipeline(
        vae=diffusers.AutoencoderKLTemporalDecoder(
            down_block_types=("DownEncoderBlock2D",) * 2, block_out_channels=(32, 32)
        ),
        image_encoder=transformers.CLIPVisionModelWithProjection(vision),
        unet=unet,
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            prediction_type="v_prediction",
            interpolation_type="linear",
            timestep_spacing="leading",
            timestep_type="continuous",
            sigma_min=0.002,
            sigma_max=700.0,
            steps_offset=1,
            use_karras_sigmas=True,
        ),
        feature_extractor=transformers.CLIPImageProcessorPil(
            size={"shortest_edge": VIDEO_SIDE},
            crop_size={"height": VIDEO_SIDE, "width": VIDEO_SIDE},
        ),
    )


def _animated(ask: Ask) -> dict[str, Any]:
    return {
        "image": ask.pictures(VIDEO_SIDE, VIDEO_SIDE),
        "height": VIDEO_SIDE,
        "width": VIDEO_SIDE,
        "num_frames": FRAMES,
        "max_guidance_scale": 3.0 if ask.guidance else 1.0,
    }


def _between(ask: Ask) -> dict[str, Any]:
    return _animated(ask) | {"height": KEY_SIDE, "width": KEY_SIDE, "num_frames": KEY_FRAMES}


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
    _unet_tiny("sd_controlnet", _sd_controlnet, _with_control),
    _unet_tiny("sd_img2img", _sd_img2img, _from_image),
    _unet_tiny("sd_inpaint", _sd_inpaint, _masked),
    _unet_tiny("animatediff", _animatediff, _frames, media="video"),
    _unet_tiny("svd", _svd, _animated, media="video"),
)

KEYS = _unet_tiny("svd_keys", _svd, _between, media="video", samples=2, batchable=False)
"""Called with two pictures, whatever is asked for: the key frames of one clip. In no matrix of the
laws, which know it as SVD; they run on it what makes such a clip (`Row.also`)."""
