"""``accel calibrate``: measure what a method must know of a model, and write it as a plan."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from accel.bundled import asset
from accel.calibration import Calibrated
from accel.errors import BadInput
from accel.guard import Guard
from accel.plan import Plan
from app.calibrators import CALIBRATORS, Entry
from app.call import arguments
from app.exits import say
from app.files import check_target, slug, write
from app.flags import Given
from app.models import Model, load
from app.modes import parameters, pipeline_for
from app.plans import toml_value
from app.progress import Bar
from app.request import Calibration, Clip, Printing, Request, Target, make
from app.tables import print_result


def calibrate(given: Given) -> None:
    """Calibrate a method and write a plan with its numbers.

    Args:
        given: The options that were typed.

    Raises:
        AccelError: Of any kind; nothing was written then.
    """
    asked = make(Calibration, given)
    entry = _entry(asked)
    if asked.count < entry.least:
        raise BadInput(
            f"{asked.what} rests on {entry.least} prompts at least, and --count is {asked.count}: "
            f"give --count {entry.least} or more."
        )
    options = _options(asked, entry)
    prompts = read_prompts(asked.prompts or asset("prompts/scenes.txt"), asked.count, "--count")
    requests = [_request(asked, prompt, number) for number, prompt in enumerate(prompts)]
    target = make(Target, given)
    out = target.out or Path(f"{asked.what}-{slug(Path(asked.model).name)}.toml")
    beside = {name: out.with_name(out.stem + suffix) for name, suffix in entry.files.items()}
    for path in (out, *beside.values()):
        check_target(path, target.overwrite)
    model = load(requests[0].source)
    pipe = pipeline_for(model.pipe, requests[0])
    with Bar() as bar:
        calls = _calls(pipe, model, requests, bar)
        found = _measured(asked.what, entry, pipe, calls, options)
    names = {name: Path(beside[name].name) for name in found.files}
    plan = _plan(found, names)
    head = (
        f"# accel calibrate {asked.what}: {asked.model} (sha256 {model.fingerprint[:16]})\n"
        f"# prompts: {len(prompts)}; {found.note}\n"
    )
    files = {beside[name]: content for name, content in found.files.items()}
    write({out: (head + plan.to_toml()).encode(), **files})
    say(f"{asked.what} on {asked.model}, {len(prompts)} prompts: {found.note}")
    say(f"use it by: accel generate PROMPT --model {asked.model} --plan {out}")
    document = {"plan": plan.to_dict(), "note": found.note, "prompts": len(prompts)}
    print_result(make(Printing, given).format, [out, *files], document)


def _plan(found: Calibrated, files: Mapping[str, Path]) -> Plan:
    """The plan of what was found, with the paths of its files."""
    held = found.method.model_copy(update=files)
    if isinstance(held, Guard):
        return Plan(*found.beside, guard=held)
    return Plan(held, *found.beside)


def _entry(asked: Calibration) -> Entry:
    if asked.what not in CALIBRATORS:
        raise BadInput(
            f"NAME {asked.what!r} is none that is calibrated: choose one of "
            f"{', '.join(CALIBRATORS)}."
        )
    return CALIBRATORS[asked.what]


def _options(asked: Calibration, entry: Entry) -> Mapping[str, Any]:
    """What was typed for the calibrator itself, checked before the work."""
    typed = {"threshold": asked.threshold, "method": asked.method}
    options = {name: value for name, value in typed.items() if value is not None}
    for change in asked.changes:
        name, equals, value = change.partition("=")
        if not equals or not name.strip():
            raise BadInput(f"--set {change}: write NAME=VALUE, such as warmup=2.")
        options[name.strip()] = toml_value(value.strip())
    with _refusals(asked.what):
        return entry.checked(options)


def _measured(
    name: str,
    entry: Entry,
    pipe: Any,
    calls: Iterable[Mapping[str, Any]],
    options: Mapping[str, Any],
) -> Calibrated:
    calibrator = entry.load()
    with _refusals(name):
        return calibrator(pipe, calls, options)


@contextmanager
def _refusals(name: str) -> Iterator[None]:
    """What a model of options refuses is an input that cannot be used."""
    try:
        yield
    except ValidationError as error:
        first = error.errors()[0]
        option = ".".join(map(str, first["loc"]))
        raise BadInput(f"{name} takes no {option} = {first['input']!r}: {first['msg']}.") from error


def read_prompts(path: Path, count: int, option: str, seen: int = 0) -> list[str]:
    """The first prompts of a text file.

    Args:
        path: A prompt a line; empty lines do not count.
        count: How many.
        option: What asks for so many, for the message.
        seen: So many more before them, which a plan was tuned on.

    Raises:
        BadInput: If the file cannot be read, or has too few lines.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        raise BadInput(
            f"--prompts {path} cannot be read ({reason}): give a text file with a prompt a line."
        ) from error
    prompts = [line.strip() for line in lines if line.strip()]
    if len(prompts) < seen + count:
        beside = f" beside the {seen} that the plan was tuned on" if seen else ""
        raise BadInput(
            f"--prompts {path} has {len(prompts)} prompts, {option} asks for {count}{beside}: give "
            f"more lines, or a lower {option}."
        )
    return prompts[: seen + count]


def _request(asked: Calibration, prompt: str, number: int) -> Request:
    drawn = {name: getattr(asked, name) for name in Clip.__dataclass_fields__}
    return Request(**drawn, prompt=prompt, steps=asked.steps, seed=asked.seed + number)


def _calls(pipe: Any, model: Model, requests: list[Request], bar: Bar) -> Iterator[dict[str, Any]]:
    """The arguments of each call, when it is its turn."""
    import torch

    advance = bar.count("calibrating", len(requests))
    form = {"output_type": "latent"} if "output_type" in parameters(pipe) else {}
    for request in requests:
        assert request.seed is not None
        generator = torch.Generator("cpu").manual_seed(request.seed)
        yield {**arguments(pipe, request, model.call), **form, "generator": generator}
        advance()
