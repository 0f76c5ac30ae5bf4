"""A network cut into components, of which each process computes one on what is a step old.

The units of the cut are the blocks of a transformer, or the down, mid and up blocks of a UNet. A
process runs the units of its own component; in the place of the others stands what they answered
at the step before, so that its own component takes in just that. When all are done, everybody gets
what everybody has computed: the last component's answer goes on into the rest of the network, and
the others wait for the next step.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from accel.errors import BadInput
from accel.seams.blocks import Block, crosses_long_skips, find_blocks, wrap_call
from accel.seams.denoisers import Call, Denoiser, Inner, Result
from parallel.age import Age
from parallel.counting import counter

if TYPE_CHECKING:
    from accel.attach import Site, Undo
    from accel.report import Tally
    from parallel.exchange import Exchange
    from parallel.mesh import Axis


def cut(costs: Sequence[float], count: int) -> tuple[int, ...]:
    """Where to cut a row of units so that the dearest component is as cheap as can be.

    Args:
        costs: Of each unit.
        count: Components; none is empty.

    Returns:
        The end of each component.

    Raises:
        BadInput: If there are fewer units.
    """
    if count > len(costs):
        raise BadInput(
            f"The network has {len(costs)} blocks, and {count} processes would each take some: "
            f"start {len(costs)} at most, or give another method of the plan a larger degree."
        )
    sums = [0.0]
    for cost in costs:
        sums.append(sums[-1] + cost)
    best: dict[int, tuple[float, tuple[int, ...]]] = {
        end: (sums[end], (end,)) for end in range(1, len(costs) + 1)
    }
    for parts in range(2, count + 1):
        best = {
            end: min(
                (max(best[begin][0], sums[end] - sums[begin]), (*best[begin][1], end))
                for begin in range(parts - 1, end)
            )
            for end in range(parts, len(costs) + 1)
        }
    return best[len(costs)][1]


class Balance:
    """Shares the units of a network out in a row: counted once, then cut evenly.

    Args:
        count: Units.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._costs: dict[int, float] = {}
        self._ends: tuple[int, ...] = ()

    @property
    def known(self) -> bool:
        """Whether every unit has been counted."""
        return len(self._costs) == self._count

    def counted(self, index: int, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a unit, and count once what it costs, in operations."""
        if index in self._costs:
            return inner(*args, **kwargs)
        with counter() as counted:
            answer = inner(*args, **kwargs)
        self._costs[index] = float(counted.get_total_flops())
        return answer

    def ends(self, processes: int) -> tuple[int, ...]:
        """Where the units of each process end; all have to be counted.

        Raises:
            BadInput: If there are fewer units than processes.
        """
        if len(self._ends) != processes:
            self._ends = cut([self._costs[unit] for unit in range(self._count)], processes)
        return self._ends

    def owner(self, index: int, processes: int) -> int:
        """The process that has a unit."""
        return next(rank for rank, end in enumerate(self.ends(processes)) if index < end)


@dataclass
class Now:
    """The call that is under way.

    Attributes:
        exchange: The processes.
        stale: What each unit that is kept answered at the step before; ``None``: all compute all.
        answers: What the units that are kept answer now.
    """

    exchange: Exchange
    stale: dict[int, Any] | None
    answers: dict[int, Any] = field(default_factory=dict)


class Components:
    """The components of one network.

    Args:
        denoiser: The network.
        axis: Who shares it.
        warmup: Steps after the first one in which everybody computes everything.
        tally: Is told what was done.

    Raises:
        UnsupportedModel: For a network without a list of blocks.
    """

    def __init__(self, denoiser: Denoiser, axis: Axis, warmup: int, tally: Tally) -> None:
        self._denoiser = denoiser
        self._axis = axis
        self._warmup = warmup
        self._tally = tally
        self._blocks: tuple[Block, ...] = ()
        if hasattr(denoiser.core, "down_blocks"):
            self._units = unet_blocks(denoiser.core)
            self._all_kept = True  # the up blocks take in what the down blocks gave
        else:
            self._blocks = find_blocks(denoiser)
            self._units = [block.module for block in self._blocks]
            self._all_kept = crosses_long_skips(self._blocks, range(1))
        self._balance = Balance(len(self._units))
        self._kept: dict[Hashable, dict[int, Any]] = {}
        self._age = Age(self._kept.clear)
        self._now: Now | None = None

    @property
    def bytes(self) -> int:
        """Memory of what is kept for the next step."""
        kept = (value for answers in self._kept.values() for value in answers.values())
        return sum(tensor.nbytes for value in kept for tensor in tensors(value))

    def reset(self) -> None:
        """Forget the run before; what the units cost is known for good."""
        self.release()
        self._age.reset()
        self._tally.change = None

    def release(self) -> None:
        """Let go of what is kept."""
        self._kept.clear()
        self._now = None

    def attach(self, site: Site) -> Iterator[Undo]:
        """Hook the units, and the network."""
        for index, unit in enumerate(self._units):
            yield wrap_call(unit, partial(self._unit, index))
        yield site.around(self._denoiser, self)

    def __call__(self, call: Call, inner: Inner) -> Result:
        """Compute a component here; the answer is that of the last one."""
        if self._axis.size == 1:
            return inner(call)
        exchange = self._axis.exchange(call.sample.device.type)
        key = (call.rows, tuple(call.sample.shape[1:]))
        stale = None if self._age.of(call) <= self._warmup else self._kept.get(key)
        self._now = Now(exchange, stale)
        try:
            result = inner(call)
            self._kept[key] = self._asked(self._now)
            if stale is None:  # all have computed it: they go on with the same bits
                result.value.copy_(exchange.agreed(result.value, exchange.size - 1))
        finally:
            self._now = None
        if stale is not None:
            ends = self._balance.ends(exchange.size)
            self._tally.change = (
                f"{exchange.size} components of {len(self._units)} blocks (cut behind "
                f"{', '.join(map(str, ends[:-1]))}); this process sent {exchange.bytes:,} bytes"
            )
        return result

    def _unit(self, index: int, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        now = self._now
        if now is None:
            return inner(*args, **kwargs)
        if now.stale is None:
            answer = self._balance.counted(index, inner, *args, **kwargs)
            if self._blocks:
                self._blocks[index].outputs(answer)  # so that it knows how it answers
            self._keep(index, answer, now)
            return answer
        if self._balance.owner(index, now.exchange.size) == now.exchange.rank:
            answer = inner(*args, **kwargs)
            self._keep(index, answer, now)
        elif index in now.stale:
            answer = now.stale[index]
        else:
            answer = self._passed(index, args, kwargs)
        return answer if index < max(now.stale) else self._shared(now)

    def _keep(self, index: int, answer: Any, now: Now) -> None:
        """Keep an answer that may be asked for at the next step."""
        if self._all_kept or now.stale is None or index in now.stale:
            now.answers[index] = answer

    def _asked(self, now: Now) -> dict[int, Any]:
        """Answers that the next step asks for: where components end, or everywhere.

        A call may leave units out (skip layers): then a component ends with the last that was run.
        """
        if self._all_kept or now.stale is not None:
            return now.answers
        ran = [
            [unit for unit in now.answers if unit < end]
            for end in self._balance.ends(now.exchange.size)
        ]
        return {max(units): now.answers[max(units)] for units in ran if units}

    def _passed(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What stands for a unit whose answer nobody reads."""
        block = self._blocks[index]
        return block.returns(block.inputs(block.bind(args, kwargs)))

    def _shared(self, now: Now) -> Any:
        """Tell everybody what was computed here; the answer of the last unit."""
        assert now.stale is not None
        size = now.exchange.size
        owners = {index: self._balance.owner(index, size) for index in now.stale}
        like = [
            [t for index in now.stale if owners[index] == rank for t in tensors(now.stale[index])]
            for rank in range(size)
        ]
        mine = [t for index in now.answers for t in tensors(now.answers[index])]
        found = [iter(part) for part in now.exchange.share(mine, like)]
        now.answers = {
            index: rebuilt(value, found[owners[index]]) for index, value in now.stale.items()
        }
        return now.answers[max(now.stale)]


def unet_blocks(core: Any) -> list[Any]:
    """The down, mid and up blocks of a UNet in the order in which they run."""
    middle = [core.mid_block] if getattr(core, "mid_block", None) is not None else []
    return [*core.down_blocks, *middle, *core.up_blocks]


def tensors(value: Any) -> list[Tensor]:
    """The tensors in what a block answers, from the first to the last."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in tensors(item)]
    return []


def rebuilt(like: Any, values: Iterator[Tensor]) -> Any:
    """An answer of the same form with other tensors."""
    if isinstance(like, Tensor):
        return next(values)
    if isinstance(like, (list, tuple)):
        return type(like)(rebuilt(item, values) for item in like)
    return like
