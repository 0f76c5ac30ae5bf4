"""When memory does not suffice: how it is told, and what takes less."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from typing import Any

NO_MEMORY = ("out of memory", "not enough memory", "can't allocate memory")
"""What torch says of it, on the accelerators and on the CPU."""


def tiling(pipe: Any) -> str | None:
    """Decode in tiles."""
    vae: Any = getattr(pipe, "vae", None)
    if not hasattr(vae, "enable_tiling") or getattr(vae, "use_tiling", False):
        return None
    vae.enable_tiling()
    return "with the decoder in tiles"


def offloading(pipe: Any) -> str | None:
    """Keep on the accelerator only the network that computes."""
    if pipe.device.type == "cpu":
        return None
    pipe.enable_model_cpu_offload(device=pipe.device)
    return "with idle networks offloaded to the CPU"


WAYS: tuple[Callable[[Any], str | None], ...] = (tiling, offloading)
"""What is tried, in this order, when memory does not suffice. Each says what it changed."""


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory did not suffice."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in NO_MEMORY)


def free() -> None:
    """Give unused memory back, on accelerators too."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
