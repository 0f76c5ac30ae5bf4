"""Weights: networks computed in int8, by torchao's kernels. One method a file."""

from accel.weights.int8_dynamic import Int8Dynamic as Int8Dynamic
from accel.weights.int8_static import Int8Static as Int8Static
from accel.weights.int8_weight_only import Int8WeightOnly as Int8WeightOnly

__all__ = ["Int8Dynamic", "Int8Static", "Int8WeightOnly"]
