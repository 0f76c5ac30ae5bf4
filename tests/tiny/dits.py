"""Image families whose blocks carry one stream, and CogView4."""

from typing import Any

import diffusers
from diffusers import DiffusionPipeline

from tiny import text
from tiny.base import Ask, Tiny
from tiny.parts import ddim, flow, image_vae, seeded

SIDE = 32
HEADS = {"attention_head_dim": 16, "num_attention_heads": 2}


def _guided(ask: Ask) -> dict[str, Any]:
    return {
        "prompt": ask.prompts,
        "height": SIDE,
        "width": SIDE,
        "negative_prompt": ask.negatives,
        "guidance_scale": 5.0 if ask.guidance else 1.0,
        "max_sequence_length": 56,
    }


def _pixart(ask: Ask) -> dict[str, Any]:
    # its tokenised negative prompt is one string, not one per sample
    negative = ask.negatives[0]
    plain = {"negative_prompt": negative, "use_resolution_binning": False, "clean_caption": False}
    return _guided(ask) | plain


def _pixart_sigma() -> DiffusionPipeline:
    tokenizer = text.t5_tokenizer()
    return diffusers.PixArtSigmaPipeline(
        tokenizer=tokenizer,
        text_encoder=text.t5_encoder(tokenizer),
        vae=image_vae(),
        transformer=diffusers.PixArtTransformer2DModel(
            in_channels=4,
            out_channels=8,
            num_layers=3,
            cross_attention_dim=32,
            caption_channels=text.WIDTH,
            sample_size=SIDE // 2,
            use_additional_conditions=False,
            **HEADS,
        ),
        # The published schedule ends at a signal of 0.006, by which an untrained noise estimate is
        # divided; this one ends at 0.13.
        scheduler=diffusers.DPMSolverMultistepScheduler(
            beta_start=0.0001, beta_end=0.008, beta_schedule="linear"
        ),
    )


def _sana_inputs(ask: Ask) -> dict[str, Any]:
    return _pixart(ask) | {"complex_human_instruction": None}


def _sana() -> DiffusionPipeline:
    tokenizer = text.gemma_tokenizer()
    return diffusers.SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=text.gemma_encoder(tokenizer),
        vae=diffusers.AutoencoderDC(
            latent_channels=4,
            attention_head_dim=4,
            encoder_block_types=("ResBlock", "ResBlock"),
            decoder_block_types=("ResBlock", "ResBlock"),
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            encoder_layers_per_block=(1, 1),
            decoder_layers_per_block=(1, 1),
            encoder_qkv_multiscales=((), ()),
            decoder_qkv_multiscales=((), ()),
            scaling_factor=0.41407,
        ),
        transformer=diffusers.SanaTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_layers=3,
            num_cross_attention_heads=2,
            cross_attention_head_dim=16,
            cross_attention_dim=32,
            caption_channels=text.WIDTH,
            sample_size=SIDE // 2,
            patch_size=2,
            **HEADS,
        ),
        scheduler=diffusers.DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    )


def _zimage() -> DiffusionPipeline:
    tokenizer = text.qwen_tokenizer()
    return diffusers.ZImagePipeline(
        scheduler=flow(shift=3.0),
        vae=image_vae(channels=4, shift=0.1159),
        text_encoder=text.qwen3_encoder(tokenizer),
        tokenizer=tokenizer,
        transformer=diffusers.ZImageTransformer2DModel(
            in_channels=4,
            dim=32,
            n_layers=3,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=text.WIDTH,
            axes_dims=[4, 6, 6],
            axes_lens=[256, 32, 32],
        ),
    )


def _lumina2() -> DiffusionPipeline:
    tokenizer = text.gemma_tokenizer()
    return diffusers.Lumina2Pipeline(
        transformer=diffusers.Lumina2Transformer2DModel(
            sample_size=SIDE // 2,
            in_channels=4,
            hidden_size=32,
            num_layers=3,
            num_refiner_layers=1,
            num_attention_heads=2,
            num_kv_heads=1,
            multiple_of=16,
            axes_dim_rope=(4, 6, 6),
            axes_lens=(300, 32, 32),
            cap_feat_dim=text.WIDTH,
        ),
        scheduler=flow(shift=6.0),
        vae=image_vae(channels=4, shift=0.1159),
        text_encoder=text.gemma_encoder(tokenizer),
        tokenizer=tokenizer,
    )


def _lumina2_inputs(ask: Ask) -> dict[str, Any]:
    # the pipeline takes its autoencoder to shrink sides by 8
    return _guided(ask) | {"system_prompt": "Draw.", "height": 4 * SIDE, "width": 4 * SIDE}


def _cogview4() -> DiffusionPipeline:
    tokenizer = text.qwen_tokenizer()
    # Pads to the next 16 tokens, unmasked: prompts are comparable within a multiple of 16 alone.
    tokenizer.padding_side = "left"
    return diffusers.CogView4Pipeline(
        tokenizer=tokenizer,
        text_encoder=text.glm_encoder(tokenizer),
        vae=image_vae(channels=4, shift=0.0),
        transformer=diffusers.CogView4Transformer2DModel(
            in_channels=4,
            out_channels=4,
            num_layers=3,
            text_embed_dim=text.WIDTH,
            time_embed_dim=32,
            condition_dim=8,
            pos_embed_max_size=16,
            sample_size=SIDE // 2,
            rope_axes_dim=(16, 16),
            **HEADS,
        ),
        scheduler=flow(base_shift=0.25, max_shift=0.75, use_dynamic_shifting=True),
    )


def _dit() -> DiffusionPipeline:
    return diffusers.DiTPipeline(
        transformer=diffusers.DiTTransformer2DModel(
            in_channels=4, out_channels=8, num_layers=3, sample_size=SIDE // 2, **HEADS
        ),
        vae=image_vae(),
        scheduler=ddim(beta_start=0.0001, beta_end=0.008, beta_schedule="linear"),
    )


def _classes(ask: Ask) -> dict[str, Any]:
    return {
        "class_labels": [number % 1000 for number in ask.numbers],
        "guidance_scale": 4.0 if ask.guidance else 1.0,
    }


CFG = ("uncond", "cond")

FAMILIES = (
    Tiny(
        name="pixart_sigma",
        build=seeded(_pixart_sigma),
        layout="batched",
        order=CFG,
        blocks="hidden",
        media="image",
        inputs=_pixart,
    ),
    Tiny(
        name="sana",
        build=seeded(_sana),
        layout="batched",
        order=CFG,
        blocks="hidden",
        media="image",
        inputs=_sana_inputs,
    ),
    Tiny(
        name="zimage",
        build=seeded(_zimage),
        layout="list",
        order=("cond", "uncond"),
        blocks="hidden",
        media="image",
        inputs=_guided,
    ),
    Tiny(
        name="lumina2",
        build=seeded(_lumina2),
        layout="two_calls_no_context",
        order=("cond", "uncond"),
        blocks="hidden",
        media="image",
        inputs=_lumina2_inputs,
    ),
    Tiny(
        name="cogview4",
        build=seeded(_cogview4),
        layout="two_calls",
        order=("cond", "uncond"),
        blocks="hidden_encoder",
        media="image",
        inputs=_guided,
    ),
    Tiny(
        name="dit",
        build=seeded(_dit),
        layout="batched",
        order=("cond", "uncond"),
        blocks="hidden",
        media="image",
        inputs=_classes,
        output="pt",
    ),
)
