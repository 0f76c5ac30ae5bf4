"""Guarded runs: a budget of error over everything that a plan does not compute."""

from accel.guard.model import Guard as Guard

__all__ = ["Guard"]
