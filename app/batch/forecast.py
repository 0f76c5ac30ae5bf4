"""What a job would do: rows, calls, time, memory and room, before anything is made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from accel.peak import MIB
from app import models
from app.batch import grouping
from app.batch.job import Row
from app.batch.planning import MOST, Plans
from app.batch.tasks import Measure, Measured
from app.call import extent
from app.tables import human

if TYPE_CHECKING:
    from app.batch.engine import Engine


@dataclass(frozen=True)
class Part:
    """A group of a job.

    Attributes:
        title: Model, size, steps, plan.
        rows: In all.
        pending: That would be made.
        size: Rows in a call; ``None``: it will be measured.
        seconds: For a row, on one worker; ``None``: unknown.
        weights: Bytes of the model's files.
        peak: Bytes at the peak of a call; ``None``: not measured.
    """

    title: str
    rows: int
    pending: int
    size: int | None
    seconds: float | None
    weights: int
    peak: int | None = None


@dataclass(frozen=True)
class Forecast:
    """See the module.

    Attributes:
        parts: A group each.
        workers: That would share the work.
        room: Bytes that the files may take.
        free: Bytes that are free; ``None``: nobody knows.
    """

    parts: tuple[Part, ...]
    workers: int
    room: int
    free: int | None

    @property
    def seconds(self) -> float | None:
        """For all rows, loading left out; ``None``: unknown for one of the groups."""
        known = [part.seconds for part in self.parts if part.pending]
        if any(each is None for each in known):
            return None
        work = sum((part.seconds or 0.0) * part.pending for part in self.parts)
        return work / self.workers

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "seconds": self.seconds}


def forecast(
    plans: Plans,
    engine: Engine,
    sizes: Mapping[str, int | None],
    measured: Mapping[str, Measured],
    free: int | None,
) -> Forecast:
    """Say what would be done.

    Args:
        plans: What is known.
        engine: The workers.
        sizes: Rows in a call, by group, where that is known.
        measured: Groups that were measured for this.
        free: Bytes that are free, if that is known.
    """
    parts = []
    for group, rows in grouping.groups(plans.rows).items():
        found = measured.get(group)
        parts.append(
            Part(
                title=title(rows[0]),
                rows=len(rows),
                pending=sum(row.id in plans.pending for row in rows),
                size=sizes.get(group) if found is None else found.size,
                seconds=_before(plans, group) if found is None else found.whole,
                weights=_weights(rows[0]),
                peak=None if found is None else found.peak,
            )
        )
    return Forecast(tuple(parts), engine.count, plans.room, free)


def _before(plans: Plans, group: str) -> float | None:
    """Seconds for a row of this group, as the folder tells of an earlier run."""
    known = [one.seconds for one in plans.state.made.values() if one.group == group]
    return median(known) if known else None


def _weights(row: Row) -> int:
    folder = models.find(row.form.request.source)
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


def title(row: Row) -> str:
    """A group in a few words."""
    request = row.form.request
    known = extent(request, models.defaults(request.source))
    frames = f"x{known.frames}" if known.frames > 1 else ""
    plan = ", ".join(one.name for one in row.form.plan) or "stock"
    name = models.title(request.source)
    return f"{name} {known.width}x{known.height}{frames}, {known.steps} steps, {plan}"


def shown(found: Forecast) -> None:
    """Show a forecast to a person."""
    console = human()
    columns = ("group", "rows", "to make", "in a call", "s a row", "weights MiB", "peak MiB")
    table = Table(*columns)
    for part in found.parts:
        table.add_row(
            Text(part.title),
            str(part.rows),
            str(part.pending),
            "measured first" if part.size is None else str(part.size),
            "?" if part.seconds is None else f"{part.seconds:.2f}",
            f"{part.weights / MIB:.0f}",
            "?" if part.peak is None else f"{part.peak / MIB:.0f}",
        )
    console.print(table)
    pending = sum(part.pending for part in found.parts)
    time = (
        "the time is unknown before rows were made here, or measured: add --measure"
        if found.seconds is None
        else f"about {_span(found.seconds)} on {found.workers} worker{'s' * (found.workers > 1)}"
    )
    free = "" if found.free is None else f" of {found.free / MIB:.0f} that are free"
    console.print(f"{pending} rows to make: {time}; at most {found.room / MIB:.0f} MiB{free}")


def _span(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    return (
        f"{hours:.1f} hours"
        if hours > 2
        else f"{minutes:.0f} minutes"
        if minutes > 2
        else f"{seconds:.0f} seconds"
    )


def lacking(sizes: Mapping[str, int | None], rows: Sequence[Row]) -> list[Measure]:
    """What ``--measure`` asks for: every group, as its rows will be made."""
    return [
        Measure(group, tuple(each[: sizes.get(group) or MOST]), whole=True)
        for group, each in grouping.groups(rows).items()
    ]
