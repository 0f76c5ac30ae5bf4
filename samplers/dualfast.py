"""DualFast: extrapolate the noise prediction from an earlier step, at no evaluation.

Source: "DualFast: Dual-Speedup Framework for Fast Sampling of Diffusion Models", arXiv 2506.13058,
from summaries of it: the rise of c and the default step τ are reconstructions. The solver is given
``ê = (1 + c)·ε − c·ε_τ`` in the place of ε. Predictions are mixed as noise whatever the network
predicts: only there do they keep their meaning from one noise level to another.

With τ the step before, ê differs from ε by c times the last change: the solver stays consistent,
and DDIM comes near to second order at c = ½ on even steps. With τ the first step the error does
not vanish with the number of steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field

from accel.attach import Accelerator, Site, Undo
from accel.errors import UnsupportedModel

if TYPE_CHECKING:
    from torch import Tensor

    from accel.report import Tally
    from accel.seams.solvers import Solver
    from accel.trajectory import Step, Update

Target = Literal["first_order_term", "all"]
Reference = Literal["previous", "first"]


class DualFast(Accelerator):
    """Give the solver ê = (1 + c)·ε − c·ε_τ in the place of the noise prediction ε.

    A sample is left as it is at steps that it does not compute, and where other branches of its
    guidance are computed than at τ. It is meant for DDIM and Euler's method: solvers of
    second order extrapolate already. With strong guidance take a small c.
    Reads the noise levels from the device, once a run.
    """

    name: ClassVar[str] = "samplers.DualFast"
    layer: ClassVar[str] = "sampler"
    seam: ClassVar[str] = "scheduler.step"
    supports: ClassVar[str] = (
        "ε, v, x0 and flow prediction; schedulers of one evaluation a step without noise"
    )
    source: ClassVar[str] = "arXiv 2506.13058 (from summaries)"
    approximates: ClassVar[bool] = False

    c: float = Field(
        default=0.25,
        ge=0.0,
        le=1.0,
        description="how far to extrapolate, in changes from τ to the present step; 0 is off",
    )
    ramp: Literal["linear", "none"] = Field(
        default="linear",
        description="linear: c rises from 0 at the first step to its value at the last",
    )
    reference: Reference = Field(
        default="previous",
        description="the step τ: the one computed before, or the first; first for 10 steps at most",
    )
    target: Target = Field(
        default="first_order_term",
        description="where ê takes the place of ε: in the solver's first-order term, or in all of "
        "them, with what it keeps for later steps; the same for solvers of first order. diffusers' "
        "own UniPC takes all alone",
    )

    @classmethod
    def off(cls) -> Self:
        """No extrapolation."""
        return cls(c=0.0)

    def why_off(self) -> str | None:
        """No extrapolation."""
        return "c is 0" if self.c == 0 else None

    def attach(self, site: Site) -> Iterator[Undo]:
        """Put it in front of ``scheduler.step``, or behind it for the first-order term alone.

        Raises:
            Conflict: If the plan's sampler evaluates a step twice, adds noise, or has no such term.
            UnsupportedModel: If that is the pipeline's own scheduler.
        """
        yield site.claim("noise prediction")
        mixer = _mixer(self, site)
        site.tally.reason = lambda: "no two steps computed the same branches"
        yield site.on_start(mixer.reset)
        yield site.edit_step(mixer.edit)
        yield site.edit_result(mixer.revise)


class Mixer:
    """The noise predictions of a run.

    Args:
        method: The settings.
        solver: The pipeline's scheduler.
        tally: Where it says what it did.
        behind: Whether the sample is changed behind the step, rather than the output before it.
    """

    def __init__(self, method: DualFast, solver: Solver, tally: Tally, *, behind: bool) -> None:
        self._method = method
        self._solver = solver
        self._tally = tally
        self._behind = behind
        self.reset()

    def reset(self) -> None:
        """Forget the run before."""
        self._kept: dict[int, tuple[frozenset[str], Tensor]] = {}
        self._change: Tensor | None = None
        self._steps = 0
        self._tally.change = None

    def edit(self, update: Update) -> Tensor:
        """Extrapolate, and keep the prediction."""
        self._solver.check(update.options)
        self._change = None
        step = update.step
        output: Tensor = update.output
        place = self._solver.place(update.sample, step)
        noise = self._solver.noise(output, place, step)
        rows = self._mixed(update)
        change = noise.new_zeros(noise.shape)
        for row in rows:
            change[row] = noise[row] - self._kept[row][1]
        self._keep(update, noise, rows)
        c = self._strength(step)
        if not rows or not c:
            return output
        self._steps += 1
        self._tally.change = f"extrapolated ε at {self._steps} steps, c up to {c:g}"
        if self._behind:
            self._change = change.mul_(c * self._solver.gain(step))
            return output
        edited: Tensor = output.clone()
        mixed = self._solver.from_noise(noise.add_(change, alpha=c), place, step)
        for row in rows:
            edited[row] = mixed[row].to(output.dtype)
        return edited

    def revise(self, step: Step, sample: Tensor) -> Tensor:  # noqa: ARG002
        """Add what the extrapolation changes in the first-order term."""
        if self._change is None:
            return sample
        return (sample + self._change).to(sample.dtype)

    def _mixed(self, update: Update) -> list[int]:
        """Rows that are computed as τ was."""
        if update.step.level[1] == 0.0:  # pure noise: ε is the sample itself
            return []
        return [
            row
            for row, computed in enumerate(update.computed)
            if row not in update.filled and row in self._kept and self._kept[row][0] == computed
        ]

    def _keep(self, update: Update, noise: Tensor, mixed: list[int]) -> None:
        for row, computed in enumerate(update.computed):
            stays = self._method.reference == "first" and row in mixed
            if row not in update.filled and not stays:
                self._kept[row] = (computed, noise[row].clone())

    def _strength(self, step: Step) -> float:
        """How far to extrapolate at a step."""
        if self._method.ramp == "none":
            return self._method.c
        if step.total is None:
            raise UnsupportedModel(
                f"{self._method.name}: this pipeline cuts its schedule where no public call shows "
                "it, so a share of its steps is not known. Set ramp='none'."
            )
        return self._method.c * step.index / max(step.total - 1, 1)


def _mixer(method: DualFast, site: Site) -> Mixer:
    """The mixer for the pipeline's scheduler, if it is one that fits."""
    from accel.seams.solvers import Solver

    scheduler = site.pipe.scheduler
    with site.beside("scheduler"):
        solver = Solver(scheduler, method.name)
        return Mixer(method, solver, site.tally, behind=_behind(method, scheduler))


def _behind(method: DualFast, scheduler: object) -> bool:
    """Whether the first-order term is to be changed behind the step.

    For a linear multistep solver it is DDIM's, whatever differences are added to it; of a solver of
    first order it is all there is, and its output is changed.

    Raises:
        UnsupportedModel: If its first-order term is not that, or it takes its steps again.
    """
    from accel.seams.solvers import ONE_STEP, REDONE
    from samplers.base import SolverScheduler
    from samplers.multistep_scheduler import MultistepScheduler
    from samplers.olss_scheduler import OLSSScheduler

    name = type(scheduler).__name__
    if isinstance(scheduler, OLSSScheduler):
        raise UnsupportedModel(
            f"{name} takes steps fitted to the network's own outputs: leave {method.name} out."
        )
    if method.target == "all" or name in ONE_STEP:
        return False
    if isinstance(scheduler, SolverScheduler) and not isinstance(scheduler, MultistepScheduler):
        raise UnsupportedModel(
            f"{method.name}: the first-order term of {name} is not DDIM's. Set target='all'."
        )
    if name in REDONE:
        raise UnsupportedModel(
            f"{method.name}: {name} takes each step again from the sample before it, which undoes "
            "a change of its first-order term. Set target='all', or put samplers.UniPC into the "
            "plan."
        )
    if getattr(scheduler, "config", {}).get("thresholding"):
        raise UnsupportedModel(
            f"{method.name}: {name} clips its predictions (thresholding), so its first-order term "
            "is not known from here. Set target='all'."
        )
    return True
