"""Tuning: ask for quality, not for thresholds.

A target (`targets`), a space of plans (`space`), a cost that no neighbour disturbs (`work`), what
draws and keeps figures (`bench`), the pipeline here (`subject`) and the prompts (`cases`), the
search (`search`), the proof on prompts that it never saw (`proof`), the function that does it all
(`tune`), and the one that proves a plan that is there (`prove`).
"""

from accel.tuning.prove import prove as prove
from accel.tuning.tune import tune as tune

__all__ = ["prove", "tune"]
