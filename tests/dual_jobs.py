"""What the tests of `parallel.DualParal` run in every rank of a world: see `worlds`."""

from dataclasses import dataclass
from typing import Any

import torch
from tiny import PIPELINES

from accel import Plan
from parallel import DualParal


class Abort(Exception):
    """What a user's callback raises in the middle of a run."""


@dataclass(frozen=True)
class Made:
    """What one rank saw.

    Attributes:
        clips: Run by run.
        calls: Calls of a network in the last run.
        detail: Of the verdict of the last run.
        peak: The most bytes that were kept in the last run.
        after: The stock pipeline's, before and after.
    """

    clips: list[torch.Tensor]
    calls: int
    detail: str
    peak: int
    after: tuple[torch.Tensor, torch.Tensor]


def made(
    name: str, method: DualParal, aborts: tuple[int, ...] = (), runs: int = 1, **call: Any
) -> Made:
    """Runs of a tiny pipeline, behind some that a callback aborts."""
    tiny = PIPELINES[name]
    pipe = tiny.build()
    stock = tiny.call(pipe, **call)
    with Plan(method).attach(pipe) as run:
        for at in aborts:
            _aborted(tiny, pipe, at, call)
        clips = [tiny.call(pipe, **call).clone() for _ in range(runs)]
    report = run.report
    [verdict], [tally] = report.verdicts.values(), report.tallies
    after = stock, tiny.call(pipe, **call)
    return Made(clips, report.calls, verdict.detail, tally.peak, after)


def _aborted(tiny: Any, pipe: Any, at: int, call: dict[str, Any]) -> None:
    def callback(_pipe: Any, index: int, _timestep: Any, state: dict[str, Any]) -> dict[str, Any]:
        if index == at:
            raise Abort
        return state

    try:
        tiny.call(pipe, callback_on_step_end=callback, **call)
    except Abort:
        return
    raise AssertionError("the run was not aborted")
