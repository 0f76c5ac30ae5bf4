"""What the tests of pairs run in every rank of a world: see `worlds`."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tiny import PIPELINES
from torch import distributed

from accel import Accelerator, Plan
from accel.errors import AccelError


@dataclass(frozen=True)
class Pair:
    """A parallel method beside another one, in one rank.

    Attributes:
        refused: What attaching said; empty if it was attached.
        alone: Output under the other method, in one process.
        found: Output under both.
        events: What the other method decided, where each rank sees all rows.
    """

    refused: str
    alone: torch.Tensor | None = None
    found: torch.Tensor | None = None
    events: tuple[str, ...] = ()


def together(
    name: str, method: Accelerator, others: Sequence[Accelerator], nudge: float, steps: int
) -> list[Pair]:
    """Run a tiny pipeline under a parallel method beside each of others.

    Args:
        name: Of the pipeline.
        method: The parallel method.
        others: Beside it, one after the other.
        nudge: By which share the weights of the second rank are larger than those of the first.
        steps: Of the run.
    """
    tiny = PIPELINES[name]
    pipe = tiny.build()
    found = []
    if distributed.get_rank():
        for each in tiny.denoisers:
            for weight in getattr(pipe, each).parameters():
                weight.data.mul_(1 + nudge)
    for other in others:
        try:
            run = Plan(method, other).attach(pipe)
        except AccelError as error:
            found.append(Pair(str(error)))
            continue
        with run:
            both = torch.as_tensor(tiny.call(pipe, steps=steps)).clone()
        [tally] = [one for one in run.report.tallies if one.method == other.name]
        with Plan(other).attach(pipe):
            alone = torch.as_tensor(tiny.call(pipe, steps=steps)).clone()
        found.append(Pair("", alone, both, tuple(map(str, tally.events))))
    return found
