"""What a device is called: seconds, and bits, depend on it."""

from __future__ import annotations

import platform
from pathlib import Path


def processor(device: str) -> str:
    """The name of the processor that a device is, with the vector unit that torch uses."""
    import torch

    if device.startswith("cuda"):
        return str(torch.cuda.get_device_name(device))
    return f"{_cpu()} ({torch.backends.cpu.get_cpu_capability()})"


def _cpu() -> str:
    listing = Path("/proc/cpuinfo")
    if listing.is_file():
        for line in listing.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
