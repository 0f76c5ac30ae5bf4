"""The file of a calibrated guard: a scale, and what it was measured on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from accel.errors import BadInput, UnsupportedModel
from accel.guard.model import UNCALIBRATED

if TYPE_CHECKING:
    from accel.guard.model import Guard


class Basis(BaseModel):
    """What `accel calibrate guard` writes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = Field(default=1, ge=1, le=1, description="of this file")
    scale: float = Field(gt=0.0, description="real error for each unit of estimated error")
    coverage: float = Field(gt=0.0, lt=1.0, description="share of pictures that it holds for")
    captions: int = Field(ge=1, description="pictures that it was measured on")
    steps: int = Field(ge=1, description="evaluations of their runs")
    budgets: tuple[float, ...] = Field(
        min_length=1, description="estimates, before the scale, that those runs were allowed"
    )
    model: str = Field(description="digest of the network, and a sample of its weights")
    plan: dict[str, Any] = Field(description="the methods that it was measured with, by name")
    ratios: tuple[float, ...] = Field(
        description="for each picture the largest real error over its estimate, rising"
    )

    @property
    def range(self) -> tuple[float, float]:
        """The promises that it was measured for."""
        return self.scale * min(self.budgets), self.scale * max(self.budgets)


def read(path: Path) -> Basis:
    """The content of a file.

    Raises:
        BadInput: If it cannot be read, or is none of a guard's.
    """
    again = "`accel calibrate guard` writes one"
    try:
        return Basis.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"guard.file {path} cannot be read ({error.strerror}): {again}.") from error
    except (ValidationError, UnicodeDecodeError) as error:
        raise BadInput(f"guard.file {path} is no file of a guard: {again}.") from error


def basis(guard: Guard, pipe: Any, plan: Mapping[str, Any]) -> tuple[float, str]:
    """The scale of a guard, and what it rests on in words.

    Args:
        guard: The guard.
        pipe: The pipeline that it is to watch.
        plan: The methods beside it, by name.

    Raises:
        BadInput: If its file cannot be read.
        UnsupportedModel: If it was calibrated for another network.
    """
    if guard.file is None:
        if guard.scale is not None:
            return guard.scale, f"scale {guard.scale:g} as given"
        return UNCALIBRATED, "uncalibrated: a guess, see `accel calibrate guard`"
    from accel.seams.identity import compared, identity

    found = read(guard.file)
    differs = compared(found.model, identity(pipe), "The guard")
    if differs is not None:
        raise UnsupportedModel(
            f"guard.file {guard.file} is for {differs}. Calibrate the guard for this one (`accel "
            "calibrate guard`), or leave the file out."
        )
    note = f"calibrated on {found.captions} pictures"
    if found.plan != json.loads(json.dumps(plan)):
        note += " with another plan"
    low, high = found.range
    if not low <= guard.max_error <= high:
        note += f", for promises of {low:.2g} to {high:.2g}"
    return found.scale, note
