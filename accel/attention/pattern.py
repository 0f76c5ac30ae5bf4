"""Sparse attention by any pattern of the library, and what is composed of them.

The patterns, with their papers: `accel.attention.patterns`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, field_validator

from accel.attention import patterns
from accel.attention.patterns.expression import normal, parsed
from accel.attention.sparse import Patterned

if TYPE_CHECKING:
    from accel.seams.layout import Layout


class Pattern(Patterned):
    """Attend by a pattern of your own: & keeps what both sides keep, | what either does."""

    name: ClassVar[str] = "attention.Pattern"
    source: ClassVar[str] = "arXiv 2505.14708, 2504.16922, 2506.19852 and 2502.01776, composed"

    expression: str = Field(
        default="Surrounding() | CrissCross()",
        description="patterns joined by & and |: Surrounding(group, reach), CrissCross(group), "
        "Neighbourhood(window, stride, dilation, causal), sliding_tile(tile, tiles), Radial(decay, "
        "block, exact, sink), Spatial and Temporal(keep, block, exact, sink), Full()",
    )

    @field_validator("expression")
    @classmethod
    def _readable(cls, text: str) -> str:
        return normal(text)

    def pattern(self, layout: Layout) -> patterns.Pattern:  # noqa: ARG002
        """The same on every layout."""
        return parsed(self.expression)
