"""What measured numbers hold for: one network, one noise process, one guidance.

A method whose numbers were fitted to a pipeline keeps a `Fingerprint` of it with them, and has it
checked where it is used, so that the numbers of one model never steer another one: one of another
class or config, or of other weights (`accel.seams.identity`). A fingerprint that was written before
it knew weights is compared without them, and a warning says so.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

from pydantic import BaseModel, ConfigDict, Field

from accel.errors import BadInput

if TYPE_CHECKING:
    from samplers.base import SolverScheduler

FLOW = ("num_train_timesteps", "invert_sigmas")
VP = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
    "snr_shift_scale",
    "timestep_type",
)
"""Settings that say what the process is; those that say where a run samples it are left out."""

WORDS = {"process": "noise process"}


class Fingerprint(BaseModel):
    """What some numbers were measured on; its numbers are finite.

    Attributes:
        model: Identity of the pipeline's denoisers: a digest of their classes and configs, and a
            sample of their weights.
        process: Digest of the training noise levels.
        prediction: What the network predicts, by the name that diffusers uses.
        guidance: Numbers of the call that set its guidance, by name; empty where it has none.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    model: str = Field(
        description="digest of classes and configs of the denoisers, and a sample of their weights"
    )
    process: str = Field(description="digest of the training noise levels")
    prediction: str = Field(description="what the network predicts")
    guidance: tuple[tuple[str, float], ...] = Field(
        default=(), description="name and value of the call's numbers that set its guidance"
    )

    @classmethod
    def of(cls, pipe: Any, scheduler: SolverScheduler, guidance: Mapping[str, float]) -> Self:
        """The fingerprint of a pipeline, one of our schedulers for it, and a call's guidance."""
        return cls(
            model=model_digest(pipe),
            process=process_digest(scheduler),
            prediction=scheduler.config.prediction_type,
            guidance=tuple(sorted(guidance.items())),
        )

    def check(self, owner: str, **found: Any) -> None:
        """Compare the fields that are given; leave out what is not known.

        Args:
            owner: Whose numbers these are, for the message.
            **found: Fields of the run at hand.

        Raises:
            BadInput: Naming the first field that is another one.
        """
        from accel.seams.identity import compared

        for name, value in found.items():
            if name == "model":
                differs = compared(self.model, value, owner)
            else:
                differs = self._difference(name, value)
            if differs is not None:
                raise BadInput(
                    f"The numbers of {owner} were measured for {differs}. Calibrate it for this "
                    "one (`accel calibrate`), or leave it out of the plan."
                )

    def _difference(self, name: str, value: Any) -> str | None:
        expected = getattr(self, name)
        if value == expected:
            return None
        return f"another {WORDS.get(name, name)}: {_shown(expected)}, not {_shown(value)}"


def model_digest(pipe: Any) -> str:
    """Identity of a pipeline's denoisers: classes, configs and a sample of the weights."""
    from accel.seams.identity import identity

    return identity(pipe)


def process_digest(scheduler: SolverScheduler) -> str:
    """Digest of the training noise levels of one of our schedulers."""
    config = scheduler.config
    names = FLOW if config.prediction_type == "flow_prediction" else VP
    return _digest({name: config[name] for name in names})


def _digest(content: Any) -> str:
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(f"{name}={number:g}" for name, number in value) or "no guidance"
    return str(value)
