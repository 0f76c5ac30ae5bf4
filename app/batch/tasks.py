"""What a worker is asked, and what it answers: plain data, which travels between machines."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from app.batch.job import Form, Row
from app.batch.manifest import Made


@dataclass(frozen=True)
class Check:
    """Say of some forms whether their models take them; no weights are read."""

    forms: tuple[Form, ...]


@dataclass(frozen=True)
class Fit:
    """Whether a form can be made.

    Attributes:
        group: Its digest.
        refusal: Why it cannot; empty: it can.
        suffix: Type of its file.
        prompted: Whether its pipeline takes a prompt.
        pixels: Of all frames of a row.
    """

    group: str
    refusal: str = ""
    suffix: str = ""
    prompted: bool = True
    pixels: int = 0


@dataclass(frozen=True)
class Checked:
    """The answer to `Check`: a form each."""

    fits: tuple[Fit, ...]


@dataclass(frozen=True)
class Measure:
    """Find out how many rows of a group go best into one call.

    Attributes:
        group: Its digest.
        rows: Some of its rows: as many as may go into a call.
        whole: Whether a call is made as the rows' calls will be, for its time and memory.
    """

    group: str
    rows: tuple[Row, ...]
    whole: bool = False


@dataclass(frozen=True)
class Measured:
    """The answer to `Measure`.

    Attributes:
        group: Its digest.
        size: Rows in a call.
        seconds: For each size that was tried, seconds a row of a short stock run.
        note: Why it is not another one.
        whole: Seconds a row, as the rows will be made.
        peak: Bytes at the peak of such a call, where that can be measured.
    """

    group: str
    size: int
    seconds: dict[int, float] = field(default_factory=dict)
    note: str = ""
    whole: float | None = None
    peak: int | None = None


@dataclass(frozen=True)
class Make:
    """Make rows in one call.

    Attributes:
        key: Of the call.
        rows: All of them share a group.
        wanted: Ids of those that are written; of none: the call is only tried.
        notes: What was changed for it already.
    """

    key: str
    rows: tuple[Row, ...]
    wanted: frozenset[str]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Began:
    """The worker has begun a call: from here on its time runs."""

    key: str


@dataclass(frozen=True)
class Beat:
    """The worker lives."""


How = Literal["made", "failed", "model", "unwritten"]


@dataclass(frozen=True)
class Answer:
    """How a call ended.

    Attributes:
        key: Of the call.
        how: ``made``; ``failed``: something with its rows; ``model``: no row of this model can be
            made; ``unwritten``: the output refuses files.
        made: The rows that were written.
        error: What went wrong.
    """

    key: str
    how: How
    made: tuple[Made, ...] = ()
    error: str = ""


Task = Check | Measure | Make
Message = Checked | Measured | Began | Answer | Beat
