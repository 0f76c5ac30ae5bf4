"""Which cells of keys a group of queries keeps, from how much it attends to them.

Ties go to the first. A group whose masses are not all numbers keeps everything.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Selection(Protocol):
    """Keeps the cells that matter."""

    def __call__(self, mass: Tensor) -> Tensor:
        """What is kept, ``[B, H, T, C]`` booleans; at least one cell of each group.

        Args:
            mass: What groups pay to cells, ``[B, H, T, C]``, by sample and head.
        """
        ...


@dataclass(frozen=True)
class TopK:
    """The same number of cells for each group: those with the most mass.

    Attributes:
        keep: Share of the cells, above 0; 1 keeps all.
        moved: Share of a sample's heads, at most one half, that keep half as much: those of which
            the most mass is kept. As many, those of which the least is, keep half as much again,
            or, where there are not so many cells, all; the mean over the heads stays (AdaSpa).
    """

    keep: float
    moved: float = 0.0

    def __call__(self, mass: Tensor) -> Tensor:
        """As `Selection` says."""
        heads, cells = mass.shape[1], mass.shape[3]
        count = share_of(self.keep, cells)
        rank = ranks(mass)
        counts = torch.full(mass.shape[:2], count, device=mass.device)
        moved = int(self.moved * heads)
        if moved:
            found = recall(mass, rank < count).argsort(dim=1, descending=True, stable=True)
            change = min(count // 2, cells - count)
            counts.scatter_(1, found[:, :moved], count - change)
            counts.scatter_(1, found[:, heads - moved :], count + change)
        return _or_all(rank < counts[:, :, None, None], mass)


@dataclass(frozen=True)
class Cumulative:
    """The fewest cells that hold a share of a group's mass, that with which it is reached included.

    Attributes:
        share: Of the mass; 1 keeps all.
        floor: Share of the cells that are kept in any case; at least one is.
    """

    share: float
    floor: float = 0.0

    def __call__(self, mass: Tensor) -> Tensor:
        """As `Selection` says."""
        if self.share >= 1:
            return torch.ones_like(mass, dtype=torch.bool)
        rank = ranks(mass)
        ordered = mass.sort(dim=-1, descending=True, stable=True).values
        before = ordered.cumsum(-1) - ordered
        due = before < self.share * ordered.sum(-1, keepdim=True)
        count = due.sum(-1, keepdim=True).clamp(min=share_of(self.floor, mass.shape[3]))
        return _or_all(rank < count, mass)


def share_of(share: float, count: int) -> int:
    """A share of some cells, at least one, rounded up."""
    return max(1, math.ceil(share * count - 1e-9))


def ranks(mass: Tensor) -> Tensor:
    """The place of each cell, 0 for the most mass: integers of the shape of ``mass``."""
    return mass.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)


def recall(mass: Tensor, kept: Tensor) -> Tensor:
    """Share of a head's mass that is kept, ``[B, H]``."""
    return (mass * kept).sum((2, 3)) / mass.sum((2, 3))


def _or_all(kept: Tensor, mass: Tensor) -> Tensor:
    return kept | ~mass.isfinite().all(-1, keepdim=True)
