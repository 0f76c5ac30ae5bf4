"""Radial attention: the farther two frames are apart, the narrower the band between them.

Li et al., arXiv 2506.19852, section 4. Attention between frames falls off with their distance δ:
frames at δ ≤ 1 are kept whole, and each doubling of δ halves the band around the same place. Below
a kernel's block the band stays as wide, and every second, fourth, … frame is kept instead. What is
kept grows as n·log n with the number of frames. The authors measure 1.9 times faster HunyuanVideo
and 1.8 times faster Wan 14B, with the first steps and layers dense.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from accel.attention.patterns.pattern import GROUPS, Pattern, joined
from accel.errors import BadInput
from accel.seams.layout import Layout, Places

if TYPE_CHECKING:
    from torch import Tensor

NOT_KEPT = -1

DECAYS = (1e-3, 64.0)
"""The least decay and the largest."""


@dataclass(frozen=True)
class Radial(Pattern):
    """Bands between frames that narrow with their distance.

    Attributes:
        decay: Factor of all bands' width, in `DECAYS`; 1 in the paper.
        block: Tokens below which a band does not narrow; 128 in the paper, the block of its kernel.
        exact: Whether bands end at any token. Otherwise blocks of a frame's tokens are kept whole
            where the band fills them – the authors' rule, 60 % of the columns to a third, in closed
            form – which costs a kernel the same and needs no masks. Blocks begin with each frame,
            and the last of a frame may be shorter; the authors' go through the whole sequence, so
            that on frames that are no whole blocks some of them cross into the next frame.
        sink: Whether all queries attend to the first frame too (Wan).

    Raises:
        BadInput: For a decay outside of `DECAYS`, or a block that is not positive.
    """

    decay: float = 1.0
    block: int = 128
    exact: bool = False
    sink: bool = False

    def __post_init__(self) -> None:
        least, most = DECAYS
        if not least <= self.decay <= most or self.block < 1:
            raise BadInput(
                f"{self} has no bands: decay is in [{least:g}, {most:g}], and block is a number of "
                "tokens, at least 1."
            )

    def reach(self, layout: Layout) -> list[int]:
        """How far a band reaches at each distance of frames, in runs of tokens; -1: not kept."""
        return [self._reach(layout, distance) for distance in range(layout.frames)]

    def _reach(self, layout: Layout, distance: int) -> int:
        if distance <= 1:
            return layout.frame
        width = self.decay * 2.0 ** (layout.frame.bit_length() - distance.bit_length())
        if width < self.block and distance % int(self.block / width):
            return NOT_KEPT
        half = max(width, self.block)
        return math.floor(half) if self.exact else math.ceil(half / self.block + 1 / 6) - 1

    def keeps(self, layout: Layout, query: Places, key: Places) -> Tensor:
        """Frames by distance, then places by distance."""
        apart = (query.frame - key.frame).abs()
        reach = apart.new_tensor(self.reach(layout))[apart.long()]
        kept = (self._run(layout, query) - self._run(layout, key)).abs() <= reach
        return kept | (key.frame == 0) if self.sink else kept

    def cells(self, layout: Layout, places: Places) -> tuple[Tensor, Tensor]:
        """Runs of a frame's tokens."""
        found = joined([places.frame, self._run(layout, places)])
        return found, found

    def groups(self, layout: Layout, places: Places) -> Sequence[Tensor]:
        """Runs of a frame's tokens, whole blocks of them where that is not too many."""
        inside = places.row * layout.width + places.column
        return [joined([places.frame, inside // size]) for size in {self.block, *GROUPS}]

    def _run(self, layout: Layout, places: Places) -> Tensor:
        inside = places.row * layout.width + places.column
        return inside if self.exact else inside // self.block
