"""What the tests of the model of costs run in every rank of a world: see `worlds`."""

import re
from dataclasses import dataclass
from typing import Any

from tiny import PIPELINES

from accel import Accelerator, Plan


@dataclass(frozen=True)
class Cost:
    """What a plan took of one rank.

    Attributes:
        sent: Bytes that its methods sent.
        kept: Bytes that they kept at the end of a step, at most.
    """

    sent: int
    kept: int


def cost(name: str, methods: list[Accelerator], **call: Any) -> Cost:
    """Run a tiny pipeline under a plan.

    Args:
        name: Of the pipeline.
        methods: The plan.
        **call: For `Tiny.call`.
    """
    tiny = PIPELINES[name]
    pipe = tiny.build()
    with Plan(*methods).attach(pipe) as run:
        tiny.call(pipe, **call)
    told = [re.search(r"sent ([\d,]+) bytes", each.detail) for each in run.report.verdicts.values()]
    sent = sum(int(one[1].replace(",", "")) for one in told if one)
    return Cost(sent, max(one.peak for one in run.report.tallies))
