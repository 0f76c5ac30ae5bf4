"""How alike two frames are."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def cosine(a: Tensor, b: Tensor) -> float:
    """Of two frames as one vector each, in float64; equal ones have 1, black ones too.

    Reads the device.
    """
    a, b = a.flatten().double(), b.flatten().double()
    if bool((a == b).all()):
        return 1.0
    size = float(a.norm() * b.norm())
    return min(1.0, float(a @ b) / size) if size > 0.0 else 0.0
