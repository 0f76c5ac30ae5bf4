"""Sparse VideoGen's two patterns: heads that look around in space, and heads that look along time.

Xi et al., arXiv 2502.01776, section 4. A spatial head attends to a band of neighbouring frames. A
temporal head attends to the same place in all frames: the very same band, once the tokens are put
in pixel-major order, where all frames of a place lie side by side. Which head is which is decided
while the model runs; here are the two masks. The authors measure 1.91 times faster HunyuanVideo
and 1.51 times faster Wan at 720p on H100, with a quarter of the pairs kept.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from accel.attention.patterns.pattern import GROUPS, Pattern, joined
from accel.errors import BadInput
from accel.seams.layout import Layout, Places

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class _Band(Pattern):
    keep: float = 0.25
    block: int = 128
    exact: bool = False
    sink: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1 or self.block < 1:
            raise BadInput(
                f"{self} has no band: keep is a share above 0 and at most 1, and block is a number "
                "of tokens, at least 1."
            )

    @abstractmethod
    def order(self, layout: Layout, places: Places) -> Tensor:
        """Numbers of tokens in the order along which the band lies."""

    def width(self, layout: Layout) -> int:
        """Tokens on either side of a query that are kept: whole blocks, at least one.

        The authors count the pairs with text in the share. Here it is that of the other pairs: the
        text of a batch is as long as its longest, and a band must not change with the company.
        """
        width = layout.image * (1 - math.sqrt(1 - self.keep))
        return max(1, round(width / self.block)) * self.block

    def keeps(self, layout: Layout, query: Places, key: Places) -> Tensor:
        """The band, and what comes first."""
        run = 1 if self.exact else self.block
        ours, theirs = (self.order(layout, side) // run for side in (query, key))
        reach = self.width(layout) // run - self.exact
        kept = (ours - theirs).abs() <= reach
        return kept | (theirs * run < layout.frame) if self.sink else kept

    def cells(self, layout: Layout, places: Places) -> tuple[Tensor, Tensor]:
        """Runs along the order."""
        found = self.order(layout, places) // (1 if self.exact else self.block)
        return found, found

    def groups(self, layout: Layout, places: Places) -> Sequence[Tensor]:
        """Runs along the order."""
        order = self.order(layout, places)
        return [joined([order // size]) for size in {self.block, *GROUPS}]


@dataclass(frozen=True)
class Spatial(_Band):
    """A band of neighbouring frames.

    Attributes:
        keep: Share of the pairs without text that the band is made for; 0.25 to 0.3 with the
            authors, who call it sparsity and count text in.
        block: Tokens to which the band's width is rounded; 128 in the paper.
        exact: Whether the band ends at any token. Otherwise blocks that it touches are kept whole,
            which costs a kernel the same and needs no masks.
        sink: Whether all queries attend to as many tokens as a frame has, at the beginning (Wan).

    Raises:
        BadInput: For a share that is none.
    """

    def order(self, layout: Layout, places: Places) -> Tensor:
        """The tokens' own order: frame after frame."""
        return layout.index(places)


@dataclass(frozen=True)
class Temporal(_Band):
    """The same place, and those beside it, in all frames.

    Attributes:
        keep: Share of the pairs without text that the band is made for; 0.25 to 0.3 with the
            authors, who call it sparsity and count text in.
        block: Tokens to which the band's width is rounded; 128 in the paper.
        exact: Whether the band ends at any token. Otherwise blocks that it touches are kept whole,
            which costs a kernel the same and needs no masks.
        sink: Whether all queries attend to as many tokens as a frame has, at the beginning of the
            pixel-major order: the mask is that of `Spatial`, whatever it means in this order.

    Raises:
        BadInput: For a share that is none.
    """

    def order(self, layout: Layout, places: Places) -> Tensor:
        """Place after place, all frames of each."""
        return layout.pixel_index(places)
