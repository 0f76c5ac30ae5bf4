"""What every benchmark needs: the machine, side-by-side timing, results as data."""

from __future__ import annotations

import datetime
import json
import platform
import statistics
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("diffusers-accel", "torch", "diffusers", "transformers", "numpy")


def machine() -> dict[str, Any]:
    """Processor, threads and versions that a figure was measured with."""
    import torch

    return {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor()
    fields = dict(
        line.split(":", 1) for line in info.read_text().splitlines() if line.count(":") == 1
    )
    names = {key.strip(): value.strip() for key, value in fields.items()}
    family, model = names.get("cpu family", "?"), names.get("model", "?")
    return f"{names.get('model name', platform.machine())} (family {family}, model {model})"


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Median and quartiles of repeated timings."""
    low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return {"median": middle, "low": low, "high": high, "repeats": len(seconds)}


def ratio(baseline: Sequence[float], accelerated: Sequence[float]) -> dict[str, float]:
    """Median and quartiles of the ratio of timings that were taken side by side."""
    return spread([a / b for a, b in zip(baseline, accelerated, strict=True)])


def save(name: str, result: dict[str, Any]) -> Path:
    """Write a result with the machine and the command that made it."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    command = " ".join(["python", *sys.argv])
    document = {"command": command, "machine": machine(), **result}
    path.write_text(json.dumps(document, indent=2) + "\n")
    return path
