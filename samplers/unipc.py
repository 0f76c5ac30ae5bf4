"""UniPC: a predictor and a corrector of one form, without evaluations for the corrector.

Zhao et al., arXiv 2302.04867, section 3 and appendix B. UniP-p is the exponential Adams-Bashforth
step through p predictions, UniC-p the Adams-Moulton step through p predictions and one at its end;
the choice of B(h) remains only where the authors put ½ in the place of the solution of a linear
system, UniP-2 and UniC-1. Everywhere else B(h) cancels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from samplers.sampler import Sampler

if TYPE_CHECKING:
    from samplers.base import SolverScheduler

Variant = Literal["bh1", "bh2"]


class UniPC(Sampler):
    """Predict, then correct with the evaluation that the next step needs anyway.

    With the corrector the order is one higher than ``order`` says. A sample whose output was
    filled in by a cache is not corrected at that step.
    """

    name: ClassVar[str] = "samplers.UniPC"
    source: ClassVar[str] = "arXiv 2302.04867, section 3"

    order: Literal[1, 2, 3] = Field(
        default=2,
        description="order of the predictor; the authors use 2 with guidance, 3 without; at "
        "guidance 7.5 and 5 steps they report DPM-Solver++ ahead",
    )
    variant: Variant = Field(
        default="bh2",
        description="how UniP-2 and UniC-1 weigh their difference: bh1 is B(h) = h, bh2 is "
        "B(h) = 1 − e^(−h)",
    )
    corrector: bool = Field(default=True, description="whether steps are corrected")
    lower_order_final: bool = Field(
        default=True, description="end with orders …, 2, 1, whatever the number of steps"
    )

    @classmethod
    def scheduler_class(cls) -> type[SolverScheduler]:
        """`samplers.UniPCScheduler`."""
        from samplers.unipc_scheduler import UniPCScheduler

        return UniPCScheduler

    def summary(self) -> str:
        """Order and corrector."""
        return f"order {self.order}" + ("" if self.corrector else ", no corrector")
