"""The image tokens that an attention module or a block is given, and all that belongs to them.

With fewer tokens a module must be given fewer of everything that is laid out by tokens: rotary
positions, masks, modulation of its own for each token. What that is, is told by name and shape.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from accel.errors import UnsupportedModel
from accel.seams.blocks import ENCODER, Block, wrap_call
from accel.seams.denoisers import Call, Denoiser
from accel.seams.layout import Layout
from accel.seams.modules import find_modules
from accel.seams.rotary import Fewer, kept_positions, shared_positions
from accel.seams.rows import take_rows
from accel.seams.tokens import FRAMES_SECOND, TEXT_FIRST, TEXT_LAST, Layouts

POSITIONS = ("rotary", "rope", "freqs", "pos_emb")
"""Parts of the names of arguments that carry positions."""

FOLDED = ("UNetSpatioTemporalConditionModel",)
"""UNets for video whose clips are ``[B, F, C, H, W]``; AnimateDiff's are ``[B, C, F, H, W]``."""

GRID = ("height", "width")
"""Parameters of blocks that convolve over the grid of the tokens."""

FIRST = "num_tokens"
"""Parameter of blocks that modulate so many tokens, those of the first frame, apart."""

TEXT = "encoder"
"""How the names of arguments begin that belong to the text."""


@dataclass(frozen=True, eq=False)
class Stream:
    """What a module or block is given.

    Attributes:
        network: Class of the network, for refusals.
        names: Of the arguments, those that are passed by position first.
        values: The arguments.
        positional: How many of them are passed by position.
        own: The tokens of the first argument, the stream of the image.
        joint: The tokens that the attention inside sees: text of a stream of its own as well.
    """

    network: str
    names: tuple[str, ...]
    values: tuple[Any, ...]
    positional: int
    own: Layout
    joint: Layout

    @property
    def hidden(self) -> Tensor:
        """The stream of the image, ``[rows · entries, tokens, C]``."""
        value: Tensor = self.values[0]
        return value

    @property
    def given(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments as they were passed."""
        return self._passed(self.values)

    @property
    def positions(self) -> Any:
        """The rotary positions, or ``None``."""
        found = (value for name, value in self._pairs if _is_position(name, value))
        return next(found, None)

    @property
    def shared(self) -> bool:
        """Whether all rows must keep the same tokens, for want of positions for each row."""
        return shared_positions(self.positions, self.joint, self.network)

    @property
    def _pairs(self) -> zip[tuple[str, Any]]:
        return zip(self.names, self.values, strict=True)

    def reduced(
        self, own: Fewer, image: Fewer, joint: Fewer
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with fewer image tokens, passed as they were.

        Args:
            own: Fewer tokens of the first argument.
            image: Fewer image tokens.
            joint: Fewer tokens of all that attend to each other.

        Raises:
            UnsupportedModel: For positions or masks of a form that is not known.
        """

        def fewer(name: str, value: Any) -> Any:
            if _is_position(name, value):
                return kept_positions(value, self.joint, image, joint, self.network)
            if not isinstance(value, Tensor) or name.startswith(TEXT):
                return value
            if "mask" in name:
                return self._mask(name, value, joint)
            by_token = value.ndim > 2 and value.shape[1] == self.own.tokens
            return own.merge(value) if by_token else value

        return self._passed([fewer(name, value) for name, value in self._pairs])

    def rows(self, rows: Sequence[int], count: int, entries: int) -> Stream:
        """What some of the ``count`` rows are given, each of which has ``entries`` entries."""
        given = dict(self._pairs)
        taken = take_rows(given, rows, count, entries)
        return Stream(
            self.network,
            self.names,
            tuple(taken.values()),
            self.positional,
            self.own,
            self.joint,
        )

    def _mask(self, name: str, mask: Tensor, joint: Fewer) -> Tensor:
        axes = [axis for axis in range(1, mask.ndim) if mask.shape[axis] == self.joint.tokens]
        if not axes and mask.shape[-1] > 1:
            raise UnsupportedModel(
                f"{self.network} hands its attention {name} of {tuple(mask.shape)} for "
                f"{self.joint}: its tokens cannot be reduced, so methods of tokens do not fit. "
                "Leave them out of the plan."
            )
        for axis in axes:
            mask = joint.rows(mask, axis)
        return mask

    def _passed(self, values: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        named = zip(self.names[self.positional :], values[self.positional :], strict=True)
        return tuple(values[: self.positional]), dict(named)


def stream_of(
    call: Call,
    layouts: Layouts,
    parameters: Sequence[str],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Stream:
    """What a module or block of a call is given.

    Args:
        call: The call of the network.
        layouts: Those of the run.
        parameters: Names of the parameters of its ``forward``, in order.
        args: What it is given by position.
        kwargs: And by name.

    Raises:
        UnsupportedModel: If the network's order of tokens is not known.
    """
    unnamed = [f"*{place}" for place in range(len(parameters), len(args))]
    named = dict(zip([*parameters, *unnamed], args, strict=False)) | kwargs
    first = parameters[0]
    if first not in named or not isinstance(named[first], Tensor):
        raise UnsupportedModel(
            f"{type(call.denoiser.core).__name__} has a part that is given no {first}: its tokens "
            "cannot be followed, so methods of tokens do not fit."
        )
    if not args:
        named = {first: named[first]} | named
    network, tokens = type(call.denoiser.core).__name__, named[first].shape[1]
    own, text = layouts.of(call, tokens), named.get(ENCODER)
    joint = own
    if isinstance(text, Tensor) and network in (*TEXT_FIRST, *TEXT_LAST):
        joint = layouts.of(call, tokens + text.shape[1])
    return Stream(network, tuple(named), tuple(named.values()), len(args), own, joint)


def token_blocks(denoiser: Denoiser, method: str, instead: str) -> Iterator[tuple[str, Block]]:
    """The blocks of a network around its self-attention, which run on any of its tokens.

    Args:
        denoiser: The network.
        method: For the refusal.
        instead: What to do then, a sentence.

    Raises:
        UnsupportedModel: For blocks that need the whole grid, fold frames into the rows, or cut
            the first frame's tokens off.
    """
    modules = find_modules(denoiser)
    network = f"{method} does not fit {type(denoiser.core).__name__}"
    if any(module.kind == "temporal" for module in modules):
        raise UnsupportedModel(f"{network}: its blocks fold frames into the rows. {instead}")
    paths = dict.fromkeys(m.path.rpartition(".")[0] for m in modules if m.kind == "self")
    for index, path in enumerate(paths):
        block = Block(index, denoiser.core.get_submodule(path))
        if any(name in block.parameters for name in GRID):
            raise UnsupportedModel(
                f"{network}: its blocks convolve over the whole grid of tokens. {instead}"
            )
        if FIRST in block.parameters:
            raise UnsupportedModel(
                f"{network}: its blocks modulate the first frame's tokens apart, by their number. "
                f"{instead}"
            )
        yield path, block


def parameters_of(module: Any) -> tuple[str, ...]:
    """Names of the parameters of a module's ``forward`` that can be passed by position."""
    core = getattr(module, "_orig_mod", module)
    found = inspect.signature(type(core).forward).parameters.values()
    return tuple(p.name for p in found if p.kind == p.POSITIONAL_OR_KEYWORD)[1:]


def downsampling(call: Call, layout: Layout) -> int:
    """How much coarser than the latents a level of a UNet is; 1 for a transformer."""
    if not hasattr(call.denoiser.core, "down_blocks"):
        return 1
    height, factor = call.sample.shape[-2], 1
    while height > layout.height:
        height, factor = -(-height // 2), 2 * factor
    return factor


def entries_of(call: Call) -> int:
    """Entries of a row in attention within pictures: the frames that a UNet for video folds."""
    core, shape = call.denoiser.core, call.sample.shape
    if len(shape) < 5 or not hasattr(core, "down_blocks"):
        return 1
    return shape[1 if type(core).__name__ in FOLDED else 2]


def pictures_of(call: Call, value: Tensor) -> Tensor:
    """An answer ``[rows, …]`` with its channels first: ``[rows, C, (F,) H, W]``, or tokens.

    Channels beyond those of the input (a learned variance) are left out.
    """
    if value.ndim < 4:
        return value
    sample = call.sample
    if value.ndim == 5 and type(call.denoiser.core).__name__ in (*FRAMES_SECOND, *FOLDED):
        value, sample = value.transpose(1, 2), sample.transpose(1, 2)
    return value[:, : sample.shape[1]]


def with_bias(mask: Tensor | None, bias: Tensor) -> Tensor:
    """A mask, boolean or additive, with a bias of the logits: additive."""
    if mask is None:
        return bias
    return torch.where(mask, bias, -torch.inf) if mask.dtype == torch.bool else mask + bias


def wrap_inside(module: Any, around: Callable[..., Any]) -> Callable[[], None]:
    """Put ``around(inner, *args, **kwargs)`` around a module, below all that is around it now.

    What others keep of the module's answers is then kept for all tokens. Returns the undo.
    """
    undo = wrap_call(module, around)
    compiled = getattr(module, "_compiled_call_impl", None)
    chain = vars(module)["forward" if compiled is None else "_compiled_call_impl"]
    chain.links.insert(0, chain.links.pop())
    return undo


def _is_position(name: str, value: Any) -> bool:
    return value is not None and any(sign in name for sign in POSITIONS)
