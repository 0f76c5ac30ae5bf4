"""Caches whose output is that of the stock pipeline, bit for bit."""

from accel import cache
from roster.row import Row

ROWS = {
    "cache.TextKV": Row(
        engine="lossless",
        active=cache.TextKV(),
        variants=(cache.TextKV(entries=2),),
        lossless=True,
        idle=frozenset({"zimage"}),  # gives its network a list of texts, joined anew at each step
    ),
}
