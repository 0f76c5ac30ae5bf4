"""Caches that rest on measured numbers: the plans that `accel calibrate` writes, point by point.

They are measured on captions of training seeds, once: the plans stay in ``plans/MODEL``, so that a
run that goes on measures what the run before did.
"""

from __future__ import annotations

from dataclasses import dataclass

from sampling import Calibration, calibrate, plans_of, read

import accel

COUNT = "2"
"""Captions of a calibration."""


@dataclass(frozen=True)
class Curve:
    """A method that is calibrated.

    Attributes:
        what: The name that `accel calibrate` is given.
        option: The option that is swept, where each value is measured by itself; or ``None``:
            numbers are measured once, and the field ``knob`` of the method is swept.
        knob: That field.
        values: Of the sweep.
    """

    what: str
    values: tuple[float, ...]
    option: str | None = None
    knob: str | None = None


CURVES = {
    "TeaCache, calibrated": Curve("teacache", (0.05, 0.1, 0.2, 0.4, 0.8), knob="threshold"),
    "MagCache, calibrated": Curve("magcache", (0.06, 0.12, 0.24, 0.5), knob="threshold"),
    "Table": Curve("table", (0.05, 0.1, 0.2, 0.4), option="--threshold {:g}"),
    "StepRehash": Curve("steps", (0.5, 0.4, 0.3, 0.22), option="--set budget={:g}"),
}
"""By curve."""


def plan_of(name: str, value: float, model: str) -> accel.Plan:
    """The plan of a point, calibrated where it is not yet.

    Args:
        name: Of the curve.
        value: Of what is swept.
        model: A bundled model.

    Raises:
        RuntimeError: If the model cannot be calibrated for this method; it says why.
    """
    curve, folder = CURVES[name], plans_of(model)
    given = [] if curve.option is None else curve.option.format(value).split()
    stem = curve.what if curve.option is None else f"{curve.what}-{value:g}"
    one = Calibration(stem, (curve.what, *given, "--count", COUNT))
    calibrate(one, model, folder)
    plan = read(folder / f"{stem}.toml")
    if curve.knob is None:
        return plan
    return accel.Plan(*(method.model_copy(update={curve.knob: value}) for method in plan))
