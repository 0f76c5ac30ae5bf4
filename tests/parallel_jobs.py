"""What the tests of `parallel` run in every rank of a world: see `worlds`."""

import os
import re
import signal
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tiny import PIPELINES
from torch import distributed

from accel import Accelerator, Plan
from accel.errors import BadInput
from accel.seams.blocks import find_blocks
from accel.seams.denoisers import find_denoisers
from parallel import launch
from parallel.exchange import Exchange
from parallel.launch import Place, agreed


@dataclass(frozen=True)
class Outcome:
    """What one rank saw.

    Attributes:
        stock: Output of the pipeline by itself.
        found: Output under the plan, run by run.
        calls: Calls of a network, run by run.
        rows: Rows that went through a network here, run by run.
        details: Of each method's verdict in the last run.
        after: Output once the plan was off.
    """

    stock: torch.Tensor
    found: list[torch.Tensor]
    calls: list[int]
    rows: list[int]
    details: dict[str, str]
    after: torch.Tensor


def outcome(
    name: str,
    methods: Sequence[Accelerator],
    runs: int = 1,
    beside: Sequence[Accelerator] = (),
    **call: Any,
) -> Outcome:
    """Run a tiny pipeline under a plan, and before and after it.

    Args:
        name: Of the pipeline.
        methods: The plan.
        runs: How often under the plan.
        beside: Methods that the other runs have as well.
        **call: For `Tiny.call`.
    """
    tiny = PIPELINES[name]
    pipe = tiny.build()

    def plain() -> torch.Tensor:
        with Plan(*beside).attach(pipe):
            return torch.as_tensor(tiny.call(pipe, **call)).clone()

    stock = plain()
    found, calls, rows = [], [], []
    with Plan(*methods, *beside).attach(pipe) as run:
        for _ in range(runs):
            found.append(torch.as_tensor(tiny.call(pipe, **call)).clone())
            calls.append(run.report.calls)
            rows.append(run.report.rows)
    details = {method: verdict.detail for method, verdict in run.report.verdicts.items()}
    return Outcome(stock, found, calls, rows, details, plain())


def exchanged(shapes: Sequence[tuple[int, ...]], dim: int) -> dict[str, Any]:
    """Gather, and borders, of numbers that tell their rank; `shapes` has one a rank."""
    exchange = Exchange(distributed.group.WORLD)
    rank, shape = exchange.rank, shapes[exchange.rank]
    mine = (
        torch.full(shape, float(rank))
        + torch.arange(shape[dim]).view([-1 if axis == dim else 1 for axis in range(len(shape))])
        / 100
    )
    lengths = [each[dim] for each in shapes]
    gathered = exchange.gather(mine, lengths, dim)
    after_gather = exchange.bytes
    border = torch.full((2, 3), float(rank))
    before, after = exchange.begin_borders(border, border + 0.5).pair()
    return {
        "gathered": gathered,
        "gather_bytes": after_gather,
        "before": before,
        "after": after,
        "border_bytes": exchange.bytes - after_gather,
    }


def fails(rank: int) -> None:
    """Fail in one rank, and leave the others waiting."""
    if distributed.get_rank() == rank:
        raise ValueError("on purpose")
    distributed.barrier()


def summed(place: Place, number: float) -> tuple[Place, float]:
    """The sum of a number over all processes."""
    total = torch.tensor(number * (place.rank + 1))
    distributed.all_reduce(total)
    return place, float(total)


def drawn(place: Place) -> float:
    """A number that the first process draws."""
    return float(agreed(place.rank + 0.5))


def breaks(place: Place, how: str, rank: int) -> None:
    """One process fails in some way, and the others wait for it."""
    if place.rank == rank:
        if how == "refuses":
            raise BadInput("there is no such thing: take another.")
        if how == "bug":
            raise KeyError("oops")
        if how == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(30)
    distributed.barrier()


def other_versions(rank: int) -> str:
    """What a process says when one has another torch."""
    place = Place(distributed.get_rank(), distributed.get_world_size(), 0)
    before = launch.version
    launch.version = lambda name: "0.0" if place.rank == rank and name == "torch" else before(name)
    try:
        launch._compare_versions(place)
    except BadInput as error:
        return str(error)
    finally:
        launch.version = before
    return ""


def weights_in_memory(name: str, method: Accelerator) -> dict[str, Any]:
    """Bytes of a pipeline's weights in memory, before, during and after a plan that splits them."""
    tiny = PIPELINES[name]
    pipe = tiny.build()
    networks = [denoiser.core for denoiser in find_denoisers(pipe)]

    def here() -> int:
        held = [one for core in networks for one in (*core.parameters(), *core.buffers())]
        return sum(one.nbytes for one in held if one.untyped_storage().filename is None)

    values = [one.clone() for core in networks for one in core.parameters()]
    before = here()
    with Plan(method).attach(pipe) as run:
        picture = torch.as_tensor(tiny.call(pipe)).clone()
        during = here()
        told = run.report.verdicts[method.name].detail
    kept = [one for core in networks for one in core.parameters()]
    blocks = [block.module for denoiser in find_denoisers(pipe) for block in find_blocks(denoiser)]
    return {
        "before": before,
        "during": during,
        "told": int(re.findall(r"([\d,]+) bytes of", told)[0].replace(",", "")),
        "after": here(),
        "same": all(torch.equal(*pair) for pair in zip(values, kept, strict=True)),
        "blocks": sum(
            one.nbytes for block in blocks for one in (*block.parameters(), *block.buffers())
        ),
        "picture": picture,
    }


def stepped(
    name: str, methods: Sequence[Accelerator], **call: Any
) -> tuple[list[torch.Tensor], int, dict[str, str]]:
    """The latents after each step of a run, the calls of a network here, and what each method did.

    Args:
        name: Of the tiny pipeline.
        methods: The plan.
        **call: For `Tiny.call`.
    """
    tiny, kept = PIPELINES[name], []
    pipe = tiny.build()

    def keep(_pipe: Any, _step: int, _timestep: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        kept.append(inputs["latents"].clone())
        return {}

    with warnings.catch_warnings(action="ignore"), Plan(*methods).attach(pipe) as run:
        tiny.call(pipe, callback_on_step_end=keep, **call)
    details = {method: verdict.detail for method, verdict in run.report.verdicts.items()}
    return kept, run.report.calls, details


def dies_at(place: Place, name: str, methods: Sequence[Accelerator], rank: int) -> None:
    """A process is killed while it looks at its second window, and the others wait for it."""
    tiny = PIPELINES[name]
    pipe = tiny.build()
    network, left = getattr(pipe, tiny.denoisers[0]), [2]
    inner = network.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if place.rank == rank and not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        return inner(*args, **kwargs)

    network.forward = forward
    with Plan(*methods).attach(pipe):
        tiny.call(pipe, steps=2)
