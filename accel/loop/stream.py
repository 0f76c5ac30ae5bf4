"""A stream: frame after frame through a picture-to-picture pipeline that was called once."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

from accel.attach import Accelerator, Run, Site, Undo
from accel.errors import BadInput, Conflict, UnsupportedModel
from accel.loop.parts import Parts
from accel.loop.queues import Feed

if TYPE_CHECKING:
    from torch import Tensor

    from accel.guard import Guard
    from accel.report import Report
    from accel.seams.denoisers import Row
    from accel.seams.stream import Ends, Level, Network, Recorder

HELD = (
    *("denoiser", "blocks", "noise prediction", "scheduler"),
    "branches: what answers for the unconditional one",
    "branches: when guidance ends",
    "branches: where guidance acts",
    "branches: where the scale is 1",
)
"""Seams of methods that follow a picture from step to step, or change the solver: the rows of a
stream's call are at all noise levels at once, and it takes no step of the scheduler."""

RESERVED = ("image", "generator", "output_type", "return_dict", "callback_on_step_end")
"""Arguments of a pipeline's call that are the stream's."""

CARRIED = ("tokens.Importance",)
"""Methods of one call that all the same go by what the step before was answered."""

FORMS = ("pil", "np", "pt")

LIGHT = ("prompt", "negative_prompt", "guidance_scale", "true_cfg_scale")
"""What the arguments begin with that change no noise level."""

REMEMBERED = 256
"""Calls of the network that the report of a stream remembers, and pictures that a rate is of."""


class Methods(Protocol):
    """A plan, as far as a stream looks at it."""

    @property
    def methods(self) -> tuple[Accelerator, ...]:
        """The methods, outermost layer first."""
        ...

    @property
    def guard(self) -> Guard | None:
        """The budget of error, where there is one."""
        ...


class Streamed(Accelerator):
    """The stream itself, in its plan: it owns the loop, and holds what does not go with it."""

    name: ClassVar[str] = "loop.Stream"
    layer: ClassVar[str] = "loop"
    seam: ClassVar[str] = "loop"
    supports: ClassVar[str] = "picture-to-picture pipelines"
    source: ClassVar[str] = "arXiv 2312.12491, section 3"
    approximates: ClassVar[bool] = False

    @classmethod
    def off(cls) -> None:
        """There is no stream without it."""
        return

    def why_off(self) -> str | None:
        """It is never off."""
        return None

    def attach(self, site: Site) -> Iterator[Undo]:
        """Own the loop.

        Raises:
            Conflict: Beside methods that follow a picture from step to step.
        """
        from accel.seams.loop import Loop
        from accel.seams.stream import Recorder

        for seam in HELD:
            yield site.claim(seam)
        parts = site.shared(Parts)
        parts.streaming = True
        yield from Loop(site.shared(Recorder)).attach(site)
        site.tally.change = "owns the loop"


@dataclass(frozen=True, eq=False)
class Flight:
    """A frame on its way.

    Attributes:
        number: Of the frame.
        x: Its latents as noisy as the next level that it is at, ``[1, …]`` in float32; clean ones
            behind the last level.
        origin: What its virtual negative leads back to.
        first: Whether it begins another scene.
    """

    number: int
    x: Tensor
    origin: Tensor
    first: bool


class Stream:
    """Feeds a picture-to-picture pipeline with frames, and gives a picture for each.

    The pipeline is called once, with the first frame, to learn what it asks of its network at each
    noise level; then the network alone runs, between the pipeline's own encoder and decoder. At
    each level the clean latents are read off the guided output, and noised again for the next level
    with the noise of that level, which is the same for all frames: with the scheduler of a
    consistency model (LCM) this is what the pipeline itself does, with the same noise. What
    scheduler the pipeline has decides its levels, not how they are solved.

    The first pictures come late: with G frames in flight (`loop.StreamBatch`) ``push`` gives none
    for the first G − 1 frames, and ``flush`` the last G − 1 at the end. There are as many pictures
    as frames, in their order; where frames are skipped (`loop.SimilarityFilter`), the picture
    before is given again.

    Args:
        pipe: A stock pipeline that takes ``image`` and ``strength``.
        plan: Methods that go with a stream: those of the family ``loop``, and others that look at
            one call of the network alone.
        levels: Noise levels, spread evenly over the evaluations that the pipeline would make; or
            the numbers of those evaluations (StreamDiffusion's ``t_index_list``).
        seed: Of all that is drawn.
        output_type: As in a call of the pipeline, ``pil`` or ``pt`` or ``np``.
        **call: The other arguments of a call of the pipeline, such as ``prompt`` and ``strength``.

    Raises:
        BadInput: For levels or arguments that are none.
        Conflict: For a method that does not go with a stream, or a plan with a guard.
        UnsupportedModel: For a pipeline that makes no picture of a picture, or of more than that.
    """

    def __init__(
        self,
        pipe: Any,
        plan: Methods | Iterable[Accelerator] = (),
        *,
        levels: int | Sequence[int] = 4,
        seed: int = 0,
        output_type: str = "pil",
        **call: Any,
    ) -> None:
        from accel.seams.stream import Ends, Recorder, check

        check(pipe)
        self._pipe, self._seed = pipe, seed
        self._asked = levels if isinstance(levels, int) else tuple(levels)
        self._check(levels, call)
        if output_type not in FORMS:
            raise BadInput(
                f"output_type = {output_type!r}: a stream gives pictures, as {', '.join(FORMS)}."
            )
        self._call = {**call, "output_type": output_type}
        self._ends: Ends = Ends(pipe, seed)
        self._run = Run((Streamed(), *_methods(plan)), pipe)
        self._parts: Parts = self._run.shared[Parts]
        self._recorder: Recorder = self._run.shared[Recorder]
        self._restart()

    def _check(self, levels: int | Sequence[int], call: dict[str, Any]) -> None:
        numbers = [levels] if isinstance(levels, int) else list(levels)
        rising = all(a < b for a, b in pairwise(numbers))
        if not numbers or not rising or min(numbers) < (1 if isinstance(levels, int) else 0):
            raise BadInput(
                f"levels = {levels!r}: give how many noise levels there are, at least 1, or the "
                "rising numbers of evaluations of the pipeline, such as (0, 2, 4, 6)."
            )
        for name in RESERVED:
            if name in call:
                raise BadInput(f"{name} is the stream's own: leave it out.")

    def _restart(self) -> None:
        self._slots: list[Flight | None] = []
        self._network: Network | None = None
        self._levels: list[Level] = []
        self._noises: list[Tensor] = []
        self._size: tuple[int, ...] | None = None
        self._shown: Any = None
        self.frames = self.pictures = self.skipped = self.ticks = 0
        self._times: deque[float] = deque(maxlen=REMEMBERED)

    # what a stream says of itself

    @property
    def report(self) -> Report:
        """What the methods did; of steps, those of the last calls."""
        return self._run.report

    @property
    def levels(self) -> tuple[Level, ...]:
        """The noise levels, the noisiest first; none before the first frame."""
        return tuple(self._levels)

    @property
    def delay(self) -> int:
        """Frames that a picture comes late by."""
        return len(self._groups) - 1 if self._levels else 0

    @property
    def pending(self) -> int:
        """Frames that are in flight."""
        return sum(flight is not None for flight in self._slots)

    @property
    def rate(self) -> float:
        """Pictures a second, over the last ones; 0 before there are two."""
        spent = self._times[-1] - self._times[0] if len(self._times) > 1 else 0.0
        return (len(self._times) - 1) / spent if spent > 0.0 else 0.0

    # frames in, pictures out

    def push(self, frame: Any) -> Any:
        """Take a frame in.

        An error leaves the stream as it was: the frame is not in it, those before it are.

        Args:
            frame: What the pipeline takes as ``image``: a PIL image, an array or a tensor.

        Returns:
            A picture; ``None`` while the stream fills.

        Raises:
            BadInput: If the frame has another size than those before it.
        """
        import torch

        with torch.no_grad():
            size = self._checked_size(frame)
            if not self._levels:
                self._learn(frame)
            self._size = size
            pixels = self._ends.pixels(frame)
            if self._skips(pixels):
                self.skipped += 1
                return self._give(self._shown, came=True)
            first = self._parts.cuts is not None and self._parts.cuts(pixels)
            clean = self._ends.clean(pixels)
            x = self._levels[0].noised(clean, self._noises[0])
            done = self._tick(Flight(self.frames, x, clean, first))
            return self._give(self._drawn(done), came=True)

    def flush(self) -> list[Any]:
        """The pictures of all frames that are still in flight; the stream may go on after it."""
        import torch

        found = []
        with torch.no_grad():
            while self.pending:
                done = self._tick(None)
                if done is not None:
                    found.append(self._give(self._drawn(done), came=False))
        return found

    def run(self, frames: Iterable[Any], *, live: bool = False, waiting: int = 4) -> Iterator[Any]:
        """A picture for each frame, read in a thread of its own.

        Args:
            frames: Where they come from.
            live: Whether the newest frame counts, and those that wait are dropped
                (`accel.loop.Feed`); else all are kept.
            waiting: Frames that may wait.

        Yields:
            The pictures, and at the end, also where the source fails, those in flight.

        Raises:
            BadInput: If there is no frame at all, or they differ in size.
            Exception: What the source raised, behind the pictures of all frames that it gave.
        """
        with Feed(frames, live=live, waiting=waiting) as feed:
            try:
                for frame in feed:
                    picture = self.push(frame)
                    if picture is not None:
                        yield picture
            except GeneratorExit:
                raise
            except Exception:
                yield from self.flush()
                raise
            if not self.frames:
                raise BadInput("There is no frame in the stream: give a source with at least one.")
            yield from self.flush()

    def change(self, **call: Any) -> None:
        """Another prompt, or other arguments of the call, from the next frame on.

        Frames in flight go on under the new ones.

        Raises:
            BadInput: For arguments that are the stream's own; or for others than prompts and scales
                of guidance while frames are in flight, which lie at the old noise levels.
        """
        self._check(self._asked, call)
        moved = [name for name in call if not name.startswith(LIGHT)]
        if moved and self.pending:
            raise BadInput(
                f"{', '.join(moved)} cannot change while {self.pending} frames are in flight: "
                "flush the stream first."
            )
        self._call |= call
        self._levels, self._network = [], None

    def _checked_size(self, frame: Any) -> tuple[int, ...]:
        size = _size(frame)
        if self._size not in (None, size):
            found, needed = ("×".join(map(str, one)) for one in (size, self._size or ()))
            raise BadInput(
                f"Frame {self.frames} is {found}, and those before it are {needed}: resize it, or "
                "begin another stream. What is in flight is still there."
            )
        return size

    def _skips(self, pixels: Tensor) -> bool:
        skips = self._parts.skips
        return skips is not None and skips(pixels, self._shown is not None)

    def _give(self, picture: Any, *, came: bool) -> Any:
        """Count a frame that came, and a picture that goes out."""
        self.frames += came
        if picture is not None:
            self._shown = picture
            self.pictures += 1
            self._times.append(time.perf_counter())
        for tell in self._parts.told:
            tell()
        return picture

    def _drawn(self, done: Flight | None) -> Any:
        return None if done is None else self._ends.picture(done.x)

    # the pipeline's own loop, once

    def _learn(self, frame: Any) -> None:
        """Call the pipeline with a frame, and remember what it asked."""
        from accel.seams.stream import Network

        with self._ends.listening():
            self._pipe(image=frame, generator=self._ends.generator(), **self._call)
        self._levels = self._recorder.levels(self._chosen(), self._pipe.scheduler)
        self._network = Network(self._levels)
        self._groups = self._shared_out()
        pixels = self._ends.pixels(frame)
        self._noises = self._ends.noises(pixels, len(self._levels))
        self._verify(pixels)
        self._slots = [None] * len(self._groups) if not self._slots else self._slots
        self._run.report.start()
        for reset in self._parts.resets:
            reset()

    def _chosen(self) -> tuple[int, ...]:
        """Which evaluations of the pipeline are levels."""
        made = len(self._recorder.evaluations)
        if isinstance(self._asked, int):
            chosen = tuple(place * made // self._asked for place in range(self._asked))
        else:
            chosen = self._asked
        if len(set(chosen)) < len(chosen) or chosen[-1] >= made:
            raise BadInput(
                f"levels = {self._asked}, and the pipeline makes {made} evaluations at these steps "
                "and this strength: ask for fewer levels, or for more steps."
            )
        return chosen

    def _shared_out(self) -> list[list[int]]:
        """The levels that each frame in flight has for itself, the noisiest first."""
        count = len(self._levels)
        flying = min(self._parts.in_flight or count, count)
        bounds = [place * count // flying for place in range(flying + 1)]
        return [list(range(a, b)) for a, b in pairwise(bounds)]

    def _verify(self, pixels: Tensor) -> None:
        recorder, first = self._recorder, self._recorder.evaluations[0]
        assert recorder.begun is not None and recorder.finished is not None
        level = replace(self._levels[0], evaluation=first)
        noisy = level.noised(self._ends.clean(pixels), self._noises[0])
        self._ends.verify(noisy, recorder.begun, recorder.finished)

    # a call of the network for all that is in flight

    def _tick(self, entering: Flight | None) -> Flight | None:
        """Move all frames on by their share of the levels; the frame that is done.

        Nothing is changed before the last call is answered.
        """
        flights = [entering, *self._slots[1:]]
        cut = {
            group[0] for group, one in zip(self._groups, flights, strict=True) if one and one.first
        }
        for turn in range(max(map(len, self._groups))):
            rows = {
                slot: group[turn]
                for slot, group in enumerate(self._groups)
                if flights[slot] is not None and turn < len(group)
            }
            if rows:
                self._move(flights, rows, cut)
        *kept, done = flights
        self._slots = [None, *kept]
        self._count()
        return done

    def _move(self, flights: list[Flight | None], rows: dict[int, int], cut: set[int]) -> None:
        """Evaluate some frames, each at its level, in one call; they go on to the next level.

        Args:
            flights: By slot; changed in place.
            rows: The levels, by slot.
            cut: Levels that are entered by the first frame of a scene.
        """
        for enter in self._parts.enters:
            enter(frozenset(cut & set(rows.values())))
        moving = {level: one for slot, level in rows.items() if (one := flights[slot]) is not None}
        asked = self._rows(moving)
        answers = self._answers({row: moving[row.sample].x for row in asked})
        for slot, level in rows.items():
            flights[slot] = self._moved(moving[level], self._levels[level], answers)
        self._parts.widest = max(self._parts.widest, len(rows))

    def _answers(self, xs: dict[Row, Tensor]) -> dict[Row, Tensor]:
        """Ask the network, below the methods of the plan.

        Raises:
            Conflict: If one of them asks where in a run it is.
        """
        assert self._network is not None
        try:
            return self._network.answers(xs, self.ticks)
        except UnsupportedModel as error:
            names = ", ".join(tally.method for tally in self._run.report.tallies[1:])
            raise Conflict(
                f"A method of this plan ({names}) does not go with a stream, whose calls are at "
                f"all steps of a run at once: {error}"
            ) from error

    def _rows(self, moving: Iterable[int]) -> list[Row]:
        """The rows of a call: the negative prompt's where it is evaluated, and the prompt's."""
        from accel.seams.denoisers import Row
        from accel.seams.loop import UNCOND
        from accel.seams.stream import COND

        negative = self._parts.negative
        guided = [level for level in moving if self._levels[level].guided]
        computed = [level for level in guided if negative == "none" or self._is_onetime(level)]
        self._parts.spared += len(guided) - len(computed)
        return [Row(UNCOND, level) for level in computed] + [Row(COND, level) for level in moving]

    def _is_onetime(self, level: int) -> bool:
        return level == 0 and self._parts.negative == "onetime"

    def _moved(self, flight: Flight, level: Level, answers: dict[Row, Tensor]) -> Flight:
        """A frame behind a level: noised for the next one, or clean."""
        from accel.seams.denoisers import Row
        from accel.seams.loop import UNCOND
        from accel.seams.stream import COND

        assert self._network is not None
        name, x, origin = self._network.name, flight.x, flight.origin
        found = {COND: answers[Row(COND, level.index)]}
        if level.guided:
            negative = answers.get(Row(UNCOND, level.index))
            if negative is None:
                negative = level.virtual(x, origin, name, self._parts.delta)
            elif self._is_onetime(level.index):
                origin = level.implied(negative, x, name)
            found = {UNCOND: negative, **found}
        clean = level.clean(level.evaluation.guided(found), x, name)
        after = level.index + 1
        if after < len(self._levels):
            clean = self._levels[after].noised(clean, self._noises[after])
        return replace(flight, x=clean, origin=origin)

    def _count(self) -> None:
        """One more call, or several that belong together, in the report."""
        self.ticks += 1
        report = self._run.report
        report.samples = self.frames - self.skipped + 1
        report.tick()
        if self.ticks % REMEMBERED == 0:
            del report.step_seconds[:-REMEMBERED]
            for tally in report.tallies:
                recent = self.ticks - REMEMBERED
                tally.events[:] = [event for event in tally.events if event.step >= recent]

    def close(self) -> None:
        """Take the plan off the pipeline; frames in flight are dropped."""
        self._run.detach()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._run.__exit__(kind, error, trace)


def _methods(plan: Methods | Iterable[Accelerator]) -> tuple[Accelerator, ...]:
    """The methods of a plan.

    Raises:
        Conflict: If it has a guard.
    """
    if getattr(plan, "guard", None) is not None:
        raise Conflict(
            "A guard counts the errors of one run from step to step, and a stream has frames at "
            "all steps at once: leave the guard out of a stream's plan."
        )
    methods = tuple(plan if isinstance(plan, Iterable) else plan.methods)
    carried = [method.name for method in methods if method.name in CARRIED]
    if carried:
        raise Conflict(
            f"{carried[0]} goes by what a picture's step before was answered, and the call before "
            "of a stream was another frame's: leave it out of a stream's plan."
        )
    shared = [method.name for method in methods if method.layer == "parallel"]
    if shared:
        raise Conflict(
            f"{shared[0]} shares one picture out over processes, and a stream runs in one: leave "
            "it out of a stream's plan."
        )
    return methods


def _size(frame: Any) -> tuple[int, ...]:
    """Of a PIL image its width and height, else the shape."""
    found = getattr(frame, "shape", None) or getattr(frame, "size", None)
    if not isinstance(found, tuple):
        raise BadInput(
            f"A frame is a {type(frame).__name__}: give a PIL image, an array or a tensor."
        )
    return tuple(map(int, found))
