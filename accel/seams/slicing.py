"""The operators of a UNet that treat each entry of one axis alone, and how one runs in slices.

A *spatial* operator (convolution, resnet, attention within a picture) is given ``[batch · frames,
…]`` and treats each entry of the first axis by itself. A *temporal* one is given ``[batch ·
positions, frames, …]``, or the same unfolded: all frames of one position belong together, and
positions are apart. Cut along that axis an operator gives the same answer piece by piece, up to
the rounding of kernels that are chosen by size. What takes statistics over positions (the norms of
temporal transformers and convolutions) or looks at neighbouring ones (a 3-D convolution with a
spatial extent) is not cut.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers.hooks.group_offloading import _GROUP_OFFLOADING
from diffusers.models.attention import (
    BasicTransformerBlock,
    FeedForward,
    FreeNoiseTransformerBlock,
    TemporalBasicTransformerBlock,
)
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import (
    ResnetBlock2D,
    ResnetBlockCondNorm2D,
    TemporalConvLayer,
    TemporalResnetBlock,
)
from diffusers.models.transformers.dual_transformer_2d import DualTransformer2DModel
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.transformers.transformer_temporal import TransformerTemporalModel
from diffusers.models.unets.unet_motion_model import AnimateDiffTransformer3D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from accel import hooks
from accel.errors import UnsupportedModel
from accel.seams.blocks import wrap_call
from accel.seams.denoisers import Denoiser
from accel.seams.modules import inside_graph

Kind = Literal["spatial", "temporal"]

SINGLE = (Attention, FeedForward, nn.Conv2d, nn.Conv3d)
"""Operators by themselves; linear layers of the names ``PROJECTIONS`` besides."""

PROJECTIONS = ("proj_in", "proj_out")

GROUPS = (
    ResnetBlock2D,
    ResnetBlockCondNorm2D,
    Transformer2DModel,
    DualTransformer2DModel,
    BasicTransformerBlock,
    FreeNoiseTransformerBlock,
    TemporalBasicTransformerBlock,
    Downsample2D,
    Upsample2D,
)
"""Runs of consecutive operators of one kind."""

TEMPORAL = (
    AnimateDiffTransformer3D,
    TransformerTemporalModel,
    TemporalBasicTransformerBlock,
    TemporalConvLayer,
    TemporalResnetBlock,
)
"""What works along time; inside of it a norm over channels sees all frames and positions."""

NORMS = (nn.GroupNorm, nn.modules.batchnorm._NormBase)

PROCESSORS = "diffusers.models."
"""Where the attention processors lie that are known to keep the entries of a batch apart …"""

PERTURBED = "PAG"
"""… but for those that take one part of the batch for another branch."""

ENTRIES = ("forward", "_compiled_call_impl")
"""What a call of a module runs."""


@dataclass(frozen=True, eq=False)
class Operator:
    """One operator, or a run of consecutive ones.

    Attributes:
        path: Where it is in the network.
        module: What stands there.
        kind: ``spatial`` or ``temporal``.
        axis: The axis of its input that it is cut along.
        entry: Name of its input.
    """

    path: str
    module: Any
    kind: Kind
    axis: int
    entry: str

    def wrap(self, around: Callable[..., Any]) -> Callable[[], None]:
        """Put ``around(inner, *args, **kwargs)`` around it; returns the undo."""
        return wrap_call(self.module, around)

    def length(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        """Entries of the axis in one call."""
        return int(self._input(args, kwargs).shape[self.axis])

    def run(
        self,
        inner: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        pieces: list[slice],
    ) -> Any:
        """Call ``inner`` for one slice of the axis after the other: one answer lives at a time.

        Raises:
            UnsupportedModel: If an argument belongs neither to the entries nor to all of them.
        """
        given = self._input(args, kwargs)
        count, whole = given.shape[self.axis], None
        for piece in pieces:
            cut, named = (self._cut(value, given, count, piece) for value in (args, kwargs))
            answer = inner(*cut, **named)
            whole = _room(answer, self.axis, count) if whole is None else whole
            _fill(whole, answer, self.axis, piece)
            del answer, cut, named
        return whole

    def _input(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        given: Tensor = args[0] if args else kwargs[self.entry]
        return given

    def _cut(self, value: Any, given: Tensor, count: int, piece: slice) -> Any:
        """The entries of a slice, out of arguments of any form."""
        if value is given:
            return given.narrow(self.axis, piece.start, piece.stop - piece.start)
        if isinstance(value, Tensor):
            return self._others(value, count, piece)
        if isinstance(value, Mapping):
            return {name: self._cut(item, given, count, piece) for name, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self._cut(item, given, count, piece) for item in value)
        return value

    def _others(self, value: Tensor, count: int, piece: slice) -> Tensor:
        """The entries of a slice in ``[count, …]`` or, where these are unfolded, ``[B·count, …]``.

        What has one entry belongs to all of them.
        """
        if value.ndim == 0 or len(value) == 1:
            return value
        if self.axis == 0 and len(value) == count:
            return value[piece]
        if self.axis == 1 and len(value) % count == 0:
            return value.reshape(-1, count, *value.shape[1:])[:, piece].flatten(0, 1)
        raise UnsupportedModel(
            f"{self.path} is given {tuple(value.shape)} beside {count} entries to be cut: which "
            "belong together is not known, so slices do not fit. Leave the method out of the plan."
        )


@dataclass(frozen=True)
class Operators:
    """The operators of a network.

    Attributes:
        cut: Those that can run in slices.
        whole: By reason, the paths of those that cannot.
    """

    cut: tuple[Operator, ...]
    whole: dict[str, list[str]]


def find_operators(denoiser: Denoiser, *, grouped: bool) -> Operators:
    """The operators of a UNet in the order in which they are listed.

    Args:
        denoiser: The network.
        grouped: Runs of consecutive operators as one, where the network has a module for them.

    Raises:
        UnsupportedModel: For a network that is no UNet, or if they lie inside a compiled graph.
    """
    core, kind = denoiser.core, type(denoiser.core).__name__
    if not getattr(core, "down_blocks", None) or not getattr(core, "up_blocks", None):
        raise UnsupportedModel(
            f"{kind} has no down_blocks and up_blocks: slices of a UNet's operators do not fit it. "
            "Use memory.GroupOffload, which serves every network."
        )
    cut: list[Operator] = []
    whole: dict[str, list[str]] = {}
    for path, module, temporal in _walk(core, "", False, grouped):
        why = crossing(module) if temporal else None
        if why is None:
            cut.append(_operator(path, module, temporal))
        else:
            whole.setdefault(why, []).append(path)
    if not cut:
        raise UnsupportedModel(
            f"{kind} has no attention, resnet or convolution of a known kind: slices of a UNet's "
            "operators do not fit it. Use memory.GroupOffload, which serves every network."
        )
    if any(inside_graph(denoiser, operator.path) for operator in cut):
        raise UnsupportedModel(
            f"Operators of {kind} are compiled into a graph, so slices do not fit. Do not compile "
            "it, or only blocks under memory.OperatorGrouping."
        )
    return Operators(tuple(cut), whole)


def _walk(
    module: nn.Module, path: str, temporal: bool, grouped: bool
) -> Iterator[tuple[str, nn.Module, bool]]:
    """Operators and temporal norms with their paths, and whether they work along time."""
    kinds = (*GROUPS, *SINGLE) if grouped else SINGLE
    for name, child in module.named_children():
        where = f"{path}.{name}".lstrip(".")
        now = temporal or isinstance(child, (*TEMPORAL, nn.Conv3d))
        projects = name in PROJECTIONS and isinstance(child, nn.Linear)
        if isinstance(child, kinds) or projects or (now and isinstance(child, NORMS)):
            yield where, child, now
        else:
            yield from _walk(child, where, now, grouped)


def crossing(module: nn.Module) -> str | None:
    """Why a temporal operator cannot be cut between positions, or ``None`` if it can."""
    if isinstance(module, NORMS):
        return "norms over all frames and positions"
    if isinstance(module, nn.Conv2d) or (isinstance(module, nn.Conv3d) and not _upright(module)):
        return "convolutions over neighbouring positions"
    return None


def _upright(layer: nn.Conv3d) -> bool:
    """Whether a convolution goes along time alone."""
    ones, padding = (1, 1), layer.padding
    along = layer.kernel_size[1:] == ones and layer.stride[1:] == ones
    return along and not isinstance(padding, str) and padding[1:] == (0, 0)


def _operator(path: str, module: nn.Module, temporal: bool) -> Operator:
    entry = list(inspect.signature(type(module).forward).parameters)[1]
    axes = {TemporalBasicTransformerBlock: 1, nn.Conv3d: 3}  # unfolded: positions, rows of them
    axis = next((axis for kind, axis in axes.items() if isinstance(module, kind)), 0)
    return Operator(path, module, "temporal" if temporal else "spatial", axis, entry)


def why_whole(module: nn.Module) -> str | None:
    """Why an operator is to run whole in this call, or ``None``: it reads hooks and processors."""
    for part in module.modules():
        if _hooked(part, within=part is not module):
            return "that another method works in"
        if _streamed(part):
            return "with weights that a stream brings once a call"
        if isinstance(part, Attention):
            kind = type(part.processor)
            if not kind.__module__.startswith(PROCESSORS) or kind.__name__.startswith(PERTURBED):
                return f"with {kind.__name__}, which may look across the batch"
    return None


def _hooked(part: nn.Module, within: bool) -> bool:
    """Whether another method would be given a slice in place of all rows.

    Of an operator itself only attention is asked, which is reached below our hook; a linear layer
    answers a slice as it does all rows.
    """
    if isinstance(part, nn.Linear) or not (within or isinstance(part, Attention)):
        return False
    ours = 0 if within else 1
    for entry in ENTRIES:
        chain = vars(part).get(entry)
        seen = len(chain.links) if isinstance(chain, hooks.Chain) else 0
        if seen > ours or (seen == 0 and hooks.in_place(part, entry)):
            return True
    return False


def _streamed(part: nn.Module) -> bool:
    """Whether diffusers' group offloading brings a layer's weights ahead, and takes them away."""
    registry = vars(part).get("_diffusers_hook")
    hook = None if registry is None else registry.get_hook(_GROUP_OFFLOADING)
    return hook is not None and hook.group.stream is not None


def slices(length: int, count: int) -> list[slice]:
    """About ``count`` slices: of ``max(round(length / count), 1)`` entries, or less the last."""
    size = max(round(length / count), 1)
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _room(answer: Any, axis: int, count: int) -> Any:
    """Empty room for all entries, of the form of an answer for some."""
    if isinstance(answer, Tensor):
        shape = [*answer.shape]
        shape[axis] = count
        last = answer.ndim == 4 and not answer.is_contiguous()
        last = last and answer.is_contiguous(memory_format=torch.channels_last)
        form = torch.channels_last if last else torch.contiguous_format
        return torch.empty(shape, dtype=answer.dtype, device=answer.device, memory_format=form)
    if isinstance(answer, Mapping):
        return type(answer)(**{name: _room(part, axis, count) for name, part in answer.items()})
    if isinstance(answer, tuple):
        return tuple(_room(part, axis, count) for part in answer)
    return answer


def _fill(whole: Any, answer: Any, axis: int, piece: slice) -> None:
    """Write the answer for a slice to its place."""
    if isinstance(answer, Tensor):
        whole.narrow(axis, piece.start, piece.stop - piece.start).copy_(answer)
    elif isinstance(answer, Mapping):
        for name, part in answer.items():
            _fill(whole[name], part, axis, piece)
    elif isinstance(answer, tuple):
        for place, part in zip(whole, answer, strict=True):
            _fill(place, part, axis, piece)
