"""Patterns: which image query may attend to which image key.

A pattern is a frozen value. ``a & b`` keeps the pairs that both keep, ``a | b`` those that either
keeps. Besides `Pattern.keeps` it says two things that make it cheap to compile and to run:

* its *cells*: tokens that it cannot tell apart as queries, and as keys. Whether a pair is kept is
  asked once for a pair of cells. Labels, not boxes: runs of tokens, clusters, residues are cells.
* its *groups*: tokens whose keys are much the same, to be served together; several proposals.

Text is no part of a pattern: it is always kept (`accel.attention`).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING

from accel.errors import BadInput
from accel.seams.layout import Grid, Layout, Places

if TYPE_CHECKING:
    from torch import Tensor

GROUPS = (64, 128, 256)
"""Queries to be served together, as far as a pattern has a choice."""

CHUNK = 1 << 19
"""Pairs of cells that are looked at together: what fits a processor's cache."""


class Pattern(ABC):
    """Which image query may attend to which image key."""

    @abstractmethod
    def keeps(self, layout: Layout, query: Places, key: Places) -> Tensor:
        """Whether queries may attend to keys: booleans that broadcast as the coordinates do."""

    def cells(self, layout: Layout, places: Places) -> tuple[Tensor, Tensor]:
        """Labels of the tokens as queries and as keys: equal ones cannot be told apart.

        Args:
            layout: What the tokens are.
            places: Of all image tokens, ``[N]`` each.
        """
        token = layout.index(places)
        return token, token

    def groups(self, layout: Layout, places: Places) -> Sequence[Tensor]:
        """Labels of the tokens: equal ones are served together. The cheapest proposal is taken.

        Args:
            layout: What the tokens are.
            places: Of all image tokens, ``[N]`` each.
        """
        return [boxes(layout, places, grown((1, 1, 1), layout.grid, size)) for size in GROUPS]

    def density(self, layout: Layout) -> float:
        """Share of all pairs of tokens, text included and none of it padded, that is kept."""
        left_out = layout.image**2 - kept_pairs(self, layout)
        return 1.0 - left_out / layout.tokens**2

    def __and__(self, other: Pattern) -> Pattern:
        return Intersection(self, other)

    def __or__(self, other: Pattern) -> Pattern:
        return Union(self, other)


@dataclass(frozen=True)
class Full(Pattern):
    """Every pair."""

    def keeps(self, layout: Layout, query: Places, key: Places) -> Tensor:  # noqa: ARG002
        """True."""
        return query.frame == query.frame

    def cells(self, layout: Layout, places: Places) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        """One cell."""
        one = places.frame * 0
        return one, one

    def groups(self, layout: Layout, places: Places) -> Sequence[Tensor]:  # noqa: ARG002
        """One group."""
        return [places.frame * 0]


@dataclass(frozen=True, repr=False)
class _Pair(Pattern):
    left: Pattern
    right: Pattern

    def cells(self, layout: Layout, places: Places) -> tuple[Tensor, Tensor]:
        """What neither side can tell apart."""
        ours, theirs = (side.cells(layout, places) for side in (self.left, self.right))
        return joined([ours[0], theirs[0]]), joined([ours[1], theirs[1]])

    def groups(self, layout: Layout, places: Places) -> Sequence[Tensor]:
        """What either side proposes."""
        return [*self.left.groups(layout, places), *self.right.groups(layout, places)]


class Intersection(_Pair):
    """The pairs that both keep."""

    def keeps(self, layout: Layout, query: Places, key: Places) -> Tensor:
        """Both."""
        return self.left.keeps(layout, query, key) & self.right.keeps(layout, query, key)

    def __repr__(self) -> str:
        return f"({self.left!r} & {self.right!r})"


class Union(_Pair):
    """The pairs that either keeps."""

    def keeps(self, layout: Layout, query: Places, key: Places) -> Tensor:
        """Either."""
        return self.left.keeps(layout, query, key) | self.right.keeps(layout, query, key)

    def __repr__(self) -> str:
        return f"({self.left!r} | {self.right!r})"


class ByAxis(Pattern):
    """A pattern made of one table of queries and keys for each axis."""

    @abstractmethod
    def tables(self, layout: Layout) -> list[Tensor]:
        """For frames, height and width, the kept pairs of coordinates: ``[L, L]`` booleans."""

    def keeps(self, layout: Layout, query: Places, key: Places) -> Tensor:
        """The pairs that every table keeps."""
        return reduce(lambda a, b: a & b, self._looked_up(layout, query, key))

    def cells(self, layout: Layout, places: Places) -> tuple[Tensor, Tensor]:
        """Coordinates with equal rows, and with equal columns, of the tables."""
        tables = self.tables(layout)
        rows, columns = (
            joined([_alike(table)[place.long()] for table, place in zip(side, places, strict=True)])
            for side in (tables, [table.T for table in tables])
        )
        return rows, columns

    def _looked_up(self, layout: Layout, query: Places, key: Places) -> list[Tensor]:
        tables = self.tables(layout)
        return [
            table.to(q.device)[q.long(), k.long()]
            for table, q, k in zip(tables, query, key, strict=True)
        ]


@dataclass(frozen=True)
class PerHead:
    """Another pattern for each head.

    Attributes:
        patterns: One a head, in the order of the heads.

    Raises:
        BadInput: If there is none.
    """

    patterns: tuple[Pattern, ...]

    def __post_init__(self) -> None:
        if not self.patterns:
            raise BadInput("PerHead() has no heads: give it one pattern a head.")

    def density(self, layout: Layout) -> float:
        """Mean over the heads."""
        found = {pattern: pattern.density(layout) for pattern in set(self.patterns)}
        return sum(found[pattern] for pattern in self.patterns) / len(self.patterns)

    def heads(self) -> dict[Pattern, tuple[int, ...]]:
        """Which heads have which pattern."""
        found: dict[Pattern, tuple[int, ...]] = {}
        for head, pattern in enumerate(self.patterns):
            found[pattern] = (*found.get(pattern, ()), head)
        return found


def _alike(table: Tensor) -> Tensor:
    """A label for each row of a table, ``[L]``; equal rows have equal labels."""
    import torch

    found: Tensor = torch.unique(table, dim=0, return_inverse=True)[1]
    return found


def joined(labels: Sequence[Tensor]) -> Tensor:
    """Labels that are equal where all of these are."""
    import torch

    def both(a: Tensor, b: Tensor) -> Tensor:
        a, b = (torch.unique(x, return_inverse=True)[1] for x in (a, b))
        return a * (b.max() + 1) + b

    return reduce(both, labels)


def boxes(layout: Layout, places: Places, sides: Grid) -> Tensor:
    """Labels of tiles of the grid; those at the far borders are smaller where they do not fit."""
    tiles = Places(*(place // side for place, side in zip(places, sides, strict=True)))
    return layout.index(tiles)


def grown(base: Grid, grid: Grid, size: int) -> Grid:
    """A box whose sides are doubled, the shortest first, until it has ``size`` tokens."""
    sides = [min(side, limit) for side, limit in zip(base, grid, strict=True)]
    while math.prod(sides) < size and sides != list(grid):
        axis = min((i for i in range(3) if sides[i] < grid[i]), key=lambda i: (sides[i], -i))
        sides[axis] = min(2 * sides[axis], grid[axis])
    return sides[0], sides[1], sides[2]


def relation(
    pattern: Pattern, layout: Layout, queries: Tensor, keys: Tensor | None = None
) -> Tensor:
    """Which tokens attend to which.

    Args:
        pattern: What decides.
        layout: What the tokens are.
        queries: Numbers of image tokens, ``[Q]``.
        keys: The same, ``[K]``; all without it, which is cheaper than to list them.

    Returns:
        Booleans ``[Q, K]``.
    """
    import torch

    width = layout.image if keys is None else len(keys)
    found = torch.empty(len(queries), width, dtype=torch.bool)
    for part in range(0, len(queries), step := max(1, CHUNK // width)):
        here = slice(part, part + step)
        found[here] = _relation(pattern, layout, queries[here], keys)
    return found


def _relation(pattern: Pattern, layout: Layout, queries: Tensor, keys: Tensor | None) -> Tensor:
    if keys is not None:
        kept = pattern.keeps(layout, layout.places(queries[:, None]), layout.places(keys))
        return kept.expand(len(queries), len(keys))
    frame, row, column = (queries.new_tensor(range(side)) for side in layout.grid)
    key = Places(frame[:, None, None], row[:, None], column)  # an open grid: little to compute
    kept = pattern.keeps(layout, layout.places(queries[:, None, None, None]), key)
    return kept.expand(len(queries), *layout.grid).reshape(len(queries), layout.image)


def all_tokens(layout: Layout) -> Tensor:
    """Numbers of all image tokens, ``[N]``, in 32 bits."""
    import torch

    return torch.arange(layout.image, dtype=torch.int32)


def kept_pairs(pattern: Pattern, layout: Layout) -> int:
    """How many pairs of image tokens a pattern keeps; counted, cell by cell."""
    tokens = all_tokens(layout)
    queries, keys = (Partition.alike(x) for x in pattern.cells(layout, layout.places(tokens)))
    several = None if len(keys) == layout.image else tokens[keys.first]
    total = 0
    for part in range(0, len(queries), step := max(1, CHUNK // len(keys))):
        here = slice(part, part + step)
        kept = relation(pattern, layout, tokens[queries.first[here]], several)
        if len(queries) == len(keys) == layout.image:
            total += int(kept.count_nonzero())
        else:
            per_query = kept.float() @ keys.sizes.float()  # at most N < 2^24: exact
            total += int((per_query.long() * queries.sizes[here]).sum())
    return total


@dataclass(frozen=True, eq=False)
class Partition:
    """Image tokens in parts.

    Attributes:
        order: The tokens, part after part, ``[N]``.
        sizes: Tokens of each part, ``[P]``.
        part: The part of each token, ``[N]``.
    """

    order: Tensor
    sizes: Tensor
    part: Tensor

    @classmethod
    def of(cls, labels: Tensor) -> Partition:
        """From a label for each token; parts are in the order of the labels."""
        import torch

        _, part, sizes = torch.unique(labels, return_inverse=True, return_counts=True)
        return cls(part.argsort(stable=True), sizes, part)

    @classmethod
    def alike(cls, labels: Tensor) -> Partition:
        """The same for labels without an order: parts of one token each come as the tokens do."""
        found = cls.of(labels)
        if len(found) < len(labels):
            return found
        token = found.part.new_tensor(range(len(labels)))
        return cls(token, found.sizes, token)

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def starts(self) -> Tensor:
        """Where each part begins in ``order``, ``[P]``."""
        return self.sizes.cumsum(0) - self.sizes

    @property
    def first(self) -> Tensor:
        """The first token of each part, ``[P]``."""
        return self.order[self.starts]
