"""DPM-Solver-v3 as a diffusers scheduler.

``pipe.scheduler = samplers.DPMSolverV3Scheduler.from_config(pipe.scheduler.config,
statistics="ems.safetensors", order=2)``
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from accel.errors import AccelWarning, BadInput
from accel.seams.seeding import Generator
from samplers.base import SolverScheduler
from samplers.dpmsolver_v3 import Corrector
from samplers.dpmsolver_v3_step import Step, clean_weights, residual_weights, step
from samplers.ems import EMS, Floats, statistics
from samplers.ems_numbers import Scalars
from samplers.fingerprint import process_digest
from samplers.prediction import Level

__all__ = ["DPMSolverV3Scheduler", "SchedulerMixin"]  # pipelines on disk look the mixin up here


@dataclass(frozen=True)
class Taken:
    """The step that was taken last.

    Attributes:
        index: Where from.
        nodes: Indices of the levels of its nodes, the start first.
        step: Its weights.
    """

    index: int
    nodes: tuple[int, ...]
    step: Step


class DPMSolverV3Scheduler(SolverScheduler):
    """DPM-Solver-v3 (multistep) for variance-preserving models and rectified flows.

    Levels may lie beyond the range that was measured: the outermost statistics serve there, and the
    order of the solver stays what it is. A scheduler does not see the network: the plan's
    `samplers.DPMSolverV3` compares it with the one that was measured. Alone, it compares noise
    process and prediction, and warns once that the network is not known.

    Attributes:
        history: The values of f of earlier steps, the newest first.
        compared: Whether somebody has compared the network; set it to say that it is the right one.
    """

    def __init__(
        self,
        statistics: str | Mapping[str, Any] | None = None,
        order: int = 2,
        *,
        pseudo: bool = False,
        corrector: Corrector = "pseudo",
        corrector_low: float = 0.0,
        corrector_high: float = math.inf,
        lower_order_final: bool = True,
        **model: Any,
    ) -> None:
        """Choose the solver and describe the model.

        Args:
            statistics: What was measured of the model: path of the file that `accel calibrate ems`
                wrote, or the ``numbers`` of its plan.
            order: 1 to 4: of the predictor. The authors use 2 with guidance, 3 without.
            pseudo: Take each derivative of the predictor from its nearest points alone.
            corrector: ``pseudo``: redo each step with one order more, each derivative from its
                nearest points; ``same``: with the same order; ``none``.
            corrector_low: σ/α at and below which nothing is corrected.
            corrector_high: σ/α above which nothing is corrected.
            lower_order_final: End with orders …, 2, 1.
            **model: Fields of `samplers.prediction.Conversion`, and of `samplers.flow.FlowNoise`
                or `samplers.vp.VPNoise`; best read from a model's own scheduler (`from_config`).

        Raises:
            BadInput: If a setting is out of its range or not known, or the statistics are missing
                or those of another noise process or prediction.
        """
        _check(order, corrector)
        ems = _found(statistics)
        solver = {
            "statistics": statistics,
            "order": order,
            "pseudo": pseudo,
            "corrector": corrector,
            "corrector_low": corrector_low,
            "corrector_high": corrector_high,
            "lower_order_final": lower_order_final,
        }
        self._ems = ems
        self.compared = ems.measured is None
        self.history: list[Tensor] = []
        self._indices: list[int] = []
        self._taken: Taken | None = None
        self._first: Tensor | None = None
        self._uncorrected: Sequence[int] | None = ()
        super().__init__(solver, model)
        if ems.measured is not None:
            ems.measured.check(
                "samplers.DPMSolverV3",
                prediction=self.config.prediction_type,
                process=process_digest(self),
            )

    @property
    def follows_ode(self) -> bool:
        """Always: no noise is added."""
        return True

    def reset_history(self) -> None:
        """Forget earlier predictions: the next step is of first order, and nothing is corrected.

        For when the predictions jump, as where guidance is switched.
        """
        self._reset()

    def skip_corrector(self, rows: Sequence[int] | None = None) -> None:
        """Do not correct at the next ``step``: the output that it gets was not computed there.

        Args:
            rows: Which samples of the batch that concerns; all of them where ``None``.
        """
        self._uncorrected = rows

    def _reset(self) -> None:
        self.history.clear()
        self._indices.clear()
        self._taken, self._first, self._uncorrected = None, None, ()

    def _prepare(self, levels: Sequence[Level]) -> None:
        self._reset()
        self._check_range(levels)
        if not self.compared:
            self.compared = True
            warnings.warn(
                "samplers.DPMSolverV3Scheduler: whether its statistics are of this pipeline's "
                "network and guidance is not compared, since a scheduler alone does not see them. "
                "Put samplers.DPMSolverV3 into a plan, or set scheduler.compared = True.",
                AccelWarning,
                stacklevel=2,
            )

    def _check_range(self, levels: Sequence[Level]) -> None:
        """Refuse statistics of quite another part of the trajectory."""
        low, high = self._ems.span
        lams = [level.lam for level in levels if math.isfinite(level.lam)]
        inside = sum(low <= lam <= high for lam in lams)
        if 2 * inside < len(lams):
            raise BadInput(
                f"The statistics are of λ from {low:.3g} to {high:.3g}, where only {inside} of the "
                f"{len(lams)} noise levels of this schedule lie (from {lams[0]:.3g} to "
                f"{lams[-1]:.3g}). Run `accel calibrate ems` over this range."
            )

    def _advance(
        self,
        index: int,
        output: Tensor,
        sample: Tensor,
        generator: Generator,  # noqa: ARG002
    ) -> Tensor:
        here, target = self._levels[index], self._levels[index + 1]
        if here.pure_noise:  # f, which is over α, says nothing: Euler's step on the data
            data: Tensor = self._conversion.data(output, sample, here)
            self._first = data
            return target.sigma / here.sigma * sample + _share(here, target) * data
        self.history.insert(0, self._residual(output, sample, here))
        self._indices.insert(0, index)
        sample = self._corrected(index, output, sample)
        kept = int(self.config.order) + 1
        del self.history[kept:], self._indices[kept:]
        if target.sigma == 0.0:
            of_x, of_f = clean_weights(self._ems, here)
            return self._weighted(of_x, sample) + of_f * self.history[0]
        nodes = tuple(self._indices[: self._order(index)])
        chosen = step(self._ems, target, self._at(nodes), pseudo=self.config.pseudo)
        self._taken = Taken(index, nodes, chosen)
        total = self._weighted(chosen.sample, sample)
        return self._added(total, chosen.history, self.history, chosen.constant)

    def _residual(self, output: Tensor, sample: Tensor, level: Level) -> Tensor:
        """What is left of the noise prediction without its linear part."""
        of_noise, of_x = residual_weights(self._ems, level)
        noise: Tensor = self._conversion.noise(output, sample, level)
        return of_noise * noise + self._weighted(of_x, sample)

    def _order(self, index: int) -> int:
        order = min(int(self.config.order), len(self.history))
        if self.config.lower_order_final:
            order = min(order, len(self._levels) - 1 - index)
        return order

    def _corrected(self, index: int, output: Tensor, sample: Tensor) -> Tensor:
        """The sample with the step to it redone, now that its end has been evaluated."""
        taken, first, rows = self._taken, self._first, self._uncorrected
        self._taken, self._first, self._uncorrected = None, None, ()
        if rows is None or not self._corrects(index):
            return sample
        if first is not None:  # from pure noise: with the clean samples of both ends averaged
            before, level = self._levels[index - 1 : index + 1]
            data = self._conversion.data(output, sample, level)
            revised: Tensor = sample + _share(before, level) / 2.0 * (data - first)
        elif taken is not None and taken.index == index - 1:
            revised = self._redone(index, taken, sample)
        else:
            return sample
        for row in rows:
            revised[row] = sample[row]
        return revised

    def _redone(self, index: int, taken: Taken, sample: Tensor) -> Tensor:
        """A copy of the sample at the end of a step that is taken with f at this end as well.

        Predictor and corrector give the start of the step the same weight, and f at its end is kept
        (the noise prediction is taken to follow along l): what is added is a sum of values of f.
        """
        nodes = self._corrector_nodes(index, taken.index)
        redone = step(
            self._ems, self._levels[index], self._at(nodes), pseudo=self._pseudo_corrector
        )
        weights: dict[int, Floats] = {}
        for sign, indices, one in ((1.0, nodes, redone), (-1.0, taken.nodes, taken.step)):
            for node, weight in zip(indices, one.history, strict=True):
                weights[node] = weights.get(node, 0.0 * weight) + sign * weight
        values = [self.history[self._indices.index(node)] for node in weights]
        constant = redone.constant - taken.step.constant
        return self._added(sample.clone(), tuple(weights.values()), values, constant)

    @property
    def _pseudo_corrector(self) -> bool:
        return bool(self.config.corrector == "pseudo")

    def _corrects(self, index: int) -> bool:
        level = self._levels[index]
        ratio = level.sigma / level.alpha
        low, high = self.config.corrector_low, self.config.corrector_high
        order = int(self.config.order) + self._pseudo_corrector
        return bool(self.config.corrector != "none" and order > 1 and low < ratio <= high)

    def _corrector_nodes(self, index: int, start: int) -> tuple[int, ...]:
        """The start of the step, its end, and what lies before its start."""
        order = int(self.config.order) + self._pseudo_corrector
        return (start, index, *(node for node in self._indices if node < start))[:order]

    def _at(self, indices: Sequence[int]) -> list[Level]:
        return [self._levels[index] for index in indices]

    def _added(
        self, total: Tensor, weights: Sequence[Floats], values: Sequence[Tensor], constant: Floats
    ) -> Tensor:
        """``total`` with the weighted values and the constant added, in place."""
        for weight, value in zip(weights, values, strict=False):
            total += self._weighted(weight, value)
        if constant.any():
            total += self._shaped(constant, total)
        return total

    def _weighted(self, weight: Floats, value: Tensor) -> Tensor:
        return value * self._shaped(weight, value)

    def _shaped(self, weight: Floats, like: Tensor) -> Tensor | float:
        """A weight as a number, or as a tensor that goes with samples ``[B, C, ...]``."""
        if weight.ndim == 0:
            return float(weight)
        axis = self._ems.axis
        shape = (like.shape[axis],) if weight.ndim == 1 else tuple(like.shape[1:])
        if weight.shape != shape:
            raise BadInput(
                f"The statistics are for {tuple(weight.shape)} (reduce={self._ems.reduce!r}), but "
                f"the sample has {shape}. Calibrate at this size, or with reduce=scalar."
            )
        tensor = torch.from_numpy(weight).to(like.device, like.dtype)
        if weight.ndim > 1:
            return tensor
        spread = [1] * like.ndim
        spread[axis] = -1
        return tensor.view(spread)


def _share(here: Level, target: Level) -> float:
    """The weight of the data in a step that is exact where the data are constant."""
    return target.alpha - here.alpha * target.sigma / here.sigma


def _found(given: str | Mapping[str, Any] | Scalars | None) -> EMS:
    if given is None:
        raise BadInput(
            "DPM-Solver-v3 needs statistics of the model: run `accel calibrate ems`, and pass "
            "statistics=PATH of the file that it writes, or the numbers of its plan."
        )
    return statistics(given)


def _check(order: int, corrector: str) -> None:
    if order not in (1, 2, 3, 4):
        raise BadInput(f"order is {order!r}; DPM-Solver-v3 has orders 1, 2, 3 and 4.")
    if corrector not in get_args(Corrector):
        raise BadInput(
            f"corrector is {corrector!r}; it must be one of {', '.join(get_args(Corrector))}."
        )
