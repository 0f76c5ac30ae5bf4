"""CFG parallelism: the two guidance branches are computed by two processes at the same time.

Source: DistriFusion (arXiv 2402.19481, section 4) and xDiT (arXiv 2411.01738, section 3) describe
the split. Where a pipeline calls its network once for each branch, one after the other, the second
call is foreseen: it differs from the first as it did at the step before.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from accel.attach import Site, Undo
from parallel.degree import OneAxis

if TYPE_CHECKING:
    from torch import Tensor

    from accel.report import Tally
    from accel.seams.denoisers import Call, Inner, Result
    from parallel.mesh import Axis


class CFG(OneAxis):
    """Compute each guidance branch in a process of its own: up to twice as fast, and exact.

    One exchange of the network's output a step. Pipelines that call their network for each branch
    in turn have no gain at their first step, nor where what they pass to the second call cannot be
    foreseen; it is compared with what they do pass, so the output is right in any case. Without
    guidance there is nothing to split. It sits above whatever works inside the network (caches of
    blocks, fewer tokens, sparse attention), which sees one branch in each process, and all go on
    with the same bits; caches that decide there for all branches of a sample are refused. Outputs
    equal a single process's up to the rounding that its own batch size makes; two calls are equal
    to the bit.
    """

    name: ClassVar[str] = "parallel.CFG"
    seam: ClassVar[str] = "branches over processes"
    supports: ClassVar[str] = "every denoiser with two guidance branches, on two processes or more"
    source: ClassVar[str] = "arXiv 2402.19481, section 4; 2411.01738, section 3"
    approximates: ClassVar[bool] = False

    degree: int = Field(
        default=2, ge=1, le=2, description="processes along this axis; 1 is off, 2 one a branch"
    )

    def attach(self, site: Site) -> Iterator[Undo]:
        """Put it around every denoiser.

        Raises:
            BadInput: At the first call of the pipeline, if there are not as many processes.
        """
        from parallel.mesh import Mesh

        yield site.claim("branches over processes")
        yield site.claim("decisions for all branches")  # inside the network: one is here alone
        axis = site.shared(Mesh).claim("cfg", self.degree, self.name)
        yield axis.release
        site.tally.reason = lambda: "the run had one guidance branch"
        yield site.on_start(axis.reset)
        for denoiser in site.denoisers:
            branches = Branches(axis, site.tally)
            yield site.on_start(branches.reset)
            yield site.around(denoiser, branches, at="branches")


class Branches:
    """Splits the calls of one network by branch."""

    def __init__(self, axis: Axis, tally: Tally) -> None:
        self._axis = axis
        self._tally = tally
        self._pair: tuple[Call, Call] | None = None
        self._first: Call | None = None
        self._ahead: tuple[Call, Result] | None = None

    def reset(self) -> None:
        """Forget the run before."""
        self._pair = self._first = self._ahead = None
        self._tally.change = None

    def __call__(self, call: Call, inner: Inner) -> Result:
        """Compute one branch here, and take the others from where they are computed."""
        branches = tuple(dict.fromkeys(row.branch for row in call.rows))
        if len(branches) > 1:
            return self._split(call, branches, inner)
        if self._begins(call):
            return self._lead(call, inner)
        return self._follow(call, inner)

    def _begins(self, call: Call) -> bool:
        """Whether a call is the first of its step, or of another window at the same step."""
        first = self._first
        return first is None or first.step.index != call.step.index or first.rows == call.rows

    def _split(self, call: Call, branches: tuple[str, ...], inner: Inner) -> Result:
        """A call of all branches: its rows are shared out."""
        from accel.seams.rows import scatter

        exchange = self._axis.exchange(call.sample.device.type)
        whose = [branches.index(row.branch) % exchange.size for row in call.rows]
        parts = [
            [index for index, rank in enumerate(whose) if rank == each]
            for each in range(exchange.size)
        ]
        mine = inner(call.take(parts[exchange.rank]))
        found = exchange.begin(_packed(mine), [len(part) for part in parts]).parts()
        self._say(exchange.bytes)
        whole = scatter(list(zip(parts, found, strict=True)), len(call.rows))
        return _unpacked(whole, mine)

    def _lead(self, call: Call, inner: Inner) -> Result:
        """The first call of a step: the second one is computed at the same time, if foreseen."""
        wasted, self._first = self._ahead is not None, call
        foreseen = None if wasted else self._foreseen(call)
        self._ahead = None
        if wasted:
            self._pair = None  # the other branch was left out: not again before it is asked for
        if foreseen is None:
            return self._agreed(inner(call), 0, call)
        exchange = self._axis.exchange(call.sample.device.type)
        mine = inner((call, foreseen)[exchange.rank])
        ours, theirs = exchange.begin(_packed(mine)).parts()
        self._say(exchange.bytes)
        self._ahead = foreseen, _unpacked(theirs, mine)
        return _unpacked(ours, mine)

    def _follow(self, call: Call, inner: Inner) -> Result:
        """The second call of a step: known already if it is as it was foreseen."""
        assert self._first is not None
        ahead, self._ahead = self._ahead, None
        self._pair = self._first, call
        if ahead and ahead[0].rows == call.rows and _same(ahead[0].arguments, call.arguments):
            return ahead[1]
        return self._agreed(inner(call), 1, call)

    def _agreed(self, result: Result, rank: int, call: Call) -> Result:
        """What a process has answered that has the branch: what others keep of it is old."""
        exchange = self._axis.exchange(call.sample.device.type)
        return _unpacked(exchange.agreed(_packed(result), rank), result)

    def _foreseen(self, call: Call) -> Call | None:
        """The second call of this step, if it differs from the first as at the step before."""
        from dataclasses import replace

        if self._pair is None:
            return None
        before, other = self._pair
        if before.rows != call.rows or before.arguments.keys() != other.arguments.keys():
            return None
        arguments = {
            name: call.arguments.get(name)
            if _same(value, other.arguments[name])
            else other.arguments[name]
            for name, value in before.arguments.items()
        }
        return replace(call, rows=other.rows, arguments=arguments)

    def _say(self, sent: int) -> None:
        self._tally.change = f"two processes computed a branch each; this one sent {sent:,} bytes"


def _packed(result: Result) -> Tensor:
    """An answer, and behind it whether each row was computed in full: ``[rows, …]``."""
    import torch

    fresh = result.value.new_tensor(result.fresh)[:, None]
    return torch.cat([result.value.flatten(1), fresh], 1)


def _unpacked(packed: Tensor, like: Result) -> Result:
    """The answer that was packed, of rows such as another answer has."""
    from accel.seams.denoisers import Result

    value = packed[:, :-1].reshape(len(packed), *like.value.shape[1:])
    return Result(value, tuple(fresh != 0 for fresh in packed[:, -1].tolist()))


def _same(one: Any, other: Any) -> bool:
    """Whether two arguments are equal; tensors that are the same are not read."""
    from torch import Tensor, equal

    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        alike = one.shape == other.shape and one.dtype == other.dtype and one.device == other.device
        return alike and equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)
