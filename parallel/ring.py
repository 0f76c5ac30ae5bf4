"""Ring attention: a part of the tokens in each process, and keys and values that go round.

Source: Ring Attention, arXiv 2310.01889, section 3.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from parallel.sequence_parallel import SequenceParallel

if TYPE_CHECKING:
    from parallel.mesh import Name


class Ring(SequenceParallel):
    """Share the tokens of a transformer out; exact, for pictures and clips of any length.

    Each process attends to one part of the keys after the other while the next part is under way,
    and merges what they answer by their log Σ exp: o = Σ oⱼ·exp(lⱼ − L). It holds one part of keys
    and values at a time, and shares out no heads.
    """

    name: ClassVar[str] = "parallel.Ring"
    source: ClassVar[str] = "arXiv 2310.01889, section 3"

    degree: int = Field(
        default=0, ge=0, description="processes along this axis; 0 all that are left, 1 is off"
    )

    @classmethod
    def off(cls) -> Ring:
        """A degree of 1."""
        return cls(degree=1)

    def why_off(self) -> str | None:
        """A degree of 1."""
        return "degree is 1" if self.degree == 1 else None

    def degrees(self) -> dict[Name, int]:
        """One axis."""
        return {"ring": self.degree}
