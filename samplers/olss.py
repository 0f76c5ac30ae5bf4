"""OLSS: every state of a short run as a fitted sum of the noise and the network's outputs so far.

Duan et al., "Optimal Linear Subspace Search: Learning to Construct Fast and High-Quality Schedulers
for Diffusion Models", arXiv 2305.14677, sections 3.2 and 3.3. A run of K evaluations keeps its
noise x_T and all outputs; step k goes to ``w_k·x_T + Σ_{q≤k} c_kq·output_q`` with scalars that
were fitted by least squares to a longer run (`samplers.olss_calibration`). The form is that of the
non-stationary solvers of arXiv 2403.01329 (BNS), which find scalars and times by gradients
instead; here these may refine the least squares (`samplers.olss_refine`).

The outputs are kept as the network gives them. Fitting ε instead would give the same states: each
state is itself a sum of these terms, so that outputs, ε and x0 span the same space.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import Field, FiniteFloat, model_validator

from accel.attach import Fitting, Site, Undo
from accel.errors import BadInput, UnsupportedModel
from samplers.fingerprint import Fingerprint, model_digest
from samplers.prediction import Level, Prediction, data_weights
from samplers.sampler import Sampler

if TYPE_CHECKING:
    from samplers.base import SolverScheduler

Row = tuple[float, ...]
"""The scalars of one step: of x_T, then of the outputs, the oldest first."""


class OLSS(Sampler):
    """Take calibrated steps: sums, fitted to a long run, of the noise and of all outputs so far.

    Made by `accel calibrate olss`, for one model, guidance, schedule and number of steps: others
    are refused; with ``--set refine=N``, calibrated by gradients as well (the form of BNS). With
    ``--set evaluations=K``, a call of N steps is answered in K. A run starts from pure noise and
    makes all its steps; a cache or a guidance rule on top changes the outputs that the sums were
    fitted to, so fit them with it (`accel.tune` does) or leave it out.
    """

    name: ClassVar[str] = "samplers.OLSS"
    supports: ClassVar[str] = "runs from pure noise, of the number of steps it was calibrated for"
    source: ClassVar[str] = "arXiv 2305.14677, section 3"

    noise: tuple[FiniteFloat, ...] = Field(
        default=(), description="weight of the initial noise in each step; without any it is off"
    )
    outputs: tuple[tuple[FiniteFloat, ...], ...] = Field(
        default=(),
        description="weights of the outputs in each step, the oldest first: k + 1 in step k",
    )
    path_timesteps: tuple[FiniteFloat, ...] = Field(
        default=(),
        description="what the network is told at each step; without any, the pipeline's schedule",
    )
    path_sigmas: tuple[FiniteFloat, ...] = Field(
        default=(),
        description="noise level at each step, and at the end: σ of a flow, σ/α otherwise",
    )
    asked_sigmas: tuple[FiniteFloat, ...] = Field(
        default=(),
        description="noise levels of the schedule in whose place the path is, which may be of more "
        "steps; others are refused. Without any, none is",
    )
    refined: int = Field(
        default=0,
        ge=0,
        description="steps of gradient descent behind these numbers, after the least squares; it "
        "only tells",
    )
    made_for: Fingerprint | None = Field(
        default=None, description="what it was calibrated on; without it, nothing is compared"
    )

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        count = len(self.noise)
        if [len(row) for row in self.outputs] != list(range(1, count + 1)):
            raise BadInput(
                f"{count} weights of the noise need as many rows of weights of the outputs, of "
                f"1, 2, … numbers; found rows of {[len(row) for row in self.outputs]}."
            )
        lengths = {"path_timesteps": 0, "path_sigmas": 1}
        for name, extra in lengths.items():
            found = len(getattr(self, name))
            if found and found != count + extra:
                raise BadInput(f"{name} has {found} numbers; {count} steps need {count + extra}.")
        if bool(self.path_timesteps) != bool(self.path_sigmas):
            raise BadInput("path_timesteps and path_sigmas describe one path: give both, or none.")
        if not self.path_sigmas and len(self.asked_sigmas) not in (0, count + 1):
            raise BadInput(
                f"asked_sigmas has {len(self.asked_sigmas)} numbers; {count} steps without a path "
                f"of their own need {count + 1}."
            )
        return self

    @classmethod
    def scheduler_class(cls) -> type[SolverScheduler]:
        """`samplers.OLSSScheduler`."""
        from samplers.olss_scheduler import OLSSScheduler

        return OLSSScheduler

    @classmethod
    def off(cls) -> Self:
        """No steps."""
        return cls()

    def why_off(self) -> str | None:
        """Without steps there is nothing to take."""
        return None if self.noise else "it has no steps: make some with `accel calibrate olss`"

    def summary(self) -> str:
        """How many steps, and whether gradients refined them."""
        by = f", refined by {self.refined} steps of gradients" if self.refined else ""
        asked = max(len(self.asked_sigmas) - 1, 0)
        of = f" in place of {asked}" if asked > len(self.noise) else ""
        return f"{len(self.noise)} calibrated steps{of}{by}"

    @classmethod
    def fitter(cls, pipe: Any, calls: Sequence[Mapping[str, Any]]) -> Fitting:
        """Fits the steps to the pipeline's own run, beside guidance rules."""
        from samplers.olss_tuning import Fitter

        return Fitter(pipe, calls)

    @property
    def rows(self) -> tuple[Row, ...]:
        """The scalars of each step."""
        return tuple((w, *row) for w, row in zip(self.noise, self.outputs, strict=True))

    def attach(self, site: Site) -> Iterator[Undo]:
        """Put the scheduler in the place of the pipeline's own."""
        if self.made_for is not None:
            try:
                self.made_for.check(self.name, model=model_digest(site.pipe))
            except BadInput as error:
                raise UnsupportedModel(str(error)) from error
        yield site.claim("all steps of the schedule")
        yield from super().attach(site)
        yield site.on_start(lambda: self._check_guidance(site))

    def _check_guidance(self, site: Site) -> None:
        from accel.seams.pipelines import guidance_of

        found = tuple(sorted(guidance_of(site.pipe).items()))
        if self.made_for is not None and found:
            self.made_for.check(self.name, guidance=found)


def first_order(prediction: Prediction, here: Level, there: Level) -> tuple[float, float]:
    """Weights ``(a, b)`` of the step ``a·x + b·output`` of first order: DDIM, Euler for a flow."""
    of_x, of_output = data_weights(prediction, here)
    kept = there.sigma / here.sigma
    gain = there.alpha - kept * here.alpha
    return kept + gain * of_x, gain * of_output


def continued(rows: Sequence[Row], step: tuple[float, float]) -> Row:
    """The scalars that take the step ``a·x + b·output`` from the state that ``rows`` end at."""
    a, b = step
    here = rows[-1] if rows else (1.0,)
    return (*(a * weight for weight in here), b)


def first_order_rows(prediction: Prediction, levels: Sequence[Level]) -> tuple[Row, ...]:
    """The scalars of a whole run of first order over these levels."""
    rows: list[Row] = []
    for here, there in pairwise(levels):
        rows.append(continued(rows, first_order(prediction, here, there)))
    return tuple(rows)
