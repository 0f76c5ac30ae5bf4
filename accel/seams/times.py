"""What a network is told of the time: the scheduler's timestep, or what a pipeline makes of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from accel.errors import UnsupportedModel
from accel.seams.denoisers import Call

ARGUMENT = "timestep"

CLOSE = 4e-3
"""Of the whole time: what half precision makes of a share."""

Form = Callable[[Any, float], Any]
"""From a timestep and the whole time to what the network is told."""

FORMS: tuple[Form, ...] = (
    lambda timestep, _whole: timestep,
    lambda timestep, whole: timestep / whole,
    lambda timestep, whole: 1.0 - timestep / whole,
)
"""The timestep itself, its share of the whole time (Flux), the share that is over (Lumina)."""


class Clock:
    """Tells a network another time than its pipeline does, in the pipeline's own form.

    Args:
        whole: The scheduler's ``num_train_timesteps``.
    """

    def __init__(self, whole: int) -> None:
        self._whole = float(whole)
        self._form: Form | None = None

    def told(self, call: Call, timestep: Tensor) -> dict[str, Any]:
        """The argument of a call that says the time, for another time.

        Which form the pipeline has is read off the first call: one device read.

        Args:
            call: The pipeline's own, of the time of its step.
            timestep: The other time, a scalar of a scheduler's timesteps.

        Raises:
            UnsupportedModel: For a network that is told of the time otherwise.
        """
        value = call.arguments.get(ARGUMENT)
        form = self._form = self._form or self._found(call, value)
        told = form(timestep, self._whole)
        return {ARGUMENT: told if not isinstance(value, Tensor) else _like(value, told)}

    def _found(self, call: Call, value: Any) -> Form:
        if value is not None:
            said = float(value.flatten()[0]) if isinstance(value, Tensor) else float(value)
            for form in FORMS:
                expected = form(call.step.timestep, self._whole)
                scale = self._whole if form is FORMS[0] else 1.0
                if abs(said - expected) <= CLOSE * scale:
                    return form
        raise UnsupportedModel(
            f"{type(call.denoiser.core).__name__} is told of the time otherwise than by the "
            "timestep or its share of the whole, so it cannot be asked about another time than "
            "that of its pipeline. Leave the method out of the plan."
        )


def _like(value: Tensor, told: Tensor) -> Tensor:
    return torch.zeros_like(value) + told.to(value)
