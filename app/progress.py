"""A progress bar: steps, time left, and how many steps were answered by a method."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from accel.attach import Run
    from accel.trajectory import Step


class Bar:
    """Shows runs on stderr while they go; on anything but a terminal it shows nothing."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description:<14}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[skipped]} skipped"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
            disable=not sys.stderr.isatty(),
        )

    def follow(self, run: Run, label: str = "denoising") -> None:
        """Show one run as a line of its own."""
        task = self._progress.add_task(label, total=None, skipped=0)

        def observe(step: Step, _result: Any) -> None:
            self._progress.update(
                task, total=step.total, completed=step.index + 1, skipped=skipped(run)
            )

        run.trajectory.observers.append(observe)

    @contextmanager
    def waiting(self, label: str) -> Iterator[None]:
        """Show a run that is not followed: no steps, only that it goes on."""
        task = self._progress.add_task(label, total=None, skipped=0)
        yield
        self._progress.update(task, total=1, completed=1)

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
