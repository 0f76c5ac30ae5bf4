"""Edits that compute only the region that they change."""

from accel.region.sige import SIGE as SIGE

__all__ = ["SIGE"]
