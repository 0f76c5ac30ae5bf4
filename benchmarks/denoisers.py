"""Whole denoisers whose pictures are as large as one likes, and the seconds of one of their calls.

* ``scenes-flux``: the bundled transformer, 8 blocks of 160 channels in 5 heads, text and picture in
  one attention. It was trained on 256 tokens: of a larger picture only the seconds mean anything.
* ``pixart``: blocks of a PixArt-Σ of its published width, 1152 channels in 16 heads, with random
  weights. The published one has 28 blocks.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import accel
from accel.seams.layout import Layout

TEXT, TEXT_WIDTH = 120, 4096
"""Text tokens of a PixArt-Σ, and their width; no attention of the picture sees them."""


@dataclass(frozen=True)
class Denoiser:
    """A pipeline whose denoiser is timed.

    Attributes:
        pipe: The pipeline.
        call: Its arguments, but for the size.
        pixels: A side of a token, in pixels.
        text: Text tokens in the attention of the picture.
    """

    pipe: Any
    call: dict[str, Any]
    pixels: int
    text: int = 0

    def seconds(self, layout: Layout, sync: Callable[[], None]) -> float:
        """Seconds of the network in one step of a picture."""
        moments: list[float] = []

        def note(*_: Any) -> None:
            sync()
            moments.append(time.perf_counter())

        network = self.pipe.transformer
        undos = [network.register_forward_pre_hook(note), network.register_forward_hook(note)]
        sides = {name: self.pixels * getattr(layout, name) for name in ("height", "width")}
        try:
            self.pipe(generator=torch.Generator().manual_seed(0), **self.call, **sides)
        finally:
            for undo in undos:
                undo.remove()
        return sum(moments[1::2]) - sum(moments[::2])


def pixart(device: str, blocks: int) -> Denoiser:
    """A pipeline around some blocks of a PixArt-Σ; the same random weights each time."""
    from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel

    torch.manual_seed(0)
    transformer = PixArtTransformer2DModel(
        num_layers=blocks,
        sample_size=128,
        out_channels=8,
        caption_channels=TEXT_WIDTH,
        use_additional_conditions=False,
    )
    pipe = PixArtSigmaPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        transformer=transformer.to(device),
        scheduler=DPMSolverMultistepScheduler(),
    )
    pipe.set_progress_bar_config(disable=True)
    if device != "cpu":
        pipe.to(torch.bfloat16)
    source = torch.Generator().manual_seed(0)
    text = torch.randn(1, TEXT, TEXT_WIDTH, generator=source).to(device, transformer.dtype)
    call = {
        "prompt_embeds": text,
        "prompt_attention_mask": torch.ones(1, TEXT, device=device),
        "negative_prompt": None,
        "guidance_scale": 1.0,
        "num_inference_steps": 1,
        "use_resolution_binning": False,
        "output_type": "latent",
    }
    return Denoiser(pipe, call, pixels=16)


def scenes_flux(device: str, blocks: int) -> Denoiser:  # noqa: ARG001
    """The bundled transformer, in one branch."""
    pipe, call = accel.load("scenes-flux")
    pipe.set_progress_bar_config(disable=True)
    if device != "cpu":
        pipe.to(device, torch.bfloat16)
    call |= {"prompt": "a house on green hills at noon", "true_cfg_scale": 1.0}
    call |= {"num_inference_steps": 1, "output_type": "latent"}
    for side in ("height", "width"):
        call.pop(side)
    return Denoiser(pipe, call, pixels=8, text=call["max_sequence_length"])


KINDS: dict[str, Callable[[str, int], Denoiser]] = {"scenes-flux": scenes_flux, "pixart": pixart}


def told(kind: str, blocks: int) -> str:
    """What is timed, in a line."""
    if kind == "pixart":
        return f"{blocks} of the 28 blocks of a PixArt-Σ (published width, random weights)"
    return (
        "The whole denoiser of scenes-flux (8 blocks; trained on 256 tokens: seconds alone count)"
    )
