"""Ulysses: a part of the tokens in each process, and all tokens of some heads for attention.

Source: DeepSpeed Ulysses, arXiv 2309.14509, section 3.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from parallel.degree import OneAxis
from parallel.sequence_parallel import SequenceParallel

if TYPE_CHECKING:
    from parallel.mesh import Name


class Ulysses(SequenceParallel, OneAxis):
    """Share the tokens of a transformer out; exact, for pictures and clips.

    For attention, each process gives away the other heads of its tokens for the other tokens of its
    heads, and back after it: two exchanges an attention. Any number of tokens, heads and processes
    will do: of heads that the processes do not divide, all get the keys and values, and each
    answers its own queries.
    """

    name: ClassVar[str] = "parallel.Ulysses"
    source: ClassVar[str] = "arXiv 2309.14509, section 3"

    def degrees(self) -> dict[Name, int]:
        """One axis."""
        return {"ulysses": self.degree}
