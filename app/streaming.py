"""``accel stream``: a clip through a picture-to-picture pipeline, frame after frame."""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from pathlib import Path
from secrets import token_hex
from typing import TYPE_CHECKING, Any

from accel.errors import AccelError, BadInput, NotWritten
from accel.loop import RCFG, Outlet, Stream, StreamBatch
from accel.plan import Plan
from app import clips, metadata, models
from app.call import SIDES, arguments, recorded
from app.exits import say
from app.files import check_target, write
from app.flags import Given
from app.metadata import Record, Result
from app.modes import parameters, pipeline_for
from app.plans import chosen
from app.progress import Bar
from app.request import Choice, Printing, Request, Source, Streaming, make
from app.tables import print_report, print_result

if TYPE_CHECKING:
    from PIL import Image

BASE = Plan(StreamBatch())
"""The plan where none is given."""

SIDE = 512
"""Pixels of a side, of a model that does not say what it draws."""


def stream(given: Given) -> None:
    """Draw a clip anew, and write it with its record.

    Args:
        given: The options that were typed.

    Raises:
        AccelError: Of any kind. Where the clip breaks off, what was made before is written first.
    """
    asked = make(Streaming, given)
    asked = asked if asked.seed is not None else replace(asked, seed=secrets.randbelow(2**32))
    plan = plan_of(asked, make(Choice, given))
    check(asked)
    with Film(asked.clip) as film:
        model = models.load(Source(**{f.name: getattr(asked, f.name) for f in fields(Source)}))
        pipe, call, size = prepared(model, asked)
        with Draft(asked.result, film.rate, size) as draft:
            made = drawn(Stream(pipe, plan, **call), film, size, draft)
            written = record(asked, plan, model, call, draft, made)
            draft.finish(written)
    print_report(made.report, made.seconds)
    say(
        f"{draft.count} frames of {film.count}, {made.skipped} skipped, "
        f"{draft.count / max(made.seconds, 1e-9):.1f} frames a second"
    )
    if made.error is not None:
        raise BadInput(
            f"{asked.clip} breaks off behind frame {film.count}: {made.error} The {draft.count} "
            f"frames before it are in {asked.result}."
        ) from made.error
    print_result(
        make(Printing, given).format,
        [asked.result, beside(asked.result)],
        {
            "seed": asked.seed,
            "frames": draft.count,
            "skipped": made.skipped,
            "frames_per_second": draft.count / max(made.seconds, 1e-9),
            "record": written.model_dump(),
        },
    )


def plan_of(asked: Streaming, choice: Choice) -> Plan:
    """The plan: `loop.StreamBatch` where none is given, and the residual guidance asked for."""
    plan = chosen(choice, BASE.to_dict())
    if asked.residual is None:
        return plan
    others = [method for method in plan if method.name != RCFG.name]
    return Plan(*others, RCFG(negative=asked.residual), guard=plan.guard)


def beside(path: Path) -> Path:
    """Where the record lies as well."""
    return path.with_name(f"{path.name}.json")


def check(asked: Streaming) -> None:
    """Refuse what can be refused before a model is loaded.

    Raises:
        BadInput: If the result cannot be written, or there is no prompt.
    """
    if asked.result.suffix.lower() != clips.CLIP:
        raise BadInput(f"OUT {asked.result}: the name has to end in {clips.CLIP}.")
    clips.check_suffix(asked.result)
    if asked.result.resolve() == asked.clip.resolve():
        raise BadInput(f"OUT {asked.result} is IN: give another name.")
    for path in (asked.result, beside(asked.result)):
        check_target(path, asked.overwrite)
    if not asked.prompt.strip():
        raise BadInput("--prompt is empty: say what to draw.")


def prepared(model: models.Model, asked: Streaming) -> tuple[Any, dict[str, Any], tuple[int, int]]:
    """The pipeline, the arguments of a stream, and the width and height of its frames.

    Raises:
        BadInput: If the model has no picture-to-picture pipeline, or does not take an option.
    """
    known = {f.name for f in fields(Request)} - {"height", "width", "compile"}
    options = {name: getattr(asked, name) for name in known if hasattr(asked, name)}
    pipe = pipeline_for(model.pipe, Request(**options, image=asked.clip))
    call = arguments(pipe, Request(**options), model.call)
    width, height = (
        getattr(asked, side) or model.call.get(side) or SIDE for side in ("width", "height")
    )
    step = int(pipe.image_processor.config.vae_scale_factor)
    for side, pixels in (("width", width), ("height", height)):
        if pixels % step:
            raise BadInput(f"--{side} {pixels}: {type(pipe).__name__} makes multiples of {step}.")
    if set(SIDES) <= set(parameters(pipe)):
        call |= {"width": width, "height": height}
    return pipe, {**call, "levels": asked.levels, "seed": asked.seed or 0}, (width, height)


@dataclass(frozen=True)
class Made:
    """What a stream gave.

    Attributes:
        report: Of its methods.
        seconds: From the first frame to the last picture.
        skipped: Frames for which the picture before stands.
        error: What the clip broke off with.
    """

    report: Any
    seconds: float
    skipped: int
    error: Exception | None


def drawn(stream: Stream, film: Film, size: tuple[int, int], draft: Draft) -> Made:
    """Feed a stream with a clip; its pictures go to the draft.

    Raises:
        BadInput: If there is no frame, or the stream cannot be made of the first.
    """
    from PIL import ImageOps

    error: Exception | None = None
    start = time.perf_counter()
    frames = (ImageOps.fit(frame, size) for frame in film.frames())
    with stream, Bar() as bar, Outlet(draft.add) as outlet:
        advance = bar.stream(film.total)
        try:
            for picture in stream.run(frames):
                outlet.put(picture)
                advance(f"{stream.rate:.1f} frames a second")
        except Broken as broken:
            error = broken
    if error is not None and not draft.count:
        raise BadInput(f"{film.path}: {error}") from error
    return Made(stream.report, time.perf_counter() - start, stream.skipped, error)


def record(
    asked: Streaming,
    plan: Plan,
    model: models.Model,
    call: dict[str, Any],
    draft: Draft,
    made: Made,
) -> Record:
    """How the clip was made."""
    values = {f.name: getattr(asked, f.name) for f in fields(asked)}
    told = {name: value for name, value in values.items() if value not in (None, False)}
    told |= {"image": str(told.pop("clip")), "fps": max(1, round(float(draft.rate)))}
    del told["result"]
    report = made.report
    return Record(
        request=told,
        plan=plan.to_dict(),
        call=recorded(call),
        inputs=metadata.digests(Request(prompt=asked.prompt, image=asked.clip)),
        fingerprint=metadata.fingerprint(model),
        pixels=draft.digest,
        result=Result(
            seconds=made.seconds,
            steps=report.steps,
            nfe=report.nfe,
            verdicts={
                name: {"state": verdict.state, "detail": verdict.detail}
                for name, verdict in report.verdicts.items()
            },
            partial=made.error is not None,
        ),
    )


class Broken(Exception):
    """A clip that cannot be read on, or whose frames change their size."""


class Film:
    """A clip on the disk, read frame by frame.

    Args:
        path: Where it is.

    Attributes:
        rate: Frames a second.
        total: Frames, where the file says so.
        count: Frames that were read.

    Raises:
        BadInput: When it is entered, if it cannot be read or has no pictures.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.count = path, 0

    def __enter__(self) -> Film:
        self._opened = clips.opened(self.path)
        self._file = self._opened.__enter__()
        if not self._file.streams.video:
            self._opened.__exit__(None, None, None)
            raise BadInput(f"{self.path} has no pictures in it: give a clip.")
        video = self._file.streams.video[0]
        self.rate = Fraction(video.average_rate or video.guessed_rate or 16)
        self.total = video.frames or None
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.__exit__(None, None, None)

    def frames(self) -> Iterator[Image.Image]:
        """Its frames in RGB.

        Raises:
            Broken: If it cannot be read on, or a frame has another size than the first.
        """
        size = None
        decoded = self._file.decode(video=0)
        while True:
            try:
                frame = next(decoded, None)
            except (OSError, ValueError, IndexError) as error:
                raise Broken(f"it cannot be read on ({error}).") from error
            if frame is None:
                return
            size = size or (frame.width, frame.height)
            if (frame.width, frame.height) != size:
                raise Broken(
                    f"the next frame is {frame.width}×{frame.height}, and those before it are "
                    f"{size[0]}×{size[1]}: convert the clip to one size."
                )
            self.count += 1
            yield frame.to_image()


class Draft:
    """A clip that is being written: beside its place, under a name of its own, until it is whole.

    Args:
        path: Its place.
        rate: Frames a second.
        size: Width and height.

    Attributes:
        count: Frames in it.
    """

    def __init__(self, path: Path, rate: Fraction, size: tuple[int, int]) -> None:
        self.path, self.rate, self.count = path, rate, 0
        self._size = tuple(side // 2 * 2 for side in size)
        self._part = path.with_name(f".{path.name}.{token_hex(4)}.part")
        self._pixels = hashlib.sha256()

    @property
    def digest(self) -> str:
        """SHA-256 over mode, size and pixels of its frames."""
        return self._pixels.hexdigest()

    def __enter__(self) -> Draft:
        self._file = clips.av().open(str(self._part), "w", format="mp4")
        self._video = self._file.add_stream("h264", rate=self.rate, options={"crf": "17"})
        self._video.width, self._video.height = self._size
        self._video.pix_fmt = "yuv420p"
        return self

    def __exit__(self, *_: object) -> None:
        self._close()
        self._part.unlink(missing_ok=True)

    def _close(self) -> None:
        if self._file is not None:
            file, self._file = self._file, None
            if self.count:
                with _disk(self.path):
                    file.mux(self._video.encode())
            file.close()

    def add(self, picture: Image.Image) -> None:
        """Add a picture.

        Raises:
            NotWritten: If the disk is full or refuses.
        """
        metadata.feed(self._pixels, picture)
        frame = clips.av().VideoFrame.from_image(picture.convert("RGB"))
        with _disk(self.path):
            self._file.mux(self._video.encode(frame))
        self.count += 1

    def finish(self, made: Record) -> None:
        """Put it in its place, with its record in it and beside.

        Raises:
            NotWritten: If the disk is full or refuses.
        """
        self._close()
        with _disk(self.path):
            content = clips.labelled(self._part, made)
        write({self.path: content, beside(self.path): made.model_dump_json(indent=2).encode()})


@contextmanager
def _disk(path: Path) -> Iterator[None]:
    try:
        yield
    except AccelError:
        raise
    except OSError as error:
        raise NotWritten(
            f"{path} could not be written ({error.strerror or error}): free some space or give "
            "another OUT. Nothing was left behind."
        ) from error
