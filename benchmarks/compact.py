"""Raw numbers in a file a fraction as long: what is said again and again is written once.

The file is read and continued as `measure.Lines` is. After the header each line is one of three:
``{"is": …}`` defines a text, a plan or whatever else is no number, which has the next place in a
list from 0 on; ``{"columns": […]}`` defines a list of names, which has the next place in another; a
list is a line: the place of its names, then a value for each. Under a name that ends with ``@``
stands a place in the first list; under ``@`` alone that of several values with their names. Numbers
have five digits.

A file is packed beside itself, as ``.gz``, and read from there where it is gone: a repository keeps
the packed one.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

from measure import Lines

DIGITS = 5
SHARED = "@"
TOGETHER = ("stage", "package", "method", "knob", "plan", "call")
"""What is the same in all lines of a setting."""


class Compact(Lines):
    """Lines of numbers and of what repeats.

    Args:
        path: The file. Its first line says what the numbers hold for.
        header: The same of the present run.

    Raises:
        SystemExit: If the file holds numbers of something else.
    """

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        if not path.exists() and packed(path).exists():
            path.write_bytes(gzip.decompress(packed(path).read_bytes()))
        super().__init__(path, header)
        self._columns: list[list[str]] = []
        self._shared: list[Any] = []
        self._places: dict[str, int] = {}
        written, self.found = self.found, []
        for line in written:
            self._read(line)

    def add(self, line: dict[str, Any]) -> None:
        """Write one down; it is found as it will be read."""
        setting = {name: line[name] for name in TOGETHER if name in line}
        values = {SHARED: setting} | {
            name if _is_number(name, one) else f"{name}{SHARED}": one
            for name, one in line.items()
            if name not in setting
        }
        fresh = [{"is": one} for name, one in values.items() if self._is_new(name, one)]
        if [*values] not in self._columns:
            fresh.append({"columns": [*values]})
        for one in fresh:
            self._read(one)
        row = [self._columns.index([*values])]
        row += [self._short(name, one) for name, one in values.items()]
        with self.path.open("a") as file:
            file.write("".join(f"{_text(one)}\n" for one in [*fresh, row]))
        self._read(row)

    def pack(self) -> Path:
        """Write the packed file; the same lines give the same bytes."""
        path = packed(self.path)
        path.write_bytes(gzip.compress(self.path.read_bytes(), mtime=0))
        return path

    def _is_new(self, name: str, one: Any) -> bool:
        return name.endswith(SHARED) and _text(one) not in self._places

    def _short(self, name: str, one: Any) -> float:
        return self._places[_text(one)] if name.endswith(SHARED) else rounded(one)

    def _read(self, written: Any) -> None:
        if isinstance(written, list):
            place, *values = written
            line: dict[str, Any] = {}
            for name, one in zip(self._columns[place], values, strict=True):
                line |= self._long(name, one)
            self.found.append(line)
        elif "is" in written:
            self._places[_text(written["is"])] = len(self._shared)
            self._shared.append(json.loads(_text(written["is"])))
        else:
            self._columns.append(written["columns"])

    def _long(self, name: str, one: Any) -> dict[str, Any]:
        if name == SHARED:
            return dict(self._shared[one])
        if name.endswith(SHARED):
            return {name.removesuffix(SHARED): self._shared[one]}
        return {name: one}


def packed(path: Path) -> Path:
    """Where a file is packed."""
    return path.with_name(f"{path.name}.gz")


def rounded(one: float) -> float:
    """With few digits, and none after the point where there are none."""
    short = float(f"{one:.{DIGITS}g}")
    return int(short) if short.is_integer() and abs(short) < 10**DIGITS else short


def _is_number(name: str, one: Any) -> bool:
    return name != "seed" and isinstance(one, int | float) and not isinstance(one, bool)


def _text(one: Any) -> str:
    return json.dumps(one, separators=(",", ":"))
