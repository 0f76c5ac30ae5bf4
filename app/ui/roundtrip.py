"""There and back: a job as a command, as Python, and as the file that it made.

What is copied runs as it is, and gives the same picture, bit for bit, on the same machine.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from pprint import pformat
from textwrap import indent
from types import MappingProxyType
from typing import Any

from accel.errors import BadInput
from accel.plan import GUARD, TUNED, Plan
from app import clips, metadata
from app.files import slug
from app.metadata import Record
from app.request import FILES, Request, make
from app.serve.jobs import Spec
from app.ui.forms import CUSTOM, goal_of, title_of

DEFAULTS = Request()
NONE: Mapping[Path, Plan] = MappingProxyType({})
ALWAYS = ("model", "seed")
"""Options that a command states even where they are the default."""

PYTHON = """\
from pathlib import Path

from accel import Plan
from app import clips, metadata
from app.files import write
from app.request import Request
from app.session import Session

request = Request(
{request}
)
plan = {plan}

session = Session.open(request.source)
outcome = session.run(request, plan)
print(outcome.report)

out = Path("{name}" + clips.suffix(request))
record = metadata.record(request, plan, session.model, outcome)
write(clips.files(out, outcome.pictures, record, request.fps))
"""


def as_cli(spec: Spec, files: Mapping[Path, Plan] = NONE) -> str:
    """The command that makes what a job made, for a POSIX shell.

    Args:
        spec: The job.
        files: Plans that lie in files: what equals one of them is named by its file. The evidence
            of a plan that is in none is left out, since options can only state its methods.

    Raises:
        BadInput: If its request is none.
        PlanError: If its plan is none.
    """
    request, plan = make(Request, spec.request, where=""), Plan.from_dict(spec.plan)
    compares = spec.kind == "compare"
    words = [
        "accel",
        "compare" if compares else "generate",
        *_options(request),
        *_plan_options(plan, files),
    ]
    if compares:
        words += ["--repeats", str(spec.repeats)]
    return shlex.join([*words, *_prompt(request.prompt)])


def _prompt(prompt: str) -> list[str]:
    if not prompt:
        return []
    return ["--", prompt] if prompt.startswith("-") else [prompt]


def _options(request: Request) -> Iterator[str]:
    for field in fields(Request):
        name, value = field.name, getattr(request, field.name)
        if name == "prompt" or value is None:
            continue
        if isinstance(value, bool):
            yield f"--{name}" if value else f"--no-{name}"
        elif name in ALWAYS or value != getattr(DEFAULTS, name):
            yield from _option(name, str(value))


def _option(name: str, value: str) -> list[str]:
    return [f"--{name}={value}"] if value.startswith("-") else [f"--{name}", value]


def _plan_options(plan: Plan, files: Mapping[Path, Plan]) -> Iterator[str]:
    file = next((path for path, one in files.items() if one == plan), None)
    if file is not None:
        yield from ("--plan", str(file))
        return
    goal = goal_of(plan)
    if goal != CUSTOM:
        yield from ("--preset", goal)
    else:
        yield from _method_options(plan)
    if plan.guard is not None:
        stock = type(plan.guard)(max_error=plan.guard.max_error).model_dump(mode="json")
        for field, value in plan.guard.model_dump(mode="json").items():
            if field == "max_error" or value != stock[field]:
                yield from ("--set", f"{GUARD}.{field}={_toml(value)}")


def _method_options(plan: Plan) -> Iterator[str]:
    for family, kinds in _changed(plan).items():
        for kind, given in kinds.items():
            yield from ("--set", f"{family}.{kind}")
            for field, value in given.items():
                yield from ("--set", f"{family}.{kind}.{field}={_toml(value)}")


def _changed(plan: Plan) -> dict[str, dict[str, dict[str, Any]]]:
    """A plan as a document, without the fields that are at their default."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for method in plan:
        family, kind = method.name.split(".")
        stock = type(method)().model_dump(mode="json")
        own = method.model_dump(mode="json")
        given = {field: value for field, value in own.items() if value != stock[field]}
        found.setdefault(family, {})[kind] = given
    return found


def _toml(value: Any) -> str:
    """A JSON value as TOML in one line; tables without what is null."""
    if isinstance(value, Mapping):
        pairs = (f"{_toml(k)} = {_toml(v)}" for k, v in value.items() if v is not None)
        return "{" + ", ".join(pairs) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    return _quoted(value) if isinstance(value, str) else repr(value)


def _quoted(text: str) -> str:
    """A basic string of TOML."""
    plain = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(c if c >= " " and c != "\x7f" else f"\\u{ord(c):04x}" for c in plain) + '"'


def as_python(spec: Spec) -> str:
    """The Python that makes what a job made, with its record, in a file of its own.

    Raises:
        BadInput: If its request is none.
        PlanError: If its plan is none.
    """
    request, plan = make(Request, spec.request, where=""), Plan.from_dict(spec.plan)
    given = {field.name: getattr(request, field.name) for field in fields(Request)}
    lines = [
        f"{name}={f'Path({str(value)!r})' if isinstance(value, Path) else repr(value)},"
        for name, value in given.items()
        if name in ALWAYS or value != getattr(DEFAULTS, name)
    ]
    return PYTHON.format(
        request=indent("\n".join(lines), "    "),
        plan=_plan_python(plan),
        name=f"{slug(request.prompt)}-{request.seed}",
    )


def _plan_python(plan: Plan) -> str:
    goal = goal_of(plan)
    if goal != CUSTOM and plan.guard is None:
        return f'Plan.preset("{goal}")'
    whole = plan.to_dict()
    beside = {name: whole[name] for name in (GUARD, TUNED) if name in whole}
    document = pformat({**_changed(plan), **beside}, width=96, sort_dicts=False)
    return f"Plan.from_dict(\n{indent(document, '    ')}\n)"


def from_file(path: Path) -> tuple[Spec, Record]:
    """The job that made a file, and its record.

    Reads the record alone: no pixel is decoded.

    Args:
        path: A PNG or MP4 that this app or the command line wrote, or the JSON beside an MP4.

    Raises:
        BadInput: If it carries no record that can be read.
        PlanError: If its plan is none that is known here.
    """
    made = clips.record_of(path)
    plan = Plan.from_dict(made.plan).to_dict()
    return Spec(request=made.asked.to_dict(), plan=plan, title=title_of(plan)), made


def lost(made: Record, folder: Path) -> list[str]:
    """The options of a record whose files are not at hand, unchanged, in a folder.

    Args:
        made: The record.
        folder: The only one that is looked into, however the record names its files.
    """
    return [
        option
        for option in FILES
        if option in made.inputs and not _is_at_hand(made, option, folder)
    ]


def _is_at_hand(made: Record, option: str, folder: Path) -> bool:
    path = Path(str(made.request.get(option)))
    if not path.resolve().is_relative_to(folder.resolve()):
        return False
    given: dict[str, Any] = {option: path}
    try:
        return metadata.digests(Request(**given))[option] == made.inputs[option]
    except BadInput:
        return False
