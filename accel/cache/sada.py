"""SADA: leave the network out while the trajectory of the solver is stable.

Source: Jiang et al., "SADA: Stability-guided Adaptive Diffusion Acceleration", arXiv 2507.17135,
sections 3.2 to 3.4. The token-wise part is not here. Where the paper assumes even steps, this
takes the true ones: slopes are derivatives in the solver's own time, the extrapolations of the
sample and the velocity follow the actual gaps, and the polynomial of the multi-step part has its
nodes in the log-SNR. Only computed outputs enter the differences.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field

from accel.attach import Accelerator, Site, Undo
from accel.cache.predictors import Keep
from accel.seams.memory import bytes_of

if TYPE_CHECKING:
    from torch import Tensor

    from accel.cache.solver_coupled import Point
    from accel.seams.solvers import Solver
    from accel.trajectory import Step


class SADA(Accelerator):
    """Skip the next step where the curvature of the trajectory points back at its extrapolation.

    After each step: x̂ is the sample extrapolated from the computed slopes f (second order, true
    gaps), Δ²f the change of the slope's change; stable if mean((x − x̂)·Δ²f) ≤ 0, the paper's
    criterion, for flows too. The authors' code has another for flows, mean(−Δ²f) ≤ 0: criterion
    'bend'; it depends on the sign that a latent channel happens to have. Neither the multi-step
    part nor more than two skips in a row is the default, unlike theirs: on scenes-flux both cost
    more than they save.

    On a skipped step the solver is given x0 = x̂ − s·f (a flow: the extrapolated velocity), or, from
    the share ``lagrange`` of the run on, where each ``every``-th step is computed, the polynomial
    through the last clean samples. Decides from the guided output, each sample for itself. Reads
    the device once a step.
    """

    name: ClassVar[str] = "cache.SADA"
    layer: ClassVar[str] = "step cache"
    seam: ClassVar[str] = "denoiser"
    supports: ClassVar[str] = (
        "every denoiser and guidance layout; schedulers of one evaluation a step without noise"
    )
    source: ClassVar[str] = "arXiv 2507.17135, sections 3.2 to 3.4"

    max_skips: int = Field(
        default=2,
        ge=0,
        description="consecutive skips after which a step is computed; 0 is off. The authors "
        "allow 4; on scenes-flux the third and fourth cost 9 dB and save a few evaluations",
    )
    start: float = Field(
        default=0.2,
        ge=0.0,
        le=1.0,
        description="share of the run before which every step is computed",
    )
    stop: float = Field(
        default=0.94, ge=0.0, le=1.0, description="share of the run from which every step is"
    )
    lagrange: float = Field(
        default=1.0,
        ge=0.0,
        le=1.0,
        description="share of the run from which each 'every'-th step is computed and x0 is a "
        "polynomial between; 1 is never. The authors use 0.48 (SD, SDXL) and 0.4 (Flux)",
    )
    criterion: Literal["deviation", "bend"] = Field(
        default="deviation",
        description="what is to have a mean of at most 0 where the next step is skipped: the "
        "'deviation' (x − x̂)·Δ²f (the paper), or the 'bend' −Δ²f (the authors' code for flows)",
    )
    every: int = Field(default=4, ge=2, description="steps from node to node of that polynomial")
    nodes: int = Field(
        default=3,
        ge=1,
        le=5,
        description="nodes of that polynomial. The authors use 4, and 3 for Flux",
    )
    keep: Keep = Field(
        default="native",
        description="how the network's answers and the polynomial's nodes are kept: 'native', in "
        "'bfloat16', on the 'cpu'. The slopes stay as they are: their second difference decides, "
        "at every step, and in bfloat16 it would be rounding",
    )

    @classmethod
    def off(cls) -> Self:
        """No skips."""
        return cls(max_skips=0)

    def why_off(self) -> str | None:
        """No skips allowed, or no part of the run to skip in."""
        if self.max_skips == 0:
            return "max_skips is 0"
        return "stop is not behind start" if self.stop <= self.start else None

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
            solver, seen = Solver(site.pipe.scheduler, self.name), Seen()
        yield site.on_start(seen.reset)
        site.tally.reason = seen.why_idle
        yield from SolverCache(
            site.tally, solver, lambda: Stability(self, solver, seen), self.keep
        ).attach(site)


@dataclass
class Seen:
    """What was measured in a run, for its report."""

    judged: int = 0

    def reset(self) -> None:
        """Forget the run before."""
        self.judged = 0

    def why_idle(self) -> str:
        """Why nothing was skipped."""
        if self.judged:
            return f"the trajectory was stable at none of {self.judged} steps"
        return "too few steps between start and stop: it takes three computed ones to judge"


class Stability:
    """The track of one sample."""

    def __init__(self, method: SADA, solver: Solver, seen: Seen) -> None:
        from accel.cache.solver_coupled import CleanNodes
        from accel.seams.trend import Trend

        self._method = method
        self._solver = solver
        self._seen = seen
        self._clean = CleanNodes(method.every, method.nodes, method.keep)
        self._trend = Trend(solver)
        self._expected: Tensor | None = None
        self._skipped = 0
        self._stable = False

    @property
    def bytes(self) -> int:
        """Memory of slopes, places and nodes."""
        return self._clean.bytes + self._trend.bytes + bytes_of(self._expected)

    def skips(self, step: Step) -> bool:
        """Inside the bounds and the cap: between nodes, or where the last step was stable."""
        if not self._inside(step, step.index) or self._skipped >= self._method.max_skips:
            return False
        if self._multistep(step, step.index):
            return self._clean.ready and not self._clean.node(step)
        return self._stable

    def _inside(self, step: Step, index: int) -> bool:
        from accel.cache.solver_coupled import first

        return first(self._method.start, step) <= index < first(self._method.stop, step)

    def _multistep(self, step: Step, index: int) -> bool:
        from accel.cache.solver_coupled import first

        return index >= first(self._method.lagrange, step)

    def learn(self, point: Point) -> None:
        """Keep the slope and, at a node, the clean sample."""
        slope = self._solver.slope(point.output, point.place, point.step)
        self._trend.learn(point.step, slope, point.place)
        self._clean.learn(point.step, self._solver.clean(slope, point.place, point.step))
        self._skipped = 0

    def fill(self, point: Point) -> Tensor:
        """What the solver is given on a skipped step."""
        self._trend.place, self._skipped = point.place, self._skipped + 1
        if self._multistep(point.step, point.step.index):
            slope = self._solver.toward(self._clean.at(point.step), point.place, point.step)
        elif point.step.levels.prediction == "flow_prediction":
            slope = self._trend.line(self._solver.time(point.step))
        else:
            assert self._expected is not None
            clean = self._solver.clean(self._trend.slopes[0].value, self._expected, point.step)
            slope = self._solver.toward(clean, point.place, point.step)
        return self._solver.output(slope, point.place, point.step)

    def judge(self, step: Step, after: Tensor) -> Tensor | None:
        """The mean of the criterion, where the next step may be skipped for it."""
        self._stable, self._expected = False, None
        ahead = step.index + 1
        if not self._trend.ready or not self._inside(step, ahead) or self._multistep(step, ahead):
            return None
        if self._skipped >= self._method.max_skips:
            return None
        self._expected = self._trend.expected(step)
        bend = self._trend.bend()
        if self._method.criterion == "bend":
            return -bend.mean()
        return ((after - self._expected) * bend).mean()

    def decide(self, value: float) -> None:
        """Stable where the mean is not above 0; NaN is not."""
        self._seen.judged += 1
        self._stable = value <= 0

    def forget(self) -> None:
        """Start anew."""
        self._trend.clear()
        self._stable, self._expected = False, None
        self._clean.clear()
