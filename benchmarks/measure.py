"""What every benchmark needs: the machine, side-by-side timing, results as data."""

from __future__ import annotations

import datetime
import hashlib
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
    if len(seconds) == 1:
        low = middle = high = seconds[0]
    else:
        low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return {"median": middle, "low": low, "high": high, "repeats": len(seconds)}


def ratio(baseline: Sequence[float], accelerated: Sequence[float]) -> dict[str, float]:
    """Median and quartiles of the ratio of timings that were taken side by side."""
    return spread([a / b for a, b in zip(baseline, accelerated, strict=True)])


class Lines:
    """Raw numbers in a file, a line of JSON each, written as they come: a rerun goes on there.

    Args:
        path: The file. Its first line says what the numbers hold for.
        header: The same of the present run.

    Raises:
        SystemExit: If the file holds numbers of something else.
    """

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        self.path = path
        header = json.loads(json.dumps(header))
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(header) + "\n")
        first, *lines = path.read_text().splitlines()
        other = [key for key in header if json.loads(first).get(key) != header[key]]
        if other:
            raise SystemExit(
                f"{path} holds numbers of another run ({', '.join(other)} differ): move it away, "
                "or begin anew with --fresh."
            )
        self.found: list[dict[str, Any]] = [json.loads(line) for line in lines]

    def add(self, line: dict[str, Any]) -> None:
        """Write one down."""
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        self.found.append(line)


def save(name: str, result: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Write a result with the machine and the command that made it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    command = " ".join(["python", *sys.argv])
    document = {"command": command, "machine": machine(), **result}
    path.write_text(json.dumps(document, indent=2) + "\n")
    return path


def digest(pipe: Any) -> str:
    """Of the network's weights: numbers of other weights are others."""
    import torch

    network = getattr(pipe, "unet", None) or pipe.transformer
    found = hashlib.sha256()
    for weight in network.state_dict().values():
        found.update(weight.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]
