"""Sparse VideoGen 2: tokens attend by clusters of their like, wherever they lie.

Source: Yang et al., "Sparse VideoGen2: Accelerate Video Generation with Sparse Attention via
Semantic-Aware Permutation", arXiv 2505.18875, section 4. The authors measure about twice the speed
on HunyuanVideo and Wan, by a kernel for groups of any size. Clusters differ from head to head, so
that here each head is served apart, and gathered, each cluster of a size of its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from accel.attention.sparse import Sparse

if TYPE_CHECKING:
    from accel.attention.account import Account
    from accel.attention.choice import Choice
    from accel.attention.serving import Answers


class SVG2(Sparse):
    """Clusters of queries keep the clusters of keys whose centroids they pay most to.

    k-means of each head's queries and keys begins with evenly spaced tokens and goes on from step
    to step, for each sample and branch alone. Reads the device at each attention.
    """

    name: ClassVar[str] = "attention.SVG2"
    source: ClassVar[str] = "arXiv 2505.18875, section 4"

    warm_up: float = Field(
        default=0.2, ge=0.0, le=1.0, description="share of the first steps that stay dense; 1 off"
    )
    share: float = Field(
        default=0.9,
        gt=0.0,
        le=1.0,
        description="share of the estimated attention that is kept; 1 is off. The authors: 0.9",
    )
    floor: float = Field(
        default=0.1,
        ge=0.0,
        le=1.0,
        description="share of the clusters of keys that are kept in any case. The authors: 0.1",
    )
    groups: int = Field(
        default=300, ge=1, description="clusters of queries. The authors: 300 to 400"
    )
    cells: int = Field(default=1000, ge=1, description="clusters of keys. The authors: 1000")
    first: int = Field(
        default=50, ge=1, description="rounds of k-means at the first step. The authors: 50"
    )
    later: int = Field(default=2, ge=1, description="rounds at later ones. The authors: 2")

    def why_off(self) -> str | None:
        """Dense at every step, or in every cluster."""
        return "share is 1: all clusters are kept" if self.share == 1 else super().why_off()

    def answers(self, choice: Choice, account: Account) -> Answers:
        """Centroids' masses, the fewest clusters that hold the share, at every step."""
        from accel.attention.clusters import Centroids
        from accel.attention.searching import Schedule, Searching
        from accel.attention.selection import Cumulative

        indicator = Centroids(self.groups, self.cells, self.first, self.later)
        selection = Cumulative(self.share, self.floor)
        return Searching(indicator, selection, Schedule(), choice, account)
