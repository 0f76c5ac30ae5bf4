"""Caches of a UNet's deep branch."""

from tiny import PIPELINES

from accel import cache
from roster.row import Row

ROWS = {
    "cache.DeepCache": Row(
        engine="unet",
        active=cache.DeepCache(interval=3),
        variants=(
            cache.DeepCache(interval=2, branch=2, predictor="newton"),
            cache.DeepCache(interval=2, branch=1, schedule="nonuniform", centre=0.5, last=True),
            cache.DeepCache(threshold=1e6, branch=3, warmup=2, max_skips=2, predictor="taylor"),
        ),
        unserved=frozenset(tiny.blocks for tiny in PIPELINES.values()) - {"unet"},
        dial=lambda threshold: cache.DeepCache(threshold=threshold, warmup=2),
    ),
}
