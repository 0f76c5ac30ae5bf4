"""What ``accel calibrate`` offers: one line a calibrator, from wherever it lives.

A calibrator is a function ``(pipe, calls, options) -> Calibrated`` (`accel.calibration`): it runs
the pipeline on the calls, which are made as they are asked for, and gives a method with the
numbers that it measured. ``options`` holds what was typed: ``--threshold X`` is ``threshold``,
``--method X`` is ``method``, and ``--set NAME=VALUE`` any other; ``--steps``, ``--count``,
``--prompts`` and ``--seed`` make the calls. An option that is not known, or out of its range, must
be refused, by ``BadInput`` or by pydantic – before the work where ``options`` below names a
pydantic model that checks them (the calibrator is then given all its fields).

A calibrator that measures more than a plan should carry gives ``files`` too. They are written
beside the plan, under its name with the suffix that is stated here; the method's field of that name
(of type `pathlib.Path`) is set to that name, and a plan that is read from a file takes such a path
relative to its own folder.

To add one, write the function beside its method and a line here: `accel calibrate NAME` then offers
it. Nothing is imported until it is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from pydantic import BaseModel

    from accel.calibration import Calibrator


@dataclass(frozen=True)
class Entry:
    """One calibrator.

    Attributes:
        home: Where the function is, ``module:function``.
        options: Where the pydantic model of its options is; ``None``: fields of the method.
        files: Suffix of each file that it gives, by the field of the method that holds its path.
        least: Prompts that it needs.
    """

    home: str
    options: str | None = None
    files: Mapping[str, str] = field(default_factory=dict)
    least: int = 1

    def load(self) -> Calibrator:
        """The function."""
        return cast("Calibrator", _load(self.home))

    def checked(self, options: Mapping[str, Any]) -> Mapping[str, Any]:
        """The options, by their model where there is one.

        Raises:
            pydantic.ValidationError: If one is not known, or out of its range.
        """
        if self.options is None:
            return options
        model = cast("type[BaseModel]", _load(self.options))
        return model.model_validate(dict(options)).model_dump()


def _load(home: str) -> Any:
    module, name = home.split(":")
    return getattr(import_module(module), name)


CALIBRATORS: dict[str, Entry] = {
    "teacache": Entry("accel.cache.calibration:calibrate_teacache"),
    "magcache": Entry("accel.cache.calibration:calibrate_magcache"),
    "table": Entry("accel.cache.calibration:calibrate_table"),
    "steps": Entry(
        "accel.cache.calibration:calibrate_steps", "accel.cache.calibration:StepOptions"
    ),
    "olss": Entry(
        "samplers.olss_calibration:calibrate_olss", options="samplers.olss_calibration:Options"
    ),
    "linear-ag": Entry(
        "accel.guidance.calibration:calibrate_linear_ag", "accel.guidance.calibration:Options"
    ),
    "schedule": Entry(
        "samplers.schedule_calibration:calibrate_schedule",
        "samplers.schedule_calibration:Options",
        {"file": "-levels.json"},
    ),
    "ems": Entry(
        "samplers.ems_calibration:calibrate_ems",
        "samplers.ems_calibration:Options",
        {"statistics": ".safetensors"},
    ),
    "int8": Entry(
        "accel.weights.calibration:calibrate_int8",
        "accel.weights.calibration:Options",
        {"scales": ".safetensors"},
    ),
    "guard": Entry(
        "accel.promises:calibrate_guard",
        "accel.promises:Options",
        {"file": "-guard.json"},
        least=19,
    ),
}
"""By the name that `accel calibrate` is given."""
