"""Attention: how it is computed, and between which tokens. One method a file."""

from accel.attention.backend import Backend as Backend

__all__ = ["Backend"]
