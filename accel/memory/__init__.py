"""Memory: where weights are kept, and as what. One method a file."""

from accel.memory.group_offload import GroupOffload as GroupOffload
from accel.memory.layerwise_casting import LayerwiseCasting as LayerwiseCasting

__all__ = ["GroupOffload", "LayerwiseCasting"]
