"""The most memory that a piece of work takes, read off counters that cost it nothing.

On an accelerator its allocator's own peak: all tensors on the device at once, weights included. On
a CPU the high-water mark that Linux keeps of the process' resident memory: all that the process
holds in RAM, libraries included, to the page. Both counters are set back first; what else reads
them (`torch.cuda.max_memory_allocated`, `getrusage`) then counts from there, so nothing is
measured unless it is asked for.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

STATUS = Path("/proc/self/status")
REFERENCES = Path("/proc/self/clear_refs")
HIGH_WATER = "5"
"""What sets the high-water mark back to what is resident now (proc(5))."""

MIB = 2**20


@dataclass(frozen=True)
class Peak:
    """What was taken at the peak.

    Attributes:
        bytes: The most at once.
        before: What was taken already when the work began.
        of: Whose memory it is: ``allocator of cuda:0``, or ``resident memory of the process``.
    """

    bytes: int
    before: int
    of: str

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def __str__(self) -> str:
        more = max(self.bytes - self.before, 0) / MIB
        return f"{self.bytes / MIB:.1f} MiB at the peak ({self.of}), {more:.1f} more than before"


@contextmanager
def watching(device: Any) -> Iterator[Callable[[], Peak | None]]:
    """Watch what is done inside; gives what reads the peak up to now.

    The reading is ``None`` where there is no such counter (MPS; a CPU under another system than
    Linux). On an accelerator neither waits for the device: its allocator counts on the host.

    Args:
        device: Where the work is done, as torch has it.
    """
    import torch

    place = torch.device(device)
    yield _resident() if place.type == "cpu" else _allocated(place)


def _allocated(place: Any) -> Callable[[], Peak | None]:
    import torch

    counters = torch.get_device_module(place)
    if not hasattr(counters, "reset_peak_memory_stats"):
        return lambda: None
    counters.init()  # setting back does not do so of itself
    counters.reset_peak_memory_stats(place)
    before = counters.memory_allocated(place)
    return lambda: Peak(counters.max_memory_allocated(place), before, f"allocator of {place}")


def _resident() -> Callable[[], Peak | None]:
    if not REFERENCES.exists():
        return lambda: None
    _give_back()
    REFERENCES.write_text(HIGH_WATER)
    before = _status("VmRSS")
    return lambda: Peak(_status("VmHWM"), before, "resident memory of the process")


def _give_back() -> None:
    """Let go of what is free but held: garbage in cycles, and what the C library (glibc) keeps."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _status(field: str) -> int:
    """A field of the process' status in bytes; the file says kB."""
    lines = (line.split() for line in STATUS.read_text().splitlines())
    return next(int(line[1]) * 1024 for line in lines if line[0] == f"{field}:")
