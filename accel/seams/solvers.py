"""How a scheduler reads the output that it is given: as a slope, and as a clean sample.

Every noise process that diffusers' samplers follow is, in the right units, the line
``x̄ = x0 + s·f`` with slope ``f = dx̄/ds``: for a flow x̄ is the sample, s its σ and f the velocity;
otherwise x̄ is the sample over α, s is σ/α and f is ε.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from accel.errors import UnsupportedModel
from accel.trajectory import Step

if TYPE_CHECKING:
    from torch import Tensor

DETERMINISTIC = (
    "CogVideoXDDIMScheduler",
    "DDIMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "LMSDiscreteScheduler",
    "UniPCMultistepScheduler",
)
"""Stock schedulers that evaluate once a step and add no noise, as long as nothing asks for it.

Ours say it of themselves, by ``follows_ode``.
"""

OVER_SIGNAL = ("EulerDiscreteScheduler", "LMSDiscreteScheduler")
"""Schedulers whose sample is over α already."""

ONE_STEP = (
    "CogVideoXDDIMScheduler",
    "DDIMScheduler",
    "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
)
"""Those of them that look at one output alone."""

REDONE = ("UniPCMultistepScheduler",)
"""Those that take a step again, from the sample before it, once its end has been evaluated."""

NOISE = ("eta", "s_churn")
"""Settings and options of a step that add noise where they are not 0."""

WAY_OUT = (
    "Put samplers.DPMSolverPP into the plan, or use one of "
    f"{', '.join(DETERMINISTIC)}; or use cache.EasyCache."
)


class Solver:
    """One scheduler, as the solver of ``dx̄/ds = f``.

    Args:
        scheduler: The pipeline's scheduler.
        method: Name of the method that needs it, for the refusal.
        way_out: What to do instead, for the refusal.

    Raises:
        UnsupportedModel: If it evaluates a step more than once, adds noise, or is not known.
    """

    def __init__(
        self,
        scheduler: Any,
        method: str = "A method coupled to the solver",
        way_out: str = WAY_OUT,
    ) -> None:
        self._method, self._way_out = method, way_out
        self._name = type(scheduler).__name__
        self._config = scheduler.config
        order = getattr(scheduler, "order", 1)
        if order != 1:
            self._refuse(f"evaluates the network {order} times a step")
        if not getattr(scheduler, "follows_ode", self._name in DETERMINISTIC):
            self._refuse("adds noise, evaluates a step twice, or is not known")
        stochastic = self._config.get("stochastic_sampling")
        if stochastic or str(self._config.get("algorithm_type")).startswith("sde"):
            self._refuse("adds noise (algorithm_type or stochastic_sampling of its config)")
        self.check(self._config)
        self._over_signal = self._name in OVER_SIGNAL
        self._sign = -1.0 if self._config.get("invert_sigmas") else 1.0  # Mochi: x0 − ε

    def check(self, options: Mapping[str, Any]) -> None:
        """Refuse options of a step that add noise."""
        for name in NOISE:
            if options.get(name):
                self._refuse(f"adds noise ({name} = {options[name]:g})")

    def _refuse(self, what: str) -> None:
        raise UnsupportedModel(
            f"{self._method} does not fit: {self._name} {what}, and it needs a scheduler that "
            f"evaluates once a step and adds no noise. {self._way_out}"
        )

    def time(self, step: Step, ahead: int = 0) -> float:
        """The noise s at a step, or at one of the steps that follow it."""
        sigma, _, noise = step.levels.at(step.position + ahead)
        return noise if _flows(step) else sigma

    def clock(self, step: Step) -> float:
        """The time, rising, in which f changes evenly: −σ of a flow, the log-SNR otherwise."""
        return -self.time(step) if _flows(step) else step.time

    def place(self, sample: Tensor, step: Step, ahead: int = 0) -> Tensor:
        """x̄ in float32: a copy."""
        _, alpha, _ = step.levels.at(step.position + ahead)
        whole = _flows(step) or self._over_signal
        return sample.float() * (1.0 if whole else 1.0 / alpha)

    def sample(self, place: Tensor, step: Step, ahead: int = 0) -> Tensor:
        """The latents at x̄, as this scheduler keeps them: `place` undone."""
        _, alpha, _ = step.levels.at(step.position + ahead)
        return place if _flows(step) or self._over_signal else place * alpha

    def given(self, place: Tensor, step: Step) -> Tensor:
        """What the network is given at x̄: α·x0 + σ·ε."""
        _, alpha, _ = step.level
        return place if _flows(step) else place * alpha

    def slope(self, output: Tensor, place: Tensor, step: Step) -> Tensor:
        """The slope f in float32, from the output after guidance: a copy."""
        value, (_, alpha, noise) = output.float(), step.level
        prediction = step.levels.prediction
        if prediction == "flow_prediction":
            return value * self._sign
        if prediction == "v_prediction":
            return value * alpha + place * (noise * alpha)
        if prediction == "sample":
            return (place - value) / self.time(step)
        return value.clone()

    def output(self, slope: Tensor, place: Tensor, step: Step) -> Tensor:
        """The output, in float32, that this scheduler reads as slope f at x̄."""
        _, alpha, noise = step.level
        prediction = step.levels.prediction
        if prediction == "flow_prediction":
            return slope * self._sign
        if prediction == "v_prediction":
            return slope * alpha - self.clean(slope, place, step) * noise
        return self.clean(slope, place, step) if prediction == "sample" else slope

    def clean(self, slope: Tensor, place: Tensor, step: Step) -> Tensor:
        """x0 = x̄ − s·f."""
        return place - slope * self.time(step)

    def noise(self, output: Tensor, place: Tensor, step: Step) -> Tensor:
        """The prediction of ε in float32, from the output after guidance: a copy."""
        slope = self.slope(output, place, step)
        _, alpha, _ = step.level
        return place + slope * alpha if _flows(step) else slope

    def from_noise(self, noise: Tensor, place: Tensor, step: Step) -> Tensor:
        """The output, in float32, that this scheduler reads as ε; of a flow where α > 0."""
        _, alpha, _ = step.level
        slope = (noise - place) / alpha if _flows(step) else noise
        return self.output(slope, place, step)

    def gain(self, step: Step) -> float:
        """What one more ε adds to the sample of the next step, in first order; α > 0."""
        ratio, _, _ = step.level
        after, alpha, _ = step.levels.at(step.position + 1)
        return (after - ratio) * (1.0 if self._over_signal else alpha)

    def toward(self, clean: Tensor, place: Tensor, step: Step) -> Tensor:
        """The slope at x̄ whose clean sample is ``clean``."""
        return (place - clean) / self.time(step)


def _flows(step: Step) -> bool:
    return step.levels.prediction == "flow_prediction"
