"""Windows of a large picture dealt out: each process asks the network about a share of them.

Source: the patches of Pixelsmith (arXiv 2406.07251, section 3) wait for nobody within a step;
ASGDiffusion (arXiv 2412.06163, section 4) deals such patches out over devices.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, ClassVar

from accel.attach import Site, Undo
from parallel.degree import ALONE, OneAxis

if TYPE_CHECKING:
    from torch import Tensor

    from accel.report import Tally
    from accel.seams.deal import Question
    from parallel.mesh import Axis


class Windows(OneAxis):
    """Deal the windows of a large picture out: N processes make it up to N times as fast, exactly.

    Stands beside a method that asks about windows which do not wait for each other, as
    `resolution.Pixelsmith` does at every step. Of W windows each process asks about every N-th,
    ⌈W / N⌉ at most, and all get all answers in one exchange a step: (N - 1) · ⌈W / N⌉ windows of
    latents are sent by each. The picture is that of one process, to the bit where each computes as
    one would. What has one window alone, as the base picture, is asked about once, and gains
    nothing; `parallel.CFG` splits that.
    """

    name: ClassVar[str] = "parallel.Windows"
    seam: ClassVar[str] = "windows over processes"
    supports: ClassVar[str] = "what `resolution.Pixelsmith` serves, beside it"
    source: ClassVar[str] = "arXiv 2406.07251, section 3; 2412.06163, section 4"
    approximates: ClassVar[bool] = False

    def attach(self, site: Site) -> Iterator[Undo]:
        """Take the questions of whoever owns the loop.

        Raises:
            BadInput: At the first call of the pipeline, if there are not as many processes.
        """
        from accel.seams.deal import Deal
        from parallel.mesh import Mesh, world

        axis = site.shared(Mesh).claim("dp", self.degree, self.name)
        yield axis.release
        yield site.on_start(axis.reset)
        site.tally.reason = lambda: (
            ALONE
            if world() == 1
            else "no method of the plan asks about windows: put resolution.Pixelsmith beside it"
        )
        shares = Shares(axis, site.tally)
        yield site.on_start(shares.reset)
        yield site.shared(Deal).to(shares)


class Shares:
    """Deals questions out over the processes of an axis; see `accel.seams.deal.Dealer`."""

    def __init__(self, axis: Axis, tally: Tally) -> None:
        self._axis = axis
        self._tally = tally
        self.reset()

    def reset(self) -> None:
        """Forget the run before."""
        self._mine = self._all = 0
        self._tally.change = None

    def __call__(self, questions: Sequence[Question], like: Tensor, /) -> Iterator[Tensor]:
        """Ask every N-th question here, and take the other answers from where they are asked."""
        from accel.seams.deal import here

        if self._axis.size == 1:
            yield from here(questions, like)
            return
        parts = self._exchanged(questions, like)
        for place in range(len(questions)):
            yield parts[place % len(parts)][place // len(parts)]

    def _exchanged(self, questions: Sequence[Question], like: Tensor) -> list[Tensor]:
        """What each process was answered, ``[its questions, …]``."""
        exchange = self._axis.exchange(like.device.type)
        counts = [len(questions[rank :: exchange.size]) for rank in range(exchange.size)]
        answers = like.new_empty((counts[exchange.rank], *like.shape))
        for place, question in enumerate(questions[exchange.rank :: exchange.size]):
            answers[place] = question()
        parts = exchange.begin(answers, counts).parts()
        self._mine += len(answers)
        self._all += len(questions)
        self._tally.change = (
            f"{exchange.size} processes shared {self._all:,} windows; this one asked about "
            f"{self._mine:,} and sent {exchange.bytes:,} bytes"
        )
        return parts
