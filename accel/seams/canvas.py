"""The picture that a call of a network is about, and the call that is about a patch of it.

A patch is to be to the network what a picture of its size is: positions begin where those of a
picture begin, and sizes that the network is told are those of the patch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from accel.errors import BadInput, UnsupportedModel
from accel.seams.denoisers import Call, Denoiser
from accel.seams.grids import BY_IDS, BY_SHAPES, Grid
from accel.seams.tokens import PICTURES, pixels_of

SPATIAL = (
    "down_block_additional_residuals",
    "mid_block_additional_residual",
    "down_intrablock_additional_residuals",
)
"""Arguments that hold pictures beside the sample: what ControlNets and adapters add."""

TOKENS = (
    "block_controlnet_hidden_states",
    "controlnet_block_samples",
    "controlnet_single_block_samples",
)
"""Arguments of transformers that hold a map of tokens ``[R, tokens, D]`` for each block."""

SIZES = ("original_size", "target_size", "resolution")
"""Arguments ``[R, 2]`` that tell a network how high and wide its picture is."""

CLIPS = ("HunyuanVideoTransformer3DModel", "WanTransformer3DModel")
"""Transformers over clips ``[R, C, F, H, W]`` whose positions follow from the size alone."""

BESIDE = ("Kontext", "Edit")
"""Parts of the names of pipelines that put a picture of reference beside the tokens."""


class Patch(Protocol):
    """What a network is to be asked about in the place of the picture."""

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns that it has of a picture."""
        ...

    def shrunk(self, picture: Tensor, factor: int, height: int, width: int) -> Tensor:
        """What it has of a map of the picture at 1/factor of its size.

        Args:
            picture: ``[R, C, h, w]``.
            factor: How often smaller than the picture it is.
            height: Rows of the patch, with its padding.
            width: Columns likewise.
        """
        ...


@dataclass(frozen=True)
class Window:
    """A part of a picture."""

    top: int
    bottom: int
    left: int
    right: int

    def size(self, _height: int, _width: int) -> tuple[int, int]:
        """Its rows and columns."""
        return self.bottom - self.top, self.right - self.left

    def of(self, picture: Tensor) -> Tensor:
        """Its pixels of a picture ``[…, H, W]``: a view."""
        return picture[..., self.top : self.bottom, self.left : self.right]

    def shrunk(self, picture: Tensor, factor: int, _height: int, _width: int) -> Tensor:
        """What it has of a map of the picture at 1/factor of its size; it begins at a multiple."""
        rows = slice(self.top // factor, -(-self.bottom // factor))
        return picture[..., rows, self.left // factor : -(-self.right // factor)]


def grain_of(pipe: Any, denoiser: Denoiser, *, clips: bool = False) -> int:
    """Of what windows have to begin at multiples: 2^L of a UNet that halves L times, or a token.

    Args:
        pipe: The pipeline.
        denoiser: Its network.
        clips: Whether a clip will do, whose frames are all cut alike.

    Raises:
        UnsupportedModel: For a network that is not given a picture that can be cut.
    """
    core, network = denoiser.core, type(denoiser.core).__name__
    if network == "UNet2DConditionModel":
        if str(core.config.get("attention_type", "default")).startswith("gated"):
            raise _refused(network, "is told places in the picture (GLIGEN)")
        if any(isinstance(module, nn.Conv3d) for module in core.modules()):
            raise _refused(network, "has frames")
        return 1 << sum(bool(getattr(one, "downsamplers", None)) for one in core.down_blocks)
    served = PICTURES + CLIPS * clips
    if network not in served:
        known = ", ".join(("UNet2DConditionModel", *served))
        raise _refused(network, f"is none of those whose pictures can be cut ({known})")
    if any(part in type(pipe).__name__ for part in BESIDE):
        raise _refused(type(pipe).__name__, "shows its network a second picture beside the first")
    if network in (*BY_IDS, *BY_SHAPES):
        return 2
    patch = core.config.patch_size
    return int(patch if isinstance(patch, int) else max(patch))


def native_side(pipe: Any, denoiser: Denoiser, base: int | None, method: str) -> int:
    """Pixels of the latents that a picture of the network's own size has a side.

    Args:
        pipe: The pipeline.
        denoiser: Its network.
        base: Pixels of that picture a side; ``None``: what the pipeline makes unless told.
        method: Who asks, for the refusal.

    Raises:
        BadInput: If that is less than what the network takes at a time.
        UnsupportedModel: If ``base`` is missing and the pipeline does not say it.
    """
    pixels, grain = pixels_of(pipe), grain_of(pipe, denoiser)
    own = denoiser.core.config.get("sample_size")
    side = getattr(pipe, "default_sample_size", own) if base is None else base // pixels
    if not isinstance(side, int):
        raise UnsupportedModel(
            f"{type(pipe).__name__} does not say for which size its network was trained, so "
            f"{method} does not fit without it: set base, in pixels."
        )
    if side < grain:
        raise BadInput(
            f"{method}: base is {base}, which makes {side} pixels of the latents, and "
            f"{type(denoiser.core).__name__} takes them {grain} at a time: set base to at "
            f"least {grain * pixels}."
        )
    return side


def _refused(name: str, why: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"{name} {why}, so making its picture from patches does not fit. Use parallel.CFG or "
        "another parallel method, and ask for a picture of the usual size."
    )


class Canvas:
    """The picture of one call.

    Args:
        call: The call.
        grain: From `grain_of`.
        grid: How its rows lie in the picture, from `accel.seams.grids`.

    Attributes:
        picture: ``[R, C, H, W]``.
        height: H.
        width: W.
    """

    def __init__(self, call: Call, grain: int, grid: Grid) -> None:
        self._call = call
        self._grain = grain
        self._grid = grid
        self._unet = hasattr(call.denoiser.core, "down_blocks")
        self.picture = self._unpacked(call.sample, grid)
        self.height, self.width = self.picture.shape[-2:]

    def sides(self, patch: Patch) -> tuple[int, int]:
        """Rows and columns that the network is given of a patch: whole tokens."""
        height, width = patch.size(self.height, self.width)
        if self._unet:
            return height, width
        grain = self._grain
        return -(-height // grain) * grain, -(-width // grain) * grain

    def call(self, patch: Patch, pixels: Tensor) -> Call:
        """The call for a patch.

        Args:
            patch: Which one.
            pixels: ``[R, C, rows, columns]`` of it; they are repeated where tokens want more.
        """
        height, width = self.sides(patch)
        below, right = height - pixels.shape[-2], width - pixels.shape[-1]
        if below or right:
            pixels = functional.pad(pixels, (0, right, 0, below), mode="replicate")
        arguments = _changed(self._call.arguments, self._changes(patch, height, width))
        arguments[self._call.denoiser.sample_name] = self._packed(pixels)
        return replace(self._call, arguments=arguments)

    def answer(self, patch: Patch, value: Tensor) -> Tensor:
        """What the network says of a patch, ``[R, C, rows, columns]``, from its answer."""
        height, width = self.sides(patch)
        picture = self._unpacked(value, self._smaller(height, width))
        rows, columns = patch.size(self.height, self.width)
        return picture[..., :rows, :columns]

    def whole(self, picture: Tensor) -> Tensor:
        """A picture as the answer of the network, ``[R, …]``."""
        return self._packed(picture)

    def _smaller(self, height: int, width: int) -> Grid:
        grid = self._grid
        if not grid.height:
            return grid
        return replace(grid, height=height // grid.patch, width=width // grid.patch)

    def _unpacked(self, value: Tensor, grid: Grid) -> Tensor:
        return value if not grid.height else torch.stack([grid.unpack(row) for row in value])

    def _packed(self, picture: Tensor) -> Tensor:
        grid = self._smaller(*picture.shape[-2:])
        if not grid.height:
            return picture
        like = picture.new_empty((grid.tokens, picture.shape[1] * grid.patch**2))
        return torch.stack([grid.pack(row, like) for row in picture])

    def _changes(self, patch: Patch, height: int, width: int) -> dict[str, Change]:
        """What becomes of arguments for a patch of so many rows and columns, padding included."""
        down, across = height / self.height, width / self.width

        def level(value: Any) -> Any:
            return _each(value, lambda one: self._level(one, patch, height, width))

        def tokens(value: Any) -> Any:
            return _each(value, lambda one: self._tokens(one, patch, height, width))

        def sizes(value: Tensor) -> Tensor:
            return value * value.new_tensor([down, across])

        def time_ids(value: Tensor) -> Tensor:  # original size, crop, target size or a score
            target = (down, across) if value.shape[-1] == 6 else (1.0,)
            return value * value.new_tensor([down, across, 1.0, 1.0, *target])

        found: dict[str, Change] = {
            **dict.fromkeys(SPATIAL, level),
            **dict.fromkeys(TOKENS, tokens),
            **dict.fromkeys(SIZES, sizes),
            "time_ids": time_ids,
            "aspect_ratio": lambda value: value * (down / across),
        }
        if self._grid.height:
            part = self._smaller(height, width)
            more = part.tokens - self._grid.tokens
            found["img_ids"] = lambda value: self._ids(value, part)
            found["img_shapes"] = lambda value: [[(1, part.height, part.width)] for _ in value]
            found["attention_mask"] = lambda value: value[..., : value.shape[-1] + more]  # Chroma
        return found

    def _level(self, value: Tensor, patch: Patch, height: int, width: int) -> Tensor:
        """A map ``[R, C, h, w]`` of a level of a UNet."""
        factor = next(
            factor
            for factor in (1 << level for level in range(self.height.bit_length()))
            if (-(-self.height // factor), -(-self.width // factor)) == tuple(value.shape[-2:])
        )
        return patch.shrunk(value, factor, height, width)

    def _tokens(self, value: Tensor, patch: Patch, height: int, width: int) -> Tensor:
        """A map ``[R, tokens, D]``."""
        sides = self.height // self._grain, self.width // self._grain
        picture = value.transpose(1, 2).reshape(len(value), -1, *sides)
        part = patch.shrunk(picture, self._grain, height, width)
        return part.flatten(-2).transpose(1, 2)

    def _ids(self, value: Tensor, part: Grid) -> Tensor:
        """Positions ``[tokens, 3]``: those of the first rows and columns."""
        table = value.reshape(*value.shape[:-2], self._grid.height, self._grid.width, -1)
        return table[..., : part.height, : part.width, :].flatten(-3, -2)


Change = Callable[[Any], Any]


def _changed(arguments: Mapping[str, Any], changes: Mapping[str, Change]) -> dict[str, Any]:
    """Arguments, and those within them, of which some are changed."""
    found: dict[str, Any] = {}
    for name, value in arguments.items():
        if isinstance(value, Mapping):
            found[name] = _changed(value, changes)
        else:
            found[name] = changes[name](value) if name in changes and value is not None else value
    return found


def _each(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The maps in an argument, changed."""
    if isinstance(value, (list, tuple)):
        return type(value)(_each(one, change) for one in value)
    return change(value)
