"""A sweep: one or two knobs of a plan at some values each, as plans, as jobs and as points.

Nothing here knows of pages. A knob is written ``cache.EasyCache.threshold``, as after ``--set``.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

from accel.errors import AccelError, BadInput, PlanError
from accel.plan import TUNED, Plan, build, method_class, methods
from app.plans import toml_value
from app.serve.jobs import FIRST, STOCK, Spec

if TYPE_CHECKING:
    from app.serve.jobs import Job

MOST = 48
"""Points of a sweep: what fits into a page, and into a coffee break."""
TITLE = 200
"""Characters of a title that a job keeps."""
KNOB = re.compile(r"(?:^|, )(\w+\.\w+\.\w+) = ")
"""A knob in the title of a point."""


@dataclass(frozen=True)
class Axis:
    """A knob and the values that it is set to.

    Raises:
        BadInput: If there are no values, or one comes twice.
    """

    knob: str
    values: tuple[Any, ...]

    def __post_init__(self) -> None:
        if not self.values:
            raise BadInput(f"{self.knob} has no values to sweep: give some, such as 0.05, 0.1.")
        twice = [value for i, value in enumerate(self.values) if value in self.values[:i]]
        if twice:
            raise BadInput(f"{self.knob} has the value {twice[0]} twice: leave one out.")


@dataclass(frozen=True)
class Point:
    """One combination of values: what it is called, and the plan that it makes."""

    title: str
    plan: dict[str, Any]


@dataclass(frozen=True)
class Mark:
    """A run of a sweep, as the plot and the table show it.

    Attributes:
        job: Its id.
        title: What it was set to; empty for the stock run.
        state: Of the job.
        seconds: Its run; ``None`` before it is done.
        ratio: How many times faster than stock; ``None`` before a stock time is known that counts:
            the first run after loading does not.
        measured: Whether the ratio comes from several stock runs, not from one alone.
        ssim: Against the stock picture of the same seed, 1 for equal; ``None`` where unknown.
        psnr: The same in dB, infinite for equal ones.
    """

    job: str
    title: str
    state: str
    seconds: float | None = None
    ratio: float | None = None
    measured: bool = False
    ssim: float | None = None
    psnr: float | None = None

    @property
    def plotted(self) -> bool:
        """Whether both coordinates are known."""
        return self.ratio is not None and self.ssim is not None


def knobs(names: Iterable[str]) -> list[str]:
    """The fields of some methods that can be swept: numbers, choices and switches."""
    return [
        f"{name}.{field}"
        for name in names
        for field, info in methods()[name].model_fields.items()
        if info.annotation in (bool, int, float) or get_origin(info.annotation) is Literal
    ]


def suggested(knob: str) -> list[Any]:
    """Values to begin with: every choice, or the default with a lower and some higher ones.

    Only what the method takes beside its other defaults; that may be nothing.
    """
    name, _, field = knob.rpartition(".")
    info = method_class(name).model_fields[field]
    near = _near(info.annotation, getattr(method_class(name)(), field))
    return [value for value in dict.fromkeys(near) if _taken(knob, value)]


def _near(kind: Any, default: Any) -> list[Any]:
    """Candidates around a default."""
    if kind is bool:
        return [False, True]
    if kind is int:
        return [default - 1, default, default + 1, default + 2]
    if kind is float:
        middle = default or 0.1
        return [float(f"{middle * factor:.3g}") for factor in (0.5, 1, 2, 3)]
    return list(get_args(kind))


def _taken(knob: str, value: Any) -> bool:
    """Whether the method takes the value beside its other defaults."""
    name, _, field = knob.rpartition(".")
    try:
        build(name, {field: value})
    except PlanError:
        return False
    return True


def written(values: Iterable[Any]) -> str:
    """Values as a person types them: ``0.05, 0.1``."""
    return ", ".join(str(v).lower() if isinstance(v, bool) else str(v) for v in values)


def values(text: str) -> tuple[Any, ...]:
    """The values in a text, separated by commas, each as after ``--set``."""
    try:
        return tuple(tomllib.loads(f"values = [{text}]")["values"])
    except tomllib.TOMLDecodeError:
        return tuple(toml_value(piece.strip()) for piece in text.split(",") if piece.strip())


def points(plan: Mapping[str, Any], axes: Sequence[Axis]) -> list[Point]:
    """Every combination of the values, the last axis running fastest; every plan is checked.

    Args:
        plan: What is changed, as ``Plan.to_dict`` writes it.
        axes: One or two knobs.

    Raises:
        BadInput: If there is no axis, a knob is there twice, or more than ``MOST`` points.
        PlanError: If a combination is no plan; it is named.
    """
    _check(axes)
    return [
        _point(plan, dict(zip((axis.knob for axis in axes), combination, strict=True)))
        for combination in product(*(axis.values for axis in axes))
    ]


def _check(axes: Sequence[Axis]) -> None:
    if not 1 <= len(axes) <= 2:
        raise BadInput(f"A sweep takes one knob or two, not {len(axes)}: choose them.")
    if len({axis.knob for axis in axes}) < len(axes):
        raise BadInput(f"{axes[0].knob} is swept twice: choose another second knob, or none.")
    count = 1
    for axis in axes:
        count *= len(axis.values)
    if count > MOST:
        raise BadInput(f"That makes {count} pictures, {MOST} are the most: leave values out.")


def _point(plan: Mapping[str, Any], settings: Mapping[str, Any]) -> Point:
    title = ", ".join(f"{knob} = {written([value])}" for knob, value in settings.items())
    document = {name: table for name, table in plan.items() if name != TUNED}
    for knob, value in settings.items():
        document = _set(document, knob, value)
    try:
        return Point(title, Plan.from_dict(document).to_dict())
    except AccelError as error:
        raise type(error)(f"{title}: {error}") from error


def settings(title: str) -> dict[str, str]:
    """The knobs in the title of a point, and what they were set to."""
    _, *pieces = KNOB.split(title)
    return dict(zip(pieces[::2], pieces[1::2], strict=True))


def _set(document: Mapping[str, Any], knob: str, value: Any) -> dict[str, Any]:
    family, _, rest = knob.partition(".")
    kind, _, field = rest.partition(".")
    kinds = dict(document.get(family, {}))
    return {**document, family: {**kinds, kind: {**kinds.get(kind, {}), field: value}}}


def runs(request: Mapping[str, Any], found: Sequence[Point], stock: str) -> list[Spec]:
    """The jobs of a sweep: the stock run, and those of the points measured against it.

    Args:
        request: With its seed, so that all runs start from the same noise.
        found: The points.
        stock: Title of the stock run.
    """
    asked = dict(request)
    points = [
        Spec(request=asked, plan=one.plan, title=one.title[:TITLE], against=FIRST) for one in found
    ]
    return [Spec(request=asked, plan=STOCK, title=stock), *points]


def marks(jobs: Sequence[Job]) -> list[Mark]:
    """The runs of a sweep against its stock run, which is the first."""
    return [_mark(job, first=job is jobs[0]) for job in jobs]


def _mark(job: Job, *, first: bool) -> Mark:
    title = "" if first else job.spec.title
    result = job.result
    if result is None or result.partial:
        return Mark(job.id, title, job.state)
    if first:
        return Mark(job.id, title, job.state, result.seconds, 1.0, True, 1.0, float("inf"))
    speedup = result.speedup
    return Mark(
        job.id,
        title,
        job.state,
        result.seconds,
        None if speedup is None else speedup.ratio,
        speedup is not None and speedup.low < speedup.high,
        _number(result.quality.get("ssim")),
        _number(result.quality.get("psnr")),
    )


def _number(value: float | str | None) -> float | None:
    """A figure of quality; ``equal`` is what JSON holds of an infinite PSNR."""
    if value == "equal":
        return float("inf")
    return None if isinstance(value, str) else value


def best(found: Iterable[Mark]) -> list[Mark]:
    """The marks that no other one beats in both speed and nearness (the Pareto front)."""
    known = [mark for mark in found if mark.plotted]
    return [mark for mark in known if not any(_beats(other, mark) for other in known)]


def _beats(one: Mark, other: Mark) -> bool:
    ours, theirs = (one.ratio or 0, one.ssim or 0), (other.ratio or 0, other.ssim or 0)
    return ours != theirs and ours[0] >= theirs[0] and ours[1] >= theirs[1]
