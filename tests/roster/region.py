"""Edits of a region: a run that is neither recorded nor edited is left alone; see `test_region`."""

from tiny import PIPELINES

from accel import region
from roster.row import Row
from roster.tokens import GRIDS, UNKNOWN

ALONE = frozenset(PIPELINES)
"""The laws make runs, not edits of recorded ones."""

ROWS = {
    "region.SIGE": Row(
        engine="region",
        active=region.SIGE(),
        variants=(region.SIGE(statistics="original", block=2, keep="bfloat16"),),
        refused=UNKNOWN | GRIDS,
        idle=ALONE,
    ),
}
