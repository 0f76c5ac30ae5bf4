"""DPM-Solver-v3: a multistep solver in the parametrization that fits a network best.

With measured statistics l, s and b of a network (`samplers.ems`) the noise prediction is split into
a linear part, ``l·x``, and the rest ``f = (σε − l·x)/α``, whose change is taken to be ``s·f + b``.
Both are integrated exactly; only what is left, the change of

    ``g(λ) = e^{−∫s}·f(λ) − ∫ e^{−∫s}·b``

(integrals from the start of the step), is interpolated by a polynomial in λ. With l = 1, s = b = 0
that is DPM-Solver++, with l = 0, s = −1, b = 0 the exponential integrator on ε.

Source: Zheng et al., arXiv 2310.13268, sections 3.1 and 3.3, appendices B and G.

Noise levels and statistics in, weights out; all integrals are relative to the start of the step, so
that no exponent grows with the range of λ. Nothing here imports torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from accel.attach import Site, Undo
from accel.errors import BadInput, UnsupportedModel
from samplers.ems_numbers import Scalars
from samplers.sampler import Sampler

if TYPE_CHECKING:
    from samplers.base import SolverScheduler
    from samplers.ems import EMS

Corrector = Literal["pseudo", "same", "none"]


class DPMSolverV3(Sampler):
    """Solve with what was measured of the network: the same error in fewer steps.

    Needs statistics from `accel calibrate ems`, which hold for one network, noise process and
    guidance, and are refused for another. A flow that starts at pure noise takes two steps of first
    order, of which the corrector mends the first; a run that ends at zero noise ends with the clean
    sample that the network predicts.
    """

    name: ClassVar[str] = "samplers.DPMSolverV3"
    source: ClassVar[str] = "arXiv 2310.13268"

    numbers: Scalars | None = Field(
        default=None, description="statistics of one number a level, in the plan itself"
    )
    statistics: Path | None = Field(
        default=None,
        description="file of statistics, for a number a channel or element; in a plan file "
        "relative to it",
    )
    sha256: str = Field(
        default="",
        pattern="^([0-9a-f]{64})?$",
        description="what the content of that file hashes to; empty: not checked",
    )
    order: Literal[1, 2, 3, 4] = Field(
        default=2, description="order of the predictor; the authors use 2 with guidance, 3 without"
    )
    pseudo: bool = Field(
        default=False,
        description="take each derivative of the predictor from its nearest points alone: for 5 "
        "steps; of second order at most",
    )
    corrector: Corrector = Field(
        default="pseudo",
        description="redo each step with the evaluation at its end, which costs none: pseudo with "
        "one order more, each derivative from its nearest points; same order; none",
    )
    corrector_low: float = Field(
        default=0.0, ge=0.0, description="σ/α at and below which nothing is corrected"
    )
    corrector_high: float = Field(
        default=math.inf,
        gt=0.0,
        description="σ/α above which nothing is corrected; 1.6 corrects the later half of the "
        "timesteps",
    )
    lower_order_final: bool = Field(default=True, description="end with orders …, 2, 1")

    @classmethod
    def scheduler_class(cls) -> type[SolverScheduler]:
        """`samplers.DPMSolverV3Scheduler`."""
        from samplers.dpmsolver_v3_scheduler import DPMSolverV3Scheduler

        return DPMSolverV3Scheduler

    def summary(self) -> str:
        """Order and corrector."""
        return f"order {self.order}, corrector {self.corrector}"

    def settings(self) -> dict[str, Any]:
        """The solver's settings, the statistics among them."""
        fields = self.model_dump(exclude={"numbers", "sha256"})
        given = self.statistics if self.numbers is None else self.numbers.model_dump(mode="json")
        return fields | {"statistics": str(given) if isinstance(given, Path) else given}

    def ems(self) -> EMS:
        """The statistics.

        Raises:
            BadInput: If there are none, or two, or their file is not what it should be.
        """
        from samplers.ems import EMS, read

        if (self.numbers is None) == (self.statistics is None):
            raise BadInput(
                f"{self.name} needs statistics of the model, as numbers or as the path of a file; "
                f"found {'neither' if self.numbers is None else 'both'}. Run `accel calibrate "
                "ems`: the plan that it writes has them."
            )
        if self.numbers is not None:
            return EMS.from_scalars(self.numbers)
        assert self.statistics is not None
        return read(self.statistics, self.sha256)

    def attach(self, site: Site) -> Iterator[Undo]:
        """Put the scheduler in place, and look at the guidance of each run.

        Raises:
            UnsupportedModel: If the statistics are missing, or those of another model.
        """
        from accel.seams.pipelines import guidance_of
        from samplers.fingerprint import model_digest

        try:
            measured = self.ems().measured
            if measured is not None:
                measured.check(self.name, model=model_digest(site.pipe))
        except BadInput as error:
            raise UnsupportedModel(str(error)) from error
        yield from super().attach(site)
        site.pipe.scheduler.compared = True
        if measured is not None:

            def look() -> None:
                found = tuple(sorted(guidance_of(site.pipe).items()))
                measured.check(self.name, guidance=found)

            yield site.on_start(look)
