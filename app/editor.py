"""Edits of pictures in a row: one recording at a time on this machine, of whoever edited last."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event, Lock, Timer
from typing import TYPE_CHECKING, Any

from accel.edit import Edited, Edits, sparse
from accel.errors import BadInput
from accel.plan import Plan
from accel.region.masks import boxed, drawn
from app import metadata, models
from app.call import picture_size
from app.edit import record_of
from app.request import Request, Source, make
from app.serve.stopping import Stop, Stopped
from app.session import Session, noise_of

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

MASK = "mask_image"
"""What inpainting pipelines call the part that they paint."""

IDLE = 900.0
"""Seconds without an edit after which a recording and its model are let go."""

STRENGTH, STEPS = 0.9, 20
"""How a picture without a record is painted into, where nothing is said."""

Loader = Callable[[Source], models.Model]
Region = tuple[float, ...]


@dataclass(frozen=True)
class Subject:
    """A picture that is edited.

    Attributes:
        request: What it was made by. Of a picture without a record: what paints into it, which has
            it as image and mask, and the prompt of its first edit.
        plan: What it was made under.
        pixels: SHA-256 of its pixels, by its record; ``None`` for a picture without one.
    """

    request: Request
    plan: Plan
    pixels: str | None = None

    def asked(self, prompt: str) -> Request:
        """The request with another prompt."""
        return replace(self.request, prompt=prompt)


def subject_of(path: Path, painting: Request) -> Subject:
    """A picture with all that is needed to edit it.

    Args:
        path: A PNG with its record, or any other picture.
        painting: How one without a record is painted into: model, strength, steps.

    Raises:
        BadInput: If it cannot be read, its record is damaged, or it is a clip.
    """
    if path.suffix == ".png" and (made := metadata.found(path)) is not None:
        with metadata.opened(path) as picture:
            if getattr(picture, "n_frames", 1) > 1:
                raise BadInput(f"{path.name} is a clip, and edits are of pictures: give a picture.")
        place = {"dtype": made.fingerprint.dtype, "device": None}
        request = make(Request, {**made.request, **place}, where="the record's ")
        made.check_inputs(request, ())
        return Subject(request.seeded(), Plan.from_dict(made.plan), made.pixels)
    width, height = picture_size(path)
    request = replace(painting, image=path, mask=path, width=width, height=height, seed=0)
    return Subject(request, Plan())


@dataclass(frozen=True)
class Made:
    """What an edit gave.

    Attributes:
        before: The picture as it was recorded.
        picture: The edit.
        file: The edit as PNG, with its record.
        seconds: Of the edit.
        dense: Seconds of a run that computes everything, when the original was recorded.
        recording: Seconds of the run that was recorded.
        painted: Share of the picture that was painted.
        computed: Share of the picture that was computed.
        count: How many edits were made of the recording, with this one.
        same: Whether the original came out as the bits of its record; ``None`` without a record.
    """

    before: Image.Image
    picture: Image.Image
    file: bytes
    seconds: float
    dense: float
    recording: float
    painted: float
    computed: float
    count: int
    same: bool | None


@dataclass
class Recorded:
    """A recording, and what was made of it.

    Attributes:
        who: Whose.
        subject: What was recorded.
        session: Its model.
        edits: The recording.
        call: The arguments of the original's call.
        original: The original as it came out.
        dense: Seconds of a run that computes everything.
        count: Edits that were made.
    """

    who: str
    subject: Subject
    session: Session
    edits: Edits
    call: dict[str, Any]
    original: Edited
    dense: float
    count: int = 0

    def edit(self, prompt: str, where: Image.Image | Region) -> Made:
        """Make an edit; if it fails, the recording stays as it was."""
        mask = _mask(where, *self.edits.size)
        changes = {"prompt": prompt, **self._painting(mask)}
        edited = self.edits.edit(mask=mask, **changes)
        self.count += 1
        request = self.subject.asked(prompt)
        if self.subject.pixels is None:
            request = replace(request, mask=None)  # the picture stood in for one
        made = record_of(request, self.session, self.edits, edited, self.call | changes)
        pixels, before = self.subject.pixels, self.original.images
        return Made(
            before=before[0],
            picture=edited.images[0],
            file=metadata.png(edited.images, made, request.fps),
            seconds=edited.seconds,
            dense=self.dense,
            recording=self.original.seconds,
            painted=float(mask.float().mean()),
            computed=edited.share,
            count=self.count,
            same=None if pixels is None else metadata.pixels(before) == pixels,
        )

    def _painting(self, mask: Tensor) -> dict[str, Any]:
        """The mask of an inpainting pipeline: what the original was painted into, and this."""
        if MASK not in self.call:
            return {}
        from PIL import Image, ImageChops

        own = self.call[MASK].convert("L")
        fresh = Image.fromarray(mask.numpy()).convert("L").resize(own.size)
        return {MASK: ImageChops.lighter(own, fresh)}


class Editor:
    """Makes the edits of a server. Keeps one model, and one recording on it.

    Args:
        load: What loads a model.
    """

    def __init__(self, load: Loader = models.load) -> None:
        self._load = load
        self._lock = Lock()
        self._session: Session | None = None
        self._recorded: Recorded | None = None
        self._under_way: tuple[str, Event] = ("", Event())
        self._rest = Timer(IDLE, self.free)

    def holds(self, who: str, subject: Subject) -> bool:
        """Whether an edit would find its recording, as of now."""
        found = self._recorded
        return found is not None and (found.who, found.subject) == (who, subject)

    def edit(self, who: str, subject: Subject, prompt: str, where: Image.Image | Region) -> Made:
        """Edit a picture, which is recorded first if it is not.

        Waits while another edit runs. The recording of somebody else is let go then.

        Args:
            who: The page of a browser.
            subject: The picture.
            prompt: What it is to show.
            where: What is to change: a picture of its size, white where it changes; or left, top,
                width, height.

        Raises:
            AccelError: If it cannot be made; a recording that was there stays.
            Stopped: If it was stopped; a recording that was there stays.
        """
        if not prompt.strip():
            raise BadInput("The prompt is empty: say what the picture is to show.")
        asked = Event()
        with self._lock:
            self._rest.cancel()
            self._under_way = who, asked
            try:
                recorded = self._recording(who, subject, prompt, Stop(asked))
                with Stop(asked).guarding(recorded.edits.run.pipe):
                    return recorded.edit(prompt, where)
            finally:
                self._under_way = "", Event()
                self._rest = Timer(IDLE, self.free)
                self._rest.daemon = True
                self._rest.start()

    def stop(self, who: str) -> None:
        """Stop the edit that is under way, if it is this one's, at its next step."""
        whose, asked = self._under_way
        if whose == who:
            asked.set()

    def end(self, who: str) -> None:
        """Stop what is under way, and let the recording go, if they are this one's."""
        self.stop(who)
        with self._lock:
            if self._recorded is not None and self._recorded.who == who:
                self._drop()

    def free(self) -> None:
        """Let recording and model go."""
        with self._lock:
            self._drop()
            self._session = None

    def _drop(self) -> None:
        if self._recorded is not None:
            recorded, self._recorded = self._recorded, None
            recorded.edits.close()

    def _recording(self, who: str, subject: Subject, prompt: str, stop: Stop) -> Recorded:
        """The recording of a picture, made where it is not there."""
        if self._recorded is None or not self.holds(who, subject):
            self._drop()
            source = subject.request.source
            if self._session is None or self._session.model.source != source:
                self._session = None  # one model at a time in memory
                self._session = Session(self._load(source))
            self._recorded = _recorded(self._session, who, subject, prompt, stop)
        return self._recorded


def _recorded(session: Session, who: str, subject: Subject, prompt: str, stop: Stop) -> Recorded:
    """Record a picture, and time a run that computes everything."""
    from PIL import Image

    request = subject.request if subject.pixels else subject.asked(prompt)
    pipe, call = session.prepare([request], subject.plan)
    if subject.pixels is None:
        call[MASK] = Image.new("L", call[MASK].size)
    edits = sparse(pipe, subject.plan)
    try:
        with stop.guarding(pipe):
            original = edits.record(**call, generator=noise_of(request))
            dense = edits.edit(region=(0, 0, 1, 1))
    except BaseException:
        edits.close()
        raise
    return Recorded(who, subject, session, edits, call, original, dense.seconds)


def _mask(where: Image.Image | Region, height: int, width: int) -> Tensor:
    """What is to change, ``[height, width]``.

    Raises:
        BadInput: If it is nothing, of another size, or outside of the picture.
    """
    if isinstance(where, tuple):
        return boxed(where, height, width)
    mask = drawn(where, height, width)
    if not bool(mask.any()):
        raise BadInput(
            "Nothing is painted: paint over what is to change, or give its region. "
            "Nothing was lost: the recording stays."
        )
    return mask


__all__ = ["Editor", "Made", "Stopped", "Subject", "subject_of"]
