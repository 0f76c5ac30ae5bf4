"""The three bundled families: how each pipeline is built, what it learns from, and its loss.

Every part is a stock diffusers or transformers class, so that a trained folder loads with a
plain `DiffusionPipeline.from_pretrained`. Legend: B samples, C latent channels, F frames, H, W.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    WanPipeline,
    WanTransformer3DModel,
)
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
)

from accel.scenes import vocabulary

TEXT_TOKENS = 32
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def clip_tokenizer() -> CLIPTokenizer:
    """A byte-pair tokenizer in which every word of the grammar is one token."""
    marks = ["<|startoftext|>", "<|endoftext|>"]
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token=marks[1]))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        min_frequency=1,
        special_tokens=marks,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.train_from_iterator([*vocabulary(), *LETTERS], trainer)
    learnt = tokenizer.get_vocab()
    merges = _merges(tokenizer)
    return CLIPTokenizer(vocab=learnt, merges=merges, model_max_length=TEXT_TOKENS)


def _merges(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    import json

    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return [(first, second) for first, second in merges]


def t5_tokenizer() -> T5TokenizerFast:
    """A unigram tokenizer: the grammar's words, then letters for whatever else is typed."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -8.0)]
    pieces += [(f"▁{word}", -2.0) for word in vocabulary() if word.isalpha()]
    pieces += [(mark, -2.0) for mark in ",."]
    pieces += [(letter, -9.0) for letter in LETTERS]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=TEXT_TOKENS)


def _clip_text(tokenizer: CLIPTokenizer, width: int) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=width // 32,
        max_position_embeddings=TEXT_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def _t5_sizes(tokenizer: T5TokenizerFast, width: int) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "d_model": width,
        "d_kv": 32,
        "d_ff": width,
        "num_layers": 2,
        "num_heads": width // 32,
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 32,
        "dropout_rate": 0.0,
        "feed_forward_proj": "gated-gelu",
    }


def image_vae(channels: int = 8) -> AutoencoderKL:
    """The autoencoder for pictures: factor 4."""
    return AutoencoderKL(
        latent_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 96),
        layers_per_block=1,
        norm_num_groups=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
        sample_size=128,
        shift_factor=0.0,
    )


def clip_vae() -> AutoencoderKLWan:
    """The autoencoder for clips: factor 4 in space and in time."""
    return AutoencoderKLWan(
        base_dim=24,
        z_dim=16,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=[0.0] * 16,
        latents_std=[1.0] * 16,
        scale_factor_temporal=4,
        scale_factor_spatial=4,
    )


def _start_flat(model: nn.Module) -> None:
    """Zero the modulations and the last layer, so that blocks start as the identity."""
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and (
            name == "proj_out" or (".norm" in f".{name}" and name.endswith("linear"))
        ):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)


def build_flux(vae: AutoencoderKL) -> FluxPipeline:
    """Scenes-flux: three double and five single stream blocks, true guidance in two calls."""
    words, pieces = clip_tokenizer(), t5_tokenizer()
    transformer = FluxTransformer2DModel(
        in_channels=4 * vae.config.latent_channels,
        num_layers=3,
        num_single_layers=5,
        attention_head_dim=32,
        num_attention_heads=5,
        joint_attention_dim=128,
        pooled_projection_dim=64,
        guidance_embeds=False,
        axes_dims_rope=(8, 12, 12),
    )
    _start_flat(transformer)
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_image_seq_len=64,
        max_image_seq_len=256,
        base_shift=0.3,
        max_shift=0.8,
    )
    return FluxPipeline(
        scheduler=scheduler,
        vae=vae,
        text_encoder=_clip_text(words, 64),
        tokenizer=words,
        text_encoder_2=T5EncoderModel(T5Config(**_t5_sizes(pieces, 128))),
        tokenizer_2=pieces,
        transformer=transformer,
    )


def build_unet(vae: AutoencoderKL) -> StableDiffusionPipeline:
    """Scenes-unet: a v-predicting UNet with cross-attention on two levels."""
    words = clip_tokenizer()
    unet = UNet2DConditionModel(
        sample_size=32,
        in_channels=vae.config.latent_channels,
        out_channels=vae.config.latent_channels,
        block_out_channels=(64, 96, 112),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=128,
        attention_head_dim=4,
        norm_num_groups=16,
    )
    scheduler = DDIMScheduler(
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        steps_offset=1,
        rescale_betas_zero_snr=True,
        beta_schedule="squaredcos_cap_v2",
        clip_sample=False,
        set_alpha_to_one=True,
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=_clip_text(words, 128),
        tokenizer=words,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def build_wan(vae: AutoencoderKLWan) -> WanPipeline:
    """Scenes-wan: a video transformer with cross-attention, two calls per step."""
    pieces = t5_tokenizer()
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=6,
        attention_head_dim=32,
        in_channels=vae.config.z_dim,
        out_channels=vae.config.z_dim,
        text_dim=128,
        freq_dim=64,
        ffn_dim=512,
        num_layers=8,
        rope_max_seq_len=64,
    )
    return WanPipeline(
        tokenizer=pieces,
        text_encoder=UMT5EncoderModel(UMT5Config(**_t5_sizes(pieces, 128))),
        vae=vae,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=2.0),
    )


def _ids(tokenizer: Any, captions: list[str], device: torch.device) -> Any:
    return tokenizer(
        captions,
        padding="max_length",
        max_length=TEXT_TOKENS,
        truncation=True,
        return_tensors="pt",
    ).to(device)


def _levels(count: int, mu: float, device: torch.device, layout: float = 0.2) -> Tensor:
    """Noise levels in (0, 1) for a scheduler shifted by e^mu. Shape [B].

    A share `layout` lies above 0.9: there the side of an object is decided, and nowhere else, so
    that training on logit-normal levels alone (4 in 1000 above 0.95) never learns what left and
    right mean. Of the rest one half is logit-normal, one spread as the scheduler's own steps.
    """
    middle = torch.sigmoid(mu + torch.randn(count, device=device))
    even, shift = torch.rand(count, device=device), math.exp(mu)
    spread = shift * even / (1 + (shift - 1) * even)
    high = 0.9 + 0.1 * torch.rand(count, device=device)
    which = torch.rand(count, device=device)
    low = torch.where(which < (1 - layout) / 2, middle, spread)
    return torch.where(which < 1 - layout, low, high)


COARSE = 8.0
"""Weight of an error's means over 4×4 latents."""

STEADY = 4.0
"""Weight of an error's changes from frame to frame."""


def _loss(error: Tensor) -> Tensor:
    """Mean square of an error [B, C, (F,) H, W] in which what is coarse, or flickers, counts more.

    Near pure noise most of the error is texture that nobody can foretell, and its gradient drowns
    that of where things stand, and of what stands still: unforeseen texture is the same in all
    frames, so that an error's changes from frame to frame are faults alone. The minimum stays where
    it is: a conditional mean is the minimum of every quadratic form.
    """
    clip = error if error.ndim == 5 else error.unsqueeze(2)
    coarse = functional.avg_pool3d(clip, (1, 4, 4))
    loss = error.square().mean() + COARSE * coarse.square().mean()
    if clip.shape[2] == 1:
        return loss
    return (
        loss
        + STEADY * clip.diff(dim=2).square().mean()
        + COARSE * STEADY * coarse.diff(dim=2).square().mean()
    )


def _unpacked(tokens: Tensor, height: int, width: int) -> Tensor:
    """Flux's tokens [B, S, 4C] as latents [B, C, H, W]."""
    split = tokens.unflatten(2, (-1, 2, 2)).unflatten(1, (height // 2, width // 2))
    return split.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def flux_loss(pipe: FluxPipeline, latents: Tensor, captions: list[str]) -> Tensor:
    """Flow-matching loss over latents [B, C, H, W]."""
    count, channels, height, width = latents.shape
    device = latents.device
    pooled = pipe.text_encoder(_ids(pipe.tokenizer, captions, device).input_ids).pooler_output
    text = pipe.text_encoder_2(_ids(pipe.tokenizer_2, captions, device).input_ids)[0]
    clean = pipe._pack_latents(latents, count, channels, height, width)
    image_ids = pipe._prepare_latent_image_ids(
        count, height // 2, width // 2, device, latents.dtype
    )
    sigma = _levels(count, 0.3 if clean.shape[1] <= 64 else 0.8, device)
    noise = torch.randn_like(clean)
    level = sigma[:, None, None]
    velocity = pipe.transformer(
        hidden_states=(1 - level) * clean + level * noise,
        timestep=sigma,
        encoder_hidden_states=text,
        pooled_projections=pooled,
        img_ids=image_ids,
        txt_ids=torch.zeros(TEXT_TOKENS, 3, device=device),
        return_dict=False,
    )[0]
    return _loss(_unpacked(velocity.float() - (noise - clean), height, width))


def _times(count: int, steps: int, device: torch.device) -> Tensor:
    """Training timesteps in [0, steps). Shape [B].

    Half are uniform, half lie above 85 % of the range, for the reason of `_levels`; a UNet has
    no positions but what the borders tell.
    """
    even, layout = torch.rand(2, count, device=device)
    layout = 0.85 + 0.15 * layout
    share = torch.where(torch.rand(count, device=device) < 0.5, even, layout)
    return (share * steps).long().clamp(max=steps - 1)


def unet_loss(pipe: StableDiffusionPipeline, latents: Tensor, captions: list[str]) -> Tensor:
    """v-prediction loss over latents [B, C, H, W]."""
    text = pipe.text_encoder(_ids(pipe.tokenizer, captions, latents.device).input_ids)[0]
    steps = pipe.scheduler.config.num_train_timesteps
    times = _times(len(latents), steps, latents.device)
    noise = torch.randn_like(latents)
    noisy = pipe.scheduler.add_noise(latents, noise, times)
    target = pipe.scheduler.get_velocity(latents, noise, times)
    velocity = pipe.unet(noisy, times, text, return_dict=False)[0]
    return _loss(velocity.float() - target)


def wan_loss(pipe: WanPipeline, latents: Tensor, captions: list[str]) -> Tensor:
    """Flow-matching loss over latents [B, C, F, H, W]."""
    tokens = _ids(pipe.tokenizer, captions, latents.device)
    text = pipe.text_encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
    text = text * tokens.attention_mask[..., None]
    sigma = _levels(len(latents), 0.7, latents.device, layout=0.45)
    noise = torch.randn_like(latents)
    level = sigma[:, None, None, None, None]
    velocity = pipe.transformer(
        hidden_states=(1 - level) * latents + level * noise,
        timestep=1000 * sigma,
        encoder_hidden_states=text,
        return_dict=False,
    )[0]
    return _loss(velocity.float() - (noise - latents))


@dataclass(frozen=True, slots=True)
class Form:
    """What a training batch is made of: pictures of an edge, or the first frames of clips."""

    size: int
    frames: int = 0

    @property
    def name(self) -> str:
        """What files of this form are called."""
        return f"{self.size}x{self.frames}" if self.frames else f"{self.size}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One bundled pipeline: its parts, its loss, and the arguments of a normal call.

    `forms` are what it learns from, the cheap form first and the one of a normal call last. A clip
    family starts with first frames, which the causal autoencoder encodes as in the whole clip.
    """

    name: str
    forms: tuple[Form, Form]
    vae: Callable[[], nn.Module]
    build: Callable[[Any], DiffusionPipeline]
    loss: Callable[[Any, Tensor, list[str]], Tensor]
    learns: tuple[str, ...]
    call: dict[str, Any]

    @property
    def clips(self) -> bool:
        """Whether it makes clips."""
        return self.forms[-1].frames > 0

    def modules(self, pipe: DiffusionPipeline) -> Iterator[tuple[str, nn.Module]]:
        """The parts that training changes, by name; the denoiser comes first."""
        for name in self.learns:
            yield name, getattr(pipe, name)


FAMILIES = {
    family.name: family
    for family in (
        Family(
            name="scenes-flux",
            forms=(Form(64), Form(128)),
            vae=image_vae,
            build=build_flux,
            loss=flux_loss,
            learns=("transformer", "text_encoder", "text_encoder_2"),
            call={
                "height": 128,
                "width": 128,
                "num_inference_steps": 28,
                "guidance_scale": 1.0,
                "true_cfg_scale": 3.5,
                "negative_prompt": "",
                "max_sequence_length": TEXT_TOKENS,
            },
        ),
        Family(
            name="scenes-unet",
            forms=(Form(64), Form(128)),
            vae=image_vae,
            build=build_unet,
            loss=unet_loss,
            learns=("unet", "text_encoder"),
            call={
                "height": 128,
                "width": 128,
                "num_inference_steps": 28,
                "guidance_scale": 3.5,
                "negative_prompt": "",
            },
        ),
        Family(
            name="scenes-wan",
            forms=(Form(64, 1), Form(64, 17)),
            vae=clip_vae,
            build=build_wan,
            loss=wan_loss,
            learns=("transformer", "text_encoder"),
            call={
                "height": 64,
                "width": 64,
                "num_frames": 17,
                "num_inference_steps": 28,
                "guidance_scale": 3.5,
                "negative_prompt": "",
                "max_sequence_length": TEXT_TOKENS,
            },
        ),
    )
}
