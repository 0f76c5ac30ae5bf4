"""Weights that a process does not need: in a temporary file, as long as they are not needed.

They are mapped from there. What is looked up all the same is read from the disk, and the memory of
what is not is the system's to take. On an accelerator they leave the device's memory.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class Elsewhere:
    """Parameters and buffers whose values lie in a temporary folder.

    Attributes:
        bytes: That lie there.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self._away: list[tuple[Tensor, torch.device]] = []

    def put(self, module: Any) -> None:
        """Take the values of a module's parameters and buffers out of memory.

        Those of a kind of their own (quantised ones) stay where they are, and so do views.

        Raises:
            OSError: If the disk is full; what has been put there before stays there.
        """
        with tempfile.TemporaryDirectory(prefix="accel-weights-") as folder:
            for number, one in enumerate([*module.parameters(), *module.buffers()]):
                if type(one.data) is Tensor and one.data.is_contiguous() and one.nbytes:
                    self._put(one, Path(folder) / str(number))

    def _put(self, one: Tensor, file: Path) -> None:
        # the mapping keeps the file's blocks when its name is gone
        storage = torch.UntypedStorage.from_file(str(file), True, one.nbytes)
        mapped = torch.empty(0, dtype=one.dtype).set_(storage, 0, one.shape)  # type: ignore[call-overload]
        mapped.copy_(one.data)
        self._away.append((one, one.device))
        self.bytes += one.nbytes
        one.data = mapped

    def bring_back(self) -> None:
        """Give every tensor its values where they were."""
        while self._away:
            one, device = self._away.pop()
            one.data = one.data.to(device, copy=True)
        self.bytes = 0
