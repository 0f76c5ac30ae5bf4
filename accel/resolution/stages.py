"""The loop of Bottleneck Sampling: stages in two sizes, each with a schedule of its own."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from accel.resolution.asking import Opened, Pictures, Resized
from accel.resolution.resizing import resized
from accel.seams.reschedule import Schedule, Schedules
from accel.seams.seeding import seeded, seeds_of
from accel.trajectory import Levels, Step

if TYPE_CHECKING:
    from accel.attach import Site, Undo
    from accel.resolution.bottleneck import Bottleneck
    from accel.seams.loop import Evaluation


def shared_out(steps: int, shares: Sequence[int]) -> list[int]:
    """Whole steps by their shares: by largest remainders, the last of them at least one.

    Args:
        steps: At least 1.
        shares: Not all 0; where the last is 0, so is its number of steps.
    """
    total = sum(shares)
    counts = [steps * share // total for share in shares]
    order = sorted(range(len(shares)), key=lambda at: -(steps * shares[at] % total))
    for place in order[: steps - sum(counts)]:
        counts[place] += 1
    if shares[-1] and not counts[-1]:
        counts[counts.index(max(counts))] -= 1
        counts[-1] = 1
    return counts


@dataclass(frozen=True)
class Stage:
    """A part of the run in one size.

    Attributes:
        first: The evaluation of the run that it begins with.
        steps: How many it has.
        patch: Its size.
        schedule: Its times, and its solver.
        levels: The noise levels of that.
    """

    first: int
    steps: int
    patch: Resized
    schedule: Schedule
    levels: Levels


class Stages:
    """Owns the loop of a pipeline: see `accel.seams.loop.Owner`.

    Args:
        method: Its settings.
        site: Where it attaches.
    """

    def __init__(self, method: Bottleneck, site: Site) -> None:
        self._method = method
        self._tally = site.tally
        self._scheduler = site.pipe.scheduler
        self._pictures = Pictures(site, method.name, clips=True)
        self._schedules = Schedules(method.name)
        self.release()

    def attach(self, site: Site) -> Iterator[Undo]:
        """Listen to the scheduler, and to where runs start."""
        with site.beside("scheduler"):
            self._schedules.check(self._scheduler)
        yield self._schedules.attach(self._scheduler)
        yield from self._pictures.attach(site)
        yield self.release
        yield site.on_start(self.reset)
        self._tally.reason = lambda: (
            f"the picture is too small: a side of {self._method.scale:g} of it is no other size "
            f"that the network takes ({self._pictures.grain} latents at a time)"
        )

    def reset(self) -> None:
        """A run starts: forget the one before."""
        self.release()
        self._tally.change = None

    def release(self) -> None:
        """Let go of everything."""
        self._stages: list[Stage] = []
        self._latents: Tensor | None = None
        self._seeds: list[int] = []
        self._solver: Any = None

    @property
    def bytes(self) -> int:
        """Memory of the latents that it keeps."""
        return 0 if self._latents is None else self._latents.nbytes

    # what the loop's seam asks for

    def begin(self, latents: Tensor, solver: Any) -> None:
        """A run begins."""
        self._solver, self._seeds = solver, seeds_of(latents)

    def evaluate(self, evaluation: Evaluation) -> Tensor:
        """Make the step of the stage that is on; show it in the full size."""
        opened = self._pictures.open(evaluation)
        index = evaluation.step.index
        if index == 0:
            self._plan(opened)
        number = max(at for at, stage in enumerate(self._stages) if stage.first <= index)
        stage = self._stages[number]
        if stage.first == index:
            self._enter(number, opened)
        self._latents = self._step(opened, stage, index - stage.first)
        height, width = opened.picture.shape[-2:]
        return self._pictures.back(resized(self._latents, height, width), evaluation)

    def _plan(self, opened: Opened) -> None:
        """Share the run out over the stages."""
        method, total = self._method, opened.evaluation.step.total
        assert total is not None  # a run from noise alone
        full = Resized(*opened.picture.shape[-2:])
        small = Resized(*(self._smaller(side) for side in (full.height, full.width)))
        if small == full:
            self._stages = [self._made(0, total, 1.0, full, full, None)]
            return
        first, shifts = 0, method.shifts or (None, None, None)
        counts = shared_out(total, method.steps)
        for patch, steps, strength, shift in zip(
            (full, small, full), counts, method.strengths, shifts, strict=True
        ):
            if steps:
                share = strength if first else 1.0
                self._stages.append(self._made(first, steps, share, full, patch, shift))
                first += steps
        self._tally.change = (
            f"{' + '.join(map(str, counts))} steps: {counts[1]} at {small.height} × {small.width} "
            f"of {full.height} × {full.width} latents"
        )

    def _smaller(self, side: int) -> int:
        grain = self._pictures.grain
        return max(1, round(side * self._method.scale / grain)) * grain

    def _made(
        self,
        first: int,
        steps: int,
        strength: float,
        full: Resized,
        patch: Resized,
        shift: float | None,
    ) -> Stage:
        here, there = (one.height * one.width // self._pictures.grain**2 for one in (full, patch))
        schedule = self._schedules.make(self._solver, steps, strength, (here, there), shift)
        return Stage(first, steps, patch, schedule, Levels(schedule.solver))

    def _enter(self, number: int, opened: Opened) -> None:
        """Begin a stage: from the run's own noise, or from what the stage before made."""
        stage, total = self._stages[number], opened.evaluation.step.total
        assert total is not None  # a run from noise alone
        if self._latents is None:
            self._latents = opened.picture[..., : stage.patch.height, : stage.patch.width]
            return
        clean = resized(self._latents, stage.patch.height, stage.patch.width)
        fresh = [
            torch.randn(clean.shape[1:], generator=one, device=clean.device)
            for one in seeded(self._seeds, total + number, clean.device)
        ]
        self._latents = stage.schedule.noised(clean, torch.stack(fresh).to(clean.dtype))

    def _step(self, opened: Opened, stage: Stage, index: int) -> Tensor:
        assert self._latents is not None
        schedule, evaluation = stage.schedule, opened.evaluation
        given = schedule.scaled(self._latents, index)
        own = evaluation.step
        step = Step(own.index, own.total, schedule.begin + index, stage.levels)
        output = opened.guided(stage.patch, given, schedule.timestep(index), step)
        return schedule.stepped(output, self._latents, index, self._seeded(stage, evaluation))

    def _seeded(self, stage: Stage, evaluation: Evaluation) -> dict[str, Any]:
        """What the solver is given: noise by the run's own seeds, where the pipeline names none.

        The solver of a stage would seed itself by what it is first given. That is computed, and
        other in its last bits beside other samples.
        """
        options = evaluation.options
        takes = "generator" in inspect.signature(stage.schedule.solver.step).parameters
        if not takes or options.get("generator") is not None:
            return options
        assert self._latents is not None
        drawn = seeded(self._seeds, evaluation.step.index, self._latents.device)
        return options | {"generator": drawn}
