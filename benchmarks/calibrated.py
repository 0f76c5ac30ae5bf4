"""Methods that rest on measured numbers: the plans that `accel calibrate` writes, point by point.

They are measured on captions of training seeds, once for the same weights and number of steps: the
plans stay in ``plans/MODEL/WEIGHTS/STEPS``, so that a run that goes on measures what the run before
did. `Bench.forget` deletes them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measure import digest
from sampling import Calibration, calibrate, forget, plans_of, read

import accel

STEPS = "{steps}"
"""In what a calibration is told, where the number of steps of a picture belongs."""


@dataclass(frozen=True)
class Curve:
    """A method that is calibrated.

    Attributes:
        what: The name that `accel calibrate` is given.
        option: The option that is swept, where each value is measured by itself; or ``None``:
            numbers are measured once, and the field ``knob`` of the method is swept.
        knob: That field.
        values: Of the sweep.
        count: Captions of the calibration.
        more: What else `accel calibrate` is told.
    """

    what: str
    values: tuple[float, ...]
    option: str | None = None
    knob: str | None = None
    count: int = 2
    more: str = ""


CURVES = {
    "TeaCache, calibrated": Curve("teacache", (0.05, 0.1, 0.2, 0.4, 0.8), knob="threshold"),
    "MagCache, calibrated": Curve("magcache", (0.06, 0.12, 0.24, 0.5), knob="threshold"),
    "Table": Curve("table", (0.05, 0.1, 0.2, 0.4), option="--threshold {:g}"),
    "StepRehash": Curve("steps", (0.5, 0.4, 0.3, 0.22), option="--set budget={:g}"),
}
"""Caches, by curve."""

SOLVERS = {
    "OLSS of stock's run": Curve(
        "olss",
        (12, 10, 9, 8, 7, 6, 5, 4, 3),
        option="--set evaluations={:g}",
        count=8,
        more=f"--set teacher_steps={STEPS} --set teacher_order=1",
    ),
}
"""Samplers that answer a call of as many steps as stock makes: the knob is what they evaluate."""


@dataclass(frozen=True)
class Bench:
    """What plans are calibrated for.

    Attributes:
        model: A bundled model.
        weights: The digest of its weights.
        steps: Of the pictures that are drawn.
    """

    model: str
    weights: str
    steps: int

    @classmethod
    def of(cls, model: str, pipe: Any, call: dict[str, Any]) -> Bench:
        """That of a model's pipeline, and of a call's arguments."""
        return cls(model, digest(pipe), call["num_inference_steps"])

    @property
    def folder(self) -> Path:
        """Where its plans lie."""
        return plans_of(self.model, self.weights, self.steps)

    def calibrate(self, one: Calibration) -> None:
        """Write the plans of a calibration that are not there yet.

        Raises:
            RuntimeError: If the model cannot be calibrated so; it says why.
        """
        calibrate(one, self.model, self.folder, self.steps)

    def forget(self) -> None:
        """Delete the plans of all curves, so that they are measured anew."""
        curves = (CURVES | SOLVERS).items()
        points = [point(name, one, self.steps) for name, curve in curves for one in curve.values]
        forget(self.folder, points)


def point(name: str, value: float, steps: int) -> Calibration:
    """How a point of a curve is measured: by itself, or as all points of the curve are."""
    curve = (CURVES | SOLVERS)[name]
    given = [] if curve.option is None else curve.option.format(value).split()
    given += curve.more.replace(STEPS, str(steps)).split()
    stem = curve.what if curve.option is None else f"{curve.what}-{value:g}"
    return Calibration(stem, (curve.what, *given, "--count", str(curve.count)))


def plan_of(name: str, value: float, bench: Bench) -> accel.Plan:
    """The plan of a point, calibrated where it is not yet.

    Args:
        name: Of the curve.
        value: Of what is swept.
        bench: What it is calibrated for.

    Raises:
        RuntimeError: If the model cannot be calibrated for this method; it says why.
    """
    curve, one = (CURVES | SOLVERS)[name], point(name, value, bench.steps)
    bench.calibrate(one)
    ((_, file),) = one.files()
    plan = read(bench.folder / file)
    if curve.knob is None:
        return plan
    return accel.Plan(*(method.model_copy(update={curve.knob: value}) for method in plan))
