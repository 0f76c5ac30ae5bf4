"""A progress bar: steps, time left, and how many steps were answered by a method.

It redraws only when a step ends, at most ten times a second, and has no thread of its own: it must
not take time from what is measured.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from rich.progress import TaskID

    from accel.attach import Run
    from accel.trajectory import Step

PAUSE = 0.1


class Bar:
    """Shows runs while they go.

    Args:
        console: Where; by default stderr. On anything but a terminal, nothing is shown.
    """

    def __init__(self, console: Console | None = None) -> None:
        console = console or Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            auto_refresh=False,
            disable=not console.is_terminal,
        )
        self._drawn = 0.0

    def follow(self, run: Run, label: str = "denoising") -> None:
        """Show the steps of one run."""
        task = self._next(label, None)

        def observe(step: Step, _result: Any) -> None:
            note = f"{skipped(run)} skipped"
            self._progress.update(task, total=step.total, completed=step.index + 1, note=note)
            self._draw(force=step.index + 1 == step.total)

        run.trajectory.observers.append(observe)

    def count(self, label: str, total: int) -> Callable[[], None]:
        """Show how many of several runs are done; returns what is called after each."""
        task = self._next(label, total)

        def advance() -> None:
            self._progress.advance(task)
            self._draw(force=True)

        return advance

    def stream(self, total: int | None) -> Callable[[str], None]:
        """Show the frames of a stream; returns what is called after each, with a note."""
        task = self._next("streaming", total)

        def advance(note: str) -> None:
            self._progress.update(task, advance=1, note=note)
            self._draw(force=False)

        return advance

    def _next(self, label: str, total: int | None) -> TaskID:
        """One line at a time: what is done goes."""
        for task in self._progress.task_ids:
            self._progress.remove_task(task)
        task = self._progress.add_task(label, total=total, note="")
        self._draw(force=True)
        return task

    def _draw(self, *, force: bool) -> None:
        now = time.monotonic()
        if force or now - self._drawn > PAUSE:
            self._drawn = now
            self._progress.refresh()

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        self._progress.stop()


def skipped(run: Run) -> int:
    """How many steps a method answered, in whole or in part, without computing them."""
    tallies = run.report.tallies
    return len({e.step for tally in tallies for e in tally.events if e.state != "computed"})
