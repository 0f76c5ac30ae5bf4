"""Caches of the whole network."""

from accel import cache
from roster.row import Row

ROWS = {
    "cache.EasyCache": Row(
        engine="network",
        active=cache.EasyCache(threshold=1e6, warmup=2),
        variants=(
            cache.EasyCache(threshold=1e6, warmup=2, predictor="reuse"),
            cache.EasyCache(threshold=1e6, warmup=2, order=2, max_skips=1, last=False),
        ),
        dial=lambda threshold: cache.EasyCache(threshold=threshold, warmup=2),
    ),
}
