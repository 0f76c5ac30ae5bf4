"""Operations of what is called, attention included."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

Shape = tuple[int, ...]


def counter() -> FlopCounterMode:
    """Counts operations while it is entered; multiply-adds count twice.

    torch's own counter leaves out the kernel of attention that a CPU has.
    """
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return FlopCounterMode(display=False, custom_mapping={kernel: _attention})


def _attention(query: Shape, key: Shape, value: Shape, *_args: Any, **_named: Any) -> int:
    found: int = sdpa_flop_count(query, key, value)  # type: ignore[no-untyped-call]
    return found
