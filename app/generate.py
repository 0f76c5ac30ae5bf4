"""``accel generate``: one picture or clip, with its record."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accel.errors import BadInput
from accel.plan import Plan
from app import clips, metadata, nearness
from app.exits import say
from app.files import check_target, slug, write
from app.flags import Given
from app.metadata import Record
from app.plans import chosen
from app.progress import Bar
from app.request import Choice, Like, Printing, Request, Target, Together, make
from app.session import Outcome, Session
from app.tables import print_report, print_result

if TYPE_CHECKING:
    from parallel.launch import Place


@dataclass(frozen=True)
class Example:
    """A file to reproduce: its record and its pictures."""

    path: Path
    record: Record
    pictures: list[Any]


def generate(given: Given) -> None:
    """Make a picture and write it.

    Args:
        given: The options that were typed.

    Raises:
        AccelError: Of any kind; nothing was written then.
    """
    from app.together import run

    run(given, make(Together, given).devices, alone)


def alone(given: Given, place: Place | None = None) -> None:
    """Make a picture in this process, and write it.

    Args:
        given: The options that were typed.
        place: Which of several processes this is, that make it together: the first one writes it.
    """
    example = _example(make(Like, given).like)
    request = asked_for(given, example)
    plan = chosen(make(Choice, given), None if example is None else example.record.plan)
    metadata.digests(request)
    first = place is None or place.rank == 0
    out = _target(make(Target, given), request, example) if first else Path()
    session = Session.open(request.source)
    with Bar() as bar:
        outcome = session.run(request, plan, bar.follow if first else None, memory=True)
    if not first:
        return
    processes = 1 if place is None else place.size
    made = metadata.record(request, plan, session.model, outcome, processes=processes)
    files = clips.files(out, outcome.pictures, made, request.fps)
    write(files)
    assert outcome.report is not None
    print_report(outcome.report, outcome.seconds)
    likeness = None if example is None else _likeness(example, made, outcome, plan)
    print_result(
        make(Printing, given).format,
        list(files),
        {"seed": request.seed, "record": made.model_dump(), "like": likeness},
    )


def _example(path: Path | None) -> Example | None:
    return None if path is None else Example(path, *clips.read(path))


def asked_for(given: Given, example: Example | None) -> Request:
    """The request of some options, or of an example with some options changed."""
    if example is None:
        return make(Request, given).seeded()
    record = example.record
    place = {"dtype": record.fingerprint.dtype, "device": _device(record.fingerprint.device)}
    request = make(Request, {**record.request, **place, **given})
    record.check_inputs(request, given)
    return request.seeded()


def _device(recorded: str) -> str | None:
    """The recorded device where this machine has it; the fingerprints tell if it has not."""
    from app.models import device_of

    try:
        return str(device_of(recorded))
    except BadInput:
        return None


def _target(target: Target, request: Request, example: Example | None) -> Path:
    """Where the result goes; by default of the type of the example, or of what the model draws."""
    out = target.out
    if out is None:
        suffix = clips.suffix(request) if example is None else example.path.suffix.lower()
        out = Path(f"{slug(request.prompt)}-{request.seed}{suffix}")
    clips.check_suffix(out)
    for path in filter(None, (out, clips.beside(out))):
        check_target(path, target.overwrite)
    return out


def _likeness(example: Example, made: Record, outcome: Outcome, plan: Plan) -> dict[str, Any]:
    """Compare what was made with the file that it should be like, and say so."""
    path, before = example.path, example.record
    if not made.asks_like(before) or plan != Plan.from_dict(before.plan):
        say(f"like {path}, with other options: not compared")
        return {"compared": False}
    if before.result.partial:
        say(f"{path} was stopped after {before.result.steps} steps: not compared")
        return {"compared": False}
    if before.result.edited is not None:
        say(f"{path} is an edit of a region of another picture: not compared")
        return {"compared": False}
    differences = before.fingerprint.differences(made.fingerprint)
    equal = made.pixels == before.pixels
    found = {"compared": True, "identical": equal, "differences": differences}
    if equal:
        say(f"identical to {path}, bit for bit")
        return found
    distance = _psnr(example.pictures, outcome.pictures)
    if differences:
        say(f"warning: not the bits of {path}: made elsewhere ({'; '.join(differences)})")
    else:
        say(f"warning: not the bits of {path}, though nothing that is recorded differs")
    say(f"PSNR against {path}: {'of another size' if distance is None else f'{distance:.1f} dB'}")
    return {**found, "psnr": distance}


def _psnr(before: list[Any], after: list[Any]) -> float | None:
    try:
        return nearness.psnr(before, after)
    except BadInput:
        return None
