"""Ulysses: a part of the tokens in each process, and all tokens of some heads for attention.

Source: DeepSpeed Ulysses, arXiv 2309.14509, section 3.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from parallel.sequence_parallel import SequenceParallel

if TYPE_CHECKING:
    from parallel.mesh import Name


class Ulysses(SequenceParallel):
    """Share the tokens of a transformer out; exact, for pictures and clips.

    For attention, each process gives away the other heads of its tokens for the other tokens of its
    heads, and back after it: two exchanges an attention. Any number of tokens, heads and processes
    will do; heads that are missing to a multiple of the processes are computed for nothing.
    """

    name: ClassVar[str] = "parallel.Ulysses"
    source: ClassVar[str] = "arXiv 2309.14509, section 3"

    degree: int = Field(
        default=0, ge=0, description="processes along this axis; 0 all that are left, 1 is off"
    )

    @classmethod
    def off(cls) -> Ulysses:
        """A degree of 1."""
        return cls(degree=1)

    def why_off(self) -> str | None:
        """A degree of 1."""
        return "degree is 1" if self.degree == 1 else None

    def degrees(self) -> dict[Name, int]:
        """One axis."""
        return {"ulysses": self.degree}
