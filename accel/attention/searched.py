"""The free combination: any indicator × any selection, at any steps, from Python and from a plan.

Not a method of a paper but the engine's own form, in which AdaSpa, SpargeAttn and SVG2 are points.
The indicator of few bits is nobody's method: it tells what a kernel of 4-bit products would keep.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, model_validator

from accel.attention.sparse import Sparse

if TYPE_CHECKING:
    from accel.attention.account import Account
    from accel.attention.choice import Choice
    from accel.attention.masses import Indicator
    from accel.attention.selection import Selection
    from accel.attention.serving import Answers

RUNS = ("exact", "low-bit", "pooled")
"""Indicators of blocks, which are runs of tokens."""

BY_INDICATOR = {
    "block": RUNS,
    "cell": RUNS,
    "cached": ("exact",),
    "bits": ("low-bit",),
    "likeness": ("pooled",),
    "groups": ("centroids",),
    "cells": ("centroids",),
    "first": ("centroids",),
    "later": ("centroids",),
}
"""Fields that only some indicators read."""

BY_SELECTION = {"keep": ("top-k",), "moved": ("top-k",), "share": ("mass",), "floor": ("mass",)}
"""Fields that only some selections read."""


class Searched(Sparse):
    """Find out while it runs which blocks of keys a block of queries needs, and keep those.

    AdaSpa is ``exact``, ``top-k``, ``when = (0.2, 0.6)``; SpargeAttn ``pooled``, ``mass``; SVG2
    ``centroids``, ``mass``. Samples, branches and heads have tables of their own. Reads the device
    at each attention.
    """

    name: ClassVar[str] = "attention.Searched"
    source: ClassVar[str] = (
        "parts of arXiv 2502.21079, 2502.18137 and 2505.18875; attention/searching.py"
    )

    indicator: Literal["exact", "low-bit", "pooled", "centroids"] = Field(
        default="pooled",
        description="what tells how much a block pays to another: the 'exact' attention; that of "
        "'low-bit' queries and keys; that of 'pooled' ones, their means; or, for clusters in the "
        "place of blocks, that of their 'centroids'",
    )
    selection: Literal["top-k", "mass"] = Field(
        default="mass",
        description="what is kept: as many blocks for each ('top-k'), or the fewest that hold a "
        "share of the 'mass'",
    )
    when: tuple[float, ...] = Field(
        default=(),
        description="shares of the run at which it searches, rising; what is found is used until "
        "the next. Empty: at every step",
    )
    keep: float = Field(default=0.2, gt=0.0, le=1.0, description="share kept by 'top-k'; 1 is off")
    moved: float = Field(
        default=0.0,
        ge=0.0,
        le=0.5,
        description="share of the heads that keep half as much by 'top-k', those that lose least; "
        "as many that lose most keep half as much again",
    )
    share: float = Field(
        default=0.95, gt=0.0, le=1.0, description="of the mass, kept by 'mass'; 1 is off"
    )
    floor: float = Field(
        default=0.0, ge=0.0, le=1.0, description="share of the blocks that 'mass' keeps in any case"
    )
    block: int = Field(default=64, ge=1, description="queries of a block")
    cell: int = Field(default=64, ge=1, description="keys of a block")
    cached: bool = Field(
        default=True,
        description="whether later 'exact' searches use the first one's sums of scores",
    )
    bits: int = Field(default=4, ge=2, le=8, description="of 'low-bit', the sign included")
    likeness: float = Field(
        default=0.6,
        ge=-1.0,
        le=1.0,
        description="mean cosine of a block's tokens up to which 'pooled' keeps it whole; below "
        "0: no block is",
    )
    groups: int = Field(default=300, ge=1, description="clusters of queries of 'centroids'")
    cells: int = Field(default=1000, ge=1, description="clusters of keys of 'centroids'")
    first: int = Field(default=50, ge=1, description="rounds of k-means of 'centroids' at first")
    later: int = Field(default=2, ge=1, description="rounds at later searches")

    @model_validator(mode="after")
    def _means_something(self) -> Self:
        fields = type(self).model_fields
        for chosen, table in (("indicator", BY_INDICATOR), ("selection", BY_SELECTION)):
            value = getattr(self, chosen)
            for name, readers in table.items():
                if value not in readers and getattr(self, name) != fields[name].default:
                    needed = " or ".join(f"'{reader}'" for reader in readers)
                    raise ValueError(f"{name} is read by {chosen} {needed} only, not by '{value}'")
        if any(not 0 <= share < 1 for share in self.when):
            raise ValueError("when lists shares of the run, from 0 to below 1")
        if any(after <= before for before, after in pairwise(self.when)):
            raise ValueError("when rises without repeats")
        return self

    def why_off(self) -> str | None:
        """Dense at every step, or in every block."""
        field = "keep" if self.selection == "top-k" else "share"
        return f"{field} is 1: all is kept" if getattr(self, field) == 1 else super().why_off()

    def answers(self, choice: Choice, account: Account) -> Answers:
        """Search as the fields say."""
        from accel.attention.searching import Schedule, Searching

        return Searching(self._indicator(), self._selection(), Schedule(self.when), choice, account)

    def _indicator(self) -> Indicator:
        from accel.attention.clusters import Centroids
        from accel.attention.masses import Exact, LowBit, Pooled

        match self.indicator:
            case "exact":
                return Exact(self.block, self.cell, self.cached)
            case "low-bit":
                return LowBit(self.block, self.cell, self.bits)
            case "pooled":
                return Pooled(self.block, self.cell, self.likeness)
            case "centroids":
                return Centroids(self.groups, self.cells, self.first, self.later)

    def _selection(self) -> Selection:
        from accel.attention.selection import Cumulative, TopK

        if self.selection == "top-k":
            return TopK(self.keep, self.moved)
        return Cumulative(self.share, self.floor)
