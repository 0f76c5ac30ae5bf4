"""Runs of a pipeline that a search looks at: dense, recorded, and led where the search wants.

`Traced` takes the place of a pipeline's scheduler. It solves the pipeline's own schedule (or one
that is even in (σ/α)^(1/7)), with many steps, to third order; it keeps every state and what the
network (after guidance) says the data is there; and where it was given a state, it goes to that one
instead of its own – so that a run evaluates the network at any states, one a noise level, with the
pipeline's prompt and guidance.

The authors of GITS have iPNDM of order 4 on that other grid. The solver here is DPM-Solver++ of
order 3: it keeps its order on whatever grid, where the weights of iPNDM are those of an even one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from accel.errors import BadInput, UnsupportedModel
from accel.seams.pipelines import guidance_of
from accel.seams.seeding import Generator
from samplers.dpmsolverpp_scheduler import DPMSolverPPScheduler
from samplers.prediction import Level
from samplers.schedule import Grid, Request
from samplers.schedules.ramps import polynomial

Array = NDArray[np.float32]
COUNT = "num_inference_steps"
GridKind = Literal["own", "polynomial"]
"""Whose levels the nodes are: the pipeline's schedule's, or those of EDM."""


@dataclass
class Trace:
    """One run.

    Attributes:
        levels: The nodes, N + 1, from noise to where the run ends.
        states: The latents at the nodes, ``[N + 1, samples, D]``.
        data: The x0-predictions, ``[N, samples, D]``.
        guidance: Numbers of the call that set its guidance.
    """

    levels: tuple[Level, ...]
    guidance: Mapping[str, float]
    _states: list[Array] = field(default_factory=list)
    _data: list[Array] = field(default_factory=list)

    @property
    def states(self) -> Array:
        """The latents at the nodes, ``[N + 1, samples, D]``."""
        return np.stack(self._states)

    @property
    def data(self) -> Array:
        """The x0-predictions, ``[N, samples, D]``."""
        return np.stack(self._data)

    @property
    def ratios(self) -> NDArray[np.float64]:
        """σ/α of the nodes that are evaluated, ``[N]``."""
        return np.array(
            [level.sigma / level.alpha if level.alpha else np.inf for level in self.levels[:-1]]
        )


class Traced(DPMSolverPPScheduler):
    """A scheduler that records a run, and leads it through given states.

    Attributes:
        trace: The latest run.
        led: States by node, ``[samples, D]``: where a run goes instead of its own. The first
            node's is the pipeline's own.
        pipe: Whose call is under way, for its guidance.
        nodes: What the levels are.
    """

    trace: Trace | None = None
    led: Mapping[int, Array] = {}
    pipe: Any = None
    nodes: GridKind = "own"

    def _schedule(self, asked: Request) -> Grid:
        own = super()._schedule(asked)
        if self.nodes == "own":
            return own
        first, last = (_ratio(own.levels[index]) for index in (0, -2))
        noise, ramp = self._noise(), polynomial(asked.count, first, last)
        levels = [own.levels[0], *(noise.at_ratio(float(ratio)) for ratio in ramp[1:])]
        return noise.moved(own, levels)

    def _prepare(self, levels: Sequence[Level]) -> None:
        super()._prepare(levels)
        self.trace = Trace(tuple(levels), guidance_of(self.pipe))

    def _advance(self, index: int, output: Tensor, sample: Tensor, generator: Generator) -> Tensor:
        assert self.trace is not None
        if len(self.trace._data) != index:
            raise UnsupportedModel(
                "A schedule is searched on runs from pure noise: this call starts in the middle "
                "(a strength below 1). Calibrate with one that does not."
            )
        data = self._conversion.data(output, sample, self._levels[index])
        reached = super()._advance(index, output, sample, generator)
        if index + 1 in self.led:
            given = torch.from_numpy(self.led[index + 1])
            reached = given.view(reached.shape).to(reached)
        if not self.trace._states:
            self.trace._states.append(_flat(sample))
        self.trace._data.append(_flat(data))
        self.trace._states.append(_flat(reached))
        return reached


def _ratio(level: Level) -> float:
    """σ/α; that of a table without signal at its end is pure noise as well."""
    return math.inf if level.pure_noise else level.sigma / level.alpha


def _flat(value: Tensor) -> Array:
    return value.detach().float().cpu().flatten(1).numpy().copy()


@contextmanager
def tracing(pipe: Any, nodes: GridKind = "own") -> Iterator[Traced]:
    """Put a recording scheduler in a pipeline's place for a while.

    Args:
        pipe: The pipeline.
        nodes: What the levels of its runs are.

    Raises:
        UnsupportedModel: If its process is not one that our samplers serve.
    """
    before = pipe.scheduler
    try:
        traced: Traced = Traced.from_config(before.config, order=3)
    except BadInput as error:
        raise UnsupportedModel(f"No schedule can be searched: {error}") from error
    traced.pipe, traced.nodes = pipe, nodes
    pipe.scheduler = traced
    try:
        yield traced
    finally:
        pipe.scheduler = before


def traced_run(
    traced: Traced, call: Mapping[str, Any], count: int, led: Mapping[int, Array] | None = None
) -> Trace:
    """Run a call at ``count`` steps and return what it did.

    Args:
        traced: As `tracing` gives.
        call: Arguments of the pipeline; its generators are left as they were.
        count: Steps, in the place of the call's own.
        led: States that the run is led through.
    """
    traced.led = {} if led is None else led
    rerun(traced.pipe, call, {COUNT: count})
    assert traced.trace is not None
    if len(traced.trace._data) != len(traced.trace.levels) - 1:
        raise UnsupportedModel(
            f"This run made {len(traced.trace._data)} of its {len(traced.trace.levels) - 1} "
            "steps: a schedule is searched on whole runs from pure noise."
        )
    return traced.trace


def rerun(pipe: Any, call: Mapping[str, Any], changes: Mapping[str, Any]) -> Any:
    """Run a call with some arguments changed, and put its generators back as they were."""
    given = call.get("generator")
    generators = given if isinstance(given, list) else [given] if given is not None else []
    before = [generator.get_state() for generator in generators]
    try:
        return pipe(**{**call, **changes})
    finally:
        for generator, state in zip(generators, before, strict=True):
            generator.set_state(state)
