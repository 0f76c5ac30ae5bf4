"""Memory: where weights are kept and as what, and how much lives at once. One method a file."""

from accel.memory.feature_slicing import FeatureSlicing as FeatureSlicing
from accel.memory.group_offload import GroupOffload as GroupOffload
from accel.memory.layerwise_casting import LayerwiseCasting as LayerwiseCasting
from accel.memory.operator_grouping import OperatorGrouping as OperatorGrouping

__all__ = ["FeatureSlicing", "GroupOffload", "LayerwiseCasting", "OperatorGrouping"]
