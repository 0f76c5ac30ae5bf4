"""Loops of our own: streams of pictures, and clips between two pictures. One method a file.

All methods of this family but `ViBiD` act in a `Stream`, which feeds a picture-to-picture pipeline
with frame after frame; in a single call of a pipeline they have nothing to do, and say so.
"""

from accel.loop.feature_bank import FeatureBank as FeatureBank
from accel.loop.queues import Feed as Feed
from accel.loop.queues import Outlet as Outlet
from accel.loop.rcfg import RCFG as RCFG
from accel.loop.similarity_filter import SimilarityFilter as SimilarityFilter
from accel.loop.stream import Stream as Stream
from accel.loop.stream_batch import StreamBatch as StreamBatch
from accel.loop.vibid import ViBiD as ViBiD

__all__ = [
    "RCFG",
    "FeatureBank",
    "Feed",
    "Outlet",
    "SimilarityFilter",
    "Stream",
    "StreamBatch",
    "ViBiD",
]
