"""What a job of each kind does with a loaded model: the bytes of its files, and its result."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from accel.errors import AccelError, BadInput, NotWritten
from accel.plan import PRESETS, Plan
from app import clips, compare, metadata, nearness
from app.files import slug
from app.metadata import Entry
from app.request import Repeats, Request, make
from app.serve.baselines import Baselines
from app.serve.following import Follower
from app.serve.jobs import Figure, Kind, Result, Spec, Speedup
from app.serve.stopping import Stopped

if TYPE_CHECKING:
    from app.compare import Comparison, Side
    from app.session import Outcome, Session

DRIFT = 1.25
"""A fresh stock run that takes so many times longer or shorter than those before speaks against
them: the machine is not as it was."""


@dataclass(frozen=True)
class Against:
    """Another job, whose picture the fidelity is measured against."""

    spec: Spec
    picture: Path


@dataclass(frozen=True)
class Task:
    """A job as the worker gets it.

    Attributes:
        job: Its id.
        spec: What to do.
        folder: Where its files go; made when they are written.
        baselines: Where stock sides are kept.
        device: Where requests run that name none; ``None``: torch's default.
        against: What the picture is measured against.
    """

    job: str
    spec: Spec
    folder: Path
    baselines: Path
    device: str | None = None
    against: Against | None = None

    @property
    def request(self) -> Request:
        """What is asked for, on the task's device."""
        asked = make(Request, self.spec.request, where="")
        return asked if asked.device or not self.device else replace(asked, device=self.device)

    @property
    def plan(self) -> Plan:
        """The plan."""
        return Plan.from_dict(self.spec.plan)

    @property
    def name(self) -> str:
        """What its picture is called, without a suffix."""
        request = self.request
        return f"{slug(request.prompt)}-{request.seed}"


class Measured(Entry):
    """What a job tells about the machine.

    Attributes:
        configuration: What its times depend on, beside the plan; ``None``: they are not typical.
        stock: Seconds of its stock runs.
        figures: By preset.
        machine: Where the figures are from.
    """

    configuration: str | None = None
    stock: list[float] = Field(default_factory=list)
    figures: dict[str, Figure] = Field(default_factory=dict)
    machine: str = ""


@dataclass(frozen=True)
class Product:
    """What a job made: the contents of its files by name, not written yet, and its result."""

    contents: dict[str, bytes]
    result: Result
    measured: Measured = field(default_factory=Measured)


def generate(session: Session, task: Task, follower: Follower) -> Product:
    """One picture or clip.

    Raises:
        Stopped: If it was stopped before there was anything to show.
        AccelError: See ``Session.run``.
    """
    request, plan = task.request, task.plan
    try:
        with _noted() as notes:
            outcome = session.run(request, plan, follower.follow)
    except Stopped:
        return _glimpse(task, follower)
    follower.say("writing")
    partly = follower.stop.partial
    made = metadata.record(request, plan, session.model, outcome, partial=partly)
    named = _encoded(task, outcome, made, notes)
    assert outcome.report is not None
    named["timeline"] = (f"{task.name}-timeline.png", compare.png(outcome.report.timeline()))
    quality = {} if partly else _fidelity(session, task, outcome)
    stock = [] if partly or len(plan) else [outcome.seconds]
    kept = Baselines(task.baselines)
    if stock and not kept.has(request, session.model):
        side = compare.Side(outcome, compare.Timing(()))
        _keep(kept, session, request, side, notes)
    typical = None if partly else configuration(session, request, outcome)
    return Product(
        {name: content for name, content in named.values()},
        _result(
            outcome,
            files={role: name for role, (name, _) in named.items()},
            seed=request.seed,
            partial=partly,
            quality=quality,
            notes=notes,
        ),
        Measured(configuration=typical, stock=stock),
    )


def compared(session: Session, task: Task, follower: Follower) -> Product:
    """Both sides of a comparison; the stock side is that of an earlier one where it still holds.

    Raises:
        Stopped: If it was stopped.
        AccelError: See ``Session.run``.
    """
    request, plan = task.request, task.plan
    title = task.spec.title or "custom plan"
    kept = Baselines(task.baselines)
    with _noted() as notes:
        held = kept.read(request, session.model)
        reused = None if held is None else _reused(session, task, follower, held)
        if reused is None:
            repeats = Repeats(repeats=task.spec.repeats)
            found = compare.measure(session, request, plan, repeats, title, follower)
            held, fresh = found.baseline, found.baseline.timing.seconds
        else:
            held, fast = reused
            fresh = held.timing.seconds[-1:]
            stock = _timed(held, held.timing.seconds[-task.spec.repeats :])
            found = compare.comparison(request, title, stock, fast)
            notes.append("the stock side is of an earlier comparison; one more run confirmed it")
    follower.say("writing")
    _keep(kept, session, request, held, notes)
    contents = compare.documents(session, request, plan, found)
    side = found.accelerated
    result = _result(
        side.outcome,
        files={_role(name): name for name in contents},
        seed=request.seed,
        seconds=side.timing.median,
        speedup=_speedup(found),
        quality=_plain(found.quality),
        notes=notes,
    )
    place = configuration(session, request, found.baseline.outcome)
    return Product(contents, result, Measured(configuration=place, stock=list(fresh)))


def measured(session: Session, task: Task, follower: Follower) -> Product:
    """Stock and the presets that fit, in turns.

    Raises:
        Stopped: If it was stopped.
        AccelError: See ``Session.run``.
    """
    request = task.request
    repeats = Repeats(repeats=task.spec.repeats)
    with _noted() as notes:
        presets = list(_fitting(session, notes))
        first, *others = compare.sides(
            session, request, [("stock", None), *presets], repeats, follower
        )
        found = {
            title: compare.comparison(request, title, first, side)
            for (title, _), side in zip(presets, others, strict=True)
        }
    figures = {
        title: Figure(
            speedup=_speedup(one),
            seconds=one.accelerated.timing.median,
            quality=_plain(one.quality),
        )
        for title, one in found.items()
    }
    follower.say("writing")
    told = {title: figure.model_dump() for title, figure in figures.items()}
    return Product(
        {"figures.json": json.dumps(told, indent=2).encode()},
        _result(
            first.outcome,
            files={"report": "figures.json"},
            seed=request.seed,
            seconds=first.timing.median,
            notes=notes,
        ),
        Measured(
            configuration=configuration(session, request, first.outcome),
            stock=list(first.timing.seconds),
            figures=figures,
            machine=metadata.fingerprint(session.model).machine,
        ),
    )


KINDS: dict[Kind, Callable[[Session, Task, Follower], Product]] = {
    "generate": generate,
    "compare": compared,
    "measure": measured,
}


def configuration(session: Session, request: Request, outcome: Outcome) -> str:
    """A hash of what the seconds of a run depend on, beside its plan: not the words, nor the seed.

    Model, machine, versions, the other arguments of the call, what kinds of files go in.
    """
    depends = {
        "call": {
            name: True if isinstance(value, str) else value for name, value in outcome.call.items()
        },
        "inputs": sorted(request.files),
        "compile": bool(request.compile),
        "fingerprint": metadata.fingerprint(session.model).model_dump(),
    }
    return hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()


@contextmanager
def _noted() -> Iterator[list[str]]:
    """Collect the warnings of a run, each once."""
    notes: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", UserWarning)
        yield notes
        notes += dict.fromkeys(str(warning.message) for warning in caught)


def _encoded(
    task: Task, outcome: Outcome, made: metadata.Record, notes: list[str]
) -> dict[str, tuple[str, bytes]]:
    """By role, name and content of the picture, and of the record beside an MP4."""

    def encode(path: Path) -> dict[Path, bytes]:
        return clips.files(path, outcome.pictures, made, task.request.fps)

    picture, film = (Path(task.name + suffix) for suffix in clips.SUFFIXES)
    if outcome.clip and len(outcome.pictures) > 1:
        try:
            (film, content), (beside, record) = encode(film).items()
        except BadInput as error:
            notes.append(f"an animated PNG: {error}")
        else:
            return {"picture": (film.name, content), "record": (beside.name, record)}
    return {"picture": (picture.name, encode(picture)[picture])}


def _glimpse(task: Task, follower: Follower) -> Product:
    """What is kept of a run whose pipeline could not be made to decode early: the preview."""
    picture = follower.picture()
    if picture is None:
        raise Stopped
    name = f"{task.name}-preview.png"
    result = Result(
        files={"picture": name},
        partial=True,
        seed=task.request.seed or 0,
        seconds=0.0,
        steps=follower.step,
        nfe=0.0,
        notes=["this pipeline cannot be made to decode early: its preview was kept"],
    )
    return Product({name: picture}, result)


def _result(outcome: Outcome, **more: Any) -> Result:
    assert outcome.report is not None
    told = outcome.report.to_dict()
    known = {
        "clip": outcome.clip and len(outcome.pictures) > 1,
        "seconds": outcome.seconds,
        **{name: told[name] for name in ("steps", "nfe", "verdicts", "events")},
    }
    if told["guard"] is not None:
        known |= {"guarded": told["guard"]["samples"], "guarded_by": told["guard"]["note"]}
    return Result.model_validate(known | more)


def _fidelity(session: Session, task: Task, outcome: Outcome) -> dict[str, float | str]:
    """How near the picture is to that of another job, if it was asked to be measured."""
    if task.against is None:
        return {}
    other = replace(task, spec=task.against.spec)
    held = None
    if not len(other.plan):
        held = Baselines(task.baselines).read(other.request, session.model)
    if held is None:
        _, pictures = clips.read(task.against.picture)
    else:
        pictures = held.outcome.pictures
    return _plain(nearness.measure(pictures, outcome.pictures))


def _keep(
    kept: Baselines, session: Session, request: Request, side: Side, notes: list[str]
) -> None:
    """Keep a stock side for later comparisons, which do without it where the disk is full."""
    try:
        kept.keep(request, session.model, side)
    except (NotWritten, OSError) as error:
        notes.append(f"the stock side was not kept for later comparisons: {error}")


def _reused(
    session: Session, task: Task, follower: Follower, held: Side
) -> tuple[Side, Side] | None:
    """A kept stock side with one more time, and the accelerated one.

    ``None`` where it was timed too seldom, or the fresh run speaks against it.
    """
    known = held.timing.seconds
    if len(known) + 1 < task.spec.repeats or not known:
        return None
    repeats = Repeats(repeats=task.spec.repeats)
    plans = [(task.spec.title, task.plan)]
    [fast] = compare.sides(session, task.request, plans, repeats, follower)
    follower.say("measuring", "one stock run, as a check")
    check = session.bare(task.request)
    same = metadata.pixels(held.outcome.pictures) == metadata.pixels(check.pictures)
    if not same or not 1 / DRIFT < check.seconds / held.timing.median < DRIFT:
        return None
    return _timed(held, (*known, check.seconds)), fast


def _timed(side: Side, seconds: tuple[float, ...]) -> Side:
    return compare.Side(side.outcome, compare.Timing(seconds))


def _fitting(session: Session, notes: list[str]) -> Iterator[tuple[str, Plan]]:
    """The presets that fit the model."""
    for name in PRESETS:
        plan = Plan.preset(name)
        try:
            plan.attach(session.model.pipe).detach()
        except AccelError as error:
            notes.append(f"{name} is left out: {error}")
        else:
            yield name, plan


def _speedup(found: Comparison) -> Speedup:
    low, high = found.ratios
    return Speedup(
        ratio=found.ratio,
        low=low,
        high=high,
        baseline_seconds=found.baseline.timing.median,
        measured=date.today().isoformat(),
    )


def _role(name: str) -> str:
    """What a file of a comparison is, by its name."""
    if name == compare.FILMS[0]:
        return "film"
    return f"{name.partition('.')[0]}-record" if name.endswith(".mp4.json") else Path(name).stem


def _plain(quality: dict[str, float | str]) -> dict[str, float | str]:
    return {name: compare.plain(value) for name, value in quality.items()}
