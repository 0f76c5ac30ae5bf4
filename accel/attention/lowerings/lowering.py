"""What every lowering is given, and what it checks."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from accel.attention.blocks import BlockSparse
from accel.errors import BadInput
from accel.seams.layout import Layout

Found = TypeVar("Found")

PROMPTS = 8
"""Masks of text that are remembered: those of the branches of a few batches."""


class Lowering(Protocol):
    """Attention by one table; made for it once, called at every layer and step."""

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float | None = None,
        text_mask: Tensor | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            q: Queries ``[B, H, S, D]``, in the model's order of tokens, rotated.
            k: Keys, likewise.
            v: Values, likewise.
            scale: Factor of the scores; 1/√D without it.
            text_mask: Which text tokens are valid, ``[B, text]`` booleans on any device, best on
                the CPU, where reading it waits for nothing; all without it. Padded ones are
                attended to by nobody; as queries they get what valid ones would.

        Returns:
            ``[B, H, S, D]``.

        Raises:
            BadInput: If tokens, heads or the mask do not fit the table.
        """
        ...


class HeadByHead:
    """A lowering for each set of heads.

    Args:
        parts: The heads, and what serves them.
    """

    def __init__(self, parts: list[tuple[tuple[int, ...], Lowering]]) -> None:
        self._parts = parts
        self._heads = sum(len(heads) for heads, _ in parts)

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float | None = None,
        text_mask: Tensor | None = None,
    ) -> Tensor:
        """As `Lowering` says."""
        if q.shape[1] != self._heads:
            raise BadInput(
                f"There are patterns for {self._heads} heads, and attention has {q.shape[1]}: "
                "give one for each."
            )
        out = torch.empty_like(q)
        for heads, lowering in self._parts:
            some = list(heads)
            out[:, some] = lowering(q[:, some], k[:, some], v[:, some], scale, text_mask)
        return out


class ByMask(Generic[Found]):
    """What was made for the latest masks of text, by what they keep. Reads the masks."""

    def __init__(self) -> None:
        self._found: OrderedDict[tuple[tuple[int, ...], bytes], Found] = OrderedDict()

    def get(self, mask: Tensor, make: Callable[[Tensor], Found]) -> Found:
        """What was made for an equal mask, or else is made now."""
        key = (tuple(mask.shape), mask.bool().cpu().numpy().tobytes())
        if key not in self._found:
            self._found[key] = make(mask)
            if len(self._found) > PROMPTS:
                self._found.popitem(last=False)
        return self._found[key]


def checked(blocks: BlockSparse, q: Tensor, k: Tensor, v: Tensor, text_mask: Tensor | None) -> None:
    """Refuse what does not fit the table.

    Raises:
        BadInput: If tokens, heads or the mask do not fit.
    """
    layout = blocks.layout
    if q.ndim != 4 or not q.shape == k.shape == v.shape or q.shape[2] != layout.tokens:
        raise BadInput(
            f"Queries, keys and values are {list(q.shape)}, {list(k.shape)} and {list(v.shape)}; "
            f"sparse attention needs all three as [B, H, {layout.tokens}, D] for {layout}."
        )
    if blocks.heads not in (1, q.shape[1]):
        raise BadInput(
            f"The table is for {blocks.heads} heads, and attention has {q.shape[1]}: give a table "
            "for each head, or one for all."
        )
    if text_mask is not None and text_mask.shape != (q.shape[0], layout.text):
        raise BadInput(
            f"The mask of the text is {list(text_mask.shape)}; it needs to be "
            f"[{q.shape[0]}, {layout.text}], True where a token is valid."
        )


def by_text(
    layout: Layout, text_mask: Tensor | None, device: torch.device
) -> list[tuple[Tensor | None, Tensor]]:
    """Samples with the same valid text, and where it is.

    Reads the mask where it is.

    Args:
        layout: The tokens.
        text_mask: Which text tokens are valid, ``[B, text]``; all without it.
        device: Where the answer is to be.

    Returns:
        Numbers of samples (None: all) with the numbers of their valid text tokens among all tokens.
    """
    span = layout.text_span
    tokens = torch.arange(span.start, span.stop, device=device)
    if text_mask is None or not layout.text:
        return [(None, tokens)]
    kinds, kind = torch.unique(text_mask.bool(), dim=0, return_inverse=True)
    if len(kinds) == 1:
        return [(None, tokens[kinds[0].to(device)])]
    return [
        ((kind == number).nonzero()[:, 0].to(device), tokens[valid.to(device)])
        for number, valid in enumerate(kinds)
    ]
