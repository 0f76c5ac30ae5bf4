"""Ring attention: a part of the tokens in each process, and keys and values that go round.

Source: Ring Attention, arXiv 2310.01889, section 3.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from parallel.degree import OneAxis
from parallel.sequence_parallel import SequenceParallel

if TYPE_CHECKING:
    from parallel.mesh import Name


class Ring(SequenceParallel, OneAxis):
    """Share the tokens of a transformer out; exact, for pictures and clips of any length.

    Each process attends to one part of the keys after the other while the next part is under way,
    and merges what they answer by their log Σ exp: o = Σ oⱼ·exp(lⱼ − L). It holds one part of keys
    and values at a time, and shares out no heads.
    """

    name: ClassVar[str] = "parallel.Ring"
    source: ClassVar[str] = "arXiv 2310.01889, section 3"

    def degrees(self) -> dict[Name, int]:
        """One axis."""
        return {"ring": self.degree}
