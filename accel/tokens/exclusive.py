"""Reductions to groups: every token belongs to one, and no matrix is ever built."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Self

from accel.tokens.reduction import Reduction, checked, gathered, picked

if TYPE_CHECKING:
    from torch import Tensor

Pooling = Literal["average", "nearest"]
"""What stands for a group: the mean of its tokens, or its anchor."""


def exclusive(target: Tensor, anchor: Tensor, pooling: Pooling = "average") -> Exclusive:
    """The reduction to groups.

    Args:
        target: The group of each token, ``[B, N]``, in ``[0, M)``. No group may be empty.
        anchor: A token of each group, ``[B, M]``.
        pooling: What stands for a group.
    """
    import torch

    ordered, order = target.sort(dim=1, stable=True)
    groups = torch.arange(anchor.shape[1], device=target.device)
    start = torch.searchsorted(ordered, groups.repeat(len(target), 1))
    end = torch.full_like(start[:, :1], target.shape[1])
    return Exclusive(
        tokens=target.shape[1],
        anchor=anchor,
        size=start.diff(dim=1, append=end).float(),
        target=target,
        order=order,
        start=start,
        pooling=pooling,
    )


@dataclass(frozen=True, eq=False, kw_only=True)
class Exclusive(Reduction):
    """Every token belongs to one group. Made by `exclusive`; no matrix is ever built.

    Sums run group by group in the order of the tokens: scattered sums would run in an order that a
    GPU does not fix.

    Attributes:
        target: The group of each token, ``[B, N]``.
        order: The tokens sorted by group, ``[B, N]``.
        start: Where each group begins in that order, ``[B, M]``.
        pooling: What stands for a group.
    """

    target: Tensor
    order: Tensor
    start: Tensor
    pooling: Pooling

    def merge(self, x: Tensor) -> Tensor:
        """The mean of each group, or its anchor."""
        import torch
        from torch.nn.functional import embedding_bag

        x = checked(x, self.tokens, self.anchor)
        if self.pooling == "nearest":
            return gathered(x, self.anchor)
        batch = max(len(x), len(self.anchor))
        x = x.expand(batch, *x.shape[1:])
        first = torch.arange(batch, device=x.device)[:, None] * self.tokens
        sums = embedding_bag(  # of means torch has no fast form on the CPU
            (self.order + first).flatten(),
            x.reshape(batch * self.tokens, -1),
            (self.start + first).flatten(),
            mode="sum",
        )
        means = sums.reshape(batch, self.length, -1) / self.size.to(sums.dtype)[..., None]
        return means.reshape(batch, self.length, *x.shape[2:])

    def unmerge(self, y: Tensor) -> Tensor:
        """Each token gets what its group has."""
        return gathered(checked(y, self.length, self.anchor), self.target)

    def take(self, rows: Sequence[int]) -> Self:
        """The groups of some rows."""
        return dataclasses.replace(
            self,
            anchor=picked(self.anchor, rows),
            size=picked(self.size, rows),
            target=picked(self.target, rows),
            order=picked(self.order, rows),
            start=picked(self.start, rows),
        )


def absorbed(gone: Tensor, into: Tensor, tokens: int) -> Exclusive:
    """The reduction in which some tokens are merged into others.

    The merged tokens are in the order of their anchors, so that neighbours stay neighbours.

    Args:
        gone: Tokens that are merged, ``[B, r]``, each once.
        into: The token that each is merged into, ``[B, r]``; none of them is ``gone``.
        tokens: N.
    """
    import torch

    stays = torch.ones(len(gone), tokens, dtype=torch.bool, device=gone.device)
    stays = stays.scatter(1, gone, False)
    rank = stays.cumsum(1) - 1
    first = (~stays).to(torch.uint8).argsort(dim=1, stable=True)
    return exclusive(
        rank.scatter(1, gone, rank.gather(1, into)), first[:, : tokens - gone.shape[1]]
    )
