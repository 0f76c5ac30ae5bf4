"""Methods of streams: in single calls of a pipeline there is nothing to do; see `test_stream`."""

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
}
