"""SpargeAttn, stage 1: blocks that are like themselves attend as their means do.

Source: Zhang et al., "SpargeAttention: Accurate and Training-free Sparse Attention Accelerating Any
Model Inference", arXiv 2502.18137, section 3.2. The second stage and the integer products are a
kernel's and not here. The authors tune both thresholds for each layer of a network; here they are
one for all. Their variant that keeps a number of blocks is ``attention.Searched`` with
``selection="top-k"``, ``keep=0.5`` and ``likeness=-0.1``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from accel.attention.sparse import Sparse

if TYPE_CHECKING:
    from accel.attention.account import Account
    from accel.attention.choice import Choice
    from accel.attention.serving import Answers


class SpargeAttn(Sparse):
    """Keep the blocks of keys whose means hold most of the attention of a block's mean query.

    Blocks whose tokens are not like each other are kept whole. Found anew at every step, for each
    sample, branch and head, from means alone. Reads the device at each attention.
    """

    name: ClassVar[str] = "attention.SpargeAttn"
    source: ClassVar[str] = "arXiv 2502.18137, section 3.2"

    warm_up: float = Field(
        default=0.0, ge=0.0, le=1.0, description="share of the first steps that stay dense; 1 off"
    )
    share: float = Field(
        default=0.98,
        gt=0.0,
        le=1.0,
        description="share of the estimated attention that is kept; 1 is off. The authors: 0.98",
    )
    likeness: float = Field(
        default=0.6,
        ge=-1.0,
        le=1.0,
        description="mean cosine of a block's tokens up to which it is kept whole; below 0: no "
        "block is. The authors: 0.6",
    )
    block: int = Field(default=128, ge=1, description="queries of a block. The authors: 128")
    cell: int = Field(default=64, ge=1, description="keys of a block. The authors: 64")

    def why_off(self) -> str | None:
        """Dense at every step, or in every block."""
        return "share is 1: all blocks are kept" if self.share == 1 else super().why_off()

    def answers(self, choice: Choice, account: Account) -> Answers:
        """Pooled masses, the fewest blocks that hold the share, at every step."""
        from accel.attention.masses import Pooled
        from accel.attention.searching import Schedule, Searching
        from accel.attention.selection import Cumulative

        indicator = Pooled(self.block, self.cell, self.likeness)
        return Searching(indicator, Cumulative(self.share), Schedule(), choice, account)
