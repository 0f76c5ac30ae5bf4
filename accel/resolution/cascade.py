"""The loop of Pixelsmith: runs of growing size, each guided by the picture of the one before."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from accel.errors import UnsupportedModel
from accel.resolution.asking import Opened, Pictures, Resized
from accel.resolution.phases import chequered, with_phases
from accel.resolution.resizing import lanczos
from accel.seams import pictures
from accel.seams.canvas import Window, native_side
from accel.seams.deal import Deal
from accel.seams.reschedule import Schedule, Schedules
from accel.seams.solvers import ONE_STEP, Solver
from accel.trajectory import Levels, Step

if TYPE_CHECKING:
    from accel.attach import Site, Undo
    from accel.resolution.pixelsmith import Pixelsmith
    from accel.seams.loop import Evaluation

Size = tuple[int, int]


def sizes(height: int, width: int, side: int, grain: int) -> list[Size]:
    """The sizes of the runs: about side² pixels first, then twice the side each, then the last.

    Args:
        height: Of the picture that is asked for, in latents, a multiple of ``grain``.
        width: Likewise.
        side: Of the network's own picture.
        grain: All sides are multiples of it.
    """
    shrink = (height * width) ** 0.5 / side
    found = [(height, width)]
    while shrink > 1.0:
        shrink = max(shrink / 2.0, 1.0) if shrink > 2.0 else 1.0
        ratio = (height * width) ** 0.5 / (side * shrink)
        found.append(_rounded(height / ratio, width / ratio, grain))
    return found[::-1]


def _rounded(height: float, width: float, grain: int) -> Size:
    rows, columns = (max(1, round(length / grain)) * grain for length in (height, width))
    return rows, columns


class Covering:
    """Patches at random places until every pixel is in one; alike in all runs and samples.

    Args:
        height: Of the picture.
        width: Likewise.
        rows: Of a patch, no more than the picture's.
        columns: Likewise.
        grain: Patches begin at multiples of it.
        seed: What the places are drawn from.
    """

    def __init__(
        self, height: int, width: int, rows: int, columns: int, grain: int, seed: int
    ) -> None:
        self._missing = torch.ones(height, width, dtype=torch.bool)
        self._size, self._grain = (rows, columns), grain
        self._generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[Window]:
        while bool(self._missing.any()):
            left = self._missing.nonzero()
            place = int(torch.randint(len(left), (1,), generator=self._generator))
            window = self._around(*(int(at) for at in left[place]))
            window.of(self._missing).fill_(False)
            yield window

    def _around(self, row: int, column: int) -> Window:
        """The patch with a pixel near its middle, moved into the picture."""
        begins = []
        for at, length, whole in zip((row, column), self._size, self._missing.shape, strict=True):
            half = length // self._grain // 2
            begin = (at // self._grain - half) * self._grain
            begins.append(min(max(begin, 0), whole - length))
        (top, left), (rows, columns) = begins, self._size
        return Window(top, top + rows, left, left + columns)


def weights(window: Window, height: int, width: int, border: int) -> Tensor:
    """What each pixel of a patch counts ``[rows, columns]``: less towards an inner edge."""
    sides = []
    for begin, end, whole in (
        (window.top, window.bottom, height),
        (window.left, window.right, width),
    ):
        along = torch.arange(end - begin)
        before = along + 1 if begin > 0 else along + border + 1
        after = end - begin - along if end < whole else end - begin - along + border
        sides.append(torch.minimum(before, after).clamp(max=border + 1) / (border + 1))
    return sides[0][:, None] * sides[1]


@dataclass
class Level:
    """A run in one size.

    Attributes:
        number: From 0, the base.
        latents: ``[B, C, H, W]``.
        guide: The clean latents that guide it; ``None``: the base, in one patch.
        noise: What the guide is noised with, ``[B, C, H, W]``.
    """

    number: int
    latents: Tensor
    guide: Tensor | None
    noise: Tensor


class Cascade:
    """Owns the loop of a pipeline: see `accel.seams.loop.Owner`.

    Args:
        method: Its settings.
        site: Where it attaches.

    Raises:
        BadInput: For a base below one token of the network.
        UnsupportedModel: For what it cannot serve; see `Pixelsmith.attach`.
    """

    def __init__(self, method: Pixelsmith, site: Site) -> None:
        self._method, self._pipe, self._tally = method, site.pipe, site.tally
        self._deal = site.shared(Deal)
        self._pictures = Pictures(site, method.name, clips=False)
        pictures.check(site.pipe, method.name)
        self._side = native_side(site.pipe, site.denoisers[0], method.base, method.name)
        self._schedules = Schedules(method.name)
        with site.beside("scheduler"):
            self._check(site.pipe.scheduler)
        self._tiles = pictures.Tiles(site.pipe.vae)
        self.release()

    def _check(self, scheduler: Any) -> None:
        name = type(scheduler).__name__
        if name not in ONE_STEP:
            raise UnsupportedModel(
                f"{self._method.name} moves patches one by one, and {name} looks back on steps or "
                f"is not known: use one of {', '.join(ONE_STEP)}, without a sampler in the plan."
            )
        self._rules = Solver(scheduler, self._method.name)

    def attach(self, site: Site) -> Iterator[Undo]:
        """Listen to the scheduler, and to where runs start."""
        yield self._schedules.attach(site.pipe.scheduler)
        yield from self._pictures.attach(site)
        yield self.release
        yield site.on_start(self.reset)
        self._tally.reason = lambda: "the picture was no larger than the base"

    def reset(self) -> None:
        """A run starts: forget the one before."""
        self.release()
        self._tally.change = None

    def release(self) -> None:
        """Let go of everything, and of the autoencoder's tiles."""
        self._tiles.off()
        self._level: Level | None = None
        self._schedule: Schedule | None = None
        self._solver: Any = None
        self._sizes: list[Size] = []
        self._patches = 0

    @property
    def bytes(self) -> int:
        """Memory of the latents, of the guide and its noise."""
        level = self._level
        if level is None:
            return 0
        kept = (level.latents, level.guide, level.noise)
        return sum(tensor.nbytes for tensor in kept if tensor is not None)

    # what the loop's seam asks for

    def begin(self, _latents: Tensor, solver: Any) -> None:
        """A run begins."""
        self._solver = solver

    def evaluate(self, evaluation: Evaluation) -> Tensor:
        """Make a step in the last size; before the first one, all of the sizes before it."""
        self._rules.check(evaluation.options)
        opened = self._pictures.open(evaluation)
        if evaluation.step.index == 0:
            self._open(opened)
        assert self._level is not None
        self._step(opened, self._level, evaluation.step.index)
        self._say()
        return self._pictures.back(self._level.latents, evaluation)

    def _open(self, opened: Opened) -> None:
        """Make the smaller pictures, and begin the last run."""
        picture, total = opened.picture, opened.evaluation.step.total
        assert total is not None  # a run from noise alone
        grain = self._pictures.grain
        height, width = picture.shape[-2:]
        self._sizes = sizes(height, width, self._side, grain)
        tokens = [rows * columns // grain**2 for rows, columns in (self._sizes[-1], self._sizes[0])]
        self._schedule = self._schedules.make(
            self._solver, total, 1.0, (tokens[0], tokens[1]), None
        )
        self._noise_levels = Levels(self._schedule.solver)
        if len(self._sizes) > 1:
            self._tiles.on()
        for number, (rows, columns) in enumerate(self._sizes):
            noise = picture[..., :rows, :columns] / self._solver_scale()
            self._level = self._begun(number, noise)
            if number < len(self._sizes) - 1:
                for index in range(total):
                    self._step(opened, self._level, index)

    def _solver_scale(self) -> float:
        """What a pipeline multiplies its noise with before the first step."""
        return float(getattr(self._solver, "init_noise_sigma", 1.0))

    def _begun(self, number: int, noise: Tensor) -> Level:
        """A run in one size, at its beginning."""
        before, schedule = self._level, self._fresh(0)
        if before is None:
            return Level(number, noise * self._solver_scale(), None, noise)
        height, width = noise.shape[-2:]
        pixels = pictures.pixels_from(self._pipe, before.latents)
        factor = pixels.shape[-1] // before.latents.shape[-1]
        large = lanczos(pixels, height * factor, width * factor)
        guide = pictures.latents_from(self._pipe, large).to(noise.dtype)
        return Level(number, schedule.noised(guide, noise), guide, noise)

    def _fresh(self, index: int) -> Schedule:
        """The schedule, about to make a step: a solver of one step knows no more than its place."""
        assert self._schedule is not None
        solver = copy.deepcopy(self._schedule.solver)
        if hasattr(solver, "set_begin_index"):
            solver.set_begin_index(index)
        return Schedule(solver, 0)

    def _step(self, opened: Opened, level: Level, index: int) -> None:
        """Take all pixels of a run through a step."""
        height, width = level.latents.shape[-2:]
        if level.guide is None:
            whole = partial(self._advanced, opened, Resized(height, width), level.latents, index)
            [level.latents] = self._deal.answers([whole], level.latents)
            return
        rows, columns = (min(self._side, side) for side in (height, width))
        grain = self._pictures.grain
        seed = index * len(self._sizes) + level.number
        found, counted = torch.zeros_like(level.latents), level.latents.new_zeros(height, width)
        rows, columns = (max(side // grain, 1) * grain for side in (rows, columns))
        windows = list(Covering(height, width, rows, columns, grain, seed))
        questions = [partial(self._refined, opened, window, level, index) for window in windows]
        like = windows[0].of(level.latents)
        for window, value in zip(windows, self._deal.answers(questions, like), strict=True):
            weight = weights(window, height, width, self._method.border).to(found)
            window.of(found).add_(value * weight)
            window.of(counted).add_(weight)
        self._patches += len(windows)
        level.latents = found / counted

    def _refined(self, opened: Opened, window: Window, level: Level, index: int) -> Tensor:
        """A patch after a step, guided while the slider says so."""
        assert level.guide is not None
        total = opened.evaluation.step.total or 0
        pixels, guide, noise = (window.of(one) for one in (level.latents, level.guide, level.noise))
        if index >= round(self._method.slider * total):
            return self._advanced(opened, window, pixels, index)
        mixed = with_phases(pixels, self._noised(guide, noise, index, total))
        value = self._advanced(opened, window, mixed, index)
        return chequered(value, self._noised(guide, noise, index + 1, total), index % 2)

    def _noised(self, clean: Tensor, noise: Tensor, index: int, total: int) -> Tensor:
        """The guide at the noise level of a step; behind the last one it is clean."""
        if index == total:
            return clean
        schedule = self._fresh(index)
        return Schedule(schedule.solver, index).noised(clean, noise)

    def _advanced(
        self, opened: Opened, patch: Resized | Window, pixels: Tensor, index: int
    ) -> Tensor:
        """Latents after a step, the network being asked about a patch."""
        schedule, own = self._fresh(index), opened.evaluation.step
        given = schedule.scaled(pixels, index)
        step = Step(index, own.total, index, self._noise_levels)
        output = opened.guided(patch, given, schedule.timestep(index), step)
        return schedule.stepped(output, pixels, index, opened.evaluation.options)

    def _say(self) -> None:
        if len(self._sizes) > 1:
            through = " → ".join(f"{height} × {width}" for height, width in self._sizes)
            self._tally.change = f"latents of {through}, {self._patches:,} patches"
