"""Guidance: evaluate fewer branches. One method a file."""

from accel.guidance.adaptive import Adaptive as Adaptive
from accel.guidance.interval import Interval as Interval

__all__ = ["Adaptive", "Interval"]
