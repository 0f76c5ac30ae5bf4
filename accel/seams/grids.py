"""Where the tokens or channels of a network's answer lie in the picture.

Some networks take and give latents as tokens ``[S, D]``: 2×2 pixels of all channels in one token
(the Flux family, Qwen-Image), or one place of a clip (LTX). What works on frequencies or compares
with an encoded picture needs the picture: ``[…, height, width]``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from accel.errors import UnsupportedModel

if TYPE_CHECKING:
    from torch import Tensor

    from accel.seams.denoisers import Call

BY_IDS = (
    "ChromaTransformer2DModel",
    "Flux2Transformer2DModel",
    "FluxTransformer2DModel",
)
"""2×2 pixels a token; ``img_ids`` say (picture, row, column) of each token."""

BY_SHAPES = ("QwenImageTransformer2DModel",)
"""2×2 pixels a token; ``img_shapes`` say (frames, rows, columns) of each picture."""

BY_SIZES = ("LTXVideoTransformer3DModel",)
"""One place of a clip a token; `SIZES` say how many, unless coordinates stand in for them."""

SIZES = ("num_frames", "height", "width")

CHANNELS_LAST = ("Kandinsky5Transformer3DModel",)


@dataclass(frozen=True)
class Grid:
    """How one row of an answer lies in the picture.

    Attributes:
        frames: Frames of tokens; 0 where there is no such axis.
        height: Rows of tokens; 0 where the row is a picture already.
        width: Columns of tokens.
        patch: Pixels a side of a token.
        last: Whether channels are the last axis.
    """

    frames: int = 0
    height: int = 0
    width: int = 0
    patch: int = 1
    last: bool = False

    @property
    def tokens(self) -> int:
        """Tokens of the picture; more (those of a reference) may follow."""
        return max(self.frames, 1) * self.height * self.width

    def unpack(self, row: Tensor) -> Tensor:
        """One row as ``[…, height, width]``; tokens behind the picture's are left out."""
        if self.last:
            return row.movedim(-1, 0)
        if not self.height:
            return row
        if self.frames:
            return row[: self.tokens].T.reshape(-1, self.frames, self.height, self.width)
        patches = row[: self.tokens].reshape(self.height, self.width, -1, self.patch, self.patch)
        picture = patches.permute(2, 0, 3, 1, 4)
        return picture.reshape(-1, self.height * self.patch, self.width * self.patch)

    def pack(self, picture: Tensor, row: Tensor) -> Tensor:
        """The picture as a row like ``row``, whose tokens behind the picture's are kept."""
        if self.last:
            return picture.movedim(0, -1)
        if not self.height:
            return picture.reshape(row.shape)
        if self.frames:
            tokens = picture.reshape(-1, self.tokens).T
        else:
            sides = (self.height, self.patch, self.width, self.patch)
            tokens = picture.reshape(-1, *sides).permute(1, 3, 0, 2, 4).reshape(self.tokens, -1)
        packed = row.clone()
        packed[: self.tokens] = tokens
        return packed


def grid_of(call: Call) -> Grid:
    """How the rows of a call's answer lie in the picture. May read the device: ask once a run.

    Raises:
        UnsupportedModel: For tokens whose order is not known.
    """
    network = type(call.denoiser.core).__name__
    arguments = call.arguments
    if network in BY_IDS:
        ids = arguments["img_ids"]
        ids = ids if ids.ndim == 2 else ids[0]
        own = ids[ids[:, 0] == ids[0, 0]]
        height, width = (int(own[:, axis].max() - own[:, axis].min()) + 1 for axis in (1, 2))
        return Grid(0, height, width, 2)
    if network in BY_SHAPES:
        shapes = arguments["img_shapes"][0]
        _, height, width = shapes[0] if isinstance(shapes, list) else shapes
        return Grid(0, int(height), int(width), 2)
    if network in BY_SIZES and all(arguments.get(name) for name in SIZES):
        frames, height, width = (int(arguments[name]) for name in SIZES)
        return Grid(frames, height, width)
    if call.sample[0].ndim < 3:
        raise UnsupportedModel(
            f"{network} gives tokens, and their order in the picture is not known: leave the "
            "method out of the plan, or add the network to accel/seams/grids.py."
        )
    return Grid(last=network in CHANNELS_LAST)
