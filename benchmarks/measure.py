"""What every benchmark needs: the machine, side-by-side timing, results as data."""

from __future__ import annotations

import datetime
import hashlib
import io
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
SOURCES = ("accel", "samplers")
"""Packages of this project whose code decides what is measured."""
PACKAGES = ("diffusers-accel", "torch", "diffusers", "transformers", "numpy")

FEWEST, MOST = 3, 9
"""Repeats that are fitted into the time there is."""

Visit = Callable[[], float]
"""Does something once, and says how many seconds of it count."""


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


def waiting(device: str) -> Callable[[], None]:
    """What waits for a device."""
    import torch

    return torch.cuda.synchronize if device == "cuda" else lambda: None


def clocked(run: Callable[[], Any], sync: Callable[[], None] = lambda: None) -> float:
    """Seconds that something takes."""
    sync()
    begin = time.perf_counter()
    run()
    sync()
    return time.perf_counter() - begin


def rounds(visits: Mapping[str, Visit], count: int, start: int = 0) -> dict[str, list[float]]:
    """Seconds of each, one after the other, that many times, there and back in turn.

    Args:
        visits: What is measured, by name.
        count: Rounds.
        start: Rounds that were made before: an even number, and the next one goes there.
    """
    seconds: dict[str, list[float]] = {name: [] for name in visits}
    for turn in range(start, start + count):
        for name in list(visits)[:: -1 if turn % 2 else 1]:
            seconds[name].append(visits[name]())
    return seconds


def repeated(
    visits: Mapping[str, Visit], spent: float, repeats: int | None = None
) -> dict[str, list[float]]:
    """Seconds of each, in as many rounds as fit.

    The first round warms up, and counts only where no more than `FEWEST` of its length fit: calls
    of seconds need no warm-up. The second goes back where the first went there, and so on.

    Args:
        visits: What is measured, by name.
        spent: Seconds in which all rounds should fit; `FEWEST` are made all the same.
        repeats: So many rounds after the first, whatever they take.
    """
    first = rounds(visits, 1)
    took = sum(one for (one,) in first.values())
    if repeats is None and took * FEWEST >= spent:
        rest = rounds(visits, FEWEST - 1, start=1)
        return {name: first[name] + rest[name] for name in visits}
    fitting = int(spent / took) if took else MOST
    return rounds(visits, repeats or min(MOST, max(FEWEST, fitting)), start=1)


def here() -> dict[str, Any]:
    """What raw numbers hold for: the machine, without the day, and the code."""
    found = {key: value for key, value in machine().items() if key != "date"}
    return {**found, "code": code([package(name) for name in SOURCES])}


def package(name: str) -> Path:
    """The folder of a package as it is imported."""
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"{name} is not installed: install this project first.")
    return Path(spec.origin).parent


def code(packages: Sequence[Path]) -> str:
    """Of the sources of packages: numbers of other code are others."""
    found = hashlib.sha256()
    for folder in packages:
        for path in sorted(folder.rglob("*.py")):
            content = path.read_bytes()
            name = path.relative_to(folder.parent).as_posix()
            found.update(f"{name} {len(content)}\n".encode() + content)
    return found.hexdigest()[:16]


def signature(device: str = "cpu") -> str:
    """Day, machine, versions and command of a table."""
    found = machine()
    versions = ", ".join(f"{name} {one}" for name, one in found["versions"].items())
    where = found["processor"] if device == "cpu" else found["device"]
    return (
        f"Measured {found['date']} on {where}, {found['threads']} threads ({versions}) with "
        f"`{' '.join(['python', *sys.argv])}`."
    )


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
        """Write one down; it is found as it will be read."""
        written = json.dumps(line)
        with self.path.open("a") as file:
            file.write(written + "\n")
        self.found.append(json.loads(written))


def weights() -> dict[str, str]:
    """Of each bundled model, a digest of its weights: figures of others are others."""
    from accel.bundled import root

    found = {}
    for folder in sorted((root() / "models").iterdir()):
        content = hashlib.sha256()
        for path in sorted(folder.rglob("*.safetensors")):
            content.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
        found[folder.name] = content.hexdigest()[:16]
    return found


def save(name: str, result: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Write a result with the machine, the weights and the command that made it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    command = " ".join(["python", *sys.argv])
    document = {"command": command, "machine": machine(), "weights": weights(), **result}
    path.write_text(json.dumps(document, indent=2) + "\n")
    return path


def save_plot(figure: Any, path: Path, dpi: int) -> None:
    """Write a plot as PNG in 256 colours, a third of the bytes, and close it."""
    import matplotlib.pyplot as plt
    from PIL import Image

    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=dpi)
    plt.close(figure)
    with Image.open(drawn) as picture:
        few = picture.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    few.save(path, "PNG", optimize=True)


def digest(pipe: Any) -> str:
    """Of the network's weights: numbers of other weights are others."""
    import torch

    network = getattr(pipe, "unet", None) or pipe.transformer
    found = hashlib.sha256()
    for weight in network.state_dict().values():
        found.update(weight.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]
