"""Image families whose blocks carry two streams, text and image."""

from collections.abc import Callable
from typing import Any

import diffusers
import transformers
from diffusers import DiffusionPipeline, FluxTransformer2DModel, SD3Transformer2DModel

from tiny import text
from tiny.base import Ask, Tiny
from tiny.parts import flow, image_vae, seeded

SIDE = 32  # of the image: latents of 16 x 16, 8 x 8 tokens
TEXT = 48  # length limit of T5 prompts
HEADS = {"attention_head_dim": 16, "num_attention_heads": 2}


def _sized(ask: Ask) -> dict[str, Any]:
    return {
        "prompt": ask.prompts,
        "height": SIDE,
        "width": SIDE,
        "max_sequence_length": TEXT,
    }


def _guided(ask: Ask) -> dict[str, Any]:
    return _sized(ask) | {
        "negative_prompt": ask.negatives,
        "guidance_scale": 5.0 if ask.guidance else 1.0,
    }


def _embedded(ask: Ask) -> dict[str, Any]:
    return _sized(ask) | {"guidance_scale": 3.5 if ask.guidance else 1.0}


def _true_cfg(ask: Ask) -> dict[str, Any]:
    guided = {"negative_prompt": ask.negatives, "true_cfg_scale": 3.5}
    return _sized(ask) | (guided if ask.guidance else {"true_cfg_scale": 1.0})


# Stable Diffusion 3


def _sd3_parts(**transformer: Any) -> dict[str, Any]:
    clip, t5 = text.clip_tokenizer(), text.t5_tokenizer()
    settings = {"num_layers": 3, "sample_size": SIDE // 2, **_sd3_sizes()}
    return {
        "transformer": SD3Transformer2DModel(**(settings | transformer)),
        "scheduler": flow(shift=3.0),
        "vae": image_vae(channels=16, shift=0.0609),
        "text_encoder": text.clip_encoder(clip, pooled=True),
        "tokenizer": clip,
        "text_encoder_2": text.clip_encoder(clip, pooled=True),
        "tokenizer_2": text.clip_tokenizer(),
        "text_encoder_3": text.t5_encoder(t5, width=2 * text.WIDTH),
        "tokenizer_3": t5,
    }


def _sd3_sizes() -> dict[str, Any]:
    return HEADS | {
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "joint_attention_dim": 2 * text.WIDTH,
        "caption_projection_dim": 32,
        "pooled_projection_dim": 2 * text.WIDTH,
        "pos_embed_max_size": 12,
        "qk_norm": "rms_norm",
    }


def _sd3() -> DiffusionPipeline:
    return diffusers.StableDiffusion3Pipeline(**_sd3_parts())


def _sd35() -> DiffusionPipeline:
    return diffusers.StableDiffusion3Pipeline(
        **_sd3_parts(num_layers=4, dual_attention_layers=(0, 1))
    )


def _skip_layer(ask: Ask) -> dict[str, Any]:
    layers = {
        "skip_guidance_layers": [1, 2],
        "skip_layer_guidance_start": 0.01,
        "skip_layer_guidance_stop": 0.7,
    }
    return _guided(ask) | (layers if ask.guidance else {})


def _sd3_controlnet() -> DiffusionPipeline:
    sizes = _sd3_sizes()
    del sizes["out_channels"]
    controlnet = diffusers.SD3ControlNetModel(num_layers=2, sample_size=SIDE // 2, **sizes)
    return diffusers.StableDiffusion3ControlNetPipeline(controlnet=controlnet, **_sd3_parts())


def _with_control(inputs: Callable[[Ask], dict[str, Any]]) -> Callable[[Ask], dict[str, Any]]:
    return lambda ask: inputs(ask) | {"control_image": ask.pictures(SIDE, SIDE)}


# Flux


def _flux_parts(*, guidance_embeds: bool = True) -> dict[str, Any]:
    clip, t5 = text.clip_tokenizer(), text.t5_tokenizer()
    return {
        "scheduler": flow(shift=3.0, use_dynamic_shifting=True),
        "vae": image_vae(channels=4, shift=0.1159),
        "text_encoder": text.clip_encoder(clip, pooled=False),
        "tokenizer": clip,
        "text_encoder_2": text.t5_encoder(t5),
        "tokenizer_2": t5,
        "transformer": FluxTransformer2DModel(
            num_layers=2, num_single_layers=2, guidance_embeds=guidance_embeds, **_flux_sizes()
        ),
    }


def _flux_sizes() -> dict[str, Any]:
    return HEADS | {
        "patch_size": 1,
        "in_channels": 16,
        "joint_attention_dim": text.WIDTH,
        "pooled_projection_dim": text.WIDTH,
        "axes_dims_rope": (4, 6, 6),
    }


def _flux() -> DiffusionPipeline:
    return diffusers.FluxPipeline(**_flux_parts())


def _flux_schnell() -> DiffusionPipeline:
    return diffusers.FluxPipeline(**_flux_parts(guidance_embeds=False))


def _flux_img2img() -> DiffusionPipeline:
    return diffusers.FluxImg2ImgPipeline(**_flux_parts())


def _flux_kontext() -> DiffusionPipeline:
    return diffusers.FluxKontextPipeline(**_flux_parts())


def _flux_controlnet() -> DiffusionPipeline:
    controlnet = diffusers.FluxControlNetModel(
        num_layers=1, num_single_layers=1, guidance_embeds=True, **_flux_sizes()
    )
    return diffusers.FluxControlNetPipeline(controlnet=controlnet, **_flux_parts())


def _from_image(ask: Ask) -> dict[str, Any]:
    return _embedded(ask) | {"image": ask.pictures(SIDE, SIDE), "strength": 0.75}


def _kontext(ask: Ask) -> dict[str, Any]:
    return _true_cfg(ask) | {
        "image": ask.pictures(SIDE, SIDE),
        "max_area": SIDE * SIDE,
        "_auto_resize": False,
    }


# Qwen-Image


def _qwenimage() -> DiffusionPipeline:
    tokenizer = text.qwen_tokenizer()
    return diffusers.QwenImagePipeline(
        scheduler=flow(
            use_dynamic_shifting=True, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
        ),
        vae=diffusers.AutoencoderKLQwenImage(
            base_dim=8,
            z_dim=4,
            dim_mult=[1, 1],
            num_res_blocks=1,
            temperal_downsample=[False],
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
        ),
        text_encoder=text.qwen_vl_encoder(tokenizer),
        tokenizer=tokenizer,
        transformer=diffusers.QwenImageTransformer2DModel(
            patch_size=2,
            in_channels=16,
            out_channels=4,
            num_layers=3,
            joint_attention_dim=text.WIDTH,
            axes_dims_rope=(4, 6, 6),
            **HEADS,
        ),
    )


# Chroma


def _chroma() -> DiffusionPipeline:
    t5 = text.t5_tokenizer()
    return diffusers.ChromaPipeline(
        scheduler=flow(shift=3.0, use_dynamic_shifting=True),
        vae=image_vae(channels=4, shift=0.1159),
        text_encoder=text.t5_encoder(t5),
        tokenizer=t5,
        transformer=diffusers.ChromaTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=2,
            num_single_layers=2,
            joint_attention_dim=text.WIDTH,
            axes_dims_rope=(4, 6, 6),
            approximator_num_channels=64,
            approximator_hidden_dim=32,
            approximator_layers=1,
            **HEADS,
        ),
    )


# HunyuanImage 2.1


def _hunyuanimage() -> DiffusionPipeline:
    qwen, byt5 = text.qwen_tokenizer(), transformers.ByT5Tokenizer()
    pipe = diffusers.HunyuanImagePipeline(
        scheduler=flow(shift=5.0),
        vae=diffusers.AutoencoderKLHunyuanImage(
            in_channels=3,
            out_channels=3,
            latent_channels=8,
            block_out_channels=(32, 32),
            layers_per_block=1,
            spatial_compression_ratio=2,
            sample_size=SIDE,
            scaling_factor=0.75289,
        ),
        text_encoder=text.qwen_vl_encoder(qwen),
        tokenizer=qwen,
        text_encoder_2=text.t5_encoder(byt5),
        tokenizer_2=byt5,
        transformer=diffusers.HunyuanImageTransformer2DModel(
            in_channels=8,
            out_channels=8,
            num_layers=2,
            num_single_layers=2,
            num_refiner_layers=1,
            patch_size=(2, 2),
            text_embed_dim=text.WIDTH,
            text_embed_2_dim=text.WIDTH,
            rope_axes_dim=(8, 8),
            **HEADS,
        ),
        guider=diffusers.AdaptiveProjectedMixGuidance(
            adaptive_projected_guidance_start_step=2, guidance_scale=3.5
        ),
    )
    pipe.tokenizer_max_length = TEXT
    pipe.tokenizer_2_max_length = TEXT
    return pipe


def _guider(ask: Ask) -> dict[str, Any]:
    return {
        "prompt": ask.prompts,
        "negative_prompt": ask.negatives,
        "height": SIDE,
        "width": SIDE,
    }


def _switch_guider(pipe: DiffusionPipeline, guidance: bool) -> None:
    if guidance:
        pipe.guider.enable()
    else:
        pipe.guider.disable()


def _mmdit(
    name: str,
    build: Callable[[], DiffusionPipeline],
    layout: str,
    inputs: Callable[[Ask], dict[str, Any]],
    *,
    order: tuple[str, ...] = ("cond",),
    blocks: str = "mmdit",
    **more: Any,
) -> Tiny:
    return Tiny(
        name=name,
        build=seeded(build),
        layout=layout,
        order=order,
        blocks=blocks,
        media="image",
        inputs=inputs,
        **more,
    )


CFG = ("uncond", "cond")
TRUE_CFG = ("cond", "uncond")

FAMILIES = (
    _mmdit("sd3", _sd3, "batched", _guided, order=CFG),
    _mmdit("sd35_skip_layer", _sd35, "batched", _skip_layer, order=(*CFG, "skip")),
    _mmdit(
        "sd3_controlnet",
        _sd3_controlnet,
        "batched",
        _with_control(_guided),
        order=CFG,
        global_noise=True,
    ),
    _mmdit("flux", _flux, "embedded", _embedded),
    _mmdit("flux_schnell", _flux_schnell, "none", _sized),
    _mmdit("flux_cfg", _flux, "two_calls", _true_cfg, order=TRUE_CFG),
    _mmdit(
        "flux_controlnet",
        _flux_controlnet,
        "two_calls_no_context",
        _with_control(_true_cfg),
        order=TRUE_CFG,
    ),
    _mmdit("flux_img2img", _flux_img2img, "embedded", _from_image),
    _mmdit("flux_kontext", _flux_kontext, "two_calls_no_context", _kontext, order=TRUE_CFG),
    _mmdit(
        "chroma",
        _chroma,
        "two_calls_no_context",
        _guided,
        order=TRUE_CFG,
        blocks="mmdit_joined",
    ),
    _mmdit(
        "hunyuanimage",
        _hunyuanimage,
        "guider",
        _guider,
        order=TRUE_CFG,
        blocks="hidden_encoder",
        switch=_switch_guider,
    ),
    _mmdit("qwenimage", _qwenimage, "two_calls", _true_cfg, order=TRUE_CFG),
)
