"""ToMe: merge the tokens that are most alike before a layer, and copy them back behind it.

One token of each cell of the grid is a destination, the others are sources; the sources that are
most like a destination are merged into it. ``cells(layout, generator).match(x, ratio)`` is a whole
ToMe; both objects can be kept for further layers and steps.

Source: Bolya and Hoffman, "Token Merging for Fast Stable Diffusion", arXiv 2303.17604, sections 3
and 4. The authors merge before self-attention only, at the highest resolution of the UNet.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from accel.tokens.fields import Merging
from accel.tokens.matching import cells

if TYPE_CHECKING:
    from torch import Tensor

    from accel.tokens.merging import Reducer, Wanted
    from accel.tokens.reduction import Reduction


class ToMe(Merging):
    """Merge the most similar tokens before self-attention, and copy its answer to all of them.

    The destinations are drawn, one in each cell, alike for all branches and samples. Matching
    costs (3/16)·N²·C multiply-adds a sample beside the 2·N²·C of the attention: ``steps`` and
    ``layers`` say for how many of them a pattern serves. The authors make it anew in every layer
    (half of the tokens: 1.87× for Stable Diffusion 1.5 at 512², without flash attention).
    """

    name: ClassVar[str] = "tokens.ToMe"
    source: ClassVar[str] = "arXiv 2303.17604, sections 3 and 4"

    cell: int = Field(
        default=2,
        ge=1,
        description="tokens of a side of a cell; up to 1 − 1/cell² of all can be merged; 1 is off",
    )
    seed: int = Field(default=0, ge=0, description="draws the destinations, in each run alike")

    def why_off(self) -> str | None:
        """A ratio of 0, or cells of one token, which is a destination."""
        return super().why_off() or ("cell is 1" if self.cell == 1 else None)

    def reducer(self) -> Reducer:
        """Cells, then a matching."""
        from accel.tokens.merging import Stateless

        def reduce(x: Tensor, wanted: Wanted) -> Reduction:
            drawn = wanted.generator(self.seed)
            size = (1, self.cell, self.cell)
            return cells(wanted.layout, drawn, size, x.device).match(x, self.ratio)

        return Stateless(reduce)
