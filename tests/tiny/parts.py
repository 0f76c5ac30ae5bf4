"""Parts that many families share: autoencoders, schedulers, and the frame around a build."""

from collections.abc import Callable

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
)
from torch import nn

from tiny.weights import behave


def seeded(build: Callable[[], DiffusionPipeline]) -> Callable[[], DiffusionPipeline]:
    """Make a build repeatable and leave the global random state alone."""

    def repeatable() -> DiffusionPipeline:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            pipe = build()
        for index, name in enumerate(sorted(pipe.components)):
            part = pipe.components[name]
            if isinstance(part, nn.Module):
                behave(part, seed=index)
        _quieten(pipe.components.get("vae"))
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return repeatable


def _quieten(vae: nn.Module | None) -> None:
    """Let an image encode to its mean, as a trained encoder nearly does.

    Some pipelines draw this noise from the global generator (SD3 ControlNet), which no seed of
    the call reaches: then samples of a batch would differ from the same samples alone.
    """
    last = getattr(vae, "quant_conv", None)
    if last is None and isinstance(vae, AutoencoderKL):
        last = vae.encoder.conv_out
    if last is not None:
        half = last.out_channels // 2
        last.weight[half:].zero_()
        last.bias[half:].fill_(-1000.0)


def image_vae(*, channels: int = 4, shift: float | None = None) -> AutoencoderKL:
    """Return an image autoencoder that halves each side."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        latent_channels=channels,
        norm_num_groups=4,
        mid_block_add_attention=False,
        use_quant_conv=shift is None,
        use_post_quant_conv=shift is None,
        shift_factor=shift,
        scaling_factor=0.18215 if shift is None else 0.3611,
    )


def ddim(**changes: object) -> DDIMScheduler:
    """Return the scheduler of Stable Diffusion 1.5."""
    settings = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
    }
    return DDIMScheduler(**(settings | changes))


def flow(**changes: object) -> FlowMatchEulerDiscreteScheduler:
    """Return the scheduler of the flow models; `changes` as the family's own configuration."""
    return FlowMatchEulerDiscreteScheduler(**changes)
