"""A live stream: one at a time on this machine, for whoever began it, from a camera or a clip."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from accel.errors import BadInput
from accel.loop import SimilarityFilter, Stream
from accel.plan import Plan
from app import models
from app.request import Choice, Source, Streaming
from app.streaming import Film, plan_of, prepared

if TYPE_CHECKING:
    from PIL import Image

LEFT = 20.0
"""Seconds without a frame after which somebody else may begin."""

LEVELS = 8
"""Noise levels at most: each is a row of a call."""

Loader = Callable[[Source], models.Model]


@dataclass(frozen=True)
class Shown:
    """What a frame gave.

    Attributes:
        picture: The newest picture; ``None`` while the stream fills.
        rate: Pictures a second, as measured over the last ones.
        frames: Frames that came.
        skipped: Of them, those for which the picture before stands.
    """

    picture: Image.Image | None
    rate: float
    frames: int
    skipped: int


class Live:
    """The live stream of a server. Keeps the model that was asked for last.

    Args:
        offered: Names of the models that may be asked for.
        load: What loads one.
    """

    def __init__(self, offered: tuple[str, ...], load: Loader = models.load) -> None:
        self._offered, self._load = offered, load
        self._lock = Lock()
        self._model: models.Model | None = None
        self._stream: Stream | None = None
        self._asked = Streaming()
        self._size = (0, 0)
        self._who, self._seen = "", 0.0

    def frame(self, who: str, asked: Streaming, picture: Image.Image) -> Shown:
        """Take a frame of a camera.

        Another prompt is taken over while the stream runs; with other settings it begins anew.

        Raises:
            AccelError: If the stream is somebody else's, or cannot be made.
        """
        from PIL import ImageOps

        with self._lock:
            self._take(who)
            stream = self._streaming(asked)
            made = stream.push(ImageOps.fit(picture.convert("RGB"), self._size))
            return _shown(stream, made)

    def film(self, who: str, asked: Streaming, path: Path) -> Iterator[Shown]:
        """Draw a clip anew, from its beginning.

        Raises:
            AccelError: As ``frame``; or if the clip cannot be read, behind what was made before.
        """
        self.end(who)
        with Film(path) as film:
            for frame in film.frames():
                yield self.frame(who, asked, frame)
        with self._lock:
            self._take(who)
            stream = self._streaming(asked)
            if not stream.frames:
                raise BadInput("There is no frame in this clip: give another one.")
            for made in stream.flush():
                yield _shown(stream, made)

    def end(self, who: str) -> None:
        """End the stream, if it is this one's."""
        with self._lock:
            if who == self._who:
                self._drop()
                self._who = ""

    def _take(self, who: str) -> None:
        """Make the stream this one's.

        Raises:
            BadInput: If somebody else has it.
        """
        now = time.monotonic()
        if who != self._who:
            if self._who and now - self._seen < LEFT:
                raise BadInput(
                    "The live stream is in use: this machine runs one at a time. Try again in "
                    f"{LEFT:g} seconds."
                )
            self._drop()
        self._who, self._seen = who, now

    def _drop(self) -> None:
        if self._stream is not None:
            stream, self._stream = self._stream, None
            stream.close()

    def _streaming(self, asked: Streaming) -> Stream:
        """The stream of some settings.

        Raises:
            BadInput: If they are not offered.
        """
        if self._stream is not None and asked == self._asked:
            return self._stream
        if not asked.prompt.strip():
            raise BadInput("The prompt is empty: say what to draw.")
        if self._stream is not None and replace(asked, prompt=self._asked.prompt) == self._asked:
            self._stream.change(prompt=asked.prompt)
        else:
            self._begin(asked)
        self._asked = asked
        assert self._stream is not None
        return self._stream

    def _begin(self, asked: Streaming) -> None:
        self._drop()
        if asked.model not in self._offered or asked.levels > LEVELS:
            raise BadInput(
                f"{asked.model} with {asked.levels} levels is not offered: choose one of "
                f"{', '.join(self._offered)}, and at most {LEVELS} levels."
            )
        source = Source(**{f.name: getattr(asked, f.name) for f in fields(Source)})
        if self._model is None or self._model.source != source:
            self._model = None  # one model at a time in memory
            self._model = self._load(source)
        pipe, call, self._size = prepared(self._model, asked)
        plan = Plan(*plan_of(asked, Choice()), SimilarityFilter())
        self._stream = Stream(pipe, plan, **call)


def _shown(stream: Stream, picture: Any) -> Shown:
    return Shown(picture, stream.rate, stream.frames, stream.skipped)
