"""ToDo: attend to a down-sampled grid of keys and values; queries stay as they are.

Nothing is matched and nothing unmerged, so that it costs next to nothing under any attention
kernel. Where positions are rotary, pool the keys behind their norm but before the rotation, and
rotate them by ``reduction.rows(rotary)``: pooled rotated keys would belong to no position.

Source: Smith et al., "ToDo: Token Downsampling for Efficient Generation of High-Resolution Images",
arXiv 2402.13573.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import Field

from accel.attach import Accelerator, Site, Undo
from accel.errors import BadInput, UnsupportedModel
from accel.tokens.exclusive import Pooling, exclusive
from accel.tokens.fields import SERVED
from accel.tokens.joint import beside_text
from accel.tokens.reduction import Reduction, identity

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from accel.seams.attention import Asked
    from accel.seams.layout import Grid, Layout
    from accel.tokens.layers import Run, Visit


class ToDo(Accelerator):
    """Attend to fewer keys and values: one for each tile of the grid, for all queries.

    ``nearest`` takes the key and the value of the tile's middle with its own position, as the
    authors do (1.5× at 768² to 1024², 3× and more at 1536² to 2048²). ``average`` needs keys that
    are not rotated yet, and refuses networks with rotary positions.
    """

    name: ClassVar[str] = "tokens.ToDo"
    layer: ClassVar[str] = "tokens"
    seam: ClassVar[str] = "tokens"
    supports: ClassVar[str] = SERVED.replace(" Sana,", "")
    source: ClassVar[str] = "arXiv 2402.13573"

    factor: int = Field(
        default=2,
        ge=1,
        description="tokens of a side of a tile, at the highest level of a UNet; 1 is off there. "
        "The authors use more than 2 above 1024²",
    )
    next_factor: int = Field(
        default=1, ge=1, description="the same at the next level of a UNet, the first of SDXL"
    )
    frames: int = Field(default=1, ge=1, description="frames of a tile, for clips")
    pooling: Pooling = Field(default="nearest", description="'nearest' or 'average'")
    proportional: bool = Field(
        default=False,
        description="count each key as often as the tokens of its tile, where the grid is ragged",
    )

    @classmethod
    def off(cls) -> Self:
        """Tiles of one token."""
        return cls(factor=1)

    def why_off(self) -> str | None:
        """Factors of 1."""
        if self.factor == self.next_factor == self.frames == 1:
            return "factor, next_factor and frames are 1"
        return None

    def attach(self, site: Site) -> Iterator[Undo]:
        """Put it around the self-attention of every network.

        Raises:
            UnsupportedModel: If a network's attention cannot be reached. Where tokens lie is known
                at the first call only, and what is not known then is refused there.
        """
        from accel.tokens.layers import Layers

        most = 2 if self.next_factor > 1 else 1
        yield from Layers(site.tally, Downsampling(self), most).attach(site)


class Downsampling:
    """Runs layers on fewer keys and values."""

    nothing = "whose attention does not go through torch's function"

    def __init__(self, method: ToDo) -> None:
        self._method = method
        self._known: dict[Any, Reduction] = {}

    def serve(self, visit: Visit, inner: Run) -> tuple[Any, int]:
        """Run the layer; it has as many queries as before.

        Raises:
            UnsupportedModel: For averages of keys that are rotated already.
        """
        from accel.seams.attention import Interception
        from accel.tokens.layers import Left

        stream, factor = visit.stream, self._factor(visit)
        if factor == (1, 1, 1):
            raise Left("at a level whose factor is 1")
        if self._method.pooling == "average" and stream.positions is not None:
            raise UnsupportedModel(
                f"{self._method.name} does not fit {stream.network} with pooling = 'average': its "
                "keys are rotated before they are seen, and a mean of rotated keys has no "
                "position. Set pooling = 'nearest'."
            )
        image = self._reduction(stream.own, factor, stream.hidden.device)
        pooled = Pooled(beside_text(stream.joint, image), self._method, visit)
        args, kwargs = stream.given
        with Interception(pooled):
            answer = inner(*args, **kwargs)
        return answer, image.length if pooled.asked else image.tokens

    def _factor(self, visit: Visit) -> Grid:
        from accel.seams.token_stream import downsampling

        level = downsampling(visit.call, visit.stream.own)
        side = self._method.factor if level == 1 else self._method.next_factor
        grid = visit.stream.own.grid
        return min(self._method.frames, grid[0]), min(side, grid[1]), min(side, grid[2])

    def _reduction(self, layout: Layout, factor: Grid, device: torch.device) -> Reduction:
        key = (layout, factor, device)
        if key not in self._known:
            self._known[key] = downsampled(layout, factor, self._method.pooling, device)
        return self._known[key]


class Pooled:
    """Attention to pooled keys and values.

    Attributes:
        asked: Attentions that were computed so.
    """

    def __init__(self, joint: Reduction, method: ToDo, visit: Visit) -> None:
        self._joint = joint
        self._method = method
        self._visit = visit
        self.asked = 0

    def __call__(self, asked: Asked) -> Tensor:
        """Compute one attention, ``[B, H, S, D]``.

        Raises:
            UnsupportedModel: If the keys are not the tokens that the layer was given.
        """
        from dataclasses import replace

        if asked.key.shape[2] != self._joint.tokens:
            raise UnsupportedModel(
                f"{self._method.name} does not fit: {self._visit.stream.network}."
                f"{self._visit.path} attends to {asked.key.shape[2]} keys where "
                f"{self._joint.tokens} tokens are. Leave it out of the plan."
            )
        self.asked += 1
        key, value = (self._few(x) for x in (asked.key, asked.value))
        mask = self._mask(asked)
        return replace(asked, key=key, value=value, attn_mask=mask).dense()

    def _few(self, x: Tensor) -> Tensor:
        return self._joint.merge(x.transpose(1, 2)).transpose(1, 2)

    def _mask(self, asked: Asked) -> Tensor | None:
        from accel.seams.token_stream import with_bias

        mask = asked.attn_mask
        if mask is not None and mask.shape[-1] == self._joint.tokens:
            mask = self._joint.rows(mask, -1)
        if self._method.proportional:
            mask = with_bias(mask, self._joint.key_bias(asked.query.dtype))
        return mask


def downsampled(
    layout: Layout,
    factor: Grid = (1, 2, 2),
    pooling: Pooling = "nearest",
    device: torch.device | str | None = None,
) -> Reduction:
    """One token for each tile of ``factor``; tiles at the end of a ragged axis are smaller.

    The middle of a tile stands for it (of four tokens: the upper left), with its position. Softmax
    attention over a grid that is constant in every tile stays exact if all tiles are full, and
    with `Reduction.key_bias` for any grid.

    Args:
        layout: Of the image tokens.
        factor: Tokens that become one, along frames, height and width; 1 on all axes is off. The
            authors use 2 at the highest resolution of the UNet, and more above 1024².
        pooling: ``nearest``, as the authors do, or ``average``.
        device: Of the indices.

    Raises:
        BadInput: For a factor below 1.
    """
    if min(factor) < 1:
        raise BadInput(f"a factor of {factor}: give at least 1 token on each axis.")
    if factor == (1, 1, 1):
        return identity(layout.image, device)
    axes = [_axis(length, side, device) for length, side in zip(layout.grid, factor, strict=True)]
    tiles, middles = zip(*axes, strict=True)
    target = _joined(tiles, [len(middle) for middle in middles])
    return exclusive(target[None], _joined(middles, layout.grid)[None], pooling)


def _axis(length: int, side: int, device: torch.device | str | None) -> tuple[Tensor, Tensor]:
    """Along one axis: the tile of each token, and the middle of each tile."""
    import torch

    start = torch.arange(0, length, side, device=device)
    middle = start + ((length - start).clamp(max=side) - 1) // 2
    return torch.arange(length, device=device) // side, middle


def _joined(axes: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    """Numbers on a grid of ``shape`` of all combinations of places along its axes."""
    frame, row, column = axes
    _, height, width = shape
    return ((frame[:, None, None] * height + row[:, None]) * width + column).flatten()
