"""Rotary positions of a clip's frames, for a transformer that is given a part of the clip.

A query and a key see each other by the difference of their positions, so a part that keeps its
place in the clip sees, of what lies outside of it, everything at its distance. The network's own
table begins at 0 and ends where its authors ended it; here positions go on.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.embeddings import get_1d_rotary_pos_embed
from torch import Tensor

from accel.errors import UnsupportedModel
from accel.seams.denoisers import Denoiser

SERVED = "WanTransformer3DModel"


class Positions:
    """Those of Wan: a pair of cosines and sines ``[1, tokens, 1, width]``.

    Args:
        denoiser: The network.

    Raises:
        UnsupportedModel: If it is another, or its table is not the one of its class.
    """

    def __init__(self, denoiser: Denoiser) -> None:
        name = type(denoiser.core).__name__
        if name != SERVED:
            raise UnsupportedModel(
                f"Blocks of a clip fit {SERVED}, and {name} is another network: where its frames "
                "lie is not known. Add it to accel/seams/clips.py, or leave the method out."
            )
        self.rope: Any = denoiser.core.rope
        self._latest: tuple[tuple[int, int], tuple[Tensor, Tensor]] | None = None
        known = self.rope.freqs_cos[:, : self.rope.t_dim]
        if not torch.equal(self._times(0, len(known))[0].to(known), known):
            raise UnsupportedModel(
                f"The rotary table of this {name} is not that of its class, so how it goes on is "
                "not known and blocks of a clip do not fit. Leave the method out of the plan."
            )

    def of(self, x: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """The positions of the tokens of some frames.

        Args:
            x: Latents ``[B, C, F, H, W]``.
            start: Place of the first frame in the clip, in patches.
        """
        frames, height, width = (
            size // patch for size, patch in zip(x.shape[2:], self.rope.patch_size, strict=True)
        )
        if self._latest is None or self._latest[0] != (start, frames):
            self._latest = (start, frames), self._times(start, frames)
        tables = []
        for times, table in zip(
            self._latest[1], (self.rope.freqs_cos, self.rope.freqs_sin), strict=True
        ):
            _, rows, columns = table.split([self.rope.t_dim, self.rope.h_dim, self.rope.w_dim], 1)
            parts = (
                times.to(table).view(frames, 1, 1, -1),
                rows[:height].view(1, height, 1, -1),
                columns[:width].view(1, 1, width, -1),
            )
            grid = [part.expand(frames, height, width, -1) for part in parts]
            tables.append(torch.cat(grid, -1).reshape(1, frames * height * width, 1, -1))
        return tables[0], tables[1]

    def _times(self, start: int, frames: int) -> tuple[Tensor, Tensor]:
        double = torch.float32 if self.rope.freqs_cos.device.type == "mps" else torch.float64
        cosines, sines = get_1d_rotary_pos_embed(
            self.rope.t_dim,
            torch.arange(start, start + frames),
            use_real=True,
            repeat_interleave_real=True,
            freqs_dtype=double,
        )
        return cosines, sines
