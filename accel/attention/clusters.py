"""Tokens in clusters: SVG2's groups and cells, and how much centroids attend to each other.

k-means by head, from tokens that are evenly spaced, or from the centroids of the step before; no
chance in it. Clusters may be empty, and are then no part of anything.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from accel.attention.masses import Estimate, Heads, Memory, at_once


@dataclass(frozen=True)
class Centroids:
    """Clusters of queries attend to clusters of keys as their centroids do, by the keys' number.

    SVG2, semantic-aware permutation and centroid-based estimation (arXiv 2505.18875, section 4).

    Attributes:
        groups: Clusters of queries; 300 to 400 in the paper.
        cells: Clusters of keys; 1000 in the paper.
        first: Rounds of k-means at the first search; 50 in the paper.
        later: Rounds at later ones, from the centroids before; 2 in the paper.
    """

    groups: int = 300
    cells: int = 1000
    first: int = 50
    later: int = 2

    def __call__(self, heads: Heads, memory: Memory) -> Estimate:
        """As `Indicator` says. Remembers ``queries`` and ``keys``: centroids ``[P, K, D]``."""
        rounds = self.later if memory else self.first
        groups, queries = clustered(heads.query, self.groups, rounds, memory.get("queries"))
        cells, keys = clustered(heads.key, self.cells, rounds, memory.get("keys"))
        scores = queries @ keys.mT * heads.scale + counts(cells, keys.shape[1])[:, None].log()
        remembered = {"queries": queries, "keys": keys}
        return Estimate(groups, cells, scores.softmax(-1), memory=remembered)


def clustered(
    x: Tensor, count: int, rounds: int, centroids: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Tokens by their nearest centroid, and the mean of each cluster, in float32.

    Args:
        x: Tokens ``[P, N, D]``.
        count: Clusters, K; not more than tokens.
        rounds: How often tokens are assigned and means taken, at least once.
        centroids: To start from, ``[P, K, D]``; evenly spaced tokens without them.

    Returns:
        The cluster of each token ``[P, N]`` and the centroids ``[P, K, D]``; an empty cluster's is
        what it was.
    """
    x = x.float()
    count = min(count, x.shape[1])
    if centroids is None:
        centroids = x[:, torch.arange(count, device=x.device) * x.shape[1] // count]
    for _ in range(rounds):
        label = nearest(x, centroids)
        number = counts(label, count)
        sums = _sums(x, label, number)
        mean = sums / number[..., None].clamp_min(1)
        centroids = torch.where(number[..., None] > 0, mean, centroids)
    return label, centroids


def nearest(x: Tensor, centroids: Tensor) -> Tensor:
    """The nearest centroid of each token, the first of several: ``[P, N]``."""
    half = centroids.square().sum(-1)[:, None] / 2
    step = max(1, at_once(x.device) // (len(x) * centroids.shape[1]))
    parts = torch.split(x, step, dim=1)
    return torch.cat([(part @ centroids.mT - half).argmax(-1) for part in parts], dim=1)


def counts(label: Tensor, count: int) -> Tensor:
    """How many tokens each cluster has: ``[P, N]`` → ``[P, K]``."""
    found = label.new_zeros((len(label), count))
    return found.scatter_add_(1, label, torch.ones_like(label))


def _sums(x: Tensor, label: Tensor, number: Tensor) -> Tensor:
    """Sum of each cluster's tokens, ``[P, K, D]``, always in the same order."""
    order = label.argsort(dim=1, stable=True)
    ordered = x.gather(1, order[..., None].expand_as(x)).flatten(0, 1)
    sums = torch.segment_reduce(ordered, "sum", lengths=number.flatten(), axis=0, initial=0)
    return sums.view(*number.shape, -1)
