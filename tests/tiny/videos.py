"""Video families with a transformer."""

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, UniPCMultistepScheduler
from torch import nn

from tiny import text
from tiny.base import Ask, Tiny
from tiny.parts import flow, seeded

SIDE = 32
FRAMES = 5  # of the video: 3 latent frames
TEXT = 48  # length limit of T5 prompts
HEADS = {"attention_head_dim": 16, "num_attention_heads": 2}


def _guided(ask: Ask) -> dict[str, Any]:
    return {
        "prompt": ask.prompts,
        "height": SIDE,
        "width": SIDE,
        "num_frames": FRAMES,
        "negative_prompt": ask.negatives,
        "guidance_scale": 5.0 if ask.guidance else 1.0,
        "max_sequence_length": TEXT,
    }


WAN: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": text.WIDTH,
    "freq_dim": 32,
    "ffn_dim": 64,
    "num_layers": 3,
    "rope_max_seq_len": 32,
    **HEADS,
}
"""Sizes of every Wan transformer here."""


def _wan_transformer() -> diffusers.WanTransformer3DModel:
    return diffusers.WanTransformer3DModel(**WAN)


def _wan(
    kind: type[DiffusionPipeline] = diffusers.WanPipeline,
    network: Callable[[], Any] = _wan_transformer,
    **more: Any,
) -> DiffusionPipeline:
    tokenizer = text.t5_tokenizer()
    return kind(
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
        transformer=network(),
        **more,
    )


def _vace_transformer() -> diffusers.WanVACETransformer3DModel:
    network = diffusers.WanVACETransformer3DModel(
        vace_layers=[0, 1],
        vace_in_channels=4 * 2 + 4,
        **WAN,
    )
    for block in network.vace_blocks:
        nn.init.normal_(block.proj_out.weight, std=0.3)
    return network


def _wan_vace() -> DiffusionPipeline:
    return _wan(diffusers.WanVACEPipeline, _vace_transformer)


def _vace_inputs(ask: Ask) -> dict[str, Any]:
    """Everything is to be painted: a control too. Words would be cleaned with ftfy, not here."""
    shape = (TEXT, text.WIDTH)
    seeds = [torch.Generator().manual_seed(number) for number in ask.numbers]
    guided = {
        "prompt_embeds": torch.stack([torch.randn(shape, generator=seed) for seed in seeds]),
        "negative_prompt_embeds": torch.ones(len(seeds), *shape),
    }
    words = ("prompt", "negative_prompt")
    return {k: v for k, v in _guided(ask).items() if k not in words} | guided


def _wan22() -> DiffusionPipeline:
    return _wan(transformer_2=_wan_transformer(), boundary_ratio=0.875)


def _ltx() -> DiffusionPipeline:
    tokenizer = text.t5_tokenizer()
    return diffusers.LTXPipeline(
        scheduler=flow(
            use_dynamic_shifting=True,
            base_shift=0.95,
            max_shift=2.05,
            base_image_seq_len=1024,
            max_image_seq_len=4096,
            shift_terminal=0.1,
        ),
        vae=diffusers.AutoencoderKLLTXVideo(
            latent_channels=8,
            block_out_channels=(8, 8, 8),
            down_block_types=("LTXVideoDownBlock3D",) * 3,
            decoder_block_out_channels=(8, 8, 8),
            layers_per_block=(1, 1, 1, 1),
            decoder_layers_per_block=(1, 1, 1, 1),
            spatio_temporal_scaling=(True, True, False),
            decoder_spatio_temporal_scaling=(True, True, False),
            decoder_inject_noise=(False,) * 4,
            downsample_type=("conv",) * 3,
            upsample_residual=(False,) * 3,
            upsample_factor=(1,) * 3,
            patch_size=1,
        ),
        text_encoder=text.t5_encoder(tokenizer),
        tokenizer=tokenizer,
        transformer=diffusers.LTXVideoTransformer3DModel(
            in_channels=8,
            out_channels=8,
            cross_attention_dim=32,
            num_layers=3,
            caption_channels=text.WIDTH,
            **HEADS,
        ),
    )


def _ltx_inputs(ask: Ask) -> dict[str, Any]:
    return _guided(ask) | {"num_frames": 9}


def _cogvideox() -> DiffusionPipeline:
    tokenizer = text.t5_tokenizer()
    return diffusers.CogVideoXPipeline(
        tokenizer=tokenizer,
        text_encoder=text.t5_encoder(tokenizer),
        vae=diffusers.AutoencoderKLCogVideoX(
            down_block_types=("CogVideoXDownBlock3D",) * 2,
            up_block_types=("CogVideoXUpBlock3D",) * 2,
            block_out_channels=(8, 8),
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=2,
            temporal_compression_ratio=2,
            sample_height=SIDE,
            sample_width=SIDE,
        ),
        transformer=diffusers.CogVideoXTransformer3DModel(
            in_channels=4,
            out_channels=4,
            time_embed_dim=32,
            text_embed_dim=text.WIDTH,
            num_layers=3,
            sample_width=SIDE // 2,
            sample_height=SIDE // 2,
            sample_frames=FRAMES,
            temporal_compression_ratio=2,
            max_text_seq_length=TEXT,
            use_rotary_positional_embeddings=True,
            **HEADS,
        ),
        scheduler=diffusers.CogVideoXDDIMScheduler(
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            snr_shift_scale=3.0,
            timestep_spacing="trailing",
        ),
    )


def _hunyuanvideo() -> DiffusionPipeline:
    llama, clip = text.llama_tokenizer(), text.clip_tokenizer()
    return diffusers.HunyuanVideoPipeline(
        text_encoder=text.llama_encoder(llama),
        tokenizer=llama,
        transformer=diffusers.HunyuanVideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_layers=2,
            num_single_layers=2,
            num_refiner_layers=1,
            text_embed_dim=text.WIDTH,
            pooled_projection_dim=text.WIDTH,
            rope_axes_dim=(4, 6, 6),
            **HEADS,
        ),
        vae=diffusers.AutoencoderKLHunyuanVideo(
            latent_channels=4,
            down_block_types=("HunyuanVideoDownBlock3D",) * 2,
            up_block_types=("HunyuanVideoUpBlock3D",) * 2,
            block_out_channels=(8, 8),
            layers_per_block=1,
            norm_num_groups=4,
            spatial_compression_ratio=2,
            mid_block_add_attention=False,
        ),
        scheduler=flow(shift=7.0),
        text_encoder_2=text.clip_encoder(clip, pooled=False),
        tokenizer_2=clip,
    )


def _hunyuanvideo_inputs(ask: Ask) -> dict[str, Any]:
    guided = {"negative_prompt": ask.negatives, "true_cfg_scale": 3.5}
    plain = _guided(ask) | {
        "guidance_scale": 6.0,
        "num_frames": 9,
        "prompt_template": {"template": "{}", "crop_start": 0},
    }
    del plain["negative_prompt"]
    return plain | (guided if ask.guidance else {})


def _mochi() -> DiffusionPipeline:
    tokenizer = text.t5_tokenizer()
    return diffusers.MochiPipeline(
        scheduler=flow(invert_sigmas=True),
        vae=diffusers.AutoencoderKLMochi(
            encoder_block_out_channels=(32, 32, 32, 32),
            decoder_block_out_channels=(32, 32, 32, 32),
            layers_per_block=(1, 1, 1, 1, 1),
        ),
        text_encoder=text.t5_encoder(tokenizer),
        tokenizer=tokenizer,
        transformer=diffusers.MochiTransformer3DModel(
            num_layers=3,
            pooled_projection_dim=16,
            text_embed_dim=text.WIDTH,
            time_embed_dim=32,
            max_sequence_length=TEXT,
            **HEADS,
        ),
    )


def _mochi_inputs(ask: Ask) -> dict[str, Any]:
    # the pipeline takes its autoencoder to shrink sides by 8 and time by 6
    return _guided(ask) | {"height": 64, "width": 128, "num_frames": 25}


def _video(name: str, build: Callable[[], DiffusionPipeline], **more: Any) -> Tiny:
    settings = {"blocks": "hidden_encoder", "inputs": _guided, "media": "video"}
    return Tiny(name=name, build=seeded(build), **(settings | more))


CFG = ("uncond", "cond")
TRUE_CFG = ("cond", "uncond")

STACKED = {"layout": "batched", "order": CFG}
CALLS = {"layout": "two_calls", "order": TRUE_CFG}

FAMILIES = (
    _video("wan21", _wan, blocks="hidden", **CALLS),
    _video("wan22", _wan22, blocks="hidden", denoisers=("transformer", "transformer_2"), **CALLS),
    _video("ltx", _ltx, blocks="hidden", inputs=_ltx_inputs, **STACKED),
    _video("cogvideox", _cogvideox, **STACKED),
    _video("hunyuanvideo", _hunyuanvideo, inputs=_hunyuanvideo_inputs, **CALLS),
    _video("mochi", _mochi, inputs=_mochi_inputs, **STACKED),
)

VACE = _video("wan_vace", _wan_vace, blocks="hidden", inputs=_vace_inputs, batchable=False, **CALLS)
"""In no matrix of the laws, which know it as Wan; what it adds, control between the blocks, is
tested with caches (test_caches_runs.py, test_caches_blocks.py)."""
