"""How long a network has been asked about pictures of one size: what was kept before is of no use.

A run may change the size of its picture (`resolution.Bottleneck`). Then what is kept for the next
step is dropped, and what warms up does so anew.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from accel.seams.denoisers import Call


class Age:
    """Counts the steps of one network since its picture had another size.

    Args:
        forget: Is called where the size changes.
    """

    def __init__(self, forget: Callable[[], None]) -> None:
        self._forget = forget
        self.reset()

    def reset(self) -> None:
        """A run starts."""
        self._begin, self._step = 0, -1
        self._sizes: set[tuple[int, ...]] = set()

    def of(self, call: Call) -> int:
        """Steps before this call's that asked about its size.

        A step whose calls differ in size (branches with texts in their rows) has all those sizes.
        """
        size, index = tuple(call.sample.shape[1:]), call.step.index
        if index != self._step:
            before, self._sizes, self._step = self._sizes, set(), index
            if before and size not in before:
                self._begin = index
                self._forget()
        self._sizes.add(size)
        return index - self._begin
