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
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Literal, cast

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from accel import hooks
from accel.attach import Accelerator, Run
from accel.calibration import Calibrated
from accel.errors import BadInput, BadOutput, UnsupportedModel
from accel.seams.denoisers import find_denoisers
from accel.seams.pipelines import guidance_of
from accel.seams.seeding import Generator, restarted
from samplers.dpmsolverpp_scheduler import DPMSolverPPScheduler
from samplers.fingerprint import Fingerprint
from samplers.olss import OLSS, Row, first_order
from samplers.olss_fit import (
    RIDGE,
    Gram,
    Solution,
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
    evaluations: int | None = Field(
        default=None,
        ge=1,
        description="steps to fit; without it, as many as are asked for",
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


@dataclass(frozen=True)
class Lesson:
    """One call, and its long run.

    Attributes:
        call: Arguments of the call.
        states: Those of the long run, noise first.
    """

    call: Mapping[str, Any]
    states: list[Tensor]


def calibrate_olss(
    pipe: Any, calls: Iterable[Mapping[str, Any]], options: Mapping[str, Any]
) -> Calibrated:
    """Fit OLSS for a pipeline; ``num_inference_steps`` of the calls says for how many steps.

    Args:
        pipe: A pipeline without a plan.
        calls: Arguments of some calls, each with a generator.
        options: Fields of `Options`; with ``evaluations``, a call of ``num_inference_steps`` is
            answered in fewer.

    Raises:
        BadInput: Without a call, or with calls that do not start from noise of their own.
        BadOutput: If the network gives NaN.
        UnsupportedModel: If the sampler does not serve the pipeline.
    """
    course = Course(pipe, Options.model_validate(dict(options)))
    course.teach(calls)
    short = course.short(course.asked.evaluations or course.steps)
    found = short.fit()
    method = short.method(found.rows)
    note = (
        f"{short.count} steps for {course.asked.teacher_steps}, by way of its states "
        f"{', '.join(map(str, short.path))}; the end is met within {found.errors[-1]:.2g}"
    )
    if course.asked.refine:
        method, done = short.refine(found)
        note += f", refined by gradients from {done.before:.2g} to {done.after:.2g}"
    return Calibrated(method, note)


class Course:
    """A calibration under way: what long runs teach.

    Attributes:
        pipe: The stock pipeline.
        asked: The options.
        config: Of the pipeline's scheduler.
        teacher: Made the long runs.
        lessons: What they went through.
        steps: That the calls ask for.
    """

    steps: int

    def __init__(self, pipe: Any, asked: Options) -> None:
        if type(pipe).__name__ in TOKEN_TIMES:
            raise UnsupportedModel(
                f"{type(pipe).__name__} gives each token a noise level of its own, and OLSS "
                "follows one for all: leave samplers.OLSS out of the plan."
            )
        self.asked = asked
        self.pipe = pipe
        self.config = pipe.scheduler.config
        self.teacher: Teacher = Teacher.from_config(self.config, order=asked.teacher_order)
        self.lessons: list[Lesson] = []
        self.gram = np.zeros(())

    def teach(self, calls: Iterable[Mapping[str, Any]]) -> None:
        """Make the long runs."""
        for call in calls:
            self._check(call)
            self.teacher.begin(self.pipe)
            run(self.pipe, self.teacher, call, self.asked.teacher_steps)
            states, outputs = self.teacher.states, self.teacher.outputs
            if not states or not bool(states[-1].isfinite().all()):
                raise BadOutput(
                    "The stock pipeline gives no steps, or NaN or infinite values: there is "
                    "nothing to fit. Try --dtype bfloat16 or float32."
                )
            self.lessons.append(Lesson(call, states))
            if self.asked.method == "search" or not self.asked.on_policy:
                self.gram = self.gram + gram_of([*states, *outputs])
        if not self.lessons:
            raise BadInput("A calibration rests on what prompts do: give at least one prompt.")

    def _check(self, call: Mapping[str, Any]) -> None:
        steps, most = call.get("num_inference_steps"), self.asked.teacher_steps
        count = self.asked.evaluations or steps
        if steps is None or count is None or not 1 <= count <= min(steps, most):
            raise BadInput(
                f"OLSS is fitted for one number of steps, at most the {most} of the long run "
                f"(teacher_steps), in place of as many or more; found {count} evaluations for a "
                f"call of {steps} steps. Say it by --steps, or by --set evaluations=…."
            )
        if self.lessons and steps != self.steps:
            raise BadInput(f"The calls are of {self.steps} and of {steps} steps: make them alike.")
        if call.get("generator") is None or call.get("timesteps") or call.get("sigmas"):
            raise BadInput(
                "A call is made again for each step that is fitted: give it a generator, and no "
                "timesteps or sigmas."
            )
        self.steps = int(steps)

    def short(self, count: int, beside: Sequence[Accelerator] = ()) -> Short:
        """A short run to be fitted.

        Args:
            count: Its evaluations.
            beside: Guidance rules that it goes with, which the long runs do without.
        """
        if self.asked.method == "uniform":
            path = uniform_path(self.asked.teacher_steps, count)
        else:
            path = search_path(self.gram, count)
        return Short(self, path, tuple(beside))

    @cached_property
    def own_schedule(self) -> tuple[float, ...]:
        """The noise levels that the pipeline has by itself at the number of steps of its calls."""
        rows = [(0.0,) * (k + 1) for k in range(self.steps)]
        probe: Probe = Probe.from_config(self.config, noise=(0.0,) * self.steps, outputs=rows)
        run(self.pipe, probe, self.lessons[0].call, self.steps)
        return probe.asked


@dataclass(frozen=True)
class Short:
    """A short run that is fitted to long ones.

    Attributes:
        course: The long runs.
        path: Indices of their states that it goes through.
        beside: Methods that it goes with.
    """

    course: Course
    path: tuple[int, ...]
    beside: tuple[Accelerator, ...] = ()
    _answers: dict[int, list[Any]] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """Its evaluations."""
        return len(self.path) - 1

    def fit(self) -> Solution:
        """The least squares, one step after the other."""
        course = self.course
        levels = [course.teacher.grid.levels[i] for i in self.path]
        thresholding = course.teacher.config.thresholding
        told = cast("Prediction", course.teacher.config.prediction_type)
        prediction: Prediction = "sample" if thresholding else told
        steps = [first_order(prediction, levels[k], levels[k + 1]) for k in range(self.count)]
        on_policy = course.asked.on_policy
        observe = self._on_policy if on_policy else looked_up(course.gram, self.path)
        return fit_path(observe, steps, course.asked.ridge)

    def _on_policy(self, rows: tuple[Row, ...]) -> Gram:
        """Take the steps so far, and look at the outputs there."""
        course = self.course
        unknown = [(0.0,) * (k + 2) for k in range(len(rows), self.count)]
        student: Student = Student.from_config(
            course.config, **self.method((*rows, *unknown)).settings()
        )
        student.fitted = len(rows)
        gram = np.zeros(())
        for number, lesson in enumerate(course.lessons):
            answers = self._answers.setdefault(number, [])
            run(course.pipe, student, lesson.call, course.steps, self.beside, answers)
            terms = student.terms
            if not torch.equal(terms[0], lesson.states[0]):
                raise BadInput(
                    "A call that is made again starts from other noise: give it latents, or a "
                    "generator that all its noise is drawn from."
                )
            gram = gram + gram_of([*terms, lesson.states[self.path[len(rows) + 1]]])
        return gram

    def method(self, rows: Sequence[Row], path: Path | None = None, refined: int = 0) -> OLSS:
        """The sampler with some scalars; of the path's own times where no others are given."""
        course, grid = self.course, self.course.teacher.grid
        timesteps, sigmas = path or (
            tuple(float(grid.timesteps[i]) for i in self.path[:-1]),
            tuple(float(grid.sigmas[i]) for i in self.path),
        )
        return OLSS(
            noise=tuple(row[0] for row in rows),
            outputs=tuple(row[1:] for row in rows),
            path_timesteps=timesteps,
            path_sigmas=sigmas,
            asked_sigmas=course.own_schedule,
            refined=refined,
            made_for=Fingerprint.of(course.pipe, course.teacher, course.teacher.guidance),
        )

    def refine(self, found: Solution) -> tuple[OLSS, Refinement]:
        """The sampler after Adam, and how much that helped."""
        course = self.course
        scheduler: Refined = Refined.from_config(
            course.config, **self.method(found.rows).settings()
        )
        moved = course.asked.times and not course.teacher.config.thresholding
        places = Places(course.teacher.grid, self.path) if moved else None
        lessons = [(lesson.call, lesson.states[-1]) for lesson in course.lessons]
        again = partial(run, course.pipe, scheduler, steps=course.steps)
        with frozen(course.pipe):
            done = refine(
                error_of(scheduler, lessons, again),
                scheduler,
                found.rows,
                found.grams,
                course.asked.refine,
                course.asked.ridge,
                places,
            )
        return self.method(done.rows, done.path, done.steps), done


def run(
    pipe: Any,
    scheduler: Any,
    call: Mapping[str, Any],
    steps: int,
    beside: tuple[Accelerator, ...] = (),
    answers: list[Any] | None = None,
) -> None:
    """Make a call with a scheduler of ours until that has seen enough; its noise is that of before.

    Args:
        pipe: The stock pipeline.
        scheduler: Raises `Reached` when it has.
        call: Arguments of the call.
        steps: That it asks for.
        beside: Methods that are attached meanwhile.
        answers: What the networks answered when the call was made before (`answering`).

    Raises:
        UnsupportedModel: If the call ends without having reached the scheduler's goal.
    """
    before = pipe.scheduler
    again = {"generator": restarted(call["generator"]), "num_inference_steps": steps}
    pipe.scheduler = scheduler
    try:
        with ExitStack() as stack:
            if beside:
                stack.callback(Run(beside, pipe).detach)
            if answers is not None:
                stack.enter_context(answering(pipe, answers))
            pipe(**{**call, **again})
    except Reached:
        return
    finally:
        pipe.scheduler = before
    raise UnsupportedModel(
        f"{type(pipe).__name__} does not run all {steps} steps on its own scheduler: OLSS cannot "
        "be fitted to it. Use samplers.DPMSolverPP."
    )


@contextmanager
def answering(pipe: Any, answers: list[Any]) -> Iterator[None]:
    """Answer the networks' first calls from a list, and add to it what they answer to the others.

    That is right where the calls of a run are made again in the same order on the same inputs. It
    is below all methods: those that are attached do their work again.
    """
    asked = 0

    def answer(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        nonlocal asked
        asked += 1
        if asked > len(answers):
            answers.append(inner(*args, **kwargs))
        return deepcopy(answers[asked - 1])

    networks = find_denoisers(pipe)
    undos = [hooks.wrap(one.module, one.entry, answer, innermost=True) for one in networks]
    try:
        yield
    finally:
        for undo in undos:
            undo()
