"""GRAT: groups of neighbouring tokens share their keys, those around them or in line with them.

Source: arXiv 2505.14708 (Grouping First, Attending Smartly), sections 3.2 and 3.3. What the authors
measure says `accel.attention.patterns.grat`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from accel.attention.patterns.grat import CrissCross, Surrounding
from accel.attention.sparse import Patterned

if TYPE_CHECKING:
    from accel.attention.patterns.pattern import Pattern
    from accel.seams.layout import Layout

Side = Annotated[int, Field(ge=0)]


class GRAT(Patterned):
    """Attend to the boxes of tokens around one's own, or to those in line with it.

    'surrounding' (GRAT-B) is the cheaper one and local: a picture's global arrangement is kept
    together by text alone. 'criss-cross' (GRAT-X) reaches everything in two layers.
    """

    name: ClassVar[str] = "attention.GRAT"
    source: ClassVar[str] = "arXiv 2505.14708, sections 3.2 and 3.3"

    form: Literal["surrounding", "criss-cross"] = Field(
        default="criss-cross", description="which boxes a box attends to"
    )
    box: tuple[Side, Side, Side] = Field(
        default=(0, 0, 0),
        description="frames, rows and columns of a box, in tokens; 0: the authors' side, which is "
        "1 × 16 × 16 in pictures and 4 × 8 × 8 in clips",
    )
    reach: int = Field(
        default=1, ge=0, description="boxes on either side that 'surrounding' attends to"
    )

    def pattern(self, layout: Layout) -> Pattern:
        """Boxes of these sides."""
        usual = Surrounding().sides(layout)
        frames, rows, columns = (own or side for own, side in zip(self.box, usual, strict=True))
        if self.form == "criss-cross":
            return CrissCross((frames, rows, columns))
        return Surrounding((frames, rows, columns), self.reach)
