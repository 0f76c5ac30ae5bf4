"""``accel compare``: the stock pipeline and the accelerated one, side by side, measured.

Both run with the same seed, warm-up first, then in turns whose order alternates, so that a drift
of the machine hits both. The stock pipeline is timed with nothing attached; its evaluations are
counted in the warm-up.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Protocol

from accel.attach import Run
from accel.errors import BadInput
from accel.plan import Plan
from accel.report import Report
from app import clips, metadata, nearness
from app.exits import say
from app.files import check_folder, slug, write
from app.flags import Given
from app.plans import chosen
from app.progress import Bar
from app.request import Choice, Printing, Repeats, Request, Target, make
from app.session import Outcome, Session
from app.sheet import draw, side_by_side
from app.tables import print_comparison, print_result

if TYPE_CHECKING:
    from PIL import Image

SIDES = ("baseline", "accelerated")
NAMES = (*(f"{side}.png" for side in SIDES), "difference.png", "sheet.png", "timeline.png")
REPORT = "report.json"
FILMS = ("side-by-side.mp4", *(f"{side}.mp4{more}" for side in SIDES for more in ("", ".json")))
"""Of clips alone, in the place of the pictures of either side, where MP4 can be written."""
GAIN = 8


@dataclass(frozen=True)
class Timing:
    """The seconds of some runs."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle one."""
        return median(self.seconds)

    @property
    def spread(self) -> float:
        """Half of the way from the shortest to the longest."""
        return (max(self.seconds) - min(self.seconds)) / 2

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {"median": self.median, "spread": self.spread, "all": list(self.seconds)}


@dataclass(frozen=True)
class Side:
    """One side of a comparison.

    Attributes:
        outcome: Of the latest warm-up run, with its report.
        timing: Of the runs that count.
    """

    outcome: Outcome
    timing: Timing

    @property
    def report(self) -> Report:
        """What the run did."""
        assert self.outcome.report is not None
        return self.outcome.report


@dataclass(frozen=True)
class Comparison:
    """Two sides and what is between them.

    Attributes:
        title: What the accelerated side ran.
        quality: By name (``psnr``, ``ssim``, ``perceptual``, ``flicker`` of clips): a number, or
            why there is none.
        frames: The same for each frame of a clip, ``flicker`` for each two in a row; empty for a
            picture.
        motion: For a clip of a scene: whether what moves, where to and how fast are as the prompt
            says, on either side; empty for everything else.
    """

    title: str
    baseline: Side
    accelerated: Side
    quality: dict[str, float | str]
    frames: dict[str, list[float | str]]
    motion: list[dict[str, bool]]

    @property
    def ratio(self) -> float:
        """How many times faster, by the medians."""
        return self.baseline.timing.median / self.accelerated.timing.median

    @property
    def ratios(self) -> tuple[float, float]:
        """The lowest and highest ratio of a pair of neighbouring runs."""
        pairs = zip(self.baseline.timing.seconds, self.accelerated.timing.seconds, strict=True)
        each = [stock / fast for stock, fast in pairs]
        return min(each), max(each)


def compare(given: Given) -> None:
    """Measure and write the pictures and the report.

    Args:
        given: The options that were typed.

    Raises:
        AccelError: Of any kind; nothing was written then.
    """
    request = make(Request, given).seeded()
    choice = make(Choice, given)
    if not (choice.plan or choice.preset or choice.goal or choice.changes):
        choice = Choice(preset="balanced")
    plan, repeats = chosen(choice), make(Repeats, given)
    metadata.digests(request)
    target = make(Target, given)
    folder = target.out or Path(f"compare-{slug(request.prompt)}-{request.seed}")
    check_folder(folder, [*NAMES, REPORT, *FILMS], target.overwrite)
    session = Session.open(request.source)
    with Bar() as bar:
        found = measure(session, request, plan, repeats, _title(choice), bar)
    files = documents(session, request, plan, found)
    folder.mkdir(exist_ok=True)
    write({folder / name: content for name, content in files.items()})
    for name in {*NAMES, *FILMS} - files.keys():  # of another comparison, written over
        (folder / name).unlink(missing_ok=True)
    print_comparison(found)
    style = make(Printing, given).format
    print_result(style, [folder / name for name in files], json.loads(files[REPORT]))


class Show(Protocol):
    """Shows runs while they go."""

    def follow(self, run: Run, label: str) -> None:
        """Show the steps of one run."""
        ...

    def count(self, label: str, total: int) -> Callable[[], None]:
        """Show how many of several runs are done; returns what is called after each."""
        ...


def measure(
    session: Session, request: Request, plan: Plan, repeats: Repeats, title: str, show: Show
) -> Comparison:
    """Run both sides, and say how near their pictures are."""
    stock, fast = sides(session, request, [("stock", None), (title, plan)], repeats, show)
    return comparison(request, title, stock, fast)


def sides(
    session: Session,
    request: Request,
    plans: Sequence[tuple[str, Plan | None]],
    repeats: Repeats,
    show: Show,
) -> list[Side]:
    """Run some plans in turns, each after its warm-up.

    The warm-up is followed step by step; while the clock runs, nothing is drawn.

    Args:
        session: With the model of the request.
        request: With a seed.
        plans: Titles and plans; ``None`` is the stock pipeline, timed with nothing attached.
        repeats: How often each runs.
        show: What shows it.
    """
    outcomes: list[Outcome] = []
    for index in range(repeats.warmup):
        label = f"warm-up {index + 1}/{repeats.warmup}"
        outcomes = [
            session.run(
                request, plan or Plan(), partial(show.follow, label=f"{label} {who}"), memory=True
            )
            for who, plan in plans
        ]
    done = show.count("timed runs", len(plans) * repeats.repeats)
    seconds: list[list[float]] = [[] for _ in plans]
    runs = [
        partial(session.bare, request) if plan is None else partial(session.run, request, plan)
        for _, plan in plans
    ]
    for index in range(repeats.repeats):
        for turn in range(len(plans))[:: 1 if index % 2 == 0 else -1]:
            seconds[turn].append(runs[turn]().seconds)
            done()
    return [
        Side(outcome, Timing(tuple(each))) for outcome, each in zip(outcomes, seconds, strict=True)
    ]


def comparison(request: Request, title: str, stock: Side, fast: Side) -> Comparison:
    """What is between two sides of a request that were timed equally often."""
    both = stock.outcome.pictures, fast.outcome.pictures
    clip = stock.outcome.clip
    return Comparison(
        title,
        stock,
        fast,
        nearness.measure(*both),
        nearness.by_frame(*both) if clip else {},
        nearness.motion(request.prompt, both) if clip else [],
    )


def _title(choice: Choice) -> str:
    name = (
        choice.preset
        or " and ".join(choice.goal)
        or (choice.plan.stem if choice.plan else "custom plan")
    )
    return f"{name}, changed" if choice.changes and name != "custom plan" else name


def documents(
    session: Session, request: Request, plan: Plan, found: Comparison
) -> dict[str, bytes]:
    """The files of a comparison, by name."""
    from accel.quality import difference

    stock, fast = found.baseline.outcome, found.accelerated.outcome
    amplified = difference(stock.pictures, fast.pictures, GAIN)
    made = metadata.record(request, plan, session.model, fast)
    plain = metadata.record(request, Plan(), session.model, stock)
    written = _film(found, amplified, request.fps) if stock.clip else {}
    suffix = clips.CLIP if written else clips.PICTURE
    for who, side, record in zip(SIDES, (stock, fast), (plain, made), strict=True):
        both = clips.files(Path(f"{who}{suffix}"), side.pictures, record, request.fps)
        written |= {path.name: content for path, content in both.items()}
    return written | {
        "difference.png": png(amplified),
        "sheet.png": png(draw(request.prompt, found, amplified, GAIN, _place(made))),
        "timeline.png": png(found.accelerated.report.timeline()),
        REPORT: json.dumps(_document(found, made), indent=2, allow_nan=False).encode(),
    }


def _film(found: Comparison, amplified: Image.Image, fps: int) -> dict[str, bytes]:
    """Both clips and their difference as one, if MP4 can be written."""
    try:
        return {FILMS[0]: clips.film(side_by_side(found, amplified, GAIN), fps)}
    except BadInput as error:
        say(f"warning: animated PNGs, and no {FILMS[0]}: {error}")
        return {}


def _place(made: metadata.Record) -> str:
    """Where a comparison was made, in a line."""
    mark = made.fingerprint
    return (
        f"{made.request['model']}, seed {made.request['seed']}, {mark.dtype}, {mark.processor}, "
        f"{mark.threads} thread{'s' * (mark.threads > 1)}, torch {mark.versions['torch']}"
    )


def _document(found: Comparison, made: metadata.Record) -> dict[str, Any]:
    sides = dict(zip(SIDES, (found.baseline, found.accelerated), strict=True))
    return {
        "ratio": found.ratio,
        "ratios": list(found.ratios),
        "quality": {name: plain(value) for name, value in found.quality.items()},
        "frames": {name: [plain(v) for v in values] for name, values in found.frames.items()},
        "motion": dict(zip(sides, found.motion, strict=False)),
        **{
            name: {"seconds": side.timing.to_dict(), "report": side.report.to_dict()}
            for name, side in sides.items()
        },
        "record": made.model_dump(),
    }


def plain(value: float | str) -> float | str:
    """A figure that JSON can hold."""
    return "equal" if value == float("inf") else value


def png(picture: Image.Image) -> bytes:
    """A picture as a PNG."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()
