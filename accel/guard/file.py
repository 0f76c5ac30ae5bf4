"""The file of a calibrated guard: a scale, and what it was measured on."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from itertools import pairwise
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
    coverage: float = Field(gt=0.0, lt=1.0, description="share of pictures that it holds for")
    captions: int = Field(ge=1, description="pictures that it was measured on")
    steps: int = Field(ge=1, description="evaluations of their runs")
    budgets: tuple[float, ...] = Field(
        min_length=1, description="estimated errors that those runs were allowed, rising"
    )
    bounds: tuple[float, ...] = Field(
        description="for each the real error that so many pictures stay within, rising"
    )
    model: str = Field(description="digest of the network, and a sample of its weights")
    plan: dict[str, Any] = Field(description="the methods that it was measured with, by name")
    errors: tuple[tuple[float, ...], ...] = Field(
        description="for each budget the real errors, picture by picture"
    )

    def spending(self, promise: float) -> float:
        """The estimated error that may be spent on a promise; 0 where none keeps it.

        Between two bounds that were measured it is on the line through them, in logarithms. Above
        the largest it is the largest that was tried; below the smallest nothing is known.
        """
        pairs = list(zip(self.bounds, self.budgets, strict=True))
        if promise < pairs[0][0]:
            return 0.0
        for (low, less), (high, more) in pairwise(pairs):
            if low <= promise < high:
                share = math.log(promise / low) / math.log(high / low) if low else 0.0
                return less * math.exp(share * math.log(more / less))
        return self.budgets[-1]


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
    """The scale of a guard, and what it rests on in words; infinite: nothing may be spent.

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
    spending = found.spending(guard.max_error)
    if not spending:
        return math.inf, (
            f"{note}: no approximation keeps a promise below {found.bounds[0]:.2g} for "
            f"{found.coverage:.0%} of them, so everything computes"
        )
    return guard.max_error / spending, note
