"""How stable the trajectory of a sample is, place by place: SADA's criterion before its mean.

Source: Jiang et al., arXiv 2507.17135, section 3.2; the steps' true gaps are taken, as in
`accel.cache.sada`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

    from accel.seams.solvers import Solver
    from accel.trajectory import Step


class Slope(NamedTuple):
    """A computed slope dx̄/ds, with its step's clock and noise s."""

    clock: float
    time: float
    value: Tensor


class Trend:
    """The last three slopes of one sample.

    Attributes:
        criterion: (x − x̂)·Δ²f at the present step, of the shape of the latents; ``None`` where
            fewer than three steps in a row were computed.
    """

    def __init__(self, solver: Solver) -> None:
        self._solver = solver
        self._slopes: list[Slope] = []
        self._place: Tensor | None = None
        self.criterion: Tensor | None = None

    @property
    def bytes(self) -> int:
        """Memory of slopes, place and criterion."""
        kept = [slope.value for slope in self._slopes]
        kept += [value for value in (self._place, self.criterion) if value is not None]
        return sum(value.numel() * value.element_size() for value in kept)

    def learn(self, step: Step, output: Tensor, sample: Tensor) -> None:
        """A step was computed: its guided output at its latents."""
        self._place = self._solver.place(sample, step)
        value = self._solver.slope(output, self._place, step)
        newest = Slope(self._solver.clock(step), self._solver.time(step), value)
        self._slopes = [newest, *self._slopes[:2]]

    def judge(self, step: Step, after: Tensor) -> None:
        """The solver has gone on to the latents ``after``."""
        self.criterion = None
        if len(self._slopes) < 3 or self._place is None:
            return
        new, middle, old = self._slopes
        here, there = self._solver.time(step), self._solver.time(step, ahead=1)
        rate = (new.value - middle.value) / (new.time - middle.time)
        slope = new.value + rate * ((here + there) / 2 - new.time)
        expected = self._place + slope * (there - here)
        bend = (new.value - middle.value) / (new.clock - middle.clock)
        bend = bend - (middle.value - old.value) / (middle.clock - old.clock)
        reached = self._solver.place(after, step, ahead=1)
        self.criterion = (reached - expected) * bend

    def forget(self) -> None:
        """A step was filled in by another method: begin anew."""
        self._slopes, self._place, self.criterion = [], None, None
