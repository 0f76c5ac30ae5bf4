"""Say where a job is while it runs: phase, step, skipped steps, time left, a small picture.

Words go out at most ten times a second. Pictures are made only while somebody watches, at most
twice a second, and so seldom that they take less than a fiftieth of the time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Event
from typing import TYPE_CHECKING, Any

from accel.errors import UnsupportedModel
from app.progress import skipped
from app.serve.jobs import Phase, Progress
from app.serve.stopping import NETWORKS, Estimate, Stop

if TYPE_CHECKING:
    from accel.attach import Run
    from accel.seams.grids import Grid
    from accel.trajectory import Step
    from app.serve.preview import Painter

PAUSE = 0.1
"""Least seconds between two messages."""

LOOKS, SHARE = 0.5, 50
"""Least seconds between two pictures, and how many times its own cost each one waits."""


@dataclass(frozen=True)
class Control:
    """What is asked of a running job, and where it answers.

    Attributes:
        stop: Set when it has to stop.
        watched: Set while somebody watches.
        send: Takes what it says.
    """

    stop: Event
    watched: Event
    send: Callable[[Any], None]


class Follower:
    """Follows the runs of one job; shown a run as `app.progress.Bar` is.

    Args:
        job: Its id.
        control: What is asked of it.

    Attributes:
        stop: Breaks its runs off.
        keeps: Whether a run that is stopped shall end with a picture.
        step: Steps made in the latest run.
    """

    def __init__(self, job: str, control: Control, *, keeps: bool = False) -> None:
        self.stop = Stop(control.stop)
        self.keeps = keeps
        self.step = 0
        self.painter: Painter | None = None
        self._job = job
        self._control = control
        self._began = self._run_began = time.monotonic()
        self._said = self._look_due = 0.0
        self._phase: Phase = "loading"
        self._note = ""
        self._run: Run | None = None
        self._estimate: Estimate | None = None
        self._grid: Grid | None = None

    def say(self, phase: Phase, note: str = "", **more: Any) -> None:
        """Say a phase, at once."""
        self._phase, self._note = phase, note
        self._said = time.monotonic()
        seconds = self._said - self._began
        self._control.send(Progress(self._job, phase, seconds=seconds, note=note, **more))

    @contextmanager
    def guarding(self, pipe: Any) -> Iterator[None]:
        """Inside, the runs of a pipeline can be stopped, and are looked at."""
        networks = [one for name in NETWORKS if (one := getattr(pipe, name, None)) is not None]
        hooks = [
            network.register_forward_pre_hook(self._on_call, with_kwargs=True)
            for network in networks
        ]
        try:
            with self.stop.guarding(pipe):
                yield
        finally:
            self._run = self._estimate = self._grid = None
            for hook in hooks:
                hook.remove()

    def follow(self, run: Run, label: str = "") -> None:
        """Follow one run, from its attached plan on."""
        self._run, self._grid, self.step = run, None, 0
        self._estimate = Estimate(run)
        if self.keeps:
            self.stop.keeping(run, self._estimate)
        self.say("encoding", label)
        self._run_began = time.monotonic()
        run.trajectory.observers.append(self._on_step)

    def count(self, label: str, total: int) -> Callable[[], None]:
        """Say how many of several runs are done; returns what is called after each."""
        singular = label.removesuffix("s")
        done = 0

        def advance() -> None:
            nonlocal done
            done += 1
            self.stop.check()
            left = (time.monotonic() - began) / done * (total - done)
            if done < total:
                self.say("measuring", f"{singular} {done + 1} of {total}", eta=left)

        began = time.monotonic()
        self.say("measuring", f"{singular} 1 of {total}")
        return advance

    def picture(self) -> bytes | None:
        """What the run was heading for, as a small PNG; ``None`` where that is not known."""
        estimate, grid = self._estimate, self._grid
        if self.painter is None or grid is None or estimate is None or not estimate.known:
            return None
        return self.painter.paint(grid.unpack(estimate.latents()[0]))

    def _on_call(self, network: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Learn, once a run, where its latents lie in the picture."""
        run = self._run
        if run is None or self._grid is not None or self.painter is None:
            return
        from accel.seams.denoisers import Call
        from accel.seams.grids import grid_of

        denoiser = next(one for one in run.denoisers if one.module is network)
        arguments = dict(zip(denoiser.parameters, args, strict=False)) | kwargs
        call = Call(denoiser, run.trajectory.now, (), arguments)
        try:
            self._grid = grid_of(call)
        except UnsupportedModel:  # the order of its tokens is not known: no pictures
            self.painter = None

    def _on_step(self, step: Step, _result: Any) -> None:
        self.step = step.index + 1
        now = time.monotonic()
        last = self.step == step.total
        if now - self._said < PAUSE and not last:
            return
        preview = self._look(now)
        left = None
        if step.total is not None:
            left = (now - self._run_began) / self.step * (step.total - self.step)
        assert self._run is not None
        self.say(
            "decoding" if last else "denoising",
            self._note,
            step=self.step,
            total=step.total,
            skipped=skipped(self._run),
            eta=left,
            preview=preview,
        )

    def _look(self, now: float) -> bytes | None:
        if now < self._look_due or not self._control.watched.is_set():
            return None
        picture = self.picture()
        if picture is not None:  # before that, the first one is due at every step
            self._look_due = now + max(LOOKS, SHARE * (time.monotonic() - now))
        return picture
