"""What every sampler that goes in a plan shares: it puts its scheduler in the pipeline's place."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Self

from accel.attach import Accelerator, Site, Undo
from accel.errors import BadInput, UnsupportedModel

if TYPE_CHECKING:
    from samplers.base import SolverScheduler

TOKEN_TIMES = ("LTXConditionPipeline", "SanaWMPipeline")
"""Pipelines in which each token has a noise level of its own: no solver here follows them."""


class Sampler(Accelerator):
    """Replaces the pipeline's scheduler by one of this package.

    The noise levels stay those of the pipeline's own scheduler, except where that trims the ends
    of a flow (UniPC, DPM-Solver). The fields are the solver's settings, under the same names. A
    scheduler that corrects has ``skip_corrector(rows)``: a plan calls it before a step whose output
    was not computed for some rows of the latents (`accel.seams.correctors`).
    """

    layer: ClassVar[str] = "sampler"
    seam: ClassVar[str] = "scheduler"
    supports: ClassVar[str] = "ε, v, x0 and flow prediction; no noise level per token"
    approximates: ClassVar[bool] = False

    @classmethod
    @abstractmethod
    def scheduler_class(cls) -> type[SolverScheduler]:
        """The scheduler that it attaches; imports torch."""

    @abstractmethod
    def summary(self) -> str:
        """What the report says of the solver, as in ``order 2, eta 1``."""

    @classmethod
    def off(cls) -> Self | None:
        """A sampler is off when it is left out: some scheduler has to be there."""
        return None

    def why_off(self) -> str | None:
        """It always does something."""
        return None

    def settings(self) -> dict[str, Any]:
        """The solver's settings, as its scheduler takes them."""
        return self.model_dump()

    def attach(self, site: Site) -> Iterator[Undo]:
        """Put the scheduler in the place of the pipeline's own."""
        pipeline, before = type(site.pipe).__name__, site.pipe.scheduler
        if pipeline in TOKEN_TIMES:
            raise UnsupportedModel(
                f"{pipeline} gives each token a noise level of its own, and {self.name} follows "
                f"one for all: leave {self.name} out of the plan."
            )
        try:
            scheduler = self.scheduler_class().from_config(before.config, **self.settings())
        except BadInput as error:
            raise UnsupportedModel(f"{self.name} on {type(before).__name__}: {error}") from error
        yield site.claim(self.seam)
        yield site.swap_scheduler(scheduler)
        site.tally.change = f"{self.summary()} in place of {type(before).__name__}"
