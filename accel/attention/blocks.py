"""What a pattern comes down to on a layout: groups of queries, cells of keys, and who attends.

Image queries are put in *groups* that are served together, image keys in *cells* that are kept or
left out together; a table says which group attends to which cell. Where not all queries of a group
attend to the same keys, the group has a mask. Patterns that are found at run time (blocks,
clusters) come as such a table as well, one for each head if need be: `BlockSparse.of_table`.

Nothing here is of the size N×N, except `BlockSparse.mask`. Masks are the largest: up to a byte for
each pair of a query and a key that its group attends to, where no two groups look alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from accel.attention.patterns.pattern import Partition, Pattern, PerHead, all_tokens, relation
from accel.errors import BadInput
from accel.seams.layout import Layout

Device = torch.device | str

UNMASKED = -1
PROBES = 16
"""Tokens whose groups are looked at to learn what a way of grouping costs."""

GATHERING = 24
"""What it costs to fetch one key and value, in queries that could have attended to it meanwhile."""

SMALLEST = 16
"""Mean number of tokens from which queries that cannot be told apart make groups of their own."""

MASKING = 1.4
"""How much slower attention with a mask is."""


@dataclass(frozen=True, eq=False)
class BlockSparse:
    """Which groups of image queries attend to which cells of image keys.

    R is 1 where all heads share the table, and otherwise the number of heads.

    Attributes:
        layout: The tokens.
        groups: The queries' partition, in T groups.
        cells: The keys' partition, in C cells.
        kept: Whether any query of a group attends to a cell, ``[R, T, C]`` booleans.
        mask_of: The number of a group's mask, ``[R, T]``; -1 where all its queries attend to all
            kept cells.
        masks: Booleans ``[G, L]``: the queries of a group, as they come in ``groups.order``, and
            the keys of its kept cells, as they come in ``cells.order``. Groups share masks.
    """

    layout: Layout
    groups: Partition
    cells: Partition
    kept: Tensor
    mask_of: Tensor
    masks: tuple[Tensor, ...] = ()

    @classmethod
    def of_table(cls, layout: Layout, groups: Tensor, cells: Tensor, kept: Tensor) -> BlockSparse:
        """From a table, without masks.

        Args:
            layout: The tokens.
            groups: A label for each image query, 0 … T - 1, ``[N]``.
            cells: A label for each image key, 0 … C - 1, ``[N]``.
            kept: Which group attends to which cell, ``[T, C]``, or ``[H, T, C]`` by head.

        Raises:
            BadInput: If the shapes do not fit, or a group attends to nothing.
        """
        parts = Partition.of(groups), Partition.of(cells)
        table = kept.bool()[None] if kept.ndim == 2 else kept.bool()
        shape = (len(parts[0]), len(parts[1]))
        if table.shape[1:] != shape:
            raise BadInput(
                f"The table is {list(kept.shape)}, but there are {shape[0]} groups of queries and "
                f"{shape[1]} cells of keys, none of them empty."
            )
        if not bool(table.any(2).all()):
            raise BadInput("A group of queries attends to no cell: keep at least one for each.")
        unmasked = torch.full(table.shape[:2], UNMASKED, device=kept.device)
        return cls(layout, *parts, table, unmasked)

    @property
    def heads(self) -> int:
        """R: 1 where all heads share the table, and otherwise the number of heads."""
        return self.kept.shape[0]

    @property
    def lengths(self) -> Tensor:
        """Image keys that each group attends to, ``[R, T]``."""
        return (self.kept * self.cells.sizes).sum(2)

    @property
    def density(self) -> float:
        """Share of all pairs of tokens, text included and none of it padded, that is kept."""
        pairs = self.lengths * self.groups.sizes * (self.mask_of == UNMASKED)
        masked = torch.tensor([int(mask.sum()) for mask in self.masks] or [0])
        inside = int(pairs.sum()) + int(masked[self.mask_of[self.mask_of >= 0].cpu()].sum())
        return self._share(inside)

    @property
    def computed(self) -> float:
        """The same share with what groups with a mask compute in vain: at least the density."""
        return self._share(int((self.lengths * self.groups.sizes).sum()))

    def _share(self, inside: int) -> float:
        layout = self.layout
        return 1.0 - (layout.image**2 - inside / self.heads) / layout.tokens**2

    def keys(self, head: int, group: int) -> Tensor:
        """The image keys that a group attends to, cell after cell, ``[L]``."""
        return self.cells.order[self.kept[head, group][self.cells.part[self.cells.order]]]

    def mask(self) -> Tensor:
        """Which image query attends to which image key, ``[R, N, N]``: N² booleans a head."""
        found = self.kept[:, :, self.cells.part][:, self.groups.part]
        for head, group in (self.mask_of != UNMASKED).nonzero().tolist():
            start, size = int(self.groups.starts[group]), int(self.groups.sizes[group])
            queries = self.groups.order[start : start + size]
            mask = self.masks[int(self.mask_of[head, group])]
            found[head, queries[:, None], self.keys(head, group)] = mask
        return found

    def to(self, device: Device) -> BlockSparse:
        """The same on a device."""
        return replace(
            self,
            groups=_moved(self.groups, device),
            cells=_moved(self.cells, device),
            kept=self.kept.to(device),
            mask_of=self.mask_of.to(device),
            masks=tuple(mask.to(device) for mask in self.masks),
        )


def _moved(part: Partition, device: Device) -> Partition:
    return Partition(part.order.to(device), part.sizes.to(device), part.part.to(device))


@dataclass(frozen=True, eq=False)
class ByHead:
    """Heads that attend by different patterns, with groups and cells of their own.

    Attributes:
        parts: For each pattern the heads that have it, and what it comes down to.
    """

    parts: tuple[tuple[tuple[int, ...], BlockSparse], ...]


def compiled(pattern: Pattern, layout: Layout, device: Device = "cpu") -> BlockSparse:
    """What a pattern comes down to; computed on the CPU, in seconds for 32,000 tokens.

    Args:
        pattern: Which query attends to which key.
        layout: The tokens.
        device: Where the tables are to be.

    Raises:
        BadInput: If a query is left with no image key.
    """
    places = layout.places(all_tokens(layout))
    queries, keys = (Partition.alike(labels) for labels in pattern.cells(layout, places))
    tables = Tables(pattern, layout, queries, keys)
    groups = _cheapest(tables, [Partition.alike(x) for x in pattern.groups(layout, places)])
    kept = torch.empty(1, len(groups), len(keys), dtype=torch.bool)
    mask_of = torch.full((1, len(groups)), UNMASKED)
    masks = Masks()
    for group in range(len(groups)):
        some, mask = tables.of(_members(groups, group))
        kept[0, group] = some
        if mask is not None:
            mask_of[0, group] = masks.number(mask)
    return BlockSparse(layout, groups, keys, kept, mask_of, tuple(masks.found)).to(device)


def compiled_by_head(pattern: PerHead, layout: Layout, device: Device = "cpu") -> ByHead:
    """As `compiled`, with a pattern for each head."""
    parts = [(heads, compiled(one, layout, device)) for one, heads in pattern.heads().items()]
    return ByHead(tuple(parts))


def _members(groups: Partition, group: int) -> Tensor:
    start = int(groups.starts[group])
    return groups.order[start : start + int(groups.sizes[group])]


@dataclass(frozen=True, eq=False)
class Tables:
    """A pattern on a layout, looked at group by group.

    Attributes:
        pattern: Which query attends to which key.
        layout: The tokens.
        queries: Queries that the pattern cannot tell apart.
        keys: Keys that the pattern cannot tell apart.
    """

    pattern: Pattern
    layout: Layout
    queries: Partition
    keys: Partition

    def of(self, members: Tensor) -> tuple[Tensor, Tensor | None]:
        """The cells that a group attends to, ``[C]``, and its mask ``[G, L]``, if it needs one.

        Raises:
            BadInput: If a query is left with no image key.
        """
        kinds, kind = torch.unique(self.queries.part[members], return_inverse=True)
        kept = self._kept(kinds)
        bits = kept.view(torch.uint8)  # the reductions of booleans are slow
        some, every, served = bits.amax(0).bool(), bits.amin(0).bool(), bits.amax(1).bool()
        if not bool(served.all()):
            lost = members[kind == int(served.logical_not().nonzero()[0])][0]
            raise BadInput(
                f"{self.pattern} leaves image token {int(lost)} of {self.layout} without any image "
                "key: join it by | with a pattern that keeps the token itself."
            )
        if torch.equal(some, every):
            return some, None
        return some, kept[:, some].repeat_interleave(self.keys.sizes[some], dim=1)[kind]

    def _kept(self, kinds: Tensor) -> Tensor:
        tokens = self.queries.first[kinds]
        if len(self.keys) == self.layout.image:
            return relation(self.pattern, self.layout, tokens.int())
        return relation(self.pattern, self.layout, tokens, self.keys.first)

    def cost(self, groups: Partition) -> float:
        """What a query costs if these are the groups, by some of them; in pairs computed."""
        total = 0.0
        for probe in range(PROBES):
            token = (2 * probe + 1) * self.layout.image // (2 * PROBES)
            members = _members(groups, int(groups.part[token]))
            some, mask = self.of(members)
            length = int(self.keys.sizes[some].sum()) + self.layout.text
            slower = 1.0 if mask is None else MASKING
            total += length * (GATHERING / len(members) + slower)
        return total


def _cheapest(tables: Tables, proposals: Sequence[Partition]) -> Partition:
    """The proposal, or the queries' own cells where they are large, that costs least."""
    own = tables.queries
    if len(own) * SMALLEST <= tables.layout.image or len(own) == 1:
        proposals = [own, *proposals]
    return min(proposals, key=tables.cost)


class Masks:
    """Masks by their number; equal ones have the same."""

    def __init__(self) -> None:
        self.found: list[Tensor] = []
        self._numbers: dict[tuple[tuple[int, ...], bytes], int] = {}

    def number(self, mask: Tensor) -> int:
        """The number of a mask."""
        packed = _packed(mask)
        number = self._numbers.setdefault((tuple(mask.shape), packed), len(self.found))
        if number == len(self.found):
            self.found.append(mask)
        return number


def _packed(mask: Tensor) -> bytes:
    import numpy as np

    return np.packbits(mask.numpy()).tobytes()
