"""Reductions: fewer tokens in the place of many, and the way back.

A reduction takes N tokens to M (merge) and back (unmerge), both linear: ``Y = W X``, ``X' = U Y``,
and the rows of W and of U sum to 1. It sees image tokens only; `joint` keeps the text of a joint
sequence out of its way. It holds indices or weights but no content, so that one can serve many
layers and steps: when it is made anew is up to who holds it.

Shapes: ``B`` rows of a call, ``N`` tokens, ``M`` ≤ N merged tokens, ``…`` any further axes. What
all rows share has a ``1`` in the place of ``B`` and goes with any batch.

Source: Token Transforming, arXiv 2506.05709 (W and U as the common form); ToMe for Stable
Diffusion, arXiv 2303.17604 (the matching).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from accel.errors import BadInput

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def gathered(x: Tensor, index: Tensor) -> Tensor:
    """Tokens of each row: ``x[B, N, …]`` and ``index[B, M]`` give ``[B, M, …]``; either B may be 1.

    Whole tokens are copied, which `Tensor.gather` does number by number.
    """
    import torch

    if len(index) == 1:
        return x.index_select(1, index[0])
    if len(x) > 1:
        first = torch.arange(len(x), device=index.device) * x.shape[1]
        index = index + first[:, None]
    found = x.flatten(0, 1).index_select(0, index.flatten())
    return found.reshape(*index.shape, *x.shape[2:])


@dataclass(frozen=True, eq=False, kw_only=True)
class Reduction(ABC):
    """Fewer tokens in the place of many.

    Attributes:
        tokens: N.
        anchor: The token at whose place each merged token stands, ``[B, M]``: it lends its rotary
            row.
        size: How many tokens each merged token stands for, ``[B, M]``: the column sums of U.
    """

    tokens: int
    anchor: Tensor
    size: Tensor

    @property
    def length(self) -> int:
        """M."""
        return self.anchor.shape[1]

    @abstractmethod
    def merge(self, x: Tensor) -> Tensor:
        """``x[B, N, …]`` as ``[B, M, …]``.

        Whatever belongs to a token can be merged: its content, or its own modulation.

        Raises:
            BadInput: If ``x`` has not N tokens, or not B rows.
        """

    @abstractmethod
    def unmerge(self, y: Tensor) -> Tensor:
        """``y[B, M, …]`` as ``[B, N, …]``.

        Raises:
            BadInput: If ``y`` has not M tokens, or not B rows.
        """

    @abstractmethod
    def take(self, rows: Sequence[int]) -> Self:
        """The reduction of some rows, in that order; a row may be named more than once.

        With it both branches of a sample follow the matching of one, and a sub-batch its own. What
        all rows share stays as it is.
        """

    def rows(self, rotary: Tensor, dim: int = 0) -> Tensor:
        """The rotary rows of the anchors, as they were: positions are never renumbered.

        Args:
            rotary: A table with N tokens; the first axis is the batch (or 1) where ``dim`` > 0.
            dim: The axis of the tokens.

        Returns:
            The table with M tokens. A table without a batch gets one in front, ``[B, M, …]``,
            unless all rows share their anchors.

        Raises:
            BadInput: If the table has not N tokens along ``dim``.
        """
        if rotary.shape[dim] != self.tokens:
            raise BadInput(
                f"a rotary table of {tuple(rotary.shape)} has {rotary.shape[dim]} tokens along "
                f"axis {dim}, the reduction {self.tokens}: leave the text's rows out, or reduce "
                "the joint sequence."
            )
        dim %= rotary.ndim
        if dim == 0:
            found = gathered(rotary[None], self.anchor)
            return found[0] if len(self.anchor) == 1 else found
        return gathered(rotary.movedim(dim, 1), self.anchor).movedim(1, dim)

    def key_bias(self, dtype: torch.dtype) -> Tensor:
        """log(size), ``[B, 1, 1, M]``, to add to the logits of merged keys.

        Attention then counts each as often as the tokens that it stands for.
        """
        import torch

        exact = self.size.to(torch.promote_types(dtype, torch.float32)).log()
        return exact.to(dtype)[:, None, None]


def matrices(reduction: Reduction, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """W ``[B, M, N]`` and U ``[B, N, M]``: what the reduction does to the unit vectors."""
    import torch

    batch, device = len(reduction.anchor), reduction.anchor.device
    many = torch.eye(reduction.tokens, dtype=dtype, device=device).expand(batch, -1, -1)
    few = torch.eye(reduction.length, dtype=dtype, device=device).expand(batch, -1, -1)
    return reduction.merge(many), reduction.unmerge(few)


def identity(tokens: int, device: torch.device | str | None = None) -> Identity:
    """The reduction that is off."""
    import torch

    return Identity(
        tokens=tokens,
        anchor=torch.arange(tokens, device=device)[None],
        size=torch.ones(1, tokens, device=device),
    )


@dataclass(frozen=True, eq=False, kw_only=True)
class Identity(Reduction):
    """All tokens as they are: what it is given is what it answers."""

    def merge(self, x: Tensor) -> Tensor:
        """``x`` itself."""
        return checked(x, self.tokens, self.anchor)

    def unmerge(self, y: Tensor) -> Tensor:
        """``y`` itself."""
        return checked(y, self.tokens, self.anchor)

    def take(self, rows: Sequence[int]) -> Self:  # noqa: ARG002
        """Itself."""
        return self


def picked(value: Tensor, rows: Sequence[int]) -> Tensor:
    """Some rows of what has one entry a row, or one for all."""
    return value if len(value) == 1 else value[list(rows)]


def checked(x: Tensor, tokens: int, index: Tensor) -> Tensor:
    """``x`` if it has ``tokens`` tokens and as many rows as ``index`` (1 goes with any)."""
    if x.ndim < 2 or x.shape[1] != tokens:
        raise BadInput(
            f"a tensor of {tuple(x.shape)} where [B, {tokens}, …] was needed: a reduction goes "
            "with one grid only; make another, or leave the text out."
        )
    if len(x) != len(index) and 1 not in (len(x), len(index)):
        raise BadInput(
            f"a batch of {len(x)} rows for a reduction of {len(index)}: name the rows with take."
        )
    return x
