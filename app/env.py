"""What a result depends on besides its plan: versions, device, processor, threads."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("diffusers-accel", "torch", "diffusers", "transformers")
OPTIONAL = ("accelerate", "peft", "xformers", "av", "gradio", "ray")


def versions() -> dict[str, str]:
    """The packages that decide about the bits of a result."""
    return {name: version(name) for name in PACKAGES}


def optional() -> dict[str, str]:
    """The packages that some features need: version, or ``not installed``."""
    found = {}
    for name in OPTIONAL:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


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


def devices() -> dict[str, str]:
    """The devices that torch finds here, and what they are."""
    import torch

    found = {"cpu": processor("cpu")}
    for index in range(torch.cuda.device_count()):
        found[f"cuda:{index}"] = processor(f"cuda:{index}")
    if torch.backends.mps.is_available():
        found["mps"] = platform.processor()
    return found


def threads() -> int:
    """The threads that torch computes with."""
    import torch

    return int(torch.get_num_threads())
