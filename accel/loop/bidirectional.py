"""The loop of ViBiD: a pass from either end of a clip at each step, with fresh noise between."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from accel.errors import BadInput, UnsupportedModel
from accel.seams import keys
from accel.seams.loop import UNCOND
from accel.seams.seeding import seeded, seeds_of
from accel.seams.solvers import Solver
from accel.seams.spaces import convert
from accel.seams.underway import arguments_of
from accel.trajectory import Levels, Step

if TYPE_CHECKING:
    from accel.attach import Site, Undo
    from accel.loop.vibid import ViBiD
    from accel.seams.loop import Evaluation

FIRST, LAST = 0, 1
"""Places of the two pictures in the batch."""

WAY_OUT = "Give the pipeline its own EulerDiscreteScheduler."


class Bidirectional:
    """Owns the loop of a pipeline: see `accel.seams.loop.Owner`.

    The clip is x̄ = x0 + s·ε ``[1, F, C, H, W]`` in float32 (`accel.seams.solvers`), and is kept by
    the pipeline from step to step.

    Args:
        method: Its settings.
        site: Where it attaches.

    Raises:
        UnsupportedModel: For a pipeline whose clips cannot be turned round, and for a scheduler
            whose latents are not known.
    """

    def __init__(self, method: ViBiD, site: Site) -> None:
        self._method, self._pipe, self._tally = method, site.pipe, site.tally
        keys.check(site.pipe, method.name)
        self._solver = Solver(site.pipe.scheduler, method.name, WAY_OUT)
        if Levels(site.pipe.scheduler).prediction == "flow_prediction":
            raise UnsupportedModel(
                f"{method.name} does not fit {type(site.pipe.scheduler).__name__}, whose noise "
                f"levels are those of a flow. {WAY_OUT}"
            )
        self._seeds: list[int] = []

    def attach(self, site: Site) -> Iterator[Undo]:
        """Listen to where runs start."""
        yield self.release
        yield site.on_start(self.reset)

    def reset(self) -> None:
        """A run starts: forget the one before."""
        self.release()
        self._tally.change = None

    def release(self) -> None:
        """Let go of everything."""
        self._seeds = []

    # what the loop's seam asks for

    def begin(self, latents: Tensor, solver: Any) -> None:  # noqa: ARG002
        """A run begins.

        Raises:
            BadInput: For another number of pictures than two.
        """
        each = int(arguments_of(self._pipe).get("num_videos_per_prompt") or 1)
        found = len(latents) // each
        if (found, each) != (2, 1):
            raise BadInput(
                f"{self._method.name} makes one clip between two pictures, and the pipeline was "
                f"given {found}{f', {each} clips of each' if each > 1 else ''}: pass the first and "
                "the last as image=[first, last], and leave num_videos_per_prompt at 1."
            )
        self._seeds = seeds_of(latents[:1])

    def evaluate(self, evaluation: Evaluation) -> Tensor:
        """Make the step from either end."""
        step = evaluation.step
        first, last = (keys.latents_of(self._pipe, evaluation, key) for key in (FIRST, LAST))
        clip = self._solver.place(evaluation.latents[:1], step)
        clip = self._pass(evaluation, clip, FIRST, last)
        clip = self._noised(clip, step).flip(keys.FRAMES)
        clip = self._pass(evaluation, clip, LAST, first).flip(keys.FRAMES)
        self._tally.change = (
            f"one clip of {clip.shape[keys.FRAMES]} frames between two pictures, two passes a step"
        )
        if step.last:
            return clip
        return torch.cat([self._solver.sample(clip, step, ahead=1)] * 2)

    def _pass(self, evaluation: Evaluation, clip: Tensor, key: int, end: Tensor) -> Tensor:
        """A step of DDIM with CFG++ under one picture.

        Args:
            evaluation: What the pipeline asks.
            clip: x̄ at the noise of the step, from the frame of that picture on.
            key: The picture.
            end: Latents of the other one, ``[1, C, H, W]``.

        Returns:
            x̄ at the noise of the next step.
        """
        step = evaluation.step
        given = self._solver.given(clip, step)
        found: dict[str, Tensor] = {}
        for question in evaluation.questions:
            network = type(question.call.denoiser.core).__name__
            for branch, answer in question.answers_of(key, given).items():
                found[branch] = convert(answer.float(), given, step, "x0", network)
        bare = found.get(UNCOND, found["cond"])
        clean = bare + self._method.scale * (found["cond"] - bare)
        if self._method.replace:
            clean.select(keys.FRAMES, -1).copy_(end)
        return clean + self._next(step) * self._solver.toward(bare, clip, step)

    def _noised(self, clip: Tensor, step: Step) -> Tensor:
        """The clip at the noise of the next step, back at that of this one."""
        added = math.sqrt(self._solver.time(step) ** 2 - self._next(step) ** 2)
        [generator] = seeded(self._seeds, step.index, clip.device)
        fresh = torch.randn(clip.shape, generator=generator, device=clip.device)
        return clip + added * fresh

    def _next(self, step: Step) -> float:
        """The noise s of the next step; 0 behind the last."""
        return 0.0 if step.last else self._solver.time(step, 1)
