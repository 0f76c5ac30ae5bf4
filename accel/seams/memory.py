"""What values take in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any


def bytes_of(*values: Any) -> int:
    """Bytes of all tensors in some values; views count as if they were copies.

    Args:
        values: Tensors, sequences, mappings and dataclasses of such; all else counts nothing.
    """
    return sum(map(_bytes, values))


def _bytes(value: Any) -> int:
    from torch import Tensor

    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, Mapping):
        return bytes_of(*value.values())
    if isinstance(value, tuple | list):
        return bytes_of(*value)
    if is_dataclass(value) and not isinstance(value, type):
        return bytes_of(*(getattr(value, entry.name) for entry in fields(value)))
    return 0
