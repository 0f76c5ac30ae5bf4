"""FoCa: forecast features along their change, then calibrate by what was forecast before.

Source: "FoCa: Forecast then Calibrate", arXiv 2508.16211, as cache-dit has it.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from accel.cache.forecasting import Forecasting
from accel.cache.predictors import Kind


class FoCa(Forecasting):
    """Go on from the last computed value by the mean of two changes, over the steps ahead.

    The two are that of the last two computed values and that of the last two values of any kind.
    They are not divided by the gap, so the forecast overshoots a line; beyond three steps the
    horizon is damped. Four values are kept whatever the order. It never reads the device.
    """

    name: ClassVar[str] = "cache.FoCa"
    source: ClassVar[str] = "arXiv 2508.16211; cache-dit"

    interval: int = Field(default=4, ge=1, description="steps from compute to compute; 1 is off")
    warmup: int = Field(default=3, ge=1, description="steps at the start that are always computed")
    predictor: Kind = Field(default="foca", description="what fills in; 'foca' is the method's own")
