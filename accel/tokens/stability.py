"""How stable the trajectory of a sample is, place by place: SADA's criterion before its mean.

Source: Jiang et al., arXiv 2507.17135, section 3.2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from accel.seams.memory import bytes_of
from accel.seams.trend import Trend

if TYPE_CHECKING:
    from torch import Tensor

    from accel.seams.solvers import Solver
    from accel.trajectory import Step


class Stability:
    """The criterion of one sample.

    Attributes:
        criterion: (x − x̂)·Δ²f at the present step, of the shape of the latents; ``None`` where
            fewer than three steps in a row were computed.
    """

    def __init__(self, solver: Solver) -> None:
        self._solver = solver
        self._trend = Trend(solver)
        self.criterion: Tensor | None = None

    @property
    def bytes(self) -> int:
        """Memory of the trend and the criterion."""
        return self._trend.bytes + bytes_of(self.criterion)

    def learn(self, step: Step, output: Tensor, sample: Tensor) -> None:
        """A step was computed: its guided output at its latents."""
        place = self._solver.place(sample, step)
        self._trend.learn(step, self._solver.slope(output, place, step), place)

    def judge(self, step: Step, after: Tensor) -> None:
        """The solver has gone on to the latents ``after``."""
        self.criterion = None
        if self._trend.ready:
            reached = self._solver.place(after, step, ahead=1)
            self.criterion = (reached - self._trend.expected(step)) * self._trend.bend()

    def forget(self) -> None:
        """A step was filled in by another method: begin anew."""
        self._trend.clear()
        self.criterion = None
