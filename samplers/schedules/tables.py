"""Align Your Steps: the published schedules.

Sabour et al., arXiv 2404.14507, appendix; found for Stable Diffusion 1.5, SDXL and Stable Video
Diffusion, ten steps each. Other numbers of steps by log-linear interpolation, as the authors do.
The numbers are those that diffusers ships.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    from samplers.schedules.ramps import Floats

Table = Literal["sd", "sdxl", "svd"]
TABLES: tuple[Table, ...] = get_args(Table)

NAMES: dict[Table, str] = {
    "sd": "StableDiffusionSigmas",
    "sdxl": "StableDiffusionXLSigmas",
    "svd": "StableDiffusionVideoSigmas",
}


def align_your_steps(table: Table, count: int) -> Floats:
    """The levels σ/α of ``count`` evaluations; imports diffusers."""
    import numpy as np
    from diffusers.schedulers import AysSchedules

    from samplers.schedules.ramps import resample

    levels = np.asarray(AysSchedules[NAMES[table]], np.float64)
    return resample(levels[levels > 0.0], count)
