"""Rows of an input, as they stand there: text, CSV and JSON lines here, YAML in ``yaml_rows``.

Lines are read and judged one by one, so that one that cannot be used takes no other with it, and
an input of any length fits into memory. Which fields there are is checked here, what is in them is
not: that is for all rows alike, however they came in.
"""

from __future__ import annotations

import csv
import json
import math
import os
import re
import stat
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from difflib import get_close_matches
from functools import partial
from itertools import chain
from pathlib import Path
from reprlib import repr as short
from typing import IO, Any

from accel.errors import BadInput
from app.request import FILES, Request


@dataclass(frozen=True, slots=True)
class Found:
    """A row as it stands in the input.

    Attributes:
        where: File and line, or file and place: ``rows.csv:12``.
        values: By field, as plain data; types and ranges are not checked yet.
    """

    where: str
    values: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Problem:
    """Something in the input that is no row.

    Attributes:
        where: As in `Found`.
        text: What was found, what was needed and what to do, in one sentence.
    """

    where: str
    text: str


@dataclass(frozen=True, slots=True)
class Place:
    """Where an input lies.

    Attributes:
        name: What it is called in ``where``.
        folder: What the paths in it are relative to.
    """

    name: str
    folder: str


Line = tuple[int, str, str]
"""Its number, its text, and what is wrong with it; nothing, if that is empty."""

FIELDS = frozenset({field.name for field in fields(Request)} - {"device"}) | {
    "id",
    "size",
    "plan",
    "preset",
    "goal",
    "set",
}
"""What a row may say. Where it runs is for the whole job."""
LONGEST = 2**20
"""Bytes of a line, without its line feed."""
BOM = "\ufeff"
DEEPEST, WIDEST = 32, 100_000
"""Levels of lists and mappings in a row, and values on one of them."""
BITS = 64
"""Of a whole number."""
KINDS = {
    ".txt": "txt",
    ".csv": "csv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".yaml": "yaml",
    ".yml": "yaml",
}
_NEEDED = "give a .txt, .csv, .jsonl or .yaml file, or - for stdin"
_PATHS = (*FILES, "plan")
_SIZE = re.compile(r"\s*([0-9]{1,9})\s*(?:[xX×]\s*([0-9]{1,9})\s*)?")


def read(
    source: str, stdin: IO[bytes] | None = None, kind: str | None = None
) -> Iterator[Found | Problem]:
    """The rows of an input, and what in it is none, in their order.

    Args:
        source: A path, or ``-``.
        stdin: What ``-`` stands for, if not the process's own.
        kind: ``txt``, ``csv``, ``jsonl`` or ``yaml``; what the suffix says if ``None``. Without
            both, what begins with ``{`` is JSON lines, all else text.

    Raises:
        BadInput: If it cannot be read or has no rows, some of it while it is read.
    """
    if kind is not None and kind not in _READERS:
        raise BadInput(f"The kind of input {short(kind)} is unknown: give {', '.join(_READERS)}.")
    if source == "-":
        return _rows(partial(_standard, stdin), kind, Place("stdin", ""))
    path = Path(source)
    place = Place(_shown(path.name), os.path.dirname(source))
    return _rows(lambda: path.open("rb"), _kind(path, kind), place)


def row(
    where: str, values: Mapping[str, Any], folder: str, defaults: Mapping[str, Any] | None = None
) -> Found | Problem:
    """A row, if it says only what a row may say.

    Args:
        where: Where it stands.
        values: What it says.
        folder: What its paths are relative to.
        defaults: What it says where it does not say otherwise; checked before.
    """
    try:
        return Found(where, {**(defaults or {}), **checked(values, folder)})
    except BadInput as error:
        return Problem(where, str(error))


def checked(values: Mapping[str, Any], folder: str) -> dict[str, Any]:
    """What a row gives: sizes as sides, changes of the plan as a list, paths as seen from here.

    Raises:
        BadInput: If there is a field that no row has, or something in it that is no plain data.
    """
    check_names(values)
    given = {name: value for name, value in values.items() if value is not None}
    _check_plain(given)
    for name in _PATHS:
        if name in given and isinstance(given[name], str) and given[name]:
            given[name] = os.path.join(folder, given[name])
    if "set" in given:
        given["set"] = _changes(given["set"])
    return _with_sides(given) if "size" in given else given


def check_names(names: Iterable[str]) -> None:
    """Refuse fields that no row has.

    Raises:
        BadInput: It names the first one, and the known one that is like it, or all.
    """
    if FIELDS.issuperset(names):
        return
    known = sorted(FIELDS)
    name = next(name for name in names if name not in FIELDS)
    close = get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}."
    raise BadInput(f"There is no field {short(name)}: {hint}")


def undecodable(raw: bytes, error: UnicodeDecodeError) -> str:
    """What is wrong with bytes that are no UTF-8."""
    position = error.start - raw.rfind(b"\n", 0, error.start)
    return (
        f"The byte 0x{raw[error.start]:02x} at position {position} of the line is no UTF-8: save "
        "it as UTF-8."
    )


def _check_plain(values: dict[str, Any]) -> None:
    """Refuse what cannot be written down again, and what has no end."""
    level: list[Any] = list(values.values())
    for _ in range(DEEPEST):
        level = [inner for value in level for inner in _inside(value)]
        if not level:
            return
        if len(level) > WIDEST:
            break
    raise BadInput(
        f"The row holds lists in lists, more than {DEEPEST} deep or {WIDEST:,} wide: it needs "
        "plain values, and an inline plan at most."
    )


def _inside(value: Any) -> Iterable[Any]:
    """What is in a value; what is in none is checked."""
    if isinstance(value, str):
        _check_text(value)
    elif isinstance(value, dict):
        return [*value, *value.values()]
    elif isinstance(value, list):
        return value
    elif isinstance(value, int) and value.bit_length() > BITS:
        raise BadInput(f"A number has more than {BITS} bits: no field takes it.")
    return ()


def _check_text(text: str) -> None:
    if "\0" in text:
        raise BadInput(f"The text {short(text)} has a zero character: leave it out.")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise BadInput(
                f"The text {short(text)} has half of a surrogate pair: give both, or the character."
            ) from error


def _changes(value: Any) -> list[str]:
    """The changes of a plan: a list of them, or a text with ``;`` or line breaks between."""
    if isinstance(value, str):
        return [part.strip() for part in re.split(r"[;\n]", value) if part.strip()]
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        return value
    raise BadInput(
        f"set is {short(value)}: give a list of texts such as 'cache.EasyCache.threshold=0.05'."
    )


def _with_sides(given: dict[str, Any]) -> dict[str, Any]:
    """A row with width and height in the place of its size."""
    size = given["size"]
    if "width" in given or "height" in given:
        raise BadInput("size is given together with width or height: give one or the other.")
    text = str(size) if isinstance(size, int) and not isinstance(size, bool) else size
    sides = _SIZE.fullmatch(text) if isinstance(text, str) else None
    if sides is None:
        raise BadInput(f"size is {short(size)}: give WIDTHxHEIGHT, such as 64x48, or one number.")
    rest = {name: value for name, value in given.items() if name != "size"}
    return {**rest, "width": int(sides[1]), "height": int(sides[2] or sides[1])}


def _kind(path: Path, kind: str | None) -> str:
    """The kind of a file that is there."""
    shown = _shown(str(path))
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise BadInput(f"The input {shown} cannot be read ({reason}): {_NEEDED}.") from error
    if stat.S_ISDIR(mode):
        raise BadInput(f"The input {shown} is a folder: {_NEEDED}.")
    found = kind or KINDS.get(path.suffix.lower())
    if found is None:
        raise BadInput(f"The input {shown} has a suffix that says nothing: {_NEEDED}.")
    return found


def _shown(name: str) -> str:
    """A name of a file on one line."""
    return name if name.isprintable() else repr(name)


def _standard(stdin: IO[bytes] | None) -> AbstractContextManager[IO[bytes]]:
    """The standard input; it stays open."""
    if stdin is None and sys.stdin is None:
        raise BadInput(f"The input is stdin, which is closed: {_NEEDED}.")
    return nullcontext(sys.stdin.buffer if stdin is None else stdin)


def _rows(
    opened: Callable[[], AbstractContextManager[IO[bytes]]], kind: str | None, place: Place
) -> Iterator[Found | Problem]:
    """The rows of a file, which is open while they are read."""
    try:
        with opened() as file:
            rows = _READERS[kind](file, place) if kind else _sniffed(file, place)
            first = next(rows, None)
            if first is None:
                raise BadInput(f"The input {place.name} has no rows: write at least a prompt.")
            yield first
            yield from rows
    except OSError as error:
        raise BadInput(
            f"The input {place.name} cannot be read ({error.strerror}): {_NEEDED}."
        ) from error


def _lines(file: IO[bytes]) -> Iterator[Line]:
    """The lines of a file, from 1; of one that is wrong the text is but a stand-in."""
    number = 0
    while raw := file.readline(LONGEST + 1):
        number += 1
        text, fault = _text(file, raw)
        yield number, text.removeprefix(BOM) if number == 1 else text, fault


def _text(file: IO[bytes], raw: bytes) -> tuple[str, str]:
    """The text of a line, and what is wrong with it."""
    if len(raw) > LONGEST and not raw.endswith(b"\n"):
        return _skipped(file, raw), f"The line is longer than {LONGEST:,} bytes: shorten it."
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        return raw.decode(errors="replace"), undecodable(raw, error)
    if "\0" in text:
        fault = f"There is a zero byte at position {raw.index(0) + 1}: leave it out."
        return text.replace("\0", "?"), fault
    return text, ""


def _skipped(file: IO[bytes], raw: bytes) -> str:
    """Read on to the end of a line; its stand-in opens the quotes and the brace that it opens."""
    begin = "{" if raw.removeprefix(BOM.encode()).lstrip().startswith(b"{") else "?"
    quotes = 0
    while raw:
        quotes += raw.count(b'"')
        raw = b"" if raw.endswith(b"\n") else file.readline(2**16)
    return begin + ',"' * (quotes % 2) + "\n"


def _sniffed(file: IO[bytes], place: Place) -> Iterator[Found | Problem]:
    """Rows of a file without a name."""
    lines = _lines(file)
    first = next((line for line in lines if line[1].strip()), None)
    if first is None:
        return iter(())
    kind = _json if first[1].lstrip().startswith("{") else _prompts
    return kind(chain([first], lines), place)


def _prompts(lines: Iterable[Line], place: Place) -> Iterator[Found | Problem]:
    """A prompt a line; what begins with ``#`` is a comment."""
    for number, text, fault in lines:
        prompt = text.strip()
        if fault:
            yield Problem(f"{place.name}:{number}", fault)
        elif prompt and not prompt.startswith("#"):
            yield Found(f"{place.name}:{number}", {"prompt": prompt})


def _json(lines: Iterable[Line], place: Place) -> Iterator[Found | Problem]:
    """An object a line."""
    for number, text, fault in lines:
        if not fault and not text.strip():
            continue
        where = f"{place.name}:{number}"
        try:
            yield Problem(where, fault) if fault else row(where, _object(text), place.folder)
        except BadInput as error:
            yield Problem(where, str(error))


def _object(text: str) -> dict[str, Any]:
    """The object in a line."""
    try:
        found = _JSON.decode(text)
    except BadInput:
        raise
    except json.JSONDecodeError as error:
        raise BadInput(
            f"This is no JSON ({error.msg.removesuffix(' at')} at character {error.pos + 1}): "
            'write one object a line, such as {"prompt": "a red house"}.'
        ) from error
    except (ValueError, RecursionError) as error:
        raise BadInput(
            "This JSON has a number that is too long, or lists in lists without end: write plain "
            "values."
        ) from error
    if not isinstance(found, dict):
        raise BadInput(
            f'The line holds {short(found)}: write an object, such as {{"prompt": "a red house"}}.'
        )
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON whose keys differ."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise BadInput(f"The key {short(twice)} is there twice: leave one of them.")
    return found


def _finite(text: str) -> float:
    """A number of JSON that is one."""
    number = float(text)
    if not math.isfinite(number):
        raise BadInput(f"The number {short(text)} is not finite: no field takes it.")
    return number


_JSON = json.JSONDecoder(object_pairs_hook=_unique, parse_float=_finite, parse_constant=_finite)


def _table(lines: Iterable[Line], place: Place) -> Iterator[Found | Problem]:
    """A row a record of CSV; the first one names the fields."""
    records = _records(lines)
    number, header, fault = next(records, (1, [], ""))
    names = [name.strip() for name in header]
    fault = fault or _misnamed(names)
    if fault:
        yield Problem(f"{place.name}:{number}", fault)
        return
    for start, cells, wrong in records:
        where = f"{place.name}:{start}"
        if wrong:
            yield Problem(where, wrong)
        elif len(cells) != len(names):
            yield Problem(
                where,
                f"The row has {len(cells)} cell{'s' * (len(cells) > 1)} where the first line names "
                f"{len(names)}: put quotes around cells with commas.",
            )
        else:
            values = {name: cell for name, cell in zip(names, cells, strict=True) if cell}
            yield row(where, values, place.folder)


def _misnamed(names: list[str]) -> str:
    """What is wrong with the first line of a table."""
    try:
        check_names(names)
    except BadInput as error:
        return f"{error} The first line names the fields, with commas between."
    twice = next((name for name in names if names.count(name) > 1), None)
    return f"The field {twice} is named twice: leave one of them." if twice else ""


def _records(lines: Iterable[Line]) -> Iterator[tuple[int, list[str], str]]:
    """Records of CSV that are not empty: the first line of each, its cells, and what is wrong."""
    faults: list[str] = []
    reader = csv.reader(_watched(lines, faults), strict=True)
    while True:
        start = reader.line_num + 1
        faults.clear()
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            cells = []
            faults.append(
                f"This is no CSV ({error}): a cell with commas, quotes or line breaks needs quotes "
                "around it, and those in it doubled."
            )
        if cells or faults:
            yield start, cells, faults[0] if faults else ""


def _watched(lines: Iterable[Line], faults: list[str]) -> Iterator[str]:
    """The texts of some lines; what is wrong with them goes into the list."""
    for _, text, fault in lines:
        if fault:
            faults.append(fault)
        yield text


def _yaml(file: IO[bytes], place: Place) -> Iterator[Found | Problem]:
    from app.batch import yaml_rows

    return yaml_rows.read(file, place)


_READERS: dict[str, Callable[[IO[bytes], Place], Iterator[Found | Problem]]] = {
    "txt": lambda file, place: _prompts(_lines(file), place),
    "csv": lambda file, place: _table(_lines(file), place),
    "jsonl": lambda file, place: _json(_lines(file), place),
    "yaml": _yaml,
}
