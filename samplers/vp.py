"""The variance-preserving process: tables of β, and grids of noise levels on them.

Public noise levels are the ratio σ/α, as in every stock scheduler for these models. The table of
training levels is computed in float32 in the order of operations of diffusers (up to rounding where
its signal is rescaled) – it is what the networks were trained on; what follows is float64.

Source: arXiv 2006.11239 (β table), 2102.09672 eq. 17 (cosine table), 2305.08891 algorithm 1 (zero
terminal signal-to-noise ratio), 2408.06072 section 3 (shift of the table, CogVideoX).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from accel.errors import BadInput
from samplers.prediction import Level, vp_level
from samplers.schedule import (
    RAMPS,
    Floats,
    Grid,
    Request,
    Spacing,
    chosen_ramp,
    descending,
    moved,
    spaced,
)


@dataclass(frozen=True, kw_only=True)
class VPNoise:
    """A variance-preserving process and its grid. Field names are those of diffusers configs.

    Attributes:
        num_train_timesteps: Length of the training table.
        beta_start: First β of the ``linear`` and ``scaled_linear`` tables.
        beta_end: Last β of these tables.
        beta_schedule: ``linear``, ``scaled_linear`` or ``squaredcos_cap_v2``.
        trained_betas: The table itself; then the three fields above are not used.
        rescale_betas_zero_snr: Bend the table down to (almost) no signal at its end.
        snr_shift_scale: Divide the table's signal-to-noise ratio by this factor.
        timestep_spacing: ``linspace``, ``leading`` or ``trailing``.
        steps_offset: Added to timesteps of the ``leading`` spacing.
        timestep_type: ``discrete``, or ``continuous`` for networks that are told ``ln(σ)/4``.
        use_karras_sigmas: Levels uniform in σ^(1/7).
        use_exponential_sigmas: Levels uniform in ln σ.
        use_beta_sigmas: Levels at quantiles of Beta(0.6, 0.6).
        sigma_min: Lowest level of such a ramp; the table's where ``None``.
        sigma_max: Highest level of such a ramp; the table's where ``None``.
        final_sigmas_type: Where a run ends: ``zero``, or ``sigma_min`` of the table.
        lambda_min_clipped: Leave out training levels of lower λ than this (cosine tables).
    """

    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    trained_betas: tuple[float, ...] | None = None
    rescale_betas_zero_snr: bool = False
    snr_shift_scale: float = 1.0
    timestep_spacing: Spacing = "linspace"
    steps_offset: int = 0
    timestep_type: Literal["discrete", "continuous"] = "discrete"
    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    use_beta_sigmas: bool = False
    sigma_min: float | None = None
    sigma_max: float | None = None
    final_sigmas_type: Literal["zero", "sigma_min"] = "zero"
    lambda_min_clipped: float = -math.inf

    def __post_init__(self) -> None:
        chosen_ramp(vars(self))
        for name, allowed in (
            ("timestep_spacing", ("linspace", "leading", "trailing")),
            ("timestep_type", ("discrete", "continuous")),
            ("final_sigmas_type", ("zero", "sigma_min")),
            ("beta_schedule", ("linear", "scaled_linear", "squaredcos_cap_v2")),
        ):
            if getattr(self, name) not in allowed and not self._unread(name):
                raise BadInput(
                    f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(allowed)}"
                    + (", or pass trained_betas." if name == "beta_schedule" else ".")
                )

    def _unread(self, name: str) -> bool:
        return name == "beta_schedule" and self.trained_betas is not None

    def betas(self) -> Tensor:
        """The table of β before any rescaling, ``[T]`` in float32."""
        count, start, end = self.num_train_timesteps, self.beta_start, self.beta_end
        if self.trained_betas is not None:
            return torch.tensor(self.trained_betas, dtype=torch.float32)
        if self.beta_schedule == "linear":
            return torch.linspace(start, end, count, dtype=torch.float32)
        if self.beta_schedule == "scaled_linear":
            return torch.linspace(start**0.5, end**0.5, count, dtype=torch.float32) ** 2
        signal = [
            math.cos((i / count + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(count + 1)
        ]
        betas = [min(1 - b / a, 0.999) for a, b in pairwise(signal)]
        return torch.tensor(betas, dtype=torch.float32)

    def alphas_cumprod(self) -> Tensor:
        """The table of ``α²``, ``[T]`` in float32."""
        squares = torch.cumprod(1.0 - self.betas(), dim=0)
        scale = self.snr_shift_scale
        if scale != 1.0:
            squares = squares / (scale + (1 - scale) * squares)
        if self.rescale_betas_zero_snr:
            roots = squares.sqrt()
            squares = ((roots - roots[-1]) * (roots[0] / (roots[0] - roots[-1]))) ** 2
            squares[-1] = 2**-24  # as the stock solvers do: σ/α stays finite
        return squares

    def table(self) -> Floats:
        """The training levels σ/α by timestep, ascending, ``[T]`` in float32."""
        squares = self.alphas_cumprod()
        return np.asarray(((1 - squares) / squares) ** 0.5)

    def level(self, sigma: float) -> Level:
        """The level whose public value is ``sigma``."""
        return vp_level(sigma)

    def training_grid(self) -> Grid:
        """All training levels, noisiest first; for ``add_noise`` outside of a run."""
        table = self.table()[::-1]
        return self._grid(np.arange(len(table))[::-1].copy(), table, table[-1:] * 0)

    def grid(self, asked: Request) -> Grid:
        """The noise levels of one run.

        Raises:
            BadInput: If what is asked for contradicts the config, or repeats a level.
        """
        self._check(asked)
        table = self.table()
        end = table[:1] if self.final_sigmas_type == "sigma_min" else table[:1] * 0
        ramp = chosen_ramp(vars(self))
        if asked.sigmas is not None:
            inner = asked.sigmas[asked.sigmas > 0]
            return self._grid(self._told(inner, table), inner, end)
        if ramp is not None:
            top = float(table[-1]) if self.sigma_max is None else self.sigma_max
            bottom = float(table[0]) if self.sigma_min is None else self.sigma_min
            sigmas = ramp(top, bottom, asked.count)
            return self._grid(self._told(sigmas, table), sigmas, end)
        times = asked.timesteps if asked.timesteps is not None else self._spaced(asked.count, table)
        return self._grid(times, np.interp(times, np.arange(len(table)), table), end)

    def at_ratio(self, ratio: float) -> Level:
        """The level with ``σ/α = ratio``."""
        return vp_level(ratio)

    def moved(self, grid: Grid, levels: Sequence[Level]) -> Grid:
        """The schedule of a grid, evaluated at other levels of its range.

        Args:
            grid: N evaluations and where they end.
            levels: N levels, never rising, above zero noise.
        """
        publics = np.array([level.sigma / level.alpha for level in levels], np.float32)
        told = self._told(publics, self.table())
        if self.timestep_type == "continuous":
            told = (0.25 * np.log(publics)).astype(np.float32)
        return moved(grid, publics, told, self.level)

    def _check(self, asked: Request) -> None:
        given = [name for name in ("sigmas", "timesteps") if getattr(asked, name) is not None]
        if asked.mu is not None:
            raise BadInput(
                "mu shifts the levels of a flow, but prediction_type says that this model is not "
                "one. Drop mu, or set prediction_type='flow_prediction'."
            )
        if len(given) > 1:
            raise BadInput("Both sigmas and timesteps are given; one follows from the other here.")
        ramps = [name for name in RAMPS if getattr(self, name)]
        if given and ramps:
            raise BadInput(
                f"{given[0]} is given, but the config asks for {ramps[0]}. Drop one of the two."
            )
        if asked.timesteps is not None and asked.timesteps[0] > self.num_train_timesteps - 1:
            raise BadInput(
                f"timesteps start at {asked.timesteps[0]:g}; this model knows 0 to "
                f"{self.num_train_timesteps - 1}."
            )

    def _spaced(self, count: int, table: Floats) -> NDArray[np.int64]:
        clipped = int((-np.log(table) < self.lambda_min_clipped).sum())
        last = self.num_train_timesteps - clipped
        return spaced(
            last, self.num_train_timesteps, count, self.timestep_spacing, self.steps_offset
        )

    def _told(self, sigmas: Floats, table: Floats) -> Floats:
        """The (fractional) timesteps at which the table has these levels."""
        return np.interp(np.log(sigmas), np.log(table), np.arange(len(table))).astype(np.float32)

    def _grid(self, times: NDArray[Any], sigmas: Floats, end: Floats) -> Grid:
        publics = np.concatenate([sigmas, end]).astype(np.float32)
        if self.timestep_type == "continuous":
            times = (0.25 * np.log(publics[:-1])).astype(np.float32)
        descending(publics, "the noise levels of this schedule (σ/α)")
        return Grid(times, publics, tuple(self.level(float(s)) for s in publics))
