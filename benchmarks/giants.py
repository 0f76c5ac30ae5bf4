"""Networks of published models in their full size, with random weights: SDXL, FLUX.1-dev, Wan 2.1.

Widths and depths are those of the published ``config.json`` files, written out here: nothing is
loaded. Weights are made on the device, in the dtype that they have there. Text encoders and VAE are
left out: the text is random numbers of its published shape, and latents are the answer. Of such a
network the seconds and the memory mean what they mean of the published one; what it draws is noise.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

Config = dict[str, Any]

POOLED = "pooled"

SDXL: Config = {
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
FLUX: Config = {
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
    "axes_dims_rope": (16, 56, 56),
}
WAN: Config = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 12,
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "ffn_dim": 8960,
    "num_layers": 30,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 1024,
}

TINY_SDXL: Config = {
    "block_out_channels": (32, 64, 64),
    "transformer_layers_per_block": (1, 1, 2),
    "attention_head_dim": (2, 4, 4),
    "cross_attention_dim": 32,
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 32,
}
TINY_FLUX: Config = {
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 32,
    "axes_dims_rope": (4, 6, 6),
}
TINY_WAN: Config = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "text_dim": 32,
    "freq_dim": 32,
    "ffn_dim": 32,
    "num_layers": 3,
}

FLUX_NOISE: Config = {
    "shift": 3.0,
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}
SDXL_NOISE: Config = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "timestep_spacing": "leading",
}


def _wan_noise(shift: float) -> Config:
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    return {**flow, "flow_shift": shift}


@dataclass(frozen=True)
class Giant:
    """A model in its full size.

    Attributes:
        network: The class of its network, in diffusers.
        pipeline: The class of its pipeline.
        scheduler: The class of its scheduler, and how that is made.
        config: Of the network.
        tiny: What of it is smaller where only the code is tried.
        call: Of the pipeline, without the text: size, steps, guidance.
        text: By argument, the shape of the text's embeddings but for their width, and the field of
            the network's configuration that is their width.
    """

    network: str
    pipeline: str
    scheduler: tuple[str, Config]
    config: Config
    tiny: Config
    call: Mapping[str, Any]
    text: Mapping[str, tuple[tuple[int, ...], str]] = field(default_factory=dict)

    def sized(self, tiny: bool) -> Config:
        """Its network's configuration."""
        return {**self.config, **(self.tiny if tiny else {})}

    def arguments(self, tiny: bool) -> dict[str, Any]:
        """Of the call, without the text."""
        small = {"height": 64, "width": 64, "num_inference_steps": 6} if tiny else {}
        if tiny and "num_frames" in self.call:
            small["num_frames"] = 9
        return {**self.call, **small, "output_type": "latent"}

    def parameters(self) -> int:
        """How many its network has, without making them."""
        with torch.device("meta"):
            return sum(one.numel() for one in self._made(False).parameters())

    def _made(self, tiny: bool) -> Any:
        import diffusers

        return getattr(diffusers, self.network)(**self.sized(tiny))

    def build(self, device: str, dtype: torch.dtype, tiny: bool = False) -> Any:
        """The pipeline, on a device.

        Args:
            device: Where the weights are made.
            dtype: In which they are made.
            tiny: In a size that a CPU draws in a moment.
        """
        import diffusers

        torch.manual_seed(0)
        with _made_on(device, dtype):
            network = self._made(tiny).eval().requires_grad_(False)
        kind, noise = self.scheduler
        scheduler = getattr(diffusers, f"{kind}Scheduler")(**noise)
        place = "unet" if "UNet" in self.network else "transformer"
        pipe = _around(getattr(diffusers, self.pipeline), {place: network, "scheduler": scheduler})
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def texts(self, device: str, dtype: torch.dtype, tiny: bool = False) -> dict[str, Any]:
        """Random embeddings of a text, and of none where there is guidance."""
        config, source = self.sized(tiny), torch.Generator().manual_seed(0)
        found = {}
        for name, (shape, width) in self.text.items():
            size = (*shape, _width(config, width))
            found[name] = torch.randn(size, generator=source).to(device, dtype)
        return found


def _width(config: Config, name: str) -> int:
    """A width of the configuration; that of the pooled text of SDXL is what sizes leave of it."""
    if name != POOLED:
        return int(config[name])
    sizes = 6 * config["addition_time_embed_dim"]
    return int(config["projection_class_embeddings_input_dim"] - sizes)


@contextmanager
def _made_on(device: str, dtype: torch.dtype) -> Iterator[None]:
    """Parameters are made there and so, not on the CPU in float32 first."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def _around(kind: Callable[..., Any], parts: Config) -> Any:
    """A pipeline of some parts, without all others that it would have."""
    needed = {
        name: None
        for name, one in inspect.signature(kind).parameters.items()
        if one.default is inspect.Parameter.empty
    }
    return kind(**{**needed, **parts})


def _branches(name: str, shape: tuple[int, ...], width: str) -> dict[str, Any]:
    """A text's embeddings, and those of none."""
    return {name: (shape, width), f"negative_{name}": (shape, width)}


def _wan(size: tuple[int, int], shift: float, **wider: int) -> Giant:
    width, height = size
    return Giant(
        network="WanTransformer3DModel",
        pipeline="WanPipeline",
        scheduler=("UniPCMultistep", _wan_noise(shift)),
        config=WAN | wider,
        tiny=TINY_WAN,
        call={
            "height": height,
            "width": width,
            "num_frames": 81,
            "num_inference_steps": 20,
            "guidance_scale": 5.0,
        },
        text=_branches("prompt_embeds", (1, 512), "text_dim"),
    )


GIANTS = {
    "sdxl": Giant(
        network="UNet2DConditionModel",
        pipeline="StableDiffusionXLPipeline",
        scheduler=("EulerDiscrete", SDXL_NOISE),
        config=SDXL,
        tiny=TINY_SDXL,
        call={
            "height": 1024,
            "width": 1024,
            "num_inference_steps": 30,
            "guidance_scale": 5.0,
        },
        text=_branches("prompt_embeds", (1, 77), "cross_attention_dim")
        | _branches("pooled_prompt_embeds", (1,), POOLED),
    ),
    "flux": Giant(
        network="FluxTransformer2DModel",
        pipeline="FluxPipeline",
        scheduler=("FlowMatchEulerDiscrete", FLUX_NOISE),
        config=FLUX,
        tiny=TINY_FLUX,
        call={
            "height": 1024,
            "width": 1024,
            "num_inference_steps": 28,
            "guidance_scale": 3.5,
        },
        text={
            "prompt_embeds": ((1, 512), "joint_attention_dim"),
            "pooled_prompt_embeds": ((1,), "pooled_projection_dim"),
        },
    ),
    "wan-1.3b": _wan((832, 480), 3.0),
    "wan-14b": _wan((1280, 720), 5.0, num_attention_heads=40, ffn_dim=13824, num_layers=40),
}
"""By name. Steps are those that the model cards show, of Wan fewer: a clip takes minutes."""
