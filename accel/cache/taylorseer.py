"""TaylorSeer: forecast features by a Taylor series of their finite differences.

Source: Liu et al., "From Reusing to Forecasting: Accelerating Diffusion Models with TaylorSeers",
arXiv 2503.06923, section 3.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from accel.cache.forecasting import Forecasting
from accel.cache.predictors import Kind


class TaylorSeer(Forecasting):
    """Compute every ``interval``-th step, forecast the others from the last ``order + 1``.

    The series is exact for features that are linear in the step; predictor ``newton`` is exact
    for polynomials up to its order. Differences are divided ones: where the gaps are even, those
    of the paper; over the uneven gaps behind the warm-up its recursion would raise them. It never
    reads the device.
    """

    name: ClassVar[str] = "cache.TaylorSeer"
    source: ClassVar[str] = "arXiv 2503.06923, section 3"

    interval: int = Field(
        default=5,
        ge=1,
        description="steps from compute to compute; 1 is off. The authors use 4 (DiT, order 4) "
        "and 6 (FLUX, order 1)",
    )
    warmup: int = Field(
        default=3,
        ge=1,
        description="steps at the start that are always computed. The authors use 2 and 3",
    )
    predictor: Kind = Field(
        default="taylor", description="what fills in; 'taylor' is the paper's series"
    )
