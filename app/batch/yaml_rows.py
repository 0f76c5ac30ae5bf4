"""Rows of a YAML file: a list of them, all combinations of some fields, or fields side by side.

What YAML's parser tells is turned into plain data here, and not by PyYAML's own composer, which
takes a key that stands twice for the last of them, follows aliases without end and, where it is
written in C, ends the process at lists that are nested deeply.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, product
from reprlib import repr as short
from typing import IO, Any, NamedTuple

import yaml
from yaml.reader import Reader

from accel.errors import BadInput
from app.batch.rows import (
    BITS,
    BOM,
    DEEPEST,
    Found,
    Place,
    Problem,
    check_names,
    checked,
    row,
    undecodable,
)

LARGEST = 2**25
"""Bytes of a file: it is read as a whole."""
MOST = 1_000_000
"""Combinations of a matrix."""
ENDLESS = 1000
"""Levels at which nothing is read any more: the parser takes ever longer for each."""
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_TAG = "tag:yaml.org,2002:"
_TEXTS = ("str", "timestamp", "value", "merge")
_VALUES = ("bool", "float", "int", "null")
_PARTS = ("defaults", "matrix", "rows", "zip")
_FORM = f"write a list of rows, or a mapping with some of {', '.join(_PARTS)}"
_ROW = "write a mapping by field, or a prompt"

Lists = dict[str, list[Any]]
Spot = tuple[str, Any, str]
"""Where in the file it stands, what stands there, and what is wrong with it."""


class _Noted(NamedTuple):
    """A value, and what is wrong with it; nothing, if that is empty."""

    value: Any
    fault: str = ""


@dataclass
class _Document:
    """The parts of a file."""

    rows: list[_Noted] = field(default_factory=list)
    others: dict[str, _Noted] = field(default_factory=dict)

    def part(self, name: str) -> _Noted:
        """A part other than the rows."""
        return self.others.get(name, _Noted(None))


class _Unreadable(Exception):
    """A file that is no such document."""

    def __init__(self, line: int, text: str) -> None:
        super().__init__(text)
        self.line = line


def read(file: IO[bytes], place: Place) -> Iterator[Found | Problem]:
    """The rows of a file: those that are listed, then its matrix, then its zip.

    Raises:
        BadInput: If it is too large.
    """
    raw = file.read(LARGEST + 1)
    if len(raw) > LARGEST:
        raise BadInput(
            f"The input {place.name} is larger than {LARGEST:,} bytes of YAML: write .jsonl, which "
            "is read line by line."
        )
    try:
        document = _parse(raw)
    except _Unreadable as error:
        yield Problem(f"{place.name}:{error.line}", str(error))
        return
    try:
        defaults = checked(_mapping(document.part("defaults")), place.folder)
    except BadInput as error:
        yield Problem(f"{place.name}: defaults", str(error))
        return
    spots = chain(
        _listed(document.rows),
        _combined("matrix", document.part("matrix"), _crossed),
        _combined("zip", document.part("zip"), _side_by_side),
    )
    for spot, values, fault in spots:
        where = f"{place.name}: {spot}"
        yield Problem(where, fault) if fault else row(where, values, place.folder, defaults)


def _mapping(noted: _Noted) -> dict[str, Any]:
    """A part that is a mapping, or not there."""
    if noted.fault:
        raise BadInput(noted.fault)
    if noted.value is not None and not isinstance(noted.value, dict):
        raise BadInput(f"Here is {short(noted.value)}: write a mapping by field.")
    return noted.value or {}


def _listed(rows: Iterable[_Noted]) -> Iterator[Spot]:
    """Rows as they are listed; a text is a prompt."""
    for index, (value, fault) in enumerate(rows):
        values = {"prompt": value} if isinstance(value, str) else value
        wrong = "" if isinstance(values, dict) else f"The row is {short(value)}: {_ROW}."
        yield f"rows[{index}]", values, fault or wrong


def _combined(
    name: str, part: _Noted, combine: Callable[[Lists], Iterable[tuple[Any, ...]]]
) -> Iterator[Spot]:
    """Rows that take a value from each of some lists."""
    if part == _Noted(None):
        return
    try:
        lists = _lists(part)
        rows = combine(lists)
    except BadInput as error:
        yield name, None, str(error)
        return
    for index, values in enumerate(rows):
        yield f"{name}[{index}]", dict(zip(lists, values, strict=True)), ""


def _lists(part: _Noted) -> Lists:
    """The lists of values, by field."""
    found = _mapping(part)
    check_names(found)
    wrong = next((name for name, values in found.items() if not _is_list(values)), None)
    if wrong is not None:
        raise BadInput(f"{wrong} is {short(found[wrong])}: write a list with a value at least.")
    if not found:
        raise BadInput("There is no field in it: write a list of values by field.")
    return found


def _is_list(values: Any) -> bool:
    return isinstance(values, list) and bool(values)


def _crossed(lists: Lists) -> Iterable[tuple[Any, ...]]:
    """All combinations; the last field changes fastest."""
    count = math.prod(map(len, lists.values()))
    if count > MOST:
        raise BadInput(f"There are {count:.3g} combinations, above {MOST:,}: take values away.")
    return product(*lists.values())


def _side_by_side(lists: Lists) -> Iterable[tuple[Any, ...]]:
    """The first values, the second ones, and so on."""
    lengths = {name: len(values) for name, values in lists.items()}
    if len(set(lengths.values())) > 1:
        told = ", ".join(f"{name} has {length}" for name, length in lengths.items())
        raise BadInput(f"The lists differ in length ({told}): write as many values in each.")
    return zip(*lists.values(), strict=True)


def _parse(raw: bytes) -> _Document:
    """The parts of a file."""
    try:
        text = raw.decode().removeprefix(BOM)
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise _Unreadable(line, undecodable(raw, error)) from error
    unprintable = Reader.NON_PRINTABLE.search(text)
    if unprintable is not None:
        line = text.count("\n", 0, unprintable.start()) + 1
        raise _Unreadable(line, f"YAML has no character {unprintable[0]!r}: leave it out.")
    parser = _LOADER(text)
    try:
        return _Composer(parser).document()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        told = " ".join(str(getattr(error, "problem", error)).split())
        line = min(mark.line, text.count("\n")) + 1 if mark is not None else 1
        raise _Unreadable(line, f"This is no YAML ({told}): {_FORM}.") from error
    finally:
        parser.dispose()


class _Composer:
    """Plain data from the events of a parser.

    What is wrong with a value is noted, and the reading goes on behind it: an error that is raised
    is one of the whole file.

    Args:
        parser: One of PyYAML's loaders.
    """

    def __init__(self, parser: Any) -> None:
        self._parser = parser
        self._anchors: dict[str, Any] = {}
        self._fault = ""

    def document(self) -> _Document:
        """The only document of a stream."""
        self._parser.get_event()
        if self._ends(yaml.StreamEndEvent):
            return _Document()
        self._parser.get_event()
        found = self._root()
        self._parser.get_event()
        if not self._ends(yaml.StreamEndEvent):
            raise _Unreadable(self._line(), f"A second document begins here: {_FORM}.")
        return found

    def _root(self) -> _Document:
        if self._ends(yaml.SequenceStartEvent):
            return _Document(self._items())
        if not self._ends(yaml.MappingStartEvent):
            line, noted = self._line(), self._noted()
            told = noted.fault or f"The file holds {short(noted.value)}: {_FORM}."
            raise _Unreadable(line, told)
        self._parser.get_event()
        document = _Document()
        while not self._ends(yaml.MappingEndEvent):
            self._part(document)
        self._parser.get_event()
        return document

    def _part(self, document: _Document) -> None:
        line, name = self._line(), self._noted().value
        if name not in _PARTS:
            raise _Unreadable(line, f"There is no part {short(name)}: {_FORM}.")
        if name in document.others:
            raise _Unreadable(line, f"The key {short(name)} is there twice: leave one of them.")
        if name == "rows" and self._ends(yaml.SequenceStartEvent):
            document.rows = self._items()
            document.others[name] = _Noted(None)
            return
        document.others[name] = self._noted()
        if name == "rows" and document.others[name] != _Noted(None):
            raise _Unreadable(line, "The rows are no list: begin each with a hyphen.")

    def _items(self) -> list[_Noted]:
        """The items of a list, each with what is wrong with it."""
        self._parser.get_event()
        items = []
        while not self._ends(yaml.SequenceEndEvent):
            items.append(self._noted())
        self._parser.get_event()
        return items

    def _ends(self, kind: type[yaml.Event]) -> bool:
        """Whether the next event is of a kind."""
        return bool(self._parser.check_event(kind))

    def _line(self) -> int:
        return int(self._parser.peek_event().start_mark.line) + 1

    def _noted(self) -> _Noted:
        """The next value."""
        self._fault = ""
        value = self._value(0)
        return _Noted(value, self._fault)

    def _value(self, depth: int) -> Any:
        event = self._parser.get_event()
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in self._anchors:
                self._note(event, f"nothing before it is called {short(event.anchor)}")
            return self._anchors.get(event.anchor)
        value = self._built(event, depth)
        if event.anchor is not None:
            self._anchors[event.anchor] = value
        return value

    def _built(self, event: Any, depth: int) -> Any:
        if isinstance(event, yaml.ScalarEvent):
            return self._scalar(event)
        if event.tag not in (None, "!", f"{_TAG}seq", f"{_TAG}map"):
            self._note(event, f"{short(event.tag)} is no plain value")
        if depth == DEEPEST:
            self._note(event, f"lists and mappings are more than {DEEPEST} deep")
            return self._skip()
        if isinstance(event, yaml.SequenceStartEvent):
            return self._list(depth)
        return self._dict(depth)

    def _list(self, depth: int) -> list[Any]:
        found = []
        while not self._ends(yaml.SequenceEndEvent):
            found.append(self._value(depth + 1))
        self._parser.get_event()
        return found

    def _dict(self, depth: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        while not self._ends(yaml.MappingEndEvent):
            event = self._parser.peek_event()
            name = self._value(depth + 1)
            value = self._value(depth + 1)
            if not isinstance(name, str):
                self._note(event, f"the key {short(name)} is no text: put quotes around it")
            elif name in found:
                self._note(event, f"the key {short(name)} is there twice: leave one of them")
            else:
                found[name] = value
        end = self._parser.get_event()
        return self._merged(found, end) if "<<" in found else found

    def _merged(self, found: dict[str, Any], event: Any) -> dict[str, Any]:
        """A mapping with those that it takes in by ``<<``: its own fields win, then the first."""
        taken = found.pop("<<")
        merged: dict[str, Any] = {}
        for base in reversed(taken if isinstance(taken, list) else [taken]):
            if not isinstance(base, dict):
                self._note(event, f"<< takes in {short(base)}, which is no mapping")
                return found
            merged |= base
        return merged | found

    def _skip(self) -> None:
        """Read on to the end of a list or mapping that has begun."""
        depth = 1
        while depth:
            event = self._parser.get_event()
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if depth > ENDLESS:
                line = event.start_mark.line + 1
                raise _Unreadable(line, f"Lists are more than {ENDLESS} deep: {_FORM}.")

    def _scalar(self, event: Any) -> Any:
        tag = event.tag
        if tag in (None, "!"):
            tag = self._parser.resolve(yaml.ScalarNode, event.value, event.implicit)
        kind = tag.removeprefix(_TAG)
        if kind in _TEXTS or (kind in ("int", "float") and ":" in event.value):
            return event.value
        if kind not in _VALUES:
            self._note(event, f"{short(tag)} is no plain value")
            return None
        return self._number(event, kind)

    def _number(self, event: Any, kind: str) -> Any:
        node = yaml.ScalarNode(f"{_TAG}{kind}", event.value)
        try:
            value = getattr(self._parser, f"construct_yaml_{kind}")(node)
        except (ValueError, LookupError, ArithmeticError):
            self._note(event, f"{short(event.value)} is no {kind}")
            return None
        if isinstance(value, float) and not math.isfinite(value):
            self._note(event, f"{short(event.value)} is not finite")
        if isinstance(value, int) and value.bit_length() > BITS:
            self._note(event, f"{short(event.value)} has more than {BITS} bits")
            return None
        return value

    def _note(self, event: Any, text: str) -> None:
        """Note what is wrong with the value that is read, the first time."""
        self._fault = self._fault or f"On line {event.start_mark.line + 1}, {text}."
