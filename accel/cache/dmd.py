"""DMD: forecast features by the linear dynamics that the kept ones obey.

Source: dynamic mode decomposition (Schmid 2010; Prony's method), as a predictor in cache-dit.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from accel.cache.forecasting import Forecasting, Where
from accel.cache.predictors import Kind


class DMD(Forecasting):
    """Find A with x_{i+1} ≈ A x_i in the span of up to six kept values, and answer A^{h/g} x_n.

    It needs four values at even gaps, so one step of warm-up serves it best; until then it draws
    a line. Six values are kept whatever the order. It reads the device once a forecast, which at
    every module costs more than it saves on small networks: it works around the network instead.
    """

    name: ClassVar[str] = "cache.DMD"
    source: ClassVar[str] = "https://doi.org/10.1017/S0022112010001217 (Schmid 2010); cache-dit"

    interval: int = Field(default=3, ge=1, description="steps from compute to compute; 1 is off")
    site: Where = Field(
        default="network",
        description="what is forecast: the outputs of attention and feed-forward 'modules', what "
        "all 'blocks' together add, or what the 'network' answers (one forecast a step)",
    )
    predictor: Kind = Field(default="dmd", description="what fills in; 'dmd' is the method's own")
