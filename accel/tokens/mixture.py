"""Reductions by dense matrices inside windows: a merged token is a mixture of many."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from accel.tokens.reduction import Reduction, checked, identity, picked

if TYPE_CHECKING:
    from torch import Tensor


def directions(x: Tensor, index: Tensor) -> Tensor:
    """The tokens of windows, scaled to length 1: ``[B, w, n, C]``, in float32 at least.

    Args:
        x: ``[B, N, …]``.
        index: The tokens of each window, ``[w, n]``.
    """
    import torch
    from torch.nn.functional import normalize

    flat = x.reshape(*x.shape[:2], -1).index_select(1, index.flatten())
    exact = flat.to(torch.promote_types(x.dtype, torch.float32))
    return normalize(exact, dim=-1).reshape(len(x), *index.shape, -1)


@dataclass(frozen=True, eq=False)
class Part:
    """Windows of one shape, each with matrices of its own.

    Attributes:
        index: The tokens of each window, ``[w, n]``.
        chosen: The places in its window of each window's anchors, ``[B, w, m]``.
        merge: W of each window, ``[B, w, m, n]``.
        unmerge: U of each window, ``[B, w, n, m]``.
    """

    index: Tensor
    chosen: Tensor
    merge: Tensor
    unmerge: Tensor


def untouched(index: Tensor, like: Tensor) -> Part:
    """Windows whose tokens stay as they are.

    Args:
        index: The tokens of each window, ``[w, n]``.
        like: A tensor of the dtype and the rows ``[B, …]`` that the matrices are to have.
    """
    import torch

    batch, (windows, side) = len(like), index.shape
    chosen = torch.arange(side, device=index.device).expand(batch, windows, -1)
    same = torch.eye(side, dtype=like.dtype, device=like.device).expand(batch, windows, -1, -1)
    return Part(index, chosen, same, same)


def mixture(parts: Sequence[Part]) -> Reduction:
    """The reduction by dense matrices inside windows that cover every token once.

    Off where no window has fewer tokens than before.
    """
    import torch

    if all(part.merge.shape[2] == part.merge.shape[3] for part in parts):
        return identity(sum(part.index.numel() for part in parts), parts[0].index.device)
    order = torch.cat([part.index.flatten() for part in parts])
    anchors = []
    for part in parts:
        index = part.index.expand(len(part.chosen), -1, -1)
        anchors.append(index.gather(2, part.chosen).flatten(1))
    return Mixture(
        tokens=len(order),
        anchor=torch.cat(anchors, dim=1),
        size=torch.cat([part.unmerge.sum(2).flatten(1) for part in parts], dim=1),
        parts=tuple(parts),
        back=order.argsort(),
    )


@dataclass(frozen=True, eq=False, kw_only=True)
class Mixture(Reduction):
    """Merged tokens are mixtures of many, inside windows. Made by `mixture`.

    The merged tokens are in the order of the windows. Merge and unmerge take m·n·C multiply-adds a
    window each: next to attention's that is little only where windows are small.

    Attributes:
        parts: The windows and their matrices.
        back: Where each token is in the order of the windows, ``[N]``.
    """

    parts: tuple[Part, ...]
    back: Tensor

    def merge(self, x: Tensor) -> Tensor:
        """W x in each window."""
        import torch

        x = checked(x, self.tokens, self.anchor)
        flat = x.reshape(*x.shape[:2], -1)
        merged = []
        for part in self.parts:
            windows = flat.index_select(1, part.index.flatten())
            windows = windows.reshape(len(x), *part.index.shape, -1)
            merged.append((part.merge.to(x.dtype) @ windows).flatten(1, 2))
        y = torch.cat(merged, dim=1)
        return y.reshape(*y.shape[:2], *x.shape[2:])

    def unmerge(self, y: Tensor) -> Tensor:
        """U y in each window."""
        import torch

        y = checked(y, self.length, self.anchor)
        flat = y.reshape(*y.shape[:2], -1)
        shapes = [part.merge.shape[1:3] for part in self.parts]
        pieces = torch.split(flat, [windows * few for windows, few in shapes], dim=1)
        spread = []
        for part, piece, shape in zip(self.parts, pieces, shapes, strict=True):
            windows = piece.reshape(len(y), *shape, -1)
            spread.append((part.unmerge.to(y.dtype) @ windows).flatten(1, 2))
        x = torch.cat(spread, dim=1).index_select(1, self.back)
        return x.reshape(*x.shape[:2], *y.shape[2:])

    def take(self, rows: Sequence[int]) -> Self:
        """The matrices of some rows."""
        parts = tuple(
            Part(
                part.index,
                picked(part.chosen, rows),
                picked(part.merge, rows),
                picked(part.unmerge, rows),
            )
            for part in self.parts
        )
        anchor, size = picked(self.anchor, rows), picked(self.size, rows)
        return dataclasses.replace(self, anchor=anchor, size=size, parts=parts)
