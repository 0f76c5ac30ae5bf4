"""Where in a picture a network's cross-attention tells places apart by the text.

In ASGDiffusion the map of cross-attention says where the structure of the picture is to be held
on to: at its objects, and less in the background, which else gets blurred (section 4.2). How the
map is made of the weights of attention is not known to us. Ours: a place counts by how much its
weights over the text differ from those of the picture on average (half the sum of the absolute
differences, in [0, 1]), so that it does not matter which token others look at who look at nothing
in particular; the mean over heads and over the layers of the way up, divided by its largest value.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from accel.seams.attention import Asked, answer_attention
from accel.seams.denoisers import Call, Denoiser
from accel.seams.modules import find_modules

if TYPE_CHECKING:
    from accel.attach import Undo


class Heat:
    """The maps of one network.

    Args:
        denoiser: The network.
    """

    def __init__(self, denoiser: Denoiser) -> None:
        cross = [part for part in find_modules(denoiser) if part.kind == "cross"]
        up = [part for part in cross if part.path.startswith("up_blocks")]
        self._modules = up or cross
        self._found: list[Tensor] | None = None

    @property
    def known(self) -> bool:
        """Whether the network has cross-attention: where text and picture attend together, not."""
        return bool(self._modules)

    def attach(self) -> Iterator[Undo]:
        """Look at its cross-attention."""
        for part in self._modules:
            yield answer_attention(part, self._answer)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While it is entered, what the network attends to is kept."""
        self._found = []
        try:
            yield
        finally:
            self._found = None

    def map(self, call: Call, height: int, width: int) -> Tensor:
        """The map ``[R, 1, height, width]``, in [0, 1], of what was watched; ones if nothing was.

        The rows of a sample have that of its ``cond`` row, where it has one: then guidance is the
        same on all its branches.
        """
        count = len(call.rows)
        levels = [
            functional.interpolate(level, (height, width), mode="bilinear")
            for weights in self._found or []
            if (level := _level(weights, count, height, width)) is not None
        ]
        if not levels:
            return torch.ones((count, 1, height, width), device=call.sample.device)
        found = torch.stack(levels).mean(0)
        found = found / found.amax((-2, -1), keepdim=True).clamp(min=1e-6)
        leaders = {row.sample: at for at, row in enumerate(call.rows) if row.branch == "cond"}
        return found[[leaders.get(row.sample, at) for at, row in enumerate(call.rows)]]

    def _answer(self, asked: Asked) -> Tensor:
        if self._found is not None:
            self._found.append(_contrast(asked))
        return asked.dense()


def _contrast(asked: Asked) -> Tensor:
    """How much the weights of each query differ from those of all, ``[B, S]`` in float32."""
    scale = asked.query.shape[-1] ** -0.5 if asked.scale is None else asked.scale
    scores = (asked.query.float() @ asked.key.float().transpose(-2, -1)) * scale
    mask = asked.attn_mask
    if mask is not None:
        hidden = mask.logical_not() if mask.dtype == torch.bool else None
        scores = scores + mask if hidden is None else scores.masked_fill(hidden, -torch.inf)
    weights = scores.softmax(-1).mean(1)
    return (weights - weights.mean(1, keepdim=True)).abs().sum(-1) / 2


def _level(weights: Tensor, count: int, height: int, width: int) -> Tensor | None:
    """``[R, 1, h, w]`` of ``[R, S]`` at the level that has S places; ``None``: at none."""
    while height * width > weights.shape[1]:
        height, width = -(-height // 2), -(-width // 2)
    if len(weights) != count or height * width != weights.shape[1]:
        return None
    return weights.reshape(count, 1, height, width)
