"""Caches of ranges of blocks."""

from accel import cache
from roster.row import Row

ROWS = {
    "cache.FirstBlock": Row(
        engine="blocks",
        active=cache.FirstBlock(threshold=1e6, warmup=1),
        variants=(
            cache.FirstBlock(threshold=1e6, warmup=2, predictor="newton"),
            cache.FirstBlock(threshold=1e6, max_skips=1, predictor="newton", order=2, last=False),
        ),
        unserved=frozenset({"unet"}),
        dial=lambda threshold: cache.FirstBlock(threshold=threshold, warmup=1),
    ),
}
