"""Command-line options from dataclasses: each field is an option, its annotation the help."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, Field, fields
from functools import wraps
from inspect import Parameter, Signature
from types import NoneType
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from typer import Option
from typer.models import OptionInfo

Given = dict[str, Any]
"""The options that were typed, by name."""

Command = Callable[[Given], None]


def takes(*groups: type) -> Callable[[Command], Callable[..., None]]:
    """Give a command the fields of some dataclasses as options, and errors in one line.

    The command is called with the options that were typed; what was left out is not in it.
    """

    def decorate(command: Command) -> Callable[..., None]:
        from app.exits import told

        @wraps(command)
        def call(**values: Any) -> None:
            debug = values.pop("debug")
            typed = {name: value for name, value in values.items() if value not in (None, [])}
            with told(debug):
                command(typed)

        parameters = [_parameter(one, group) for group in groups for one in fields(group)]
        signature = Signature([*parameters, _debug()])
        call.__annotations__ = {}
        call.__signature__ = signature  # type: ignore[attr-defined]
        return call

    return decorate


def _parameter(one: Field[Any], group: type) -> Parameter:
    annotation = get_type_hints(group, include_extras=True)[one.name]
    kind, *notes = get_args(annotation)
    option = next(note for note in notes if type(note).__module__ == "typer.models")
    has_default = one.default is not MISSING and one.default is not None
    flag = one.default is False
    if isinstance(option, OptionInfo) and has_default and not flag and one.default != "":
        option.show_default = str(one.default)
    default = False if flag else None
    return Parameter(
        one.name,
        Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[kind if flag else _optional(kind), option],
    )


def _optional(kind: Any) -> Any:
    if NoneType in get_args(kind) or get_origin(kind) is list:
        return kind
    return kind | None


def _debug() -> Parameter:
    option = Option("--debug", help="show the traceback of an error", rich_help_panel="Output")
    return Parameter(
        "debug", Parameter.KEYWORD_ONLY, default=False, annotation=Annotated[bool, option]
    )
