"""SA-Solver: stochastic Adams steps, with noise where it does most good.

Xue et al., arXiv 2309.05019, section 5. For every τ(t) ≥ 0 there is an SDE with the marginals of
the sampling ODE; over a step with constant τ it is the one of `samplers.adams` with η = τ². The
steps with two nodes use the authors' simplification (their appendix, "bh1" here).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, model_validator

from samplers.sampler import Sampler

if TYPE_CHECKING:
    from samplers.base import SolverScheduler


class SASolver(Sampler):
    """Solve an SDE with as much noise as ``tau`` says, by predictor and corrector.

    Noise on the way repairs errors of the earlier steps, and so gains with more steps (20 and
    above); with few steps use ``tau=0``, which is a solver of the ODE. A sample whose output was
    filled in by a cache is not corrected at that step.
    """

    name: ClassVar[str] = "samplers.SASolver"
    source: ClassVar[str] = "arXiv 2309.05019, section 5"

    predictor_order: Literal[1, 2, 3] = Field(
        default=2, description="how many predictions the predictor uses"
    )
    corrector_order: Literal[0, 2, 3, 4] = Field(
        default=2,
        description="how many predictions the corrector uses, the new one counted; 0: none",
    )
    tau: float = Field(
        default=1.0,
        ge=0.0,
        le=2.0,
        description="noise on the way where noise is added: 0 is the ODE, 1 the ancestral SDE",
    )
    tau_from: float = Field(
        default=0.8,
        ge=0.0,
        le=1.0,
        description="where noise begins, as a share of the training noise levels (1: pure noise)",
    )
    tau_to: float = Field(
        default=0.2, ge=0.0, le=1.0, description="where noise ends, as the same share"
    )
    lower_order_final: bool = Field(
        default=True, description="end with orders …, 2, 1, whatever the number of steps"
    )

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.tau_from < self.tau_to:
            raise ValueError(
                f"tau_from ({self.tau_from:g}) must not be below tau_to ({self.tau_to:g}): a run "
                "goes from noise to data"
            )
        return self

    @classmethod
    def scheduler_class(cls) -> type[SolverScheduler]:
        """`samplers.SASolverScheduler`."""
        from samplers.sa_solver_scheduler import SASolverScheduler

        return SASolverScheduler

    def summary(self) -> str:
        """Orders and noise."""
        orders = f"predictor {self.predictor_order}, corrector {self.corrector_order}"
        return f"{orders}, tau {self.tau:g}"
