"""``accel edit``: a region of a picture made anew, the rest kept as it was."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from accel.edit import Edited, Edits, sparse
from accel.errors import BadInput
from accel.plan import Plan
from app import metadata
from app.call import read_picture, recorded
from app.exits import say
from app.files import check_target, slug, write
from app.flags import Given
from app.generate import Example, asked_for
from app.request import Editing, Printing, Request, Target, make
from app.session import Outcome, Session, noise_of
from app.tables import print_result


def edit(given: Given) -> None:
    """Edit a picture and write it.

    Args:
        given: The options that were typed.

    Raises:
        AccelError: Of any kind; nothing was written then.
    """
    asked, target = make(Editing, given), make(Target, given)
    where = _where(asked)
    record, pictures = metadata.read(asked.original)
    out = target.out or Path(f"{slug(asked.prompt)}-edit.png")
    check_target(out, target.overwrite)
    request = asked_for({}, Example(asked.original, record, pictures))
    session, plan = Session.open(request.source), Plan.from_dict(record.plan)
    pipe, call = session.prepare([request], plan)
    changes: dict[str, Any] = {
        "prompt": [asked.prompt] if isinstance(call["prompt"], list) else asked.prompt
    }
    with sparse(pipe, plan) as edits:
        original = edits.record(**call, generator=noise_of(request))
        if metadata.pixels(original.images) != record.pixels:
            say(f"warning: not the bits of {asked.original}: the edit is of the picture made here")
        edited = edits.edit(**changes, **where)
        made = record_of(
            replace(request, prompt=asked.prompt), session, edits, edited, call | changes
        )
        dense = edits.edit(**changes, region=(0, 0, 1, 1)) if asked.dense else None
    write({out: metadata.png(edited.images, made, request.fps)})
    told = {**_told(original, edited, dense), "record": made.model_dump()}
    print_result(make(Printing, given).format, [out], told)


def record_of(
    request: Request, session: Session, edits: Edits, edited: Edited, call: Mapping[str, Any]
) -> metadata.Record:
    """The record of the latest edit.

    Args:
        request: That of the original, with the prompt of the edit.
        session: Of the model.
        edits: The recording.
        edited: The edit.
        call: The arguments of its call.
    """
    outcome = Outcome(edited.images, False, recorded(call), edited.seconds, edits.report)
    return metadata.record(request, edits.plan, session.model, outcome, edited=edited.share)


def _where(asked: Editing) -> dict[str, Any]:
    """Where a picture is to change, as the edit takes it."""
    if (asked.mask is None) == (asked.region is None):
        found = "both" if asked.mask else "none"
        raise BadInput(
            f"An edit takes a mask or a region, one of the two: found {found}. Give --mask FILE, "
            "or --region X,Y,W,H."
        )
    if asked.mask is not None:
        return {"mask": read_picture(asked.mask)}
    return {"region": region_of(str(asked.region))}


def region_of(text: str) -> tuple[float, ...]:
    """Left, top, width and height of a region, from their text.

    Raises:
        BadInput: If these are not four numbers.
    """
    parts = text.split(",")
    try:
        numbers = tuple(float(part) for part in parts)
    except ValueError:
        numbers = ()
    if len(numbers) != 4:
        raise BadInput(
            f"--region is left,top,width,height, such as 0.25,0.25,0.2,0.2: found {text!r}."
        )
    return numbers


def _told(original: Edited, edited: Edited, dense: Edited | None) -> dict[str, Any]:
    """Say what the edit took, for humans and as data."""
    say(f"computed {edited.share:.1%} of the picture in {edited.seconds:.2f} s")
    document: dict[str, Any] = {
        "share": edited.share,
        "seconds": edited.seconds,
        "recording_seconds": original.seconds,
        "report": edited.report,
    }
    if dense is not None:
        ratio = dense.seconds / edited.seconds
        say(f"everything: {dense.seconds:.2f} s, {ratio:.2f} times as long")
        document["dense_seconds"] = dense.seconds
    return document
