"""Pictures in and out of a text-to-image pipeline's loop: its autoencoder, its form of latents."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch

from accel.errors import BadOutput, UnsupportedModel
from accel.seams.grids import Grid

if TYPE_CHECKING:
    from torch import Tensor

TOKENS = {
    "ChromaPipeline": True,
    "FluxPipeline": True,
    "StableDiffusion3Pipeline": False,
    "StableDiffusionPipeline": False,
    "StableDiffusionXLPipeline": False,
}
"""Pipelines that are known here, and whether their latents are tokens of 2×2 pixels."""


def check(pipe: Any, what: str) -> None:
    """Refuse pipelines whose latents are not known here.

    Raises:
        UnsupportedModel: By name.
    """
    name = type(pipe).__name__
    if name not in TOKENS or type(pipe.vae).__name__ != "AutoencoderKL":
        raise UnsupportedModel(
            f"{what} does not fit {name} with {type(pipe.vae).__name__}, whose latents it does not "
            f"know: use one of {', '.join(TOKENS)} with an AutoencoderKL. A picture-to-picture "
            "pipeline has a text-to-image one of the same parts: "
            "StableDiffusionPipeline(**pipe.components)."
        )


def scale_name(pipe: Any) -> str:
    """The argument of a call that sets the scale w of u + w·(c − u)."""
    taken = inspect.signature(type(pipe).__call__).parameters
    return "true_cfg_scale" if "true_cfg_scale" in taken else "guidance_scale"


@torch.no_grad()
def encode(pipe: Any, image: Any) -> tuple[Tensor, int, int]:
    """A picture as the latents of the loop, ``[1, …]``, with its height and width in pixels.

    Raises:
        BadOutput: If the autoencoder gives NaN or infinite latents.
    """
    pixels = pipe.image_processor.preprocess(image)[:1].to(pipe._execution_device, pipe.vae.dtype)
    latents = latents_from(pipe, pixels)
    height, width = pixels.shape[-2:]
    grid = _grid(pipe, *latents.shape[-2:])
    if grid.height:
        like = latents.new_zeros(grid.tokens, 4 * latents.shape[1])
        latents = grid.pack(latents[0], like)[None]
    return latents, height, width


@torch.no_grad()
def decode(pipe: Any, latents: Tensor, height: int, width: int, output_type: str) -> Any:
    """Latents of the loop as pictures, as the pipeline itself makes them."""
    if TOKENS[type(pipe).__name__]:
        rows, columns = (side // pipe.vae_scale_factor for side in (height, width))
        grid = _grid(pipe, rows, columns)
        latents = torch.stack([grid.unpack(row) for row in latents])
    pixels = pixels_from(pipe, latents)
    return pipe.image_processor.postprocess(pixels, output_type=output_type)


@torch.no_grad()
def latents_from(pipe: Any, pixels: Tensor) -> Tensor:
    """Pixels in [-1, 1], ``[B, 3, height, width]``, as latents ``[B, C, h, w]``.

    Raises:
        BadOutput: If the autoencoder gives NaN or infinite latents.
    """
    vae = pipe.vae
    latents = vae.encode(pixels.to(vae.dtype)).latent_dist.mode()
    latents = (latents - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor
    if not bool(latents.isfinite().all()):
        raise BadOutput(
            f"The autoencoder gives NaN or infinite latents in {vae.dtype}: load it in float32."
        )
    found: Tensor = latents
    return found


@torch.no_grad()
def pixels_from(pipe: Any, latents: Tensor) -> Tensor:
    """Latents ``[B, C, h, w]`` as pixels in about [-1, 1], ``[B, 3, height, width]``."""
    vae = pipe.vae
    latents = latents / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
    pixels: Tensor = vae.decode(latents.to(vae.dtype), return_dict=False)[0]
    return pixels


class Tiles:
    """Lets an autoencoder work in tiles for a while, unless it does so anyway.

    Args:
        vae: The autoencoder.
    """

    def __init__(self, vae: Any) -> None:
        self._vae = vae
        self._changed = False

    def on(self) -> None:
        """From now on in tiles."""
        if not self._vae.use_tiling:
            self._vae.enable_tiling()
            self._changed = True

    def off(self) -> None:
        """As before."""
        if self._changed:
            self._vae.disable_tiling()
            self._changed = False


def _grid(pipe: Any, rows: int, columns: int) -> Grid:
    if not TOKENS[type(pipe).__name__]:
        return Grid()
    return Grid(0, rows // 2, columns // 2, 2)
