"""Fitting OLSS while plans are searched for: one pipeline, its own runs as the long ones.

What a tuned plan is to come near to is the stock pipeline's own picture. So the long run is that of
the pipeline itself, as many steps and, where its scheduler is of first order, the same solver; and
the steps are fitted on-policy beside the guidance rules of the plan, so that they make up for what
those leave out. The long runs are made once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

from accel.attach import Accelerator
from accel.errors import Conflict
from accel.seams.solvers import ONE_STEP
from samplers.olss import OLSS
from samplers.olss_calibration import Course, Options

BESIDE = "guidance"
"""The layer whose methods the steps are fitted with."""


class Fitter:
    """Fits steps for a pipeline.

    Args:
        pipe: The stock pipeline.
        calls: Some of its calls, of one number of steps, each with a generator.
    """

    def __init__(self, pipe: Any, calls: Sequence[Mapping[str, Any]]) -> None:
        self._pipe = pipe
        self._calls = calls
        self._known: dict[tuple[int, tuple[Accelerator, ...]], OLSS] = {}

    def __call__(self, beside: Iterable[Accelerator], options: Mapping[str, Any]) -> OLSS:
        """The method with its steps.

        Args:
            beside: The other methods of the plan.
            options: ``evaluations``: how many steps.

        Raises:
            AccelError: If there is none, or the other methods do not serve the pipeline.
        """
        methods, count = tuple(beside), options["evaluations"]
        for method in methods:
            if method.layer == OLSS.layer:
                raise Conflict(
                    f"{OLSS.name} has noise levels of its own, beside which {method.name} does "
                    "nothing: leave one of them out of the plan."
                )
        rules = tuple(method for method in methods if method.layer == BESIDE)
        if (count, rules) not in self._known:
            short = self._course.short(count, rules)
            self._known[count, rules] = short.method(short.fit().rows)
        return self._known[count, rules]

    @cached_property
    def _course(self) -> Course:
        first = type(self._pipe.scheduler).__name__ in ONE_STEP
        steps = self._calls[0]["num_inference_steps"]
        asked = Options(teacher_steps=steps, teacher_order=1 if first else 2)
        course = Course(self._pipe, asked)
        course.teach(self._calls)
        return course
