"""The rectified flow: grids of noise levels as the stock flow scheduler makes them.

Public noise levels are σ itself (``α = 1 − σ``); the network is told ``σ·num_train_timesteps``
unless the caller gives timesteps.

Source: arXiv 2210.02747, 2403.03206 section 5.3.2 (shift); 2501.00103 (terminal stretch, LTX).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from accel.errors import BadInput
from samplers.prediction import Level, flow_level
from samplers.schedule import (
    RAMPS,
    Floats,
    Grid,
    Request,
    chosen_ramp,
    descending,
    dynamic_shift,
    moved,
    shift,
    stretch,
)


@dataclass(frozen=True, kw_only=True)
class FlowNoise:
    """A rectified flow and its grid. Field names are those of diffusers configs.

    Attributes:
        num_train_timesteps: What the network is told at σ = 1.
        shift: Static shift of the levels toward noise.
        use_dynamic_shifting: Shift by ``mu`` (an argument of ``set_timesteps``) instead.
        time_shift_type: ``exponential`` (by e^mu) or ``linear`` (by mu).
        base_shift: For the pipeline that computes mu: its value at ``base_image_seq_len`` tokens.
        max_shift: For the pipeline that computes mu: its value at ``max_image_seq_len`` tokens.
        base_image_seq_len: See ``base_shift``.
        max_image_seq_len: See ``max_shift``.
        shift_terminal: Stretch the levels so that the last evaluation is at this one.
        invert_sigmas: The network is told ``1 − σ`` and predicts ``x0 − ε`` (Mochi).
        timestep_spacing: Without ``sigmas=``: ``linspace`` ends with an evaluation at the lowest
            training level (FlowMatchEuler), ``trailing`` one stride above it (UniPC).
        use_karras_sigmas: Levels uniform in σ^(1/7).
        use_exponential_sigmas: Levels uniform in ln σ.
        use_beta_sigmas: Levels at quantiles of Beta(0.6, 0.6).
        sigma_min: Lowest level of such a ramp; that of the unramped grid where ``None``.
        sigma_max: Highest level of such a ramp; that of the unramped grid where ``None``.
    """

    num_train_timesteps: int = 1000
    shift: float = 1.0
    use_dynamic_shifting: bool = False
    time_shift_type: Literal["exponential", "linear"] = "exponential"
    base_shift: float | None = 0.5
    max_shift: float | None = 1.15
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096
    shift_terminal: float | None = None
    invert_sigmas: bool = False
    timestep_spacing: Literal["linspace", "trailing"] = "linspace"
    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    use_beta_sigmas: bool = False
    sigma_min: float | None = None
    sigma_max: float | None = None

    def __post_init__(self) -> None:
        chosen_ramp(vars(self))
        if self.time_shift_type not in ("exponential", "linear"):
            raise BadInput(
                f"time_shift_type is {self.time_shift_type!r}; it must be exponential or linear."
            )
        if self.timestep_spacing not in ("linspace", "trailing"):
            raise BadInput(
                f"timestep_spacing is {self.timestep_spacing!r}; for a flow it must be linspace "
                "or trailing."
            )
        if not self.shift > 0 or not math.isfinite(self.shift):
            raise BadInput(f"shift is {self.shift}; it must be a finite number above 0.")

    def level(self, sigma: float) -> Level:
        """The level whose public value is ``sigma``."""
        return flow_level(1.0 - sigma if self.invert_sigmas else sigma)

    def training_grid(self) -> Grid:
        """All training levels, noisiest first; for ``scale_noise`` outside of a run."""
        return self._grid(self._training_levels(), None)

    def grid(self, asked: Request) -> Grid:
        """The noise levels of one run.

        With ``timesteps`` alone they name the levels (σ = t / num_train_timesteps) and nothing is
        shifted; with both, the levels come from ``sigmas`` and the network is told ``timesteps``.

        Raises:
            BadInput: If what is asked for contradicts the config, or repeats a level.
        """
        if asked.timesteps is not None and self.invert_sigmas:
            raise BadInput(
                "timesteps is given, but this network is told 1 − σ (invert_sigmas). Pass sigmas, "
                "the true noise levels, instead."
            )
        if asked.timesteps is not None and asked.sigmas is None:
            return self._named_by(asked.timesteps)
        levels = self._unshifted(asked.count) if asked.sigmas is None else asked.sigmas
        if levels[0] > 1 + 1e-6 or levels[-1] <= 0:
            raise BadInput(
                f"sigmas run from {levels[0]:g} to {levels[-1]:g}; those of a flow lie in (0, 1]. "
                "Leave out the final 0: it is where every run ends."
            )
        levels = self._shifted(levels, asked.mu)
        if self.shift_terminal:
            levels = stretch(levels, self.shift_terminal)
        return self._grid(self._ramped(levels), asked.timesteps)

    def at_ratio(self, ratio: float) -> Level:
        """The level with ``σ/α = ratio``."""
        return flow_level(ratio / (1.0 + ratio))

    def moved(self, grid: Grid, levels: Sequence[Level]) -> Grid:
        """The schedule of a grid, evaluated at other levels of its range.

        What the network is told follows the grid: in between linearly in λ, in which a shift of
        the levels is a shift indeed.

        Args:
            grid: N evaluations and where they end.
            levels: N levels, never rising, above zero noise.
        """
        sigmas = np.array([level.sigma for level in levels])
        publics = (1 - sigmas if self.invert_sigmas else sigmas).astype(np.float32)
        inner = [k for k, level in enumerate(grid.levels) if math.isfinite(level.lam)]
        if not inner:
            return grid
        shares = np.clip(grid.timesteps[inner] / self.num_train_timesteps, 1e-6, 1 - 1e-6)
        odds = np.interp(
            [level.lam for level in levels],
            [grid.levels[k].lam for k in inner],
            np.log(shares / (1 - shares)),
        )
        told = self.num_train_timesteps / (1 + np.exp(-odds))
        return moved(grid, publics, told.astype(np.float32), self.level)

    def _named_by(self, timesteps: NDArray[Any]) -> Grid:
        ramps = [name for name in RAMPS if getattr(self, name)]
        if ramps:
            raise BadInput(
                f"timesteps is given, but the config asks for {ramps[0]}. Drop one of the two."
            )
        if timesteps[0] > self.num_train_timesteps or timesteps[-1] <= 0:
            raise BadInput(
                f"timesteps run from {timesteps[0]:g} to {timesteps[-1]:g}; they must lie in "
                f"(0, {self.num_train_timesteps}]. Leave out the final 0."
            )
        told = timesteps.astype(np.float32)
        return self._grid(told / self.num_train_timesteps, told)

    def _training_levels(self) -> Floats:
        count = self.num_train_timesteps
        levels = np.linspace(1, count, count, dtype=np.float32)[::-1] / count
        return levels if self.use_dynamic_shifting else shift(levels, self.shift)

    def _unshifted(self, count: int) -> Floats:
        """Levels before the shift. The lowest is a *shifted* training level, as in the stock."""
        train = self.num_train_timesteps
        if self.timestep_spacing == "trailing":
            return np.linspace(1, 1 / train, count + 1)[:-1]
        levels = self._training_levels()
        return np.linspace(float(levels[0]) * train, float(levels[-1]) * train, count) / train

    def _shifted(self, levels: Floats, mu: float | None) -> Floats:
        if not self.use_dynamic_shifting:
            return shift(levels, self.shift)
        if mu is None or not math.isfinite(mu):
            raise BadInput(
                f"mu is {mu}, but this config shifts its levels by it (use_dynamic_shifting). "
                "Pass a finite set_timesteps(..., mu=...), or set use_dynamic_shifting=False."
            )
        return dynamic_shift(levels, math.exp(mu) if self.time_shift_type == "exponential" else mu)

    def _ramped(self, levels: Floats) -> Floats:
        ramp = chosen_ramp(vars(self))
        if ramp is None:
            return levels
        top = levels[0].item() if self.sigma_max is None else self.sigma_max
        bottom = levels[-1].item() if self.sigma_min is None else self.sigma_min
        return ramp(top, bottom, len(levels))

    def _grid(self, sigmas: Floats, timesteps: NDArray[Any] | None) -> Grid:
        """Close the grid with σ = 0; ``sigmas`` are true noise levels."""
        closed = np.append(sigmas, 0).astype(np.float32)
        descending(closed, "the noise levels of this schedule (σ)")
        publics = (1 - closed).astype(np.float32) if self.invert_sigmas else closed
        times = publics[:-1] * self.num_train_timesteps if timesteps is None else timesteps
        levels = tuple(self.level(float(s)) for s in publics)
        return Grid(times.astype(np.float32), publics, levels)
