"""The manifest: what was decided and what was made, a line each, never changed afterwards.

A line is the CRC-32 of its text in eight hexadecimal digits, a space, and the text: a JSON object
whose ``kind`` says which entry it is. A line whose sum is wrong was torn by a crash, or damaged
later: it counts as not written, so that its row is made again. Every writer (a shard) has a file of
its own; the state of a job is what all of them say together.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter, ValidationError

from app.batch.storage import Storage
from app.metadata import Entry

FORMAT = 1
PATTERN = "manifest*.jsonl"


class Begun(Entry):
    """A call of ``accel batch`` on this folder: the first line it writes.

    Attributes:
        rows: Rows of the input, all shards together.
        seed: The seed that all others follow from.
        moment: When, ISO 8601 with the offset.
        command: The options that were typed.
    """

    kind: Literal["begun"] = "begun"
    format: Literal[1] = 1
    rows: int
    seed: int
    moment: str
    command: dict[str, str] = Field(default_factory=dict)


class Sized(Entry):
    """How many rows of a group go into one call of the pipeline, from now on.

    Attributes:
        group: Digest of what the rows of the group have in common.
        size: Rows in a call.
        seconds: For each size that was tried, seconds a row.
        note: Why it is not another one.
    """

    kind: Literal["sized"] = "sized"
    group: str
    size: int
    seconds: dict[int, float] = Field(default_factory=dict)
    note: str = ""


class Made(Entry):
    """A row whose file lies there, whole.

    Attributes:
        id: Of the row.
        hash: Of all that the picture depends on but the machine.
        index: Place of the row in the input, from 0.
        file: Its name below the output folder, with ``/`` between folders.
        sha256: Of the file.
        bytes: Its size.
        pixels: SHA-256 over the pixels of all frames.
        group: Digest of the group.
        batch: Ids of the rows that were made in the same call, in order.
        seed: The noise.
        prompt: What was asked for.
        seconds: Of the call that made it, its share.
        steps: Steps of the sampler.
        nfe: Network evaluations for this row.
        verdicts: By method ``{"state": …, "detail": …}``.
        saved: By method the share of its steps that were not computed, 0 to 1.
        peak: Bytes at the peak of the call, where that was measured.
        notes: What was changed for it: out of memory, tried again.
        worker: Which one made it.
        moment: When, seconds since 1970.
    """

    kind: Literal["made"] = "made"
    id: str
    hash: str
    index: int
    file: str
    sha256: str
    bytes: int
    pixels: str
    group: str
    batch: tuple[str, ...]
    seed: int
    prompt: str
    seconds: float
    steps: int
    nfe: float
    verdicts: dict[str, dict[str, str]] = Field(default_factory=dict)
    saved: dict[str, float] = Field(default_factory=dict)
    peak: int | None = None
    notes: tuple[str, ...] = ()
    worker: str = ""
    moment: float


class Failed(Entry):
    """A row that could not be made.

    Attributes:
        id, hash, index, prompt: As in `Made`.
        reason: What went wrong, in one sentence.
        quarantined: Whether it ended the process that made it, time after time: a resume leaves it
            alone.
        moment: When, seconds since 1970.
    """

    kind: Literal["failed"] = "failed"
    id: str
    hash: str
    index: int
    prompt: str
    reason: str
    quarantined: bool = False
    moment: float


class Ended(Entry):
    """A call of ``accel batch`` has come to its end.

    Attributes:
        seconds: From its beginning.
        made: Rows that it made.
        failed: Rows that it could not make.
        left: Rows that it left: interrupted, or stopped at an error.
        workers: How many there were.
    """

    kind: Literal["ended"] = "ended"
    seconds: float
    made: int
    failed: int
    left: int = 0
    workers: int = 1


Line = Begun | Sized | Made | Failed | Ended
_LINES: TypeAdapter[Line] = TypeAdapter(Annotated[Line, Field(discriminator="kind")])


@dataclass
class State:
    """What a manifest says, all its files together.

    Attributes:
        made: By id, the latest.
        failed: By id, the latest; a row that was made since is not in it.
        sizes: By group, the first: it holds for the whole life of a folder.
        begun: All calls, in the order of files and lines.
        ended: Those that came to an end.
        damaged: File and number of every line that cannot be read.
    """

    made: dict[str, Made] = field(default_factory=dict)
    failed: dict[str, Failed] = field(default_factory=dict)
    sizes: dict[str, Sized] = field(default_factory=dict)
    begun: list[Begun] = field(default_factory=list)
    ended: list[Ended] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)

    def add(self, line: Line) -> None:
        """Take a line in."""
        match line:
            case Made():
                self.made[line.id] = line
                self.failed.pop(line.id, None)
            case Failed():
                self.failed[line.id] = line
                self.made.pop(line.id, None)
            case Sized():
                self.sizes.setdefault(line.group, line)
            case Begun():
                self.begun.append(line)
            case Ended():
                self.ended.append(line)


def encode(line: Line) -> bytes:
    """A line as it is written."""
    text = line.model_dump_json(exclude_defaults=False).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def decode(raw: bytes) -> Line | None:
    """A line as it was written, without its end; ``None``: it is damaged."""
    total, _, text = raw.partition(b" ")
    if total != b"%08x" % zlib.crc32(text):
        return None
    try:
        return _LINES.validate_json(text)
    except ValidationError:
        return None


def read(storage: Storage) -> State:
    """What all manifests of a folder say, in the order in which things happened.

    Raises:
        NotWritten: If one cannot be read.
    """
    state, entries = State(), list[Line]()
    for name in storage.names(PATTERN):
        for number, raw in enumerate(storage.get(name).split(b"\n"), 1):
            line = decode(raw) if raw else None
            if line is not None:
                entries.append(line)
            elif raw:
                state.damaged.append(f"{name}:{number}")
    for line in sorted(entries, key=_moment):
        state.add(line)
    return state


def _moment(line: Line) -> float:
    """Rows are taken in the order of the clock, all else first, in the order of writing."""
    return line.moment if isinstance(line, (Made, Failed)) else 0.0


class Manifest:
    """The manifest of one writer.

    Args:
        storage: Where it lies.
        name: Of its file.
    """

    def __init__(self, storage: Storage, name: str) -> None:
        self._storage = storage
        self._name = name

    def write(self, lines: Iterable[Line]) -> None:
        """Write some lines; they are on the disk when this returns.

        Raises:
            NotWritten: If the disk is full or refuses, or somebody has taken the file away.
        """
        self._storage.append(self._name, b"".join(map(encode, lines)))
