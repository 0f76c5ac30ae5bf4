"""Patterns as text: ``Surrounding(reach=1) | Radial(decay=0.5)``, read without running it.

The language is that of the patterns themselves: their names, called with numbers, booleans, None
and tuples of them, joined by ``&`` and ``|``, in parentheses or not.
"""

from __future__ import annotations

import ast
import inspect
from difflib import get_close_matches
from functools import cache
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ArgsKwargs

from accel.attention.patterns.grat import CrissCross, Surrounding
from accel.attention.patterns.neighbourhood import Neighbourhood, sliding_tile
from accel.attention.patterns.pattern import Full, Pattern
from accel.attention.patterns.radial import Radial
from accel.attention.patterns.sparse_videogen import Spatial, Temporal
from accel.errors import BadInput

NAMES: dict[str, Any] = {
    "CrissCross": CrissCross,
    "Full": Full,
    "Neighbourhood": Neighbourhood,
    "Radial": Radial,
    "Spatial": Spatial,
    "Surrounding": Surrounding,
    "Temporal": Temporal,
    "sliding_tile": sliding_tile,
}


def parsed(text: str) -> Pattern:
    """The pattern that a text describes.

    Raises:
        BadInput: If it describes none: what was found, and what there is.
    """
    return _pattern(_tree(text))


def normal(text: str) -> str:
    """The text with the usual blanks and parentheses: equal for equal expressions.

    Raises:
        BadInput: If it describes no pattern.
    """
    parsed(text)
    return ast.unparse(_tree(text))


def _tree(text: str) -> ast.expr:
    try:
        return ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise BadInput(f"{text!r} cannot be read as a pattern ({error}): {_known()}") from error


def _pattern(node: ast.expr) -> Pattern:
    match node:
        case ast.BinOp(left, ast.BitAnd(), right):
            return _pattern(left) & _pattern(right)
        case ast.BinOp(left, ast.BitOr(), right):
            return _pattern(left) | _pattern(right)
        case ast.Call(ast.Name(name), arguments, keywords) if name in NAMES:
            return _called(name, arguments, keywords)
        case ast.Call(ast.Name(name)) | ast.Name(name):
            close = get_close_matches(name, NAMES, 1)
            hint = f"did you mean {close[0]}(…)?" if close else _known()
            raise BadInput(f"{ast.unparse(node)!r} is no pattern: {hint}")
    raise BadInput(f"{ast.unparse(node)!r} is no pattern: {_known()}")


def _called(name: str, arguments: list[ast.expr], keywords: list[ast.keyword]) -> Pattern:
    given = [_value(name, node) for node in arguments]
    named = {keyword.arg or "**": _value(name, keyword.value) for keyword in keywords}
    try:
        inspect.signature(NAMES[name]).bind(*given, **named)
        made: Pattern = _adapter(name).validate_python(ArgsKwargs(tuple(given), named))
    except TypeError as error:  # fields that it does not have, or lacks
        raise BadInput(f"{name}: {error}.") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join([name, *map(str, first["loc"])])
        raise BadInput(f"{where}: {first['msg'].removeprefix('Value error, ')}") from error
    return made


@cache
def _adapter(name: str) -> TypeAdapter[Pattern]:
    return TypeAdapter(NAMES[name])


def _value(name: str, node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError) as error:
        raise BadInput(
            f"{name} takes numbers, booleans, None and tuples of them, not {ast.unparse(node)!r}."
        ) from error


def _known() -> str:
    return f"write {', '.join(sorted(NAMES))}, called with their fields, joined by & and |."
