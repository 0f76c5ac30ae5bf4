"""What methods along one axis have in common: how many processes they take."""

from __future__ import annotations

from typing import ClassVar, Self

from pydantic import Field

from accel.attach import Accelerator

ALONE = "there is one process: start more (`--devices`, or torchrun)"
"""Why a method did nothing."""


class OneAxis(Accelerator):
    """Shares work out along one axis of the mesh."""

    layer: ClassVar[str] = "parallel"

    degree: int = Field(
        default=0, ge=0, description="processes along this axis; 0 all that are left, 1 is off"
    )

    @classmethod
    def off(cls) -> Self:
        """A degree of 1."""
        return cls(degree=1)

    def why_off(self) -> str | None:
        """A degree of 1."""
        return "degree is 1" if self.degree == 1 else None
