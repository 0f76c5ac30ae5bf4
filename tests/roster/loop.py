"""Loops of our own.

Methods of streams have nothing to do in single calls of a pipeline (see `test_stream`), and clips
between two pictures are made of calls that have two (see `test_vibid`).
"""

from tiny import PIPELINES

from accel import loop
from roster.row import Row

SINGLE = frozenset(PIPELINES)
"""The laws make single calls."""

NO_UNET = frozenset(tiny.blocks for tiny in PIPELINES.values() if tiny.blocks != "unet")

ROWS = {
    "loop.FeatureBank": Row("streams", loop.FeatureBank(), unserved=NO_UNET, idle=SINGLE),
    "loop.RCFG": Row("streams", loop.RCFG(), idle=SINGLE),
    "loop.SimilarityFilter": Row("streams", loop.SimilarityFilter(), idle=SINGLE),
    "loop.StreamBatch": Row("streams", loop.StreamBatch(), idle=SINGLE),
    "loop.ViBiD": Row(
        "key frames",
        loop.ViBiD(),
        refused=SINGLE - {"svd"},
        idle=frozenset({"svd"}),
        also=("svd_keys",),
        variants=(loop.ViBiD(scale=0.6, replace=False),),
    ),
}
