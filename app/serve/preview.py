"""Latents as a small picture, without the decoder: a linear map, fitted once a model.

What a model's own decoder makes of a few random, smooth latents tells how each channel colours a
place; least squares give the map.
"""

from __future__ import annotations

import inspect
import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

SIDE = 256
"""Pixels a side of a preview, at most."""

PLACES, LEAST = 12, 4
"""Latents a side of a picture that the map is fitted on, and how many of those at least."""


@dataclass(frozen=True)
class Painter:
    """The map of one model.

    Attributes:
        weights: ``[channels + 1, 3]``, float32; the last row is the colour of zero.
    """

    weights: Tensor

    @classmethod
    def fit(cls, pipe: Any) -> Painter | None:
        """Fit the map of a pipeline; ``None`` where it has no decoder of latents into RGB."""
        vae: Any = getattr(pipe, "vae", None)
        channels = _channels(vae)
        if channels is None:
            return None
        import torch

        noise = torch.Generator("cpu").manual_seed(0)
        count = max(LEAST, -(-2 * channels // PLACES**2))
        coarse = torch.randn(count, channels, 4, 4, generator=noise)
        smooth = torch.nn.functional.interpolate(coarse, size=(PLACES, PLACES), mode="bicubic")
        with torch.no_grad():
            colours = _decoded(vae, smooth.to(vae.device, vae.dtype))
        if colours.shape[1] != 3 or not bool(colours.isfinite().all()):
            return None
        places = smooth.movedim(1, -1).reshape(-1, channels)
        known = torch.cat([places, torch.ones(len(places), 1)], dim=1)
        wanted = colours.movedim(1, -1).reshape(-1, 3)
        ridge = torch.eye(channels + 1) * 1e-3 * len(places)
        return cls(torch.linalg.solve(known.T @ known + ridge, known.T @ wanted))

    def paint(self, latents: Tensor) -> bytes | None:
        """A PNG of at most 256 px a side; of a clip, its middle frame.

        Args:
            latents: Of one sample, ``[channels, (frames,) height, width]``.

        Returns:
            ``None`` for latents of another number of channels, or in another form.
        """
        from PIL import Image

        if len(latents) != len(self.weights) - 1 or latents.ndim not in (3, 4):
            return None
        still = latents[:, latents.shape[1] // 2] if latents.ndim == 4 else latents
        places = still.detach().to("cpu", self.weights.dtype).movedim(0, -1)
        colours = places @ self.weights[:-1] + self.weights[-1]
        levels = (colours.clamp(0, 1) * 255).round().byte().numpy()
        picture = Image.fromarray(levels)
        scale = SIDE / max(picture.size)
        size = [max(1, round(side * scale)) for side in picture.size]
        buffer = io.BytesIO()
        picture.resize(size, Image.Resampling.BICUBIC).save(buffer, "PNG", compress_level=1)
        return buffer.getvalue()


def _channels(vae: Any) -> int | None:
    """How many channels the latents of a decoder have."""
    if not hasattr(vae, "decode") or not hasattr(vae, "config"):
        return None
    found = vae.config.get("latent_channels") or vae.config.get("z_dim")
    return int(found) if found else None


def _decoded(vae: Any, latents: Tensor) -> Tensor:
    """What the decoder makes of latents in the pipeline's units: RGB 0 to 1, a pixel a latent."""
    import torch

    given = _in_units_of(vae, latents)
    counted = "num_frames" in inspect.signature(vae.decode).parameters  # frames are rows
    if not counted and any(isinstance(part, torch.nn.Conv3d) for part in vae.modules()):
        given = given.unsqueeze(2)
    value = vae.decode(given, **({"num_frames": 1} if counted else {})).sample
    picture = value[:, :, 0] if value.ndim == 5 else value
    small = torch.nn.functional.adaptive_avg_pool2d(
        picture.float(), (latents.shape[-2], latents.shape[-1])
    )
    return (small / 2 + 0.5).cpu()


def _in_units_of(vae: Any, latents: Tensor) -> Tensor:
    """From the units of a pipeline's loop to those of its decoder."""
    import torch

    config = vae.config
    scaling = config.get("scaling_factor") or 1.0
    held = {**dict(vae.named_buffers(recurse=False)), **config}
    mean, std = held.get("latents_mean"), held.get("latents_std")
    if mean is None or std is None:
        return latents / scaling + (config.get("shift_factor") or 0.0)
    level, spread = (
        torch.as_tensor(value).to(latents).reshape(1, -1, 1, 1) for value in (mean, std)
    )
    return latents * spread / scaling + level
