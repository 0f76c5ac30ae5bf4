"""AdaSpa: which blocks matter is searched for exactly, twice a run, and kept in between.

Source: Xia et al., "Training-free and Adaptive Sparse Attention for Efficient Long Video
Generation", arXiv 2502.21079, section 4. How many heads the authors give a larger and a smaller
budget is not published: none by default. A search here goes over the scores once; where the sums of
an earlier one are at hand, it is spared those too. The authors measure 1.78 times faster
HunyuanVideo and 1.66 times faster CogVideoX1.5.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar, Self

from pydantic import Field, model_validator

from accel.attention.sparse import Sparse

if TYPE_CHECKING:
    from accel.attention.account import Account
    from accel.attention.choice import Choice
    from accel.attention.serving import Answers


class AdaSpa(Sparse):
    """Each block of queries attends to the blocks of keys that it pays most to, text aside.

    Samples, branches and heads have blocks of their own. A search that a cache leaves out is made
    when the network next runs. Keeps four bytes for each query and head. Reads the device at each
    attention.
    """

    name: ClassVar[str] = "attention.AdaSpa"
    source: ClassVar[str] = "arXiv 2502.21079, section 4"

    warm_up: float = Field(
        default=0.2,
        ge=0.0,
        le=1.0,
        description="share of the first steps that stay dense; 1 is off. The authors: 10 of 50",
    )
    keep: float = Field(
        default=0.2,
        gt=0.0,
        le=1.0,
        description="share of the blocks that are kept; 1 is off. The authors: 0.2",
    )
    block: int = Field(default=64, ge=1, description="tokens of a block")
    searches: tuple[float, ...] = Field(
        default=(0.2, 0.6),
        description="shares of the run at which it searches, rising; the first step that is not "
        "dense always does. The authors: steps 10 and 30 of 50",
    )
    moved: float = Field(
        default=0.0,
        ge=0.0,
        le=0.5,
        description="share of the heads that keep half as many blocks, those that lose least; as "
        "many that lose most keep half as many again",
    )

    @model_validator(mode="after")
    def _rising(self) -> Self:
        shares = self.searches
        if not shares or any(not 0 <= share < 1 for share in shares):
            raise ValueError("searches are shares of the run, at least one, from 0 to below 1")
        if any(after <= before for before, after in pairwise(shares)):
            raise ValueError("searches rise without repeats")
        return self

    def why_off(self) -> str | None:
        """Dense at every step, or in every block."""
        return "keep is 1: all blocks are kept" if self.keep == 1 else super().why_off()

    def answers(self, choice: Choice, account: Account) -> Answers:
        """Exact masses, the same number of blocks for each, at listed steps."""
        from accel.attention.masses import Exact
        from accel.attention.searching import Schedule, Searching
        from accel.attention.selection import TopK

        return Searching(
            Exact(self.block, self.block),
            TopK(self.keep, self.moved),
            Schedule(self.searches),
            choice,
            account,
        )
