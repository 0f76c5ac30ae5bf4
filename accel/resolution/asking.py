"""What a network says of a picture of another size than its pipeline's, guided as that guides."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from accel.errors import UnsupportedModel
from accel.seams.canvas import SPATIAL, TOKENS, Canvas, Patch, grain_of
from accel.seams.grids import Grid, grid_of
from accel.seams.times import Clock
from accel.trajectory import Step

if TYPE_CHECKING:
    from accel.attach import Site
    from accel.seams.loop import Evaluation, Question

Undo = Callable[[], None]


@dataclass(frozen=True)
class Resized:
    """The whole picture in another size.

    Attributes:
        height: Rows.
        width: Columns.
    """

    height: int
    width: int

    def size(self, _height: int, _width: int) -> tuple[int, int]:
        """Its own rows and columns."""
        return self.height, self.width

    def shrunk(self, picture: Tensor, factor: int, height: int, width: int) -> Tensor:
        """A map of the picture, in averages: see `accel.seams.canvas.Patch`."""
        sides = -(-height // factor), -(-width // factor)
        return functional.interpolate(picture, sides, mode="area")


class Pictures:
    """The pictures that the latents of a pipeline are, and what its network says of others.

    Args:
        site: Of the method.
        method: Its name.
        clips: Whether it works on clips too.

    Raises:
        UnsupportedModel: For a pipeline of two networks, and one that is given no plain picture.
    """

    def __init__(self, site: Site, method: str, *, clips: bool) -> None:
        self._method = method
        self._pipe = type(site.pipe).__name__
        if len(site.denoisers) > 1:
            raise UnsupportedModel(
                f"{method} does not fit {self._pipe}: it asks a network about other times than its "
                "pipeline does, which changes from one network to another at a time of its own. "
                "Leave the method out of the plan."
            )
        [self._denoiser] = site.denoisers
        self.grain = grain_of(site.pipe, self._denoiser, clips=clips)
        self._whole = int(site.pipe.scheduler.config.get("num_train_timesteps", 1000))
        self.release()

    def attach(self, site: Site) -> Iterator[Undo]:
        """Whenever a run starts, the one before is forgotten."""
        yield self.release
        yield site.on_start(self.release)

    def release(self) -> None:
        """Forget the run before."""
        self._grid: Grid | None = None
        self._clock = Clock(self._whole)
        self._given: Tensor | None = None

    def open(self, evaluation: Evaluation) -> Opened:
        """Look at an evaluation.

        Raises:
            UnsupportedModel: For a run that does not start from noise alone, a network that is
                given more than the latents, and latents that were changed between the steps.
        """
        step = evaluation.step
        if step.position != step.index:
            self._refuse("starts from a picture, in the midst of its schedule")
        if self._given is not None and not _same(self._given, evaluation.latents):
            self._refuse("changes its latents between two steps (inpainting, or a callback)")
        questions = evaluation.questions
        if self._grid is None:
            self._grid = self._looked_at(evaluation)
        canvases = tuple(
            Canvas(question.asking(evaluation.latents), self.grain, self._grid)
            for question in questions
        )
        return Opened(evaluation, canvases, self._grid, self._clock)

    def _looked_at(self, evaluation: Evaluation) -> Grid:
        """How the rows of a run's calls lie in the picture."""
        call = evaluation.questions[0].asking(evaluation.latents)
        if any(call.arguments.get(name) is not None for name in (*SPATIAL, *TOKENS)):
            self._refuse("has a ControlNet or an adapter look at the latents of its own steps")
        grid = grid_of(call)
        channels = evaluation.latents.shape[-1 if grid.height else 1]
        if call.denoiser.core.config.in_channels != channels:
            self._refuse("shows its network a second picture beside the latents")
        return grid

    def back(self, picture: Tensor, evaluation: Evaluation) -> Tensor:
        """A picture ``[B, C, H, W]`` as the latents that the pipeline goes on from."""
        assert self._grid is not None
        latents = picture
        if self._grid.height:
            like = evaluation.latents
            latents = torch.stack(
                [self._grid.pack(one, row) for one, row in zip(picture, like, strict=True)]
            )
        self._given = latents
        return latents

    def _refuse(self, why: str) -> None:
        raise UnsupportedModel(
            f"{self._pipe} {why}, and {self._method} makes its picture from noise alone: leave "
            "the method out of the plan, or use the text-to-image pipeline of the same parts."
        )


@dataclass(frozen=True)
class Opened:
    """One evaluation of the pipeline's loop, as questions about pictures.

    Attributes:
        evaluation: What the pipeline asks, and how it guides.
        canvases: The pictures of its questions.
        grid: How their rows lie in them.
        clock: Tells the network another time.
    """

    evaluation: Evaluation
    canvases: tuple[Canvas, ...]
    grid: Grid
    clock: Clock

    @property
    def picture(self) -> Tensor:
        """The latents ``[B, C, H, W]``, or ``[B, C, F, H, W]`` of a clip."""
        latents = self.evaluation.latents
        if not self.grid.height:
            return latents
        return torch.stack([self.grid.unpack(row) for row in latents])

    def guided(self, patch: Patch, pixels: Tensor, timestep: Tensor, step: Step) -> Tensor:
        """What the network says, all branches combined.

        Args:
            patch: What of the picture it is asked about.
            pixels: ``[B, C, rows, columns]`` of it, scaled as the network wants it.
            timestep: The time of these pixels, a scalar of a scheduler's timesteps.
            step: What the methods below are told of it.

        Returns:
            ``[B, C, rows, columns]``.
        """
        answers: dict[str, Tensor] = {}
        for question, canvas in zip(self.evaluation.questions, self.canvases, strict=True):
            answers |= self._asked(question, canvas, patch, pixels, timestep, step)
        mixed = self.evaluation.mixed(answers)
        return mixed if self.grid.height else mixed[:, : self.evaluation.channels]

    def _asked(
        self,
        question: Question,
        canvas: Canvas,
        patch: Patch,
        pixels: Tensor,
        timestep: Tensor,
        step: Step,
    ) -> dict[str, Tensor]:
        rows = [row.sample for row in question.call.rows]
        call = canvas.call(patch, pixels[rows].to(question.dtype))
        told: dict[str, Any] = self.clock.told(question.call, timestep)
        value = question.below(replace(call, step=step, arguments=call.arguments | told)).value
        return question.apart(canvas.answer(patch, value))


def _same(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.shape == b.shape and torch.equal(a.to(b.dtype), b))
