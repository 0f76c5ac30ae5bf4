"""Refining OLSS by gradients: the scalars of a short run, and when it evaluates, as BNS has them.

The least squares make each step good by itself; what counts is the end. So Adam goes on from them,
with gradients through the whole short run and the network of the distance between its end and the
long run's. Only what the solver does is changed: no weight is trained.

Source: arXiv 2403.01329 (BNS), sections 3.1 and 3.2, where the search begins from an ordinary
solver, and the noise, the outputs and the times are free as here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from accel.seams.denoisers import find_denoisers
from samplers.olss import Row
from samplers.olss_fit import ROUNDING, Gram
from samplers.olss_scheduler import OLSSScheduler
from samplers.schedule import Grid

RATE = 1e-3
"""Of Adam: how far a step moves the scalars, as a share of the state's norm."""

TIMES_RATE = 1e-2
"""How far it moves the times, as a share of the gap between two of them."""


Path = tuple[tuple[float, ...], tuple[float, ...]]
"""What the network is told at each step; the noise levels there, and at the end."""


class Reached(Exception):
    """A run went as far as it was to go."""


class Refined(OLSSScheduler):
    """Takes steps whose scalars and times are tensors, with gradients, and keeps where they end."""

    scalars: Callable[[int], Tensor]
    told: Callable[[], Tensor] | None = None
    end: Tensor

    def _take(self, grid: Grid, device: str | torch.device | None) -> None:
        super()._take(grid, device)
        if self.told is not None:
            with torch.enable_grad():
                self.timesteps = self.told().to(self.timesteps.device, torch.float32)
            self._times = self.timesteps.detach().tolist()

    def index_for_timestep(
        self, timestep: float | Tensor, schedule_timesteps: Tensor | None = None
    ) -> int:
        """The position of a timestep, whose gradient does not matter here."""
        value = timestep.detach() if isinstance(timestep, Tensor) else timestep
        return super().index_for_timestep(value, schedule_timesteps)

    def _prepare(self, levels: Sequence[Any]) -> None:
        super()._prepare(levels)
        torch.set_grad_enabled(True)  # until the pipeline's own ``no_grad`` is left

    def _combine(self, index: int) -> Tensor:
        assert self._start is not None
        terms = torch.stack([self._start, *self._kept])
        weights = self.scalars(index).to(terms.device, terms.dtype)
        reached = (weights.view(-1, *[1] * (terms.ndim - 1)) * terms).sum(0)
        if index + 1 == self.num_inference_steps:
            self.end = reached
            raise Reached
        return reached


class Places:
    """Where on the long run's grid the short run evaluates, as gaps that gradients can move.

    The first place is the grid's first node, and the end its last: K − 1 places are free, between
    nodes as well. They keep their order whatever the gaps.

    Args:
        grid: Of the long run, N evaluations.
        path: K + 1 of its nodes, from 0 to N.
    """

    def __init__(self, grid: Grid, path: Sequence[int]) -> None:
        self._told = torch.tensor(told_to_the_end(grid), dtype=torch.float64)
        self._sigmas = np.asarray(grid.sigmas, np.float64)
        gaps = torch.tensor(np.diff(path), dtype=torch.float64)
        self.gaps = gaps.log().requires_grad_()

    def now(self) -> Tensor:
        """The K places, in nodes."""
        last = len(self._sigmas) - 1
        ends = self.gaps.softmax(0).cumsum(0)[:-1] * last
        return torch.cat([ends.new_zeros(1), ends])

    def told(self) -> Tensor:
        """What the network is told there, ``[K]``."""
        places = self.now()
        below = places.detach().floor().long().clamp(max=len(self._told) - 2)
        here, there = self._told[below], self._told[below + 1]
        return here + (places - below) * (there - here)

    def written(self) -> Path:
        """The path as numbers."""
        places = self.now().detach().numpy()
        nodes = np.arange(len(self._sigmas))
        sigmas = np.append(np.interp(places, nodes, self._sigmas), self._sigmas[-1])
        return tuple(self.told().tolist()), tuple(sigmas.tolist())


def told_to_the_end(grid: Grid) -> list[float]:
    """What the network is told at each of N nodes, and would be where the run ends, ``N + 1``.

    Continued evenly in σ. Timesteps end at 0; times that are below it anyhow (ln σ/4) do not.
    """
    told, sigmas = (np.asarray(values, np.float64) for values in (grid.timesteps, grid.sigmas))
    slope = (told[-1] - told[-2]) / (sigmas[-2] - sigmas[-3])
    end = told[-1] + slope * (sigmas[-1] - sigmas[-2])
    return [*told.tolist(), float(end if told[-1] < 0 else max(end, 0.0))]


@dataclass(frozen=True)
class Refinement:
    """What came out.

    Attributes:
        rows: The scalars of each step.
        path: The times, where they were moved.
        steps: After how many steps of Adam; 0 if none made it better.
        before: The relative error of the end before.
        after: And after.
    """

    rows: tuple[Row, ...]
    path: Path | None
    steps: int
    before: float
    after: float


def refine(
    descend: Callable[[bool], float],
    scheduler: Refined,
    rows: Sequence[Row],
    grams: Sequence[Gram],
    steps: int,
    ridge: float,
    places: Places | None,
) -> Refinement:
    """The best of all states that Adam goes through.

    Args:
        descend: Runs with the scheduler and returns the relative error of its end; leaves its
            gradients where it is told that another step follows.
        scheduler: Takes the steps.
        rows: Scalars to begin with.
        grams: Of each step's terms, as `samplers.olss_fit.Solution` has them.
        steps: Steps of Adam.
        ridge: Of the fit.
        places: When to evaluate; ``None`` to leave the times as they are.
    """
    turned = [_whitened(gram, ridge) for gram in grams]
    start = [torch.tensor(row, dtype=torch.float64) for row in rows]
    moves = [torch.zeros_like(row, requires_grad=True) for row in start]
    groups: list[dict[str, Any]] = [{"params": moves, "lr": RATE}]
    scheduler.scalars = lambda index: start[index] + turned[index] @ moves[index]
    if places is not None:
        scheduler.told = places.told
        groups.append({"params": [places.gaps], "lr": TIMES_RATE})
    adam = torch.optim.Adam(groups)
    best = Refinement(tuple(rows), None, 0, float("inf"), float("inf"))
    for step in range(steps + 1):
        adam.zero_grad()
        error = descend(step < steps)
        if step == 0:
            best = Refinement(tuple(rows), None, 0, error, error)
        elif error < best.after:
            found = tuple(tuple(scheduler.scalars(k).tolist()) for k in range(len(start)))
            path = None if places is None else places.written()
            best = Refinement(found, path, step, best.before, error)
        adam.step()
    return best


def _whitened(gram: Gram, ridge: float) -> Tensor:
    """Turns directions of equal effect on a state into scalars, by a share of the state's norm."""
    inner = gram[:-1, :-1]
    damped = inner + max(ridge, ROUNDING) * np.trace(inner) / len(inner) * np.eye(len(inner))
    turned = np.linalg.inv(np.linalg.cholesky(damped)).T * np.sqrt(gram[-1, -1])
    return torch.from_numpy(turned)


@contextmanager
def frozen(pipe: Any) -> Iterator[None]:
    """Without gradients of weights."""
    weights = [w for one in find_denoisers(pipe) for w in one.core.parameters() if w.requires_grad]
    try:
        for weight in weights:
            weight.requires_grad_(False)
        yield
    finally:
        for weight in weights:
            weight.requires_grad_(True)


Call = Mapping[str, Any]


def error_of(
    scheduler: Refined, lessons: Sequence[tuple[Call, Tensor]], again: Callable[[Call], None]
) -> Callable[[bool], float]:
    """What `refine` descends: the relative error of the ends of some calls.

    Args:
        scheduler: Keeps where a run ends.
        lessons: Calls, and where each is to end.
        again: Makes a call with the scheduler.
    """

    def descend(onward: bool) -> float:
        left = total = 0.0
        for call, end in lessons:
            again(call)
            with torch.enable_grad():
                target = end.to(scheduler.end)
                loss = (scheduler.end - target).square().sum()
                if onward:
                    (loss / target.square().sum()).log().backward()  # type: ignore[no-untyped-call]
            left, total = left + float(loss.detach()), total + float(target.square().sum())
        return float(np.sqrt(left / total))

    return descend
