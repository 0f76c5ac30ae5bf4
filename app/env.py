"""What a result depends on besides its plan: versions, device, processor, threads."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

from accel.machine import processor

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
