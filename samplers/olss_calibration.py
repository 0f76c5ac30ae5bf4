"""Calibrating OLSS: record long runs, search a path through them, fit the steps, maybe refine them.

The long run is made by DPM-Solver++ (`teacher_order`) on the pipeline's own schedule of
`teacher_steps`. The steps are then fitted on-policy: the short run itself is taken as far as it is
fitted, and the next step is fitted to the outputs found there. For that, each call is made once
more for each step; the network answers what it was asked before from memory, so that a prompt costs
`teacher_steps` + K evaluations – and K times its text encoder.

``refine`` goes on by gradients (`samplers.olss_refine`). That is calibration as well: no weight is
trained. What it made better says so: ``refined`` in the plan, in the report and in the note.

Source: arXiv 2305.14677, section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from accel import hooks
from accel.calibration import Calibrated
from accel.errors import BadInput, BadOutput, UnsupportedModel
from accel.seams.denoisers import find_denoisers
from accel.seams.pipelines import guidance_of
from accel.seams.seeding import Generator
from samplers.dpmsolverpp_scheduler import DPMSolverPPScheduler
from samplers.fingerprint import Fingerprint
from samplers.olss import OLSS, Row, first_order
from samplers.olss_fit import (
    RIDGE,
    Fit,
    Gram,
    fit_path,
    gram_of,
    looked_up,
    search_path,
    uniform_path,
)
from samplers.olss_refine import (
    Path,
    Places,
    Reached,
    Refined,
    Refinement,
    error_of,
    frozen,
    refine,
)
from samplers.olss_scheduler import OLSSScheduler, kept
from samplers.prediction import Prediction
from samplers.sampler import TOKEN_TIMES
from samplers.schedule import Grid


class Options(BaseModel):
    """How OLSS is calibrated."""

    model_config = ConfigDict(extra="forbid")

    method: Literal["search", "uniform"] = Field(
        default="search", description="how the states to go through are chosen"
    )
    on_policy: bool = Field(
        default=True, description="fit each step on the short run itself, not on the long one"
    )
    teacher_steps: int = Field(default=100, ge=2, description="evaluations of the long run")
    teacher_order: Literal[1, 2, 3] = Field(
        default=2, description="order of the long run's solver; 1 is DDIM, as the authors have it"
    )
    ridge: float = Field(default=RIDGE, ge=0.0, description="pull toward the step of first order")
    refine: int = Field(default=0, ge=0, description="steps of Adam after the least squares")
    times: bool = Field(
        default=True,
        description="refine: also when the network is evaluated, as BNS does; not where x0 is "
        "clipped, which depends on the level",
    )


class Teacher(DPMSolverPPScheduler):
    """Solves the long run and writes down its states and outputs, on the CPU."""

    def begin(self, pipe: Any) -> None:
        """Forget what was written down."""
        self.pipe = pipe
        self.states: list[Tensor] = []
        self.outputs: list[Tensor] = []

    def _prepare(self, levels: Sequence[Any]) -> None:
        super()._prepare(levels)
        self.guidance = guidance_of(self.pipe)
        self.grid = Grid(self.timesteps.cpu().numpy(), self.sigmas.cpu().numpy(), self._levels)

    def _advance(self, index: int, output: Tensor, sample: Tensor, generator: Generator) -> Tensor:
        if index != len(self.states):
            raise BadInput(
                f"OLSS is fitted to runs from pure noise, and this one goes to step {index} after "
                f"{len(self.states)} steps: calibrate with calls that make all their steps."
            )
        self.states.append(sample.cpu())
        self.outputs.append(kept(self._conversion, output, sample, self._levels[index]).cpu())
        reached = super()._advance(index, output, sample, generator)
        if index + 1 == self.num_inference_steps:
            self.states.append(reached.cpu())
            raise Reached
        return reached


class Probe(OLSSScheduler):
    """Reads the noise levels that a run asks for, and makes no step."""

    def _prepare(self, levels: Sequence[Any]) -> None:
        super()._prepare(levels)
        raise Reached


class Student(OLSSScheduler):
    """Takes the steps that are fitted and stops where the next one is to be fitted."""

    fitted = 0

    def _combine(self, index: int) -> Tensor:
        if index == self.fitted:
            raise Reached
        return super()._combine(index)

    @property
    def terms(self) -> list[Tensor]:
        """The noise and the outputs so far."""
        assert self._start is not None
        return [self._start.cpu(), *(output.cpu() for output in self._kept)]


@dataclass
class Lesson:
    """One call, and its long run.

    Attributes:
        call: Arguments of the call.
        states: Those of the long run, noise first; in the end those of the path.
        answers: What the networks answered in the short run so far, in order.
    """

    call: Mapping[str, Any]
    states: list[Tensor]
    answers: list[Any]


def calibrate_olss(
    pipe: Any, calls: Iterable[Mapping[str, Any]], options: Mapping[str, Any]
) -> Calibrated:
    """Fit OLSS for a pipeline; ``num_inference_steps`` of the calls says for how many steps.

    Args:
        pipe: A pipeline without a plan.
        calls: Arguments of some calls, each with a generator.
        options: Fields of `Options`.

    Raises:
        BadInput: Without a call, or with calls that do not start from noise of their own.
        BadOutput: If the network gives NaN.
        UnsupportedModel: If the sampler does not serve the pipeline.
    """
    course = Course(pipe, Options.model_validate(dict(options)))
    course.teach(calls)
    found = course.fit()
    method = course.method(found.rows)
    note = (
        f"{course.count} steps for {course.asked.teacher_steps}, by way of its states "
        f"{', '.join(map(str, course.path))}; the end is met within {found.errors[-1]:.2g}"
    )
    if course.asked.refine:
        method, done = course.refine(found)
        note += f", refined by gradients from {done.before:.2g} to {done.after:.2g}"
    return Calibrated(method, note)


class Course:
    """A calibration under way.

    Attributes:
        asked: The options.
        count: Steps of the short run.
        path: Indices of the long run's states that the short run goes through.
    """

    count: int
    path: tuple[int, ...]

    def __init__(self, pipe: Any, asked: Options) -> None:
        if type(pipe).__name__ in TOKEN_TIMES:
            raise UnsupportedModel(
                f"{type(pipe).__name__} gives each token a noise level of its own, and OLSS "
                "follows one for all: leave samplers.OLSS out of the plan."
            )
        self.asked = asked
        self._pipe = pipe
        self._config = pipe.scheduler.config
        self._teacher: Teacher = Teacher.from_config(self._config, order=asked.teacher_order)
        self._lessons: list[Lesson] = []
        self._gram = np.zeros(())

    def teach(self, calls: Iterable[Mapping[str, Any]]) -> None:
        """Make the long runs, and choose the path."""
        for call in calls:
            self._check(call)
            self._teacher.begin(self._pipe)
            run(self._pipe, self._teacher, call, self.asked.teacher_steps)
            states, outputs = self._teacher.states, self._teacher.outputs
            if not states or not bool(states[-1].isfinite().all()):
                raise BadOutput(
                    "The stock pipeline gives no steps, or NaN or infinite values: there is "
                    "nothing to fit. Try --dtype bfloat16 or float32."
                )
            self._lessons.append(Lesson(call, states, []))
            if self.asked.method == "search" or not self.asked.on_policy:
                self._gram = self._gram + gram_of([*states, *outputs])
        if not self._lessons:
            raise BadInput("A calibration rests on what prompts do: give at least one prompt.")
        length = self.asked.teacher_steps
        if self.asked.method == "uniform":
            self.path = uniform_path(length, self.count)
        else:
            self.path = search_path(self._gram, self.count)
        for lesson in self._lessons:
            lesson.states = [lesson.states[i] for i in self.path]

    def _check(self, call: Mapping[str, Any]) -> None:
        count = call.get("num_inference_steps")
        if count is None or not 1 <= count <= self.asked.teacher_steps:
            raise BadInput(
                f"OLSS is fitted for one number of steps, at most the {self.asked.teacher_steps} "
                f"of the long run (teacher_steps); the call says {count}. Say it by --steps."
            )
        if self._lessons and count != self.count:
            raise BadInput(f"The calls are of {self.count} and of {count} steps: make them alike.")
        if call.get("generator") is None or call.get("timesteps") or call.get("sigmas"):
            raise BadInput(
                "A call is made again for each step that is fitted: give it a generator, and no "
                "timesteps or sigmas."
            )
        self.count = int(count)

    def fit(self) -> Fit:
        """The least squares, one step after the other."""
        levels = [self._teacher.grid.levels[i] for i in self.path]
        thresholding = self._teacher.config.thresholding
        told = cast("Prediction", self._teacher.config.prediction_type)
        prediction: Prediction = "sample" if thresholding else told
        steps = [first_order(prediction, levels[k], levels[k + 1]) for k in range(self.count)]
        observe = self._on_policy if self.asked.on_policy else looked_up(self._gram, self.path)
        self._asked = self._own_schedule()
        return fit_path(observe, steps, self.asked.ridge)

    def _on_policy(self, rows: tuple[Row, ...]) -> Gram:
        """Take the steps so far, and look at the outputs there."""
        unknown = [(0.0,) * (k + 2) for k in range(len(rows), self.count)]
        student: Student = Student.from_config(
            self._config, **self.method((*rows, *unknown)).settings()
        )
        student.fitted = len(rows)
        gram = np.zeros(())
        for lesson in self._lessons:
            with answering(self._pipe, lesson.answers):
                run(self._pipe, student, lesson.call, self.count)
            terms = student.terms
            if not torch.equal(terms[0], lesson.states[0]):
                raise BadInput(
                    "A call that is made again starts from other noise: give it latents, or a "
                    "generator that all its noise is drawn from."
                )
            gram = gram + gram_of([*terms, lesson.states[len(rows) + 1]])
        return gram

    def _own_schedule(self) -> tuple[float, ...]:
        """The noise levels that the pipeline has by itself at this number of steps."""
        rows = [(0.0,) * (k + 1) for k in range(self.count)]
        probe: Probe = Probe.from_config(self._config, noise=(0.0,) * self.count, outputs=rows)
        run(self._pipe, probe, self._lessons[0].call, self.count)
        return probe.asked

    def method(self, rows: Sequence[Row], path: Path | None = None, refined: int = 0) -> OLSS:
        """The sampler with some scalars; of the path's own times where no others are given."""
        grid = self._teacher.grid
        timesteps, sigmas = path or (
            tuple(float(grid.timesteps[i]) for i in self.path[:-1]),
            tuple(float(grid.sigmas[i]) for i in self.path),
        )
        return OLSS(
            noise=tuple(row[0] for row in rows),
            outputs=tuple(row[1:] for row in rows),
            path_timesteps=timesteps,
            path_sigmas=sigmas,
            asked_sigmas=self._asked,
            refined=refined,
            made_for=Fingerprint.of(self._pipe, self._teacher, self._teacher.guidance),
        )

    def refine(self, found: Fit) -> tuple[OLSS, Refinement]:
        """The sampler after Adam, and how much that helped."""
        scheduler: Refined = Refined.from_config(self._config, **self.method(found.rows).settings())
        moved = self.asked.times and not self._teacher.config.thresholding
        places = Places(self._teacher.grid, self.path) if moved else None
        lessons = [(lesson.call, lesson.states[-1]) for lesson in self._lessons]
        again = partial(run, self._pipe, scheduler, steps=self.count)
        with frozen(self._pipe):
            done = refine(
                error_of(scheduler, lessons, again),
                scheduler,
                found.rows,
                found.grams,
                self.asked.refine,
                self.asked.ridge,
                places,
            )
        return self.method(done.rows, done.path, done.steps), done


def run(pipe: Any, scheduler: Any, call: Mapping[str, Any], steps: int) -> None:
    """Make a call with a scheduler of ours until that has seen enough; its noise is that of before.

    Raises:
        UnsupportedModel: If the call ends without having reached the scheduler's goal.
    """
    before = pipe.scheduler
    again = {"generator": restarted(call["generator"]), "num_inference_steps": steps}
    pipe.scheduler = scheduler
    try:
        pipe(**{**call, **again})
    except Reached:
        return
    finally:
        pipe.scheduler = before
    raise UnsupportedModel(
        f"{type(pipe).__name__} does not run all {steps} steps on its own scheduler: OLSS cannot "
        "be fitted to it. Use samplers.DPMSolverPP."
    )


def restarted(generator: Any) -> Any:
    """A generator (or a list of them) in the state that this one is in."""
    if isinstance(generator, list):
        return [restarted(one) for one in generator]
    return generator.clone_state()


@contextmanager
def answering(pipe: Any, answers: list[Any]) -> Iterator[None]:
    """Answer the networks' first calls from a list, and add to it what they answer to the others.

    That is right where the calls of a run are made again in the same order on the same inputs.
    """
    asked = 0

    def answer(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        nonlocal asked
        asked += 1
        if asked > len(answers):
            answers.append(inner(*args, **kwargs))
        return deepcopy(answers[asked - 1])

    undos = [hooks.wrap(one.module, one.entry, answer) for one in find_denoisers(pipe)]
    try:
        yield
    finally:
        for undo in undos:
            undo()
