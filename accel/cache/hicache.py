"""HiCache: forecast features by a series of Hermite polynomials, damped by their scale.

Source: "HiCache: Training-free Acceleration of Diffusion Models via Hermite Polynomial-based
Feature Caching", arXiv 2508.16984, section 3.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from accel.cache.forecasting import Forecasting
from accel.cache.predictors import Kind


class HiCache(Forecasting):
    """TaylorSeer with σ^j H_j(σk) in place of k^j: steadier over long gaps at higher orders.

    At order 1 the slope counts 2σ²-fold (a half at σ = 0.5). Differences are divided ones, as
    TaylorSeer's here. It never reads the device.
    """

    name: ClassVar[str] = "cache.HiCache"
    source: ClassVar[str] = "arXiv 2508.16984, section 3"

    interval: int = Field(
        default=6, ge=1, description="steps from compute to compute; 1 is off. The authors use 6"
    )
    warmup: int = Field(default=3, ge=1, description="steps at the start that are always computed")
    predictor: Kind = Field(
        default="hicache", description="what fills in; 'hicache' is the paper's series"
    )
    order: int = Field(
        default=2, ge=1, le=4, description="degree of 'hicache', 'newton' and 'taylor'"
    )
