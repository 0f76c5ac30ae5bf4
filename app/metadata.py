"""The record in a file: how a picture was made, so that it can be made again.

A PNG carries two text chunks: ``parameters``, the line that other tools show, and ``accel``, a
versioned JSON object (``Record``). Equal fingerprints promise equal bits.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from accel.errors import BadInput
from accel.machine import processor
from accel.plan import Plan
from app import env
from app.request import FILES, Request, Source, make

if TYPE_CHECKING:
    from PIL import Image

    from app.models import Model
    from app.session import Outcome

FORMAT = 1
KEY = "accel"


class Entry(BaseModel):
    """A part of a record: frozen, and without fields that are not known."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Fingerprint(Entry):
    """What a result's bits depend on, besides plan and request."""

    model: str = Field(description="SHA-256 over the model's files")
    versions: dict[str, str]
    device: str
    processor: str
    threads: int
    dtype: str
    savings: tuple[str, ...] = Field((), description="what was changed to take less memory")
    processes: int = Field(1, description="how many made it together")
    together: int = Field(1, description="how many were made in the same call of the pipeline")

    @property
    def machine(self) -> str:
        """What the seconds of a run depend on, beside model and versions."""
        return f"{self.device}, {self.processor}, {self.threads} threads"

    def differences(self, other: Fingerprint) -> list[str]:
        """What is not the same, in words: ``threads: 4, now 1``."""
        ours, theirs = _flat(self), _flat(other)
        return [
            f"{name}: {_short(ours.get(name))}, now {_short(theirs.get(name))}"
            for name in {**ours, **theirs}
            if ours.get(name) != theirs.get(name)
        ]


class Result(Entry):
    """What the run gave."""

    seconds: float
    steps: int
    nfe: float
    verdicts: dict[str, dict[str, str]]
    partial: bool = Field(False, description="whether it was stopped before its last step")
    edited: float | None = Field(
        None, description="of an edit of a region: the share of the picture that was computed"
    )


class Record(Entry):
    """How a file was made."""

    version: Literal[1] = 1
    request: dict[str, Any]
    plan: dict[str, Any]
    call: dict[str, Any]
    inputs: dict[str, str] = Field(description="SHA-256 of the files that went in, by option")
    fingerprint: Fingerprint
    pixels: str = Field(description="SHA-256 over size and pixels of all frames")
    result: Result

    @property
    def asked(self) -> Request:
        """The request.

        Raises:
            BadInput: If it is none.
        """
        return make(Request, self.request, where="the record's ")

    def check_inputs(self, request: Request, given: Container[str]) -> None:
        """Refuse pictures that are not those that the record was made from.

        Args:
            request: What is to be made.
            given: The options that were typed: of these, other files are meant.

        Raises:
            BadInput: Names the file that is missing or another.
        """
        now = digests(request)
        for option, digest in self.inputs.items():
            if option not in given and now.get(option) != digest:
                raise BadInput(
                    f"--{option} {getattr(request, option)} is not the file that the picture was "
                    f"made from (SHA-256 {digest[:12]}…): give that one, by --{option}."
                )

    def asks_like(self, other: Record) -> bool:
        """Whether the same was asked for, wherever model and files lie."""
        return self.inputs == other.inputs and words(self.request) == words(other.request)


def record(
    request: Request,
    plan: Plan,
    model: Model,
    outcome: Outcome,
    *,
    partial: bool = False,
    edited: float | None = None,
    processes: int = 1,
    mark: Fingerprint | None = None,
) -> Record:
    """The record of a run.

    Args:
        request: What was asked for.
        plan: The plan that it ran under.
        model: The model.
        outcome: What the run gave.
        partial: Whether it was stopped before its last step.
        edited: Of an edit of a region, the share of the picture that was computed.
        processes: How many made it together.
        mark: The model's fingerprint here and now, where it is known already.
    """
    report = outcome.report
    assert report is not None
    mark = mark or fingerprint(model)
    return Record(
        request=request.to_dict(),
        plan=plan.to_dict(),
        call=outcome.call,
        inputs=digests(request),
        fingerprint=mark.model_copy(update={"processes": processes, "together": outcome.together}),
        pixels=pixels(outcome.pictures),
        result=Result(
            seconds=outcome.seconds,
            steps=report.steps,
            nfe=report.nfe,
            verdicts={
                method: {"state": verdict.state, "detail": verdict.detail}
                for method, verdict in report.verdicts.items()
            },
            partial=partial,
            edited=edited,
        ),
    )


def fingerprint(model: Model) -> Fingerprint:
    """What the bits of this model's results depend on, here and now."""
    pipe = model.pipe
    device = str(pipe._execution_device)  # where its networks lie between calls is another matter
    return Fingerprint(
        model=model.fingerprint,
        versions=env.versions(),
        device=device,
        processor=processor(device),
        threads=env.threads(),
        dtype=str(pipe.dtype).removeprefix("torch."),
        savings=tuple(savings(pipe)),
    )


def savings(pipe: Any) -> list[str]:
    """What was changed of a pipeline so that it takes less memory, in words."""
    parts = [part for part in pipe.components.values() if part is not None]
    found = {
        "decoder in tiles": any(getattr(part, "use_tiling", False) for part in parts),
        "networks offloaded": any(hasattr(part, "_hf_hook") for part in parts),
    }
    return [words for words, is_so in found.items() if is_so]


def digests(request: Request) -> dict[str, str]:
    """SHA-256 of the files that go into a request, by option.

    Raises:
        BadInput: If one cannot be read.
    """
    found = {}
    for option, path in request.files.items():
        try:
            with path.open("rb") as file:
                found[option] = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise BadInput(f"--{option} {path} cannot be read: {error.strerror}.") from error
    return found


def pixels(pictures: Sequence[Image.Image]) -> str:
    """SHA-256 over mode, size and pixels of pictures."""
    digest = hashlib.sha256()
    for picture in pictures:
        feed(digest, picture)
    return digest.hexdigest()


def feed(digest: hashlib._Hash, picture: Image.Image) -> None:
    """Add mode, size and pixels of a picture to a digest."""
    digest.update(f"{picture.mode} {picture.width} {picture.height}\0".encode())
    digest.update(picture.tobytes())


def parameters(made: Record) -> str:
    """The line that other tools read: prompt, negative prompt, settings."""
    call, request = made.call, made.asked
    sampler = next((name for name in made.plan.get("samplers", {})), "the model's own")
    settings = {
        "Steps": made.result.steps,
        "Sampler": sampler,
        "CFG scale": call.get("true_cfg_scale", call.get("guidance_scale")),
        "Seed": request.seed,
        "Size": f"{call['width']}x{call['height']}" if {"width", "height"} <= set(call) else None,
        "Model": request.model,
        "Model hash": made.fingerprint.model[:10],
        "Version": f"diffusers-accel {made.fingerprint.versions.get('diffusers-accel')}",
    }
    stated = ", ".join(f"{name}: {value}" for name, value in settings.items() if value is not None)
    lines = [request.prompt, f"Negative prompt: {call.get('negative_prompt') or ''}", stated]
    return "\n".join(lines)


def png(pictures: Sequence[Image.Image], made: Record, fps: int) -> bytes:
    """A PNG with its record; an animated one of several frames, which loses nothing."""
    from PIL.PngImagePlugin import PngInfo

    chunks = PngInfo()
    chunks.add_text("parameters", parameters(made))
    chunks.add_text(KEY, made.model_dump_json())
    buffer = io.BytesIO()
    first, *others = pictures
    clip: dict[str, Any] = (
        {"save_all": True, "append_images": others, "duration": 1000 / fps, "loop": 0}
        if others
        else {}
    )
    first.save(buffer, "PNG", pnginfo=chunks, **clip)
    return buffer.getvalue()


def record_of(path: Path) -> Record:
    """The record of a PNG that we wrote; no pixel is decoded.

    Raises:
        BadInput: If it is no PNG, or carries no record that can be read.
    """
    with opened(path) as picture:
        return _record(picture, path)


def found(path: Path) -> Record | None:
    """The record of a PNG; ``None`` where it carries none.

    Raises:
        BadInput: If it is no PNG, or its record cannot be read.
    """
    with opened(path) as picture:
        return _record(picture, path) if KEY in picture.info else None


def read(path: Path) -> tuple[Record, list[Image.Image]]:
    """The record and the pictures of a PNG that we wrote.

    Raises:
        BadInput: If it is no PNG, or carries no record that can be read.
    """
    from PIL import ImageSequence

    with opened(path) as picture:
        made = _record(picture, path)
        frames = [
            (frame.copy(), float(frame.info.get("duration", 0)))
            for frame in ImageSequence.Iterator(picture)
        ]
    return made, _repeated(frames, made.asked.fps)


@contextmanager
def opened(path: Path) -> Iterator[Image.Image]:
    """A PNG; what cannot be read of it inside is bad input too."""
    from PIL import Image

    try:
        with Image.open(path, formats=["PNG"]) as picture:
            yield picture
    except BadInput:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise BadInput(f"{path} cannot be read as a PNG picture: {reason}.") from error


def _record(picture: Image.Image, path: Path) -> Record:
    text = picture.info.get(KEY)
    if not isinstance(text, str):
        raise BadInput(
            f"{path} carries no record of diffusers-accel: it was made, or saved again, by another "
            "program. Give a file as `accel generate` wrote it."
        )
    return parse(text, str(path))


def _repeated(frames: list[tuple[Image.Image, float]], fps: int) -> list[Image.Image]:
    """The frames of a clip: Pillow writes equal ones once, with the milliseconds of all."""
    if len(frames) == 1:
        return [frames[0][0]]
    return [picture for picture, shown in frames for _ in range(max(1, round(shown * fps / 1000)))]


def parse(text: str, where: str) -> Record:
    """A record from its JSON.

    Raises:
        BadInput: If it is none, or of another version.
    """
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{where}: its record is no JSON ({error}).") from error
    found = document.get("version") if isinstance(document, dict) else None
    if found != FORMAT:
        raise BadInput(
            f"{where}: its record has version {found!r}, this diffusers-accel reads {FORMAT}."
        )
    try:
        made = Record.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        raise BadInput(f"{where}: its record is damaged at '{name}': {first['msg']}.") from error
    assert made.asked
    return made


def words(request: dict[str, Any]) -> dict[str, Any]:
    """A request without places: fingerprint and digests stand for model, device and files."""
    places = {one.name for one in fields(Source)} | set(FILES)
    return {name: value for name, value in request.items() if name not in places}


def _flat(entry: Fingerprint) -> dict[str, str]:
    plain = entry.model_dump()
    savings = " and ".join(plain.pop("savings")) or None
    flat = {name: str(value) for name, value in plain.items() if name != "versions"}
    return {**plain["versions"], **flat, **({} if savings is None else {"savings": savings})}


def _short(value: str | None) -> str:
    return "none" if value is None else value if len(value) < 60 else f"{value[:12]}…"
