"""Guidance: evaluate fewer branches. One method a file."""

from accel.guidance.adaptive import Adaptive as Adaptive
from accel.guidance.cfg_cache import CFGCache as CFGCache
from accel.guidance.interval import Interval as Interval
from accel.guidance.linear_ag import LinearAG as LinearAG
from accel.guidance.residual import Residual as Residual
from accel.guidance.skip_at_one import SkipAtOne as SkipAtOne

__all__ = ["Adaptive", "CFGCache", "Interval", "LinearAG", "Residual", "SkipAtOne"]
