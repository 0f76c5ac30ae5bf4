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
    "cache.DBCache": Row(
        engine="blocks",
        active=cache.DBCache(threshold=1e6, front=1, back=1, warmup=1),
        variants=(
            cache.DBCache(threshold=1e6, front=2, warmup=1, budget=2, predictor="newton"),
            cache.DBCache(
                threshold=1e6, front=1, warmup=1, steps=(2,), last=False, keep="bfloat16"
            ),
            cache.DBCache(threshold=1e6, front=1, warmup=1, accumulated=1e6, changed=0.1),
        ),
        unserved=frozenset({"unet"}),
        dial=lambda threshold: cache.DBCache(threshold=threshold, front=2, warmup=1),
    ),
    "cache.TeaCache": Row(
        engine="blocks",
        active=cache.TeaCache(threshold=1e6),
        variants=(
            cache.TeaCache(threshold=1e6, coefficients="wan2.1-1.3b", max_skips=2, warmup=2),
            cache.TeaCache(
                threshold=1e6, coefficients=(0.0, 1.0, 0.0, 1.0, 0.1), predictor="newton", warmup=2
            ),
        ),
        unserved=frozenset({"unet"}),
        dial=lambda threshold: cache.TeaCache(threshold=threshold, max_skips=0),
    ),
    "cache.MagCache": Row(
        engine="blocks",
        active=cache.MagCache(threshold=1e6, share=0.0),
        variants=(
            cache.MagCache(threshold=1e6, share=0.4, max_skips=2, predictor="taylor"),
            cache.MagCache(threshold=0.5, share=0.2, curve=(1.0, 0.9, 0.8), last=False),
        ),
        unserved=frozenset({"unet"}),
    ),
    "cache.DeltaDiT": Row(
        engine="blocks",
        active=cache.DeltaDiT(interval=2),
        variants=(
            cache.DeltaDiT(interval=3, share=1.0, boundary=0.3, last=True),
            cache.DeltaDiT(interval=2, share=0.4, warmup=2, max_skips=1, predictor="newton"),
        ),
        unserved=frozenset({"unet"}),
    ),
}
