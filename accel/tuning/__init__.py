"""Tuning: ask for quality, not for thresholds.

A target (`targets`), a space of plans (`space`), a cost that no neighbour disturbs (`work`), what
draws and keeps figures (`bench`), the search (`search`), the proof on prompts that it never saw
(`proof`), and the function that does it all (`tune`).
"""

from accel.tuning.tune import tune as tune

__all__ = ["tune"]
