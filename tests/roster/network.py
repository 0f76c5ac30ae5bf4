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
    "cache.StepRehash": Row(
        engine="network",
        active=cache.StepRehash(steps=(0, 1, 3)),
        variants=(
            cache.StepRehash(steps=(0, 2, 5), predictor="reuse"),
            cache.StepRehash(steps=(0, 1), warmup=2, max_skips=1, order=2),
        ),
    ),
    "cache.Custom": Row(
        engine="network",
        active=cache.Custom(interval=3, warmup=2, predictor="newton"),
        variants=(
            cache.Custom(rule="within", interval=2, low=-1e9, high=1e9, last=False),
            cache.Custom(rule="below", indicator="input", threshold=1e6, warmup=2),
            cache.Custom(rule="accumulated", indicator="input", threshold=1e6, warmup=2),
            cache.Custom(rule="steps", steps=(0, 1, 3), predictor="taylor"),
        ),
        dial=lambda threshold: cache.Custom(
            rule="accumulated", indicator="input", threshold=threshold, warmup=2
        ),
    ),
}
