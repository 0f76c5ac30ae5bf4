"""ZEUS: leave the network out in a fixed pattern and extrapolate what the solver is given.

Source: the public code of ZEUS, of the authors of SADA (arXiv 2507.17135).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from accel.attach import Site, Undo
from accel.cache.fields import Spaced
from accel.cache.predictors import Keep

if TYPE_CHECKING:
    from torch import Tensor

    from accel.cache.solver_coupled import Point
    from accel.seams.solvers import Solver
    from accel.trajectory import Step


class ZEUS(Spaced):
    """Skip by number of the step; no criterion, and the device is never read.

    A step is followed by a skipped one if its number leaves a remainder by ``interval`` other
    than the last one (2 of 3 steps are skipped), later in the run, from ``lagrange`` on, if it is
    no node of a polynomial through clean samples (3 of 4). The first skip gives the solver
    2ε_n − ε_{n+1} of the last two computed guided outputs, the second ε_n, the third the first
    one's again: over a whole gap what is too much in one makes up for what is missing in the next.
    """

    name: ClassVar[str] = "cache.ZEUS"
    layer: ClassVar[str] = "step cache"
    seam: ClassVar[str] = "denoiser"
    supports: ClassVar[str] = (
        "every denoiser and guidance layout; schedulers of one evaluation a step without noise"
    )
    source: ClassVar[str] = "public code, after arXiv 2507.17135"

    interval: int = Field(default=3, ge=1, description="of so many steps one is computed; 1 is off")
    max_skips: int = Field(
        default=4, ge=1, description="consecutive skips after which a step is computed"
    )
    start: float = Field(
        default=0.2,
        ge=0.0,
        le=1.0,
        description="share of the run before which no step is followed by a skipped one",
    )
    stop: float = Field(
        default=0.9, ge=0.0, le=1.0, description="share of the run from which none is"
    )
    lagrange: float = Field(
        default=1.0,
        ge=0.0,
        le=1.0,
        description="share of the run from which x0 is a polynomial between each 'every'-th "
        "step; 1 is never. The authors use 0.48",
    )
    every: int = Field(default=4, ge=2, description="steps from node to node of that polynomial")
    nodes: int = Field(default=3, ge=1, le=5, description="nodes of that polynomial")
    keep: Keep = Field(
        default="native",
        description="how the network's answers, the guided outputs and the polynomial's nodes are "
        "kept: 'native', in 'bfloat16', on the 'cpu'",
    )

    def attach(self, site: Site) -> Iterator[Undo]:
        """Put it around every denoiser and in front of ``scheduler.step``.

        Raises:
            UnsupportedModel: For a scheduler that evaluates twice a step, or adds noise.
            Conflict: If a method of the plan brings such a scheduler.
        """
        from accel.cache.solver_coupled import SolverCache
        from accel.seams.solvers import Solver

        yield site.claim("denoiser")
        with site.beside("scheduler"):
            solver = Solver(site.pipe.scheduler, self.name)
        site.tally.reason = lambda: "too few steps between start and stop"
        yield from SolverCache(site.tally, solver, lambda: Pattern(self, solver), self.keep).attach(
            site
        )


class Pattern:
    """The track of one sample."""

    def __init__(self, method: ZEUS, solver: Solver) -> None:
        from accel.cache.predictors import History
        from accel.cache.solver_coupled import CleanNodes

        self._method = method
        self._solver = solver
        self._clean = CleanNodes(method.every, method.nodes, method.keep)
        self._outputs = History(2, method.keep)
        self._skipped = 0

    @property
    def bytes(self) -> int:
        """Memory of outputs and nodes."""
        return self._outputs.bytes + self._clean.bytes

    def skips(self, step: Step) -> bool:
        """By the number of the step before."""
        from accel.cache.solver_coupled import first

        method, before = self._method, step.index - 1
        if not first(method.start, step) <= before < first(method.stop, step):
            return False
        if self._skipped >= method.max_skips:
            return False
        if self._multistep(step):
            return self._clean.ready and before % method.every != 0
        return len(self._outputs) > 1 and before % method.interval != method.interval - 1

    def _multistep(self, step: Step) -> bool:
        from accel.cache.solver_coupled import first

        return step.index - 1 >= first(self._method.lagrange, step)

    def learn(self, point: Point) -> None:
        """Keep the output and, at a node, the clean sample."""
        self._outputs.add(float(point.step.index), point.output.float())
        slope = self._solver.slope(point.output, point.place, point.step)
        self._clean.learn(point.step, self._solver.clean(slope, point.place, point.step))
        self._skipped = 0

    def fill(self, point: Point) -> Tensor:
        """What the solver is given on a skipped step."""
        self._skipped += 1
        if self._multistep(point.step):
            slope = self._solver.toward(self._clean.at(point.step), point.place, point.step)
            return self._solver.output(slope, point.place, point.step)
        new, old = self._outputs.value(0), self._outputs.value(1)
        if self._skipped % 2 == 0:
            return new
        return new * 2 - old

    def judge(self, step: Step, after: Tensor) -> None:
        """Nothing is measured."""

    def decide(self, value: float) -> None:
        """Nothing was."""

    def forget(self) -> None:
        """Start anew."""
        from accel.cache.predictors import History

        self._outputs = History(2, self._method.keep)
        self._clean.clear()
