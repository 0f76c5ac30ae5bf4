"""How a scheduler is asked for noise levels of one's own choice, in its public ``set_timesteps``.

Levels are σ/α, descending, ∞ at the pure noise that a flow starts from; where the run ends is the
scheduler's own business.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from accel.errors import BadInput, UnsupportedModel
from accel.trajectory import Levels

BY_SIGMAS = ("EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler", "UniPCMultistepScheduler")
"""Stock schedulers that take noise levels (UniPC: those of a flow only)."""

BY_TIMESTEPS = (
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
)
"""Stock schedulers that take whole timesteps of a variance-preserving process only."""

CLOSED = ("EulerDiscreteScheduler",)
"""Schedulers whose list ends with where the run ends."""

RAMPS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")
"""Settings that choose levels of their own."""

PURE = 1000.0
"""Levels σ/α from here on are pure noise: the start of a flow, which some schedulers nudge below
it, and of tables without signal at their end."""

TOLERANCE = 2e-3
"""Relative error of ``(σ/α)/(1 + σ/α)``, and of its complement, that rounding may make."""


class Lists:
    """Asks one scheduler for lists of levels.

    Args:
        scheduler: Ours, or one of diffusers'.
        method: Name of the method that needs it, for refusals.

    Raises:
        UnsupportedModel: If the scheduler takes no list, or its config chooses the levels.
    """

    def __init__(self, scheduler: Any, method: str) -> None:
        self.scheduler = scheduler
        self.method = method
        self.name = type(scheduler).__name__
        levels = Levels(scheduler)
        self.flow = levels.prediction == "flow_prediction"
        self.ours = hasattr(scheduler, "follows_ode")
        served = self.ours or self.name in (BY_SIGMAS + (() if self.flow else BY_TIMESTEPS))
        if not served or (self.name == "UniPCMultistepScheduler" and not self.flow):
            process = "a flow" if self.flow else "such a model"
            raise UnsupportedModel(
                f"{method} does not fit: it needs a scheduler that takes a list of noise levels; "
                f"for {process} {self.name} takes none, or is not known. Put a sampler such as "
                "samplers.DPMSolverPP into the plan, or use one of "
                f"{', '.join(BY_SIGMAS[1:] if self.flow else (*BY_TIMESTEPS, *BY_SIGMAS[:1]))}."
            )
        ramps = [name for name in RAMPS if scheduler.config.get(name)]
        if ramps:
            raise UnsupportedModel(
                f"{method} does not fit: {ramps[0]} of the {self.name} chooses the noise levels "
                f"as well. Set {ramps[0]}=False in the scheduler's config, or leave {method} out."
            )

    @property
    def terminal(self) -> bool:
        """Whether the last level is a fixed one: the config stretches every list to it."""
        return bool(self.flow and self.scheduler.config.get("shift_terminal"))

    def now(self) -> tuple[list[float], float]:
        """The levels of the evaluations of the present schedule, and where it ends."""
        levels = Levels(self.scheduler)
        count = len(levels.timesteps)
        found = [levels.at(i)[0] for i in range(count)]
        if found[0] >= PURE:
            found[0] = math.inf
        return found, levels.at(count)[0] if len(levels.sigmas) > count else 0.0

    def known(self) -> tuple[float, float]:
        """The noisiest and the cleanest level that the network was trained on, pure noise aside."""
        if self.flow:
            steps = int(self.scheduler.config.num_train_timesteps)
            return steps - 1.0, 1.0 / (steps - 1.0)
        table = self.table()
        return max(level for level in table if level < PURE), table[0]

    def table(self) -> list[float]:
        """σ/α of each training timestep, ascending: of a variance-preserving process."""
        products = self.scheduler.alphas_cumprod.tolist()
        return [math.sqrt((1.0 - product) / max(product, 1e-12)) for product in products]

    def arguments(self, levels: Sequence[float], given: Mapping[str, Any]) -> dict[str, Any]:
        """What to ask ``set_timesteps`` for, so that these levels come out.

        A shift that the scheduler will apply (also a dynamic one, by ``mu``) is undone beforehand.

        Args:
            levels: σ/α of the evaluations.
            given: The arguments of the pipeline's own call, by name.

        Raises:
            BadInput: If the network knows no such levels, or two fall on one timestep.
            UnsupportedModel: If the config fixes the last level, and the list ends at another.
        """
        kept = {name: given[name] for name in ("device", "mu") if name in given}
        if self.flow:
            return self._of_flow([_share(level) for level in levels], given, kept)
        table = self.table()
        inside = [self._noisiest if math.isinf(level) else level for level in levels]
        if inside[0] > self._noisiest * 1.01:
            raise BadInput(
                f"{self.method} starts at σ/α = {inside[0]:g}, but this network knows nothing "
                f"noisier than {self._noisiest:g}: choose a schedule for it."
            )
        if self.name in BY_TIMESTEPS:
            return {"timesteps": self._timesteps(inside, table), **kept}
        end = [self._end()] if self.name in CLOSED else []
        return {"sigmas": np.array([*inside, *end]), **kept}

    def check(self, levels: Sequence[float]) -> None:
        """Compare the schedule that came of it.

        Raises:
            UnsupportedModel: If it is another one.
        """
        found, _ = self.now()
        asked = list(levels)
        if not self.flow:
            found, asked = ([min(x, self._noisiest) for x in row] for row in (found, asked))
        same = len(found) == len(asked) and all(map(self._same, found, asked))
        if not same:
            raise UnsupportedModel(
                f"{self.method} asked the {self.name} for σ/α = {_shown(asked)}; it made "
                f"{_shown(found)} of it. Put a sampler such as samplers.DPMSolverPP into the plan."
            )

    def _same(self, found: float, asked: float) -> bool:
        if self.name in BY_TIMESTEPS:
            table = self.table()
            return abs(_place(table, found) - _place(table, asked)) <= 0.51
        share = _share(asked)
        return abs(_share(found) - share) <= TOLERANCE * min(share, max(1.0 - share, 5e-3))

    def _of_flow(
        self, sigmas: list[float], given: Mapping[str, Any], kept: dict[str, Any]
    ) -> dict[str, Any]:
        terminal = self.scheduler.config.get("shift_terminal")
        if terminal and abs(sigmas[-1] - terminal) > TOLERANCE * terminal:
            raise UnsupportedModel(
                f"{self.method} ends with an evaluation at σ = {sigmas[-1]:g}, but this scheduler "
                f"stretches every schedule to {terminal:g} (shift_terminal). Use a schedule that "
                "ends there, such as one that was searched on this pipeline."
            )
        unshifted = [self._unshifted(sigma, given.get("mu")) for sigma in sigmas]
        asked: dict[str, Any] = {"sigmas": np.array(unshifted), **kept}
        if given.get("timesteps") is not None and given.get("sigmas") is not None:
            # CogView4: the network is told the level before the shift
            asked["timesteps"] = asked["sigmas"] * self.scheduler.config.num_train_timesteps
        return asked

    def _unshifted(self, sigma: float, mu: float | None) -> float:
        config = self.scheduler.config
        if config.get("use_dynamic_shifting"):
            if mu is None:
                return sigma  # the scheduler refuses by itself
            linear = config.get("time_shift_type") == "linear"
            factor = float(mu) if linear else math.exp(float(mu))
        else:
            own = hasattr(type(self.scheduler), "shift")  # diffusers' Euler: what set_shift gave
            factor = self.scheduler.shift if own else config.get("shift", 1.0)
            factor = float(config.get("flow_shift", factor))
        return sigma / (factor - (factor - 1.0) * sigma)

    def _timesteps(self, levels: Sequence[float], table: list[float]) -> list[int]:
        times = [round(_place(table, level)) for level in levels]
        for i, (one, other) in enumerate(itertools.pairwise(times)):
            if other >= one:
                raise BadInput(
                    f"{self.method}: the {self.name} takes whole timesteps, and σ/α = "
                    f"{levels[i]:g} and {levels[i + 1]:g} are both timestep {one}. Ask for fewer "
                    "steps, or put samplers.DPMSolverPP into the plan, which takes noise levels."
                )
        return times

    @property
    def _noisiest(self) -> float:
        return self.table()[-1]

    def _end(self) -> float:
        last = self.scheduler.config.get("final_sigmas_type", "zero") == "sigma_min"
        return self.table()[0] if last else 0.0


def bound(
    method: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[dict[str, Any], int]:
    """The arguments of a ``set_timesteps`` call by name, and for how many steps it asks.

    Raises:
        BadInput: If they say no number of steps.
    """
    given = dict(inspect.signature(method).bind(*args, **kwargs).arguments)
    given |= given.pop("kwargs", {})
    for name in ("num_inference_steps", "sigmas", "timesteps"):
        value = given.get(name)
        if value is not None:
            return given, int(value) if name == "num_inference_steps" else len(value)
    raise BadInput("set_timesteps was called without a number of steps: pass one.")


def _share(level: float) -> float:
    """σ of a flow whose σ/α is ``level``."""
    return 1.0 if math.isinf(level) else level / (1.0 + level)


def _place(table: list[float], level: float) -> float:
    """The (fractional) timestep at which an ascending table has a level, linear in ln σ/α."""
    return float(np.interp(math.log(max(level, 1e-12)), np.log(table), np.arange(len(table))))


def _shown(levels: Sequence[float]) -> str:
    return ", ".join(f"{level:.4g}" for level in levels)
