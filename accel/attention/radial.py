"""Radial attention: the farther two frames are apart, the narrower the band between them.

Source: Li et al., arXiv 2506.19852, section 4. What the authors measure says
`accel.attention.patterns.radial`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from accel.attention.patterns import radial
from accel.attention.sparse import Patterned

if TYPE_CHECKING:
    from accel.attention.patterns.pattern import Pattern
    from accel.seams.layout import Layout


class Radial(Patterned):
    """In clips, halve the band between frames with each doubling of their distance.

    What is kept grows as n·log n with the number of frames. Frames beside each other are kept
    whole, so that a picture stays dense.
    """

    name: ClassVar[str] = "attention.Radial"
    source: ClassVar[str] = "arXiv 2506.19852, section 4"

    decay: float = Field(
        default=1.0, ge=1e-3, le=64.0, description="factor of all bands' width; 1 in the paper"
    )
    block: int = Field(
        default=128,
        ge=1,
        description="tokens below which a band does not narrow, but frames are left out; the "
        "block of the authors' kernel",
    )
    exact: bool = Field(
        default=False,
        description="end bands at any token. Otherwise whole blocks are kept, which costs a kernel "
        "the same and needs no masks",
    )
    sink: bool = Field(
        default=False, description="attend to the first frame from everywhere too, as with Wan"
    )

    def pattern(self, layout: Layout) -> Pattern:  # noqa: ARG002
        """The same on every layout."""
        return radial.Radial(self.decay, self.block, self.exact, self.sink)
