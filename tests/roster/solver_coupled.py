"""Caches between network and solver."""

from accel import cache
from roster.row import Row

ROWS = {
    "cache.SADA": Row(
        engine="solver",
        # From the step on where each second one is a node. The criterion judges the guided output
        # of a random network: whether it skips anything there is chance (it does on 10 of 32 tiny
        # pipelines), so a form that is step-wise alone cannot be here (see test_caches_solver).
        active=cache.SADA(start=0.0, stop=1.0, lagrange=0.0, every=2, nodes=1),
        variants=(
            cache.SADA(start=0.0, stop=1.0, lagrange=0.0, every=3, nodes=1, max_skips=1),
            cache.SADA(start=0.0, stop=1.0, lagrange=0.0, every=2, nodes=1, keep="bfloat16"),
        ),
    ),
    "cache.ZEUS": Row(
        engine="solver",
        active=cache.ZEUS(start=0.0, stop=1.0),
        variants=(
            cache.ZEUS(start=0.0, stop=1.0, max_skips=1),
            cache.ZEUS(start=0.0, stop=1.0, lagrange=0.0, every=2, nodes=1),
        ),
    ),
}
