"""What methods share that switch guidance, or how it is answered, while a run is under way."""

from __future__ import annotations

from pydantic import Field

from accel.attach import Accelerator

HISTORY = (
    "the output jumps there, and a multistep solver's history is of outputs before. The history is "
    "the batch's: with samples that switch apart, one resets all, and warns"
)
"""Why a solver's history is reset, and whose it is."""


class Switching(Accelerator):
    """A method after whose switch the guided output jumps, while the solver remembers it."""

    reset_history: bool = Field(
        default=False,
        description=f"take a step of first order where guidance begins or ends: {HISTORY}",
    )
