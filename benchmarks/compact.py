"""Raw numbers in a file a tenth as long: what is said again and again is written once.

The file is read and continued as `measure.Lines` is. After the header each line is one of three:
``{"is": …}`` defines a text, a plan or whatever else is no number, which has the next place in a
list from 0 on; ``{"columns": […]}`` names the values of the lines below it; a list is a line. In a
column whose name ends with ``@`` stand places of the list, in the others numbers of five digits.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from measure import Lines

DIGITS = 5
SHARED = "@"


class Compact(Lines):
    """Lines of numbers and of what repeats.

    Args:
        path: The file. Its first line says what the numbers hold for.
        header: The same of the present run.

    Raises:
        SystemExit: If the file holds numbers of something else.
    """

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        super().__init__(path, header)
        self._columns: list[str] = []
        self._shared: list[Any] = []
        self._places: dict[str, int] = {}
        written, self.found = self.found, []
        for line in written:
            self._read(line)

    def add(self, line: dict[str, Any]) -> None:
        """Write one down; it is found as it will be read."""
        fresh: list[Any] = []
        columns = [name if _is_number(one) else f"{name}{SHARED}" for name, one in line.items()]
        for one in line.values():
            if not _is_number(one) and _text(one) not in self._places:
                self._define(one)
                fresh.append({"is": one})
        if columns != self._columns:
            fresh.append({"columns": columns})
        fresh.append([self._short(one) for one in line.values()])
        with self.path.open("a") as file:
            file.write("".join(f"{_text(one)}\n" for one in fresh))
        if columns != self._columns:
            self._read(fresh[-2])
        self._read(json.loads(_text(fresh[-1])))

    def _short(self, one: Any) -> float:
        return _rounded(one) if _is_number(one) else self._places[_text(one)]

    def _define(self, one: Any) -> None:
        self._places[_text(one)] = len(self._shared)
        self._shared.append(json.loads(_text(one)))

    def _read(self, written: Any) -> None:
        if isinstance(written, list):
            pairs = zip(self._columns, written, strict=True)
            self.found.append(dict(self._value(name, one) for name, one in pairs))
        elif "is" in written:
            self._define(written["is"])
        else:
            self._columns = written["columns"]

    def _value(self, name: str, one: Any) -> tuple[str, Any]:
        if name.endswith(SHARED):
            return name.removesuffix(SHARED), self._shared[one]
        return name, one


def _is_number(one: Any) -> bool:
    return isinstance(one, int | float) and not isinstance(one, bool)


def _rounded(one: float) -> float:
    return one if isinstance(one, int) else float(f"{one:.{DIGITS}g}")


def _text(one: Any) -> str:
    return json.dumps(one, separators=(",", ":"))
