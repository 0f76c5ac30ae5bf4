"""USP: Ulysses within parts of a ring.

Source: Unified Sequence Parallelism, arXiv 2405.07719, section 3.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Self

from pydantic import Field, model_validator

from parallel.sequence_parallel import SequenceParallel

if TYPE_CHECKING:
    from parallel.mesh import Name


class USP(SequenceParallel):
    """Share the tokens of a transformer out by Ulysses and Ring at once; exact.

    Processes along ``ulysses`` exchange heads, which wants the fastest link; keys and values of
    such a group go round along ``ring``.
    """

    name: ClassVar[str] = "parallel.USP"
    source: ClassVar[str] = "arXiv 2405.07719, section 3"

    ulysses: int = Field(
        default=2, ge=0, description="processes that exchange heads; 0 all that are left"
    )
    ring: int = Field(
        default=0, ge=0, description="parts that keys and values go round; 0 all that are left"
    )

    @model_validator(mode="after")
    def _one_is_open(self) -> Self:
        if not self.ulysses and not self.ring:
            raise ValueError("ulysses and ring are both 0: only one can take what is left")
        return self

    @classmethod
    def off(cls) -> Self:
        """One process along both."""
        return cls(ulysses=1, ring=1)

    def why_off(self) -> str | None:
        """One process along both."""
        return "ulysses and ring are 1" if self.ulysses == self.ring == 1 else None

    def degrees(self) -> dict[Name, int]:
        """Both axes."""
        return {"ring": self.ring, "ulysses": self.ulysses}
