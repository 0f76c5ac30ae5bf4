"""What became of the attentions of a run, and how the report says it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from accel.seams.attention import UNREACHED

if TYPE_CHECKING:
    from accel.report import Tally


class Account:
    """Counts attentions of the image, those that were served and those that stayed dense.

    Args:
        tally: Where it is said.
    """

    def __init__(self, tally: Tally) -> None:
        self._tally = tally
        tally.reason = self._why_idle
        self.reset()

    def reset(self) -> None:
        """Forget the run before."""
        self._served: Counter[str] = Counter()
        self._left: Counter[str] = Counter()
        self._notes: dict[str, str] = {}
        self._densities = 0.0
        self._tally.change = None

    def keeps(self, memory: Callable[[], int]) -> None:
        """Say how many bytes are kept at a moment."""
        self._tally.memory = memory

    def served(self, density: float, lowering: str) -> None:
        """One attention that was computed sparsely.

        Args:
            density: Share of all pairs of tokens that it kept.
            lowering: By what it was computed.
        """
        self._served[lowering] += 1
        self._densities += density
        self._tally.change = self._said()

    def left(self, reason: str) -> None:
        """One attention that stayed dense; ``reason`` goes on after "12 …"."""
        self._left[reason] += 1
        if self._served:
            self._tally.change = self._said()

    def note(self, about: str, text: str) -> None:
        """Say something else; a later note about the same takes its place."""
        self._notes[about] = text
        if self._served:
            self._tally.change = self._said()

    def failed(self, reasons: Mapping[str, str]) -> None:
        """Say which lowerings could not be measured, and why."""
        for name, why in reasons.items():
            self.note(name, f"{name} failed where it was tried: {why}")

    def advise(self, text: str) -> None:
        """Say something that the user should change: a warning at the end of the run too."""
        self.note(text, text)
        self._tally.advise(text)

    def _said(self) -> str:
        count = sum(self._served.values())
        how = " and ".join(sorted(self._served))
        density = self._densities / count
        said = [f"{count} attentions by {how} at a mean density of {density:.2f}"]
        if self._left:
            said.append(f"left dense: {self._reasons()}")
        return "; ".join([*said, *self._notes.values()])

    def _reasons(self) -> str:
        return ", ".join(f"{count} {reason}" for reason, count in self._left.items())

    def _why_idle(self) -> str:
        if not self._left:
            return f"no attention of the image {UNREACHED}"
        return f"all attentions stayed dense: {self._reasons()}"
