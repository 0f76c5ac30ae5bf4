"""How much attention each block of image queries pays to each block of image keys.

What decides at run time which blocks are computed: the exact mass, or an estimate that costs less.
Blocks are runs of tokens in their own order; the last one may be shorter. Text belongs to no block,
on whatever side of the image it lies: it is always kept, and counts in exact masses alone, as what
a query has left over for the image.

Shapes: P heads (of all samples), N image tokens, D channels, T blocks of queries, C blocks of keys.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

SCORES = 1 << 20
"""Scores that are looked at at once, where one block of queries of one head has no more: what fits
a processor's cache."""

SCORES_ON_DEVICE = 1 << 26
"""The same where it is kernels that should be few."""

TINY = 1e-12

Memory = dict[str, Tensor]
"""What one search leaves to the next, ``[P, …]`` each."""


@dataclass(frozen=True, eq=False)
class Heads:
    """The rotated queries and keys of some heads.

    Attributes:
        query: Of the image, ``[P, N, D]``.
        key: Of the image, ``[P, N, D]``.
        text: Keys of the text, ``[P, L, D]``; L may be 0.
        valid: Which of them are no padding, ``[P, L]`` booleans; ``None``: all.
        scale: Factor of the scores.
    """

    query: Tensor
    key: Tensor
    text: Tensor
    valid: Tensor | None
    scale: float


@dataclass(frozen=True, eq=False)
class Estimate:
    """Who attends to whom, in parts of the image.

    Attributes:
        groups: The part of each query, ``[N]``, or ``[P, N]`` by head; parts may be empty there.
        cells: The part of each key, likewise.
        mass: What a group pays to a cell, ``[P, T, C]``, not negative, in units of the group's own.
        needed: What is kept whatever the mass, ``[P, T, C]`` booleans; ``None``: nothing.
        memory: What the next search is given.
    """

    groups: Tensor
    cells: Tensor
    mass: Tensor
    needed: Tensor | None = None
    memory: Memory = field(default_factory=dict)


class Indicator(Protocol):
    """Tells how much groups of queries attend to cells of keys."""

    def __call__(self, heads: Heads, memory: Memory) -> Estimate:
        """Look at some heads.

        Args:
            heads: Their queries and keys.
            memory: What the search before left; empty at the first.
        """
        ...


@dataclass(frozen=True)
class Exact:
    """The attention itself, summed up by blocks; never more than `at_once` scores together.

    A search costs what the scores of dense attention do. AdaSpa (arXiv 2502.21079, section 4).

    Attributes:
        block: Queries of a group.
        cell: Keys of a cell.
        cached: Whether later searches divide by the first one's sums (log-sum-exp of each query's
            scores), which spares them a pass over the scores.
    """

    block: int = 64
    cell: int = 64
    cached: bool = True

    def __call__(self, heads: Heads, memory: Memory) -> Estimate:
        """As `Indicator` says. Remembers ``lse``, ``[P, N]``."""
        count = heads.query.shape[1]
        mass, lse = exact_mass(heads, self.block, self.cell, memory.get("lse"))
        groups, cells = (runs(count, size, mass.device) for size in (self.block, self.cell))
        return Estimate(groups, cells, mass, memory={"lse": lse} if self.cached else {})


@dataclass(frozen=True)
class LowBit:
    """The attention of queries and keys of few bits, summed up by blocks.

    Each token's queries, and its keys less their mean, are integers times the token's own scale. A
    kernel of that width finds the same masses; here they are computed in the model's own numbers,
    so this tells what such a kernel would keep, and saves no time itself.

    Attributes:
        block: Queries of a group.
        cell: Keys of a cell.
        bits: Of the integers, their sign included: 4 are -7 … 7.
    """

    block: int = 64
    cell: int = 64
    bits: int = 4

    def __call__(self, heads: Heads, memory: Memory) -> Estimate:
        """As `Indicator` says. Remembers nothing."""
        middle = heads.key.mean(1, keepdim=True)
        coarse = replace(
            heads,
            query=quantised(heads.query, self.bits),
            key=quantised(heads.key - middle, self.bits),
            text=quantised(heads.text - middle, self.bits),
        )
        return Exact(self.block, self.cell, cached=False)(coarse, memory)


@dataclass(frozen=True)
class Pooled:
    """The attention of mean queries to mean keys, where blocks are like themselves.

    SpargeAttn, stage 1 (arXiv 2502.18137, section 3.2). Blocks of queries, and of keys, whose
    tokens differ too much for a mean are kept whole. Costs next to nothing.

    Attributes:
        block: Queries of a group; 128 in the paper.
        cell: Keys of a cell; 64 in the paper.
        likeness: Mean cosine of a block's tokens, two by two, at and below which it is kept whole;
            below 0: no block is.
    """

    block: int = 128
    cell: int = 64
    likeness: float = 0.6

    def __call__(self, heads: Heads, memory: Memory) -> Estimate:  # noqa: ARG002
        """As `Indicator` says. Remembers nothing."""
        q, k, count = heads.query.float(), centred(heads.key.float()), heads.query.shape[1]
        groups, cells = (runs(count, size, q.device) for size in (self.block, self.cell))
        scores = means(q, self.block) @ means(k, self.cell).mT * heads.scale
        scores = scores + sizes(count, self.cell, q.device).log()
        mixed_q = likeness(q, self.block) <= self.likeness
        mixed_k = likeness(k, self.cell) <= self.likeness
        mass = scores.masked_fill(mixed_k[:, None], -math.inf).softmax(-1)
        needed = mixed_q[:, :, None] | mixed_k[:, None]
        return Estimate(groups, cells, mass.masked_fill(mixed_k[:, None], 0.0), needed)


def exact_mass(heads: Heads, block: int, cell: int, lse: Tensor | None) -> tuple[Tensor, Tensor]:
    """Σ exp(q·k·scale − lse) over the queries and keys of each pair of blocks.

    A group's masses and what it pays to the text add up to the number of its queries.

    Args:
        heads: Queries and keys.
        block: Queries of a group.
        cell: Keys of a cell.
        lse: Log-sum-exp of each query's scores, ``[P, N]``; computed if it is not given.

    Returns:
        ``[P, T, C]`` in float32, and the log-sum-exp.
    """
    size, count = heads.query.shape[:2]
    mass = heads.query.new_empty((size, -(-count // block), -(-count // cell)), dtype=torch.float32)
    known = lse is not None
    lse = heads.query.new_empty((size, count), dtype=torch.float32) if lse is None else lse
    limit = at_once(mass.device)
    some = max(1, limit // (block * count))
    step = max(1, limit // (min(some, size) * block * count))
    for part in range(0, size, some):
        for first in range(0, mass.shape[1], step):
            here, rows = slice(part, part + some), slice(first * block, (first + step) * block)
            scores = _scores(heads, here, rows, heads.key)
            if not known:
                lse[here, rows] = _log_sum_exp(heads, here, rows, scores)
            shares = scores.sub_(lse[here, rows, None]).exp_()
            mass[here, first : first + step] = _summed(_summed(shares, cell).mT, block).mT
    return mass, lse


def _scores(heads: Heads, here: slice, rows: slice, key: Tensor) -> Tensor:
    # scaled first: float16 overflows where the attention itself does not
    return ((heads.query[here, rows] * heads.scale) @ key[here].mT).float()


def _log_sum_exp(heads: Heads, here: slice, rows: slice, scores: Tensor) -> Tensor:
    found = scores.logsumexp(-1)
    if not heads.text.shape[1]:
        return found
    text = _scores(heads, here, rows, heads.text)
    if heads.valid is not None:
        text = text.masked_fill(~heads.valid[here, None], -math.inf)
    return torch.logaddexp(found, text.logsumexp(-1))


def _summed(x: Tensor, size: int) -> Tensor:
    """Sums over runs of the last dimension."""
    whole = pad(x, (0, -x.shape[-1] % size))
    return whole.reshape(*x.shape[:-1], -1, size).sum(-1)


def at_once(device: torch.device) -> int:
    """How many scores are looked at at once."""
    return SCORES if device.type == "cpu" else SCORES_ON_DEVICE


def runs(count: int, size: int, device: torch.device) -> Tensor:
    """The run of each of ``count`` tokens, ``[N]``; the last run may be shorter."""
    return torch.arange(count, device=device) // size


def sizes(count: int, size: int, device: torch.device) -> Tensor:
    """Tokens of each run, in float32."""
    starts = torch.arange(0, count, size, device=device)
    return (count - starts).clamp(max=size).float()


def means(x: Tensor, size: int) -> Tensor:
    """Means over runs of tokens: ``[P, N, D]`` → ``[P, T, D]``."""
    return _summed(x.mT, size).mT / sizes(x.shape[1], size, x.device)[:, None]


def likeness(x: Tensor, size: int) -> Tensor:
    """Mean cosine of all pairs of tokens of a run, each with itself too: ``[P, T]``."""
    return means(normalize(x, dim=-1), size).square().sum(-1)


def centred(key: Tensor) -> Tensor:
    """Keys less their mean, which moves all scores of a query alike: ``[P, N, D]``."""
    return key - key.mean(1, keepdim=True)


def quantised(x: Tensor, bits: int) -> Tensor:
    """Tokens rounded to symmetric integers times a scale of the token's own."""
    levels = 2 ** (bits - 1) - 1
    scale: Tensor = x.abs().amax(-1, keepdim=True).clamp_min(TINY) / levels
    return (x / scale).round() * scale
