"""What is said at the end of ``accel batch``: figures from the manifest, a page, a contact sheet.

Everything follows from the manifest and the pictures: equal ones give equal bytes, whenever and
wherever the report is written.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from statistics import quantiles
from typing import Literal

from accel.report import ACTIVE
from app.batch import contact, page
from app.batch.manifest import Failed, Made, State
from app.batch.storage import Storage
from app.metadata import Entry

SLICES = 60
ROWS_A_SLICE = 5
BARS = 20
SLOWEST = 3
FENCE = 4.0
"""What took longer than the upper quartile by so many times the middle half is not drawn."""
INSTANT = 1e-3
"""Seconds, and the share of a time, that count as none."""


class Spread(Entry):
    """How some values are spread: a quarter lies below ``lower``, a quarter above ``upper``.

    Attributes:
        least, lower, median, upper, most: In order; between two values, in proportion.
    """

    least: float
    lower: float
    median: float
    upper: float
    most: float


class Row(Entry):
    """Which row."""

    id: str
    index: int


class Slow(Row):
    """A row that took long.

    Attributes:
        seconds: Its share of the call that made it.
        file: What it gave.
    """

    seconds: float
    file: str


class Reason(Entry):
    """Why a method did nothing, and in how many rows."""

    text: str
    rows: int


class Method(Entry):
    """What a method did in all rows that were made.

    Attributes:
        name: Of the method.
        active: Rows in which it did something.
        inactive: Rows in which it did nothing.
        reasons: Why, the most frequent first.
        saved: The share of its steps that were not computed, 0 to 1; ``None``: no row says.
    """

    name: str
    active: int
    inactive: int
    reasons: tuple[Reason, ...]
    saved: Spread | None


class Worker(Entry):
    """What a worker did.

    Attributes:
        name: Of the worker.
        rows: That it made.
        seconds: That its calls took.
        rows_per_second: Of these seconds; ``None``: they were not measured.
    """

    name: str
    rows: int
    seconds: float
    rows_per_second: float | None


class Noted(Entry):
    """Something that was changed for some rows."""

    note: str
    rows: tuple[Row, ...]


class Failure(Entry):
    """Rows that failed for the same reason.

    Attributes:
        reason: In one sentence.
        quarantined: Whether a resume leaves them alone.
        rows: In the order of the input.
    """

    reason: str
    quarantined: bool
    rows: tuple[Row, ...]


class Histogram(Entry):
    """How many rows took how many seconds.

    Attributes:
        start: Where the first bar begins.
        width: Of each bar; 0 if all rows took equally long.
        rows: In each bar.
        beyond: Rows that took much longer than all these.
    """

    start: float
    width: float
    rows: tuple[int, ...]
    beyond: int


class Throughput(Entry):
    """How many rows were done when; a time in which nothing ran shows as zeros.

    Attributes:
        first: When the first row was done, seconds since 1970.
        last: When the last one was.
        slice: Seconds in each of the equal slices between them.
        rows: Done in each slice.
        rows_per_minute: The same as a rate.
    """

    first: float
    last: float
    slice: float
    rows: tuple[int, ...]
    rows_per_minute: tuple[float, ...]


class Figures(Entry):
    """What a manifest says, counted.

    Attributes:
        version: Of this document.
        date: The last moment that the manifest speaks of, ISO 8601.
        rows: Rows of the input.
        made: Rows whose file is there.
        failed: Rows that could not be made.
        quarantined: Those of the failed ones that a resume leaves alone.
        left: Rows of which nothing is known yet.
        calls: How often ``accel batch`` began here.
        ended: How many of these calls came to their end.
        seconds: What those took that came to their end, added up even where they ran at the same
            time, as shards do.
        rows_per_second: What those made, by these seconds; ``None``: none has come to its end.
        work_seconds: What all rows took, all workers together.
        bytes: Of all files.
        peak: The most memory that a call took, in bytes; ``None``: it was not measured.
        nfe: Network evaluations a row.
        seconds_a_row: What a row took.
        histogram: The same as bars.
        slowest: Those that took longest.
        throughput: Rows over time; ``None``: all were done at once.
        methods: By name.
        batches: By rows in a call, how many rows were made in such calls.
        workers: By name.
        notes: What was changed for rows, the most frequent first.
        failures: By reason, the most frequent first.
        damaged: Lines of the manifest that cannot be read.
    """

    version: Literal[1] = 1
    date: str | None
    rows: int
    made: int
    failed: int
    quarantined: int
    left: int
    calls: int
    ended: int
    seconds: float
    rows_per_second: float | None
    work_seconds: float
    bytes: int
    peak: int | None
    nfe: Spread | None
    seconds_a_row: Spread | None
    histogram: Histogram | None
    slowest: tuple[Slow, ...]
    throughput: Throughput | None
    methods: tuple[Method, ...]
    batches: dict[int, int]
    workers: tuple[Worker, ...]
    notes: tuple[Noted, ...]
    failures: tuple[Failure, ...]
    damaged: tuple[str, ...]

    def to_json(self) -> str:
        """As a document that ``model_validate_json`` reads back."""
        return self.model_dump_json(indent=2) + "\n"


def files(state: State, rows: int, storage: Storage, title: str) -> dict[str, bytes]:
    """What is written beside the pictures, by name.

    A picture that is missing or damaged is no reason to fail: it is shown as such.

    Args:
        state: What the manifest says.
        rows: Rows of the input.
        storage: Where the pictures lie.
        title: The heading of the page.
    """
    found, made = figures(state, rows), in_order(state)
    shown = contact.chosen(made)
    contents = {
        "report.json": found.to_json().encode(),
        "report.html": page.draw(found, title, made, len(shown)).encode(),
    }
    if shown:
        contents["contact.jpg"] = contact.draw(shown, storage)
    return contents


def in_order(state: State) -> list[Made]:
    """All rows that were made, in the order of the input."""
    return sorted(state.made.values(), key=lambda row: (row.index, row.id))


def figures(state: State, rows: int) -> Figures:
    """Count what a manifest says.

    Args:
        state: What it says.
        rows: Rows of the input.
    """
    made = in_order(state)
    ended = math.fsum(call.seconds for call in state.ended)
    return Figures(
        date=_date(state),
        rows=rows,
        made=len(made),
        failed=len(state.failed),
        quarantined=sum(row.quarantined for row in state.failed.values()),
        left=max(0, rows - len(made) - len(state.failed)),
        calls=len(state.begun),
        ended=len(state.ended),
        seconds=ended,
        rows_per_second=_rate(sum(call.made for call in state.ended), ended),
        work_seconds=math.fsum(row.seconds for row in made),
        bytes=sum(row.bytes for row in made),
        peak=max((row.peak for row in made if row.peak is not None), default=None),
        nfe=_spread(row.nfe for row in made),
        seconds_a_row=_spread(row.seconds for row in made),
        histogram=_histogram([row.seconds for row in made]),
        slowest=_slowest(made),
        throughput=_throughput([row.moment for row in made]),
        methods=_methods(made),
        batches=_batches(made),
        workers=_workers(made),
        notes=_notes(made),
        failures=_failures(state.failed.values()),
        damaged=tuple(state.damaged),
    )


def _date(state: State) -> str | None:
    known = [row.moment for row in state.made.values()]
    known += [row.moment for row in state.failed.values()]
    known += [moment for call in state.begun if (moment := _seconds(call.moment)) is not None]
    try:
        return datetime.fromtimestamp(max(known), UTC).isoformat(timespec="seconds")
    except (ValueError, OverflowError, OSError):  # there is none, or it is beyond all calendars
        return None


def _seconds(moment: str) -> float | None:
    """Seconds since 1970 of an ISO 8601 moment; one without an offset is taken as UTC."""
    try:
        found = datetime.fromisoformat(moment)
    except ValueError:
        return None
    return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()


def _rate(count: int, seconds: float) -> float | None:
    return count / seconds if seconds >= INSTANT else None


def _spread(values: Iterable[float]) -> Spread | None:
    ordered = sorted(values)
    if not ordered:
        return None
    if len(ordered) == 1:
        lower = median = upper = ordered[0]
    else:
        lower, median, upper = quantiles(ordered, n=4, method="inclusive")
    return Spread(least=ordered[0], lower=lower, median=median, upper=upper, most=ordered[-1])


def _histogram(seconds: Sequence[float]) -> Histogram | None:
    spread = _spread(seconds)
    if spread is None:
        return None
    limit = _limit(spread)
    near = [value for value in seconds if value <= limit]
    start, end, beyond = spread.least, max(near), len(seconds) - len(near)
    if end - start <= INSTANT * max(end, INSTANT):
        return Histogram(start=start, width=0, rows=(len(near),), beyond=beyond)
    bars = min(BARS, math.ceil(math.sqrt(len(near))))
    width = (end - start) / bars
    counts = Counter(min(bars - 1, int((value - start) / width)) for value in near)
    rows = tuple(counts[bar] for bar in range(bars))
    return Histogram(start=start, width=width, rows=rows, beyond=beyond)


def _limit(spread: Spread) -> float:
    """What is drawn at most: a single row that took an hour does not press all others together."""
    middle = spread.upper - spread.lower
    return spread.upper + FENCE * middle if middle > 0 else spread.most


def _slowest(made: Sequence[Made]) -> tuple[Slow, ...]:
    ordered = sorted(made, key=lambda row: (-row.seconds, row.index, row.id))[:SLOWEST]
    return tuple(
        Slow(id=row.id, index=row.index, seconds=row.seconds, file=row.file) for row in ordered
    )


def _throughput(moments: Sequence[float]) -> Throughput | None:
    first, last = min(moments, default=0.0), max(moments, default=0.0)
    if last - first < INSTANT:
        return None
    slices = max(1, min(SLICES, len(moments) // ROWS_A_SLICE))
    width = (last - first) / slices
    counts = Counter(min(slices - 1, int((moment - first) / width)) for moment in moments)
    rows = tuple(counts[place] for place in range(slices))
    rates = tuple(60 * count / width for count in rows)
    return Throughput(first=first, last=last, slice=width, rows=rows, rows_per_minute=rates)


def _methods(made: Sequence[Made]) -> tuple[Method, ...]:
    names = {name for row in made for name in [*row.verdicts, *row.saved]}
    return tuple(_method(name, made) for name in sorted(names))


def _method(name: str, made: Sequence[Made]) -> Method:
    verdicts = [row.verdicts[name] for row in made if name in row.verdicts]
    idle = [verdict for verdict in verdicts if verdict.get("state") != ACTIVE]
    reasons = Counter(verdict.get("detail", "") for verdict in idle)
    return Method(
        name=name,
        active=len(verdicts) - len(idle),
        inactive=len(idle),
        reasons=tuple(
            Reason(text=text, rows=count)
            for text, count in sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
        ),
        saved=_spread(row.saved[name] for row in made if name in row.saved),
    )


def _batches(made: Sequence[Made]) -> dict[int, int]:
    counts = Counter(max(1, len(row.batch)) for row in made)
    return dict(sorted(counts.items()))


def _workers(made: Sequence[Made]) -> tuple[Worker, ...]:
    seconds = defaultdict[str, list[float]](list)
    for row in made:
        seconds[row.worker].append(row.seconds)
    return tuple(
        Worker(
            name=name,
            rows=len(took),
            seconds=math.fsum(took),
            rows_per_second=_rate(len(took), math.fsum(took)),
        )
        for name, took in sorted(seconds.items())
    )


def _notes(made: Sequence[Made]) -> tuple[Noted, ...]:
    groups = defaultdict[str, list[Row]](list)
    for row in made:
        for note in dict.fromkeys(row.notes):
            groups[note].append(Row(id=row.id, index=row.index))
    ordered = sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))
    return tuple(Noted(note=note, rows=tuple(rows)) for note, rows in ordered)


def _failures(failed: Iterable[Failed]) -> tuple[Failure, ...]:
    groups = defaultdict[tuple[str, bool], list[Row]](list)
    for row in sorted(failed, key=lambda row: (row.index, row.id)):
        groups[row.reason, row.quarantined].append(Row(id=row.id, index=row.index))
    ordered = sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))
    return tuple(
        Failure(reason=reason, quarantined=quarantined, rows=tuple(rows))
        for (reason, quarantined), rows in ordered
    )
