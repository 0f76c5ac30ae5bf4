"""Memory: where weights are kept, and as what. One method a file."""

from accel.memory.group_offload import GroupOffload as GroupOffload

__all__ = ["GroupOffload"]
