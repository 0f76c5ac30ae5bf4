"""Where the trajectory of a sample goes by its last three slopes, and how it bends.

Source: Jiang et al., "SADA", arXiv 2507.17135, section 3.2, with the steps' true gaps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from accel.seams.memory import bytes_of

if TYPE_CHECKING:
    from torch import Tensor

    from accel.seams.solvers import Solver
    from accel.trajectory import Step


class Slope(NamedTuple):
    """A computed slope.

    Attributes:
        clock: Of the step, for the change of the slope.
        time: s of the step, for the extrapolation.
        value: dx̄/ds.
    """

    clock: float
    time: float
    value: Tensor


class Trend:
    """The last three computed slopes of one sample.

    Attributes:
        slopes: The newest first.
        place: Where the sample is now; ``None`` before the first step.
    """

    def __init__(self, solver: Solver) -> None:
        self._solver = solver
        self.slopes: list[Slope] = []
        self.place: Tensor | None = None

    @property
    def ready(self) -> bool:
        """Whether three slopes are known."""
        return len(self.slopes) == 3

    @property
    def bytes(self) -> int:
        """Memory of slopes and place."""
        return bytes_of(self.slopes, self.place)

    def learn(self, step: Step, slope: Tensor, place: Tensor) -> None:
        """A step was computed: its slope, and where."""
        newest = Slope(self._solver.clock(step), self._solver.time(step), slope)
        self.slopes = [newest, *self.slopes[:2]]
        self.place = place

    def line(self, time: float) -> Tensor:
        """The slope at a time, on the line through the two newest ones."""
        new, old = self.slopes[:2]
        return new.value + (new.value - old.value) * ((time - new.time) / (new.time - old.time))

    def expected(self, step: Step) -> Tensor:
        """Where the sample is after a step, by the line's slope in the middle of it: x̂."""
        assert self.place is not None
        here, there = self._solver.time(step), self._solver.time(step, ahead=1)
        return self.place + self.line((here + there) / 2) * (there - here)

    def bend(self) -> Tensor:
        """Δ²f: how the change of the slope changes."""
        new, middle, old = self.slopes
        change = (new.value - middle.value) / (new.clock - middle.clock)
        return change - (middle.value - old.value) / (middle.clock - old.clock)

    def clear(self) -> None:
        """Begin anew."""
        self.slopes, self.place = [], None
