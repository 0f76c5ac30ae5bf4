"""Neighbourhood attention, generalized: a window of keys for each query, which moves in strides.

Source: Hassani et al., arXiv 2504.16922 (GNA), section 3; 2204.07143 (NA) is stride 1, and sliding
tiles are arXiv 2502.04507 (STA), section 3. What the authors measure says
`accel.attention.patterns.neighbourhood`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from accel.attention.patterns import neighbourhood
from accel.attention.sparse import Patterned

if TYPE_CHECKING:
    from accel.attention.patterns.pattern import Pattern
    from accel.seams.layout import Layout

Window = Annotated[int, Field(ge=0)]
Tokens = Annotated[int, Field(ge=1)]


class Neighbourhood(Patterned):
    """Attend to a window around the query, of the same size for all, at the borders too.

    Only strides of some tokens save time: queries of one stride share their keys. The window's
    keys are counted in tokens, and where an axis is shorter (the deep levels of a UNet) it is the
    whole axis.
    """

    name: ClassVar[str] = "attention.Neighbourhood"
    source: ClassVar[str] = "arXiv 2504.16922, section 3; sliding tile: 2502.04507, section 3"

    form: Literal["window", "sliding tile"] = Field(
        default="window",
        description="'sliding tile' (STA): the window counts tiles of a stride, an odd number",
    )
    window: tuple[Window, Window, Window] = Field(
        default=(0, 24, 24),
        description="keys along frames, rows and columns; 0: the whole axis",
    )
    stride: tuple[Tokens, Tokens, Tokens] = Field(
        default=(1, 8, 8),
        description="neighbouring queries that share a window, along each axis; at most the "
        "window. STA's tiles are 6 × 8 × 8",
    )
    dilation: tuple[Tokens, Tokens, Tokens] = Field(
        default=(1, 1, 1), description="every how many tokens a window takes one, along each axis"
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        for axis, stride in zip(self.window, self.stride, strict=True):
            if self.form == "window" and 0 < axis < stride:
                raise ValueError(f"a stride of {stride} is more than its window of {axis}")
            if self.form == "sliding tile" and axis and axis % 2 == 0:
                raise ValueError(f"a window of {axis} tiles has no middle: give an odd number")
        if self.form == "sliding tile" and max(self.dilation) > 1:
            raise ValueError("sliding tiles have no dilation")
        return self

    def pattern(self, layout: Layout) -> Pattern:
        """The window, as far as the axes go.

        Raises:
            BadInput: If dilation is more than an axis has.
        """
        keys = self.window
        if self.form == "sliding tile":
            frames, rows, columns = (w * s for w, s in zip(keys, self.stride, strict=True))
            keys = (frames, rows, columns)
        first, second, third = (
            window if 0 < window * every <= length else None
            for window, every, length in zip(keys, self.dilation, layout.grid, strict=True)
        )
        return neighbourhood.Neighbourhood((first, second, third), self.stride, self.dilation)
