"""From which resolution and length on sparse attention pays, measured where it would run.

Queries, keys and values are those of a network at the first step of a call. From their layout on,
one axis after the other is doubled (frames of clips, columns, rows), tokens with it, until the next
would take too long: a search by content finds as much as in the network's own attention. Methods
are asked as in a run, so that it is the engine's own judgement that is told ahead.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import PrivateAttr

from accel.attach import Accelerator, Site, Undo
from accel.attention import timing
from accel.attention.account import Account
from accel.attention.choice import AUTO, Choice
from accel.attention.paying import Judged
from accel.attention.serving import Moment, Passing
from accel.attention.sparse import Sparse
from accel.attention.static import said
from accel.errors import AccelError
from accel.report import Tally
from accel.seams.attention import Asked, answer_attention
from accel.seams.denoisers import Call, Inner, Result
from accel.seams.layout import Layout
from accel.seams.modules import Module, find_modules
from accel.seams.tokens import Span, layout_of, refuse_unknown, span_of

if TYPE_CHECKING:
    from torch import Tensor

BUDGET = 10.0
"""Seconds to measure for; the first layout is measured whatever it takes."""


@dataclass(frozen=True)
class Seen:
    """The attention that a network spends most on.

    Attributes:
        moment: It, at the first step; its text is taken to be valid.
        span: What a token stands for, if the pipeline says it.
    """

    moment: Moment
    span: Span | None = None

    def enlarged(self, layout: Layout) -> Moment:
        """The same with image tokens repeated along the axes on which a layout is larger."""
        own, asked = self.moment.layout, self.moment.asked
        factors = [new // old for new, old in zip(layout.grid, own.grid, strict=True)]
        q, k, v = (_repeated(x, own, factors) for x in (asked.query, asked.key, asked.value))
        return replace(self.moment, asked=Asked(q, k, v, scale=asked.scale), layout=layout)

    def size(self, layout: Layout) -> str:
        """What the tokens of a layout show, in pixels and frames where that is known."""
        return said(layout) if self.span is None else f"{self.span.size(layout)}, {said(layout)}"


def _repeated(x: Tensor, layout: Layout, factors: Sequence[int]) -> Tensor:
    """Tokens ``[B, H, S, D]`` of a larger layout."""
    text, image = (x[:, :, span] for span in (layout.text_span, layout.image_span))
    image = image.reshape(*x.shape[:2], *layout.grid, x.shape[3])
    for axis, factor in enumerate(factors):
        image = image.repeat_interleave(factor, dim=2 + axis)
    parts = [text, image.flatten(2, 4)]
    return torch.cat(parts if layout.text_first else parts[::-1], dim=2)


class Enough(Exception):
    """The first call of a network is through: there is nothing more to see."""


class Looking(Accelerator):
    """Sees the longest attention of the image in one call of a network, and ends the run."""

    name: ClassVar[str] = "attention.Looking"
    layer: ClassVar[str] = "attention"
    seam: ClassVar[str] = "attention"
    supports: ClassVar[str] = "networks whose order of tokens is known"
    source: ClassVar[str] = "here"

    _found: Seen | None = PrivateAttr(default=None)

    @classmethod
    def off(cls) -> None:
        """Leave it out."""

    def why_off(self) -> None:
        """It always looks."""

    @property
    def found(self) -> Seen | None:
        """The attention of most tokens, if there is any; the others are not kept."""
        return self._found

    def attach(self, site: Site) -> Iterator[Undo]:
        """Look at every denoiser.

        Raises:
            UnsupportedModel: For a network whose order of tokens is not known.
        """
        calls: list[Call] = []

        def around(call: Call, inner: Inner) -> Result:
            calls.append(call)
            inner(call)
            raise Enough

        def look(module: Module, asked: Asked) -> Tensor:
            if calls and asked.query.shape == asked.key.shape:
                call = calls[-1]
                self._see(call, module, asked, site.pipe)
            return asked.dense()

        for denoiser in site.denoisers:
            refuse_unknown(denoiser, "Sparse attention")
            yield site.around(denoiser, around)
            for module in find_modules(denoiser):
                if module.kind == "self":
                    yield answer_attention(module, partial(look, module))

    def _see(self, call: Call, module: Module, asked: Asked, pipe: Any) -> None:
        """Keep an attention if it is the longest so far."""
        layout = layout_of(call, asked.query.shape[2])
        if self._found is None or layout.tokens > self._found.moment.layout.tokens:
            rows = Passing(call).rows(module)
            moment = Moment(asked, layout, None, module, rows, call.step)
            self._found = Seen(moment, span_of(pipe, call, layout))


@dataclass(frozen=True)
class Timed:
    """One method on one layout.

    Attributes:
        tokens: How many, text included.
        layout: In words: pixels and frames, where the pipeline says what a token stands for, and
            the grid of tokens.
        density: Share of pairs that is kept.
        dense: Seconds of dense attention.
        sparse: Seconds of the method, with the share of a search that falls on one attention.
    """

    tokens: int
    layout: str
    density: float
    dense: float
    sparse: float

    @property
    def pays(self) -> bool:
        """Whether it is faster."""
        return self.sparse < self.dense


@dataclass(frozen=True)
class Payoff:
    """From where on one method pays.

    Attributes:
        method: Its name; its fields are the defaults.
        timed: Where it keeps less than all, by tokens.
        reason: Why it was not measured on other layouts.
    """

    method: str
    timed: tuple[Timed, ...]
    reason: str = ""

    @property
    def since(self) -> Timed | None:
        """The layout from which on it always paid."""
        start = None
        for one in reversed(self.timed):
            if not one.pays:
                break
            start = one
        return start

    def __str__(self) -> str:
        if not self.timed:
            return f"is dense up to here: {self.reason}"
        if self.since is None:
            return f"does not pay up to {self.timed[-1].tokens:,} tokens ({self.timed[-1].layout})"
        return f"pays from {self.since.tokens:,} tokens on ({self.since.layout})"


def ladder(layout: Layout) -> Iterator[Layout]:
    """A layout, and ever larger ones: twice as many image tokens each, and the same text."""
    axes = ("frames", "width", "height") if layout.frames > 1 else ("width", "height")
    yield layout
    for axis in cycle(axes):
        layout = replace(layout, **{axis: 2 * getattr(layout, axis)})
        yield layout


@torch.no_grad()
def paying(
    seen: Seen,
    methods: Sequence[Sparse],
    budget: float,
    seconds: timing.Clock | None = None,
    now: Callable[[], float] = time.monotonic,
) -> tuple[Payoff, ...]:
    """Measure the methods on larger and larger layouts.

    Args:
        seen: The network's attention.
        methods: What is measured.
        budget: Seconds for all of it. A layout is left out if it would take more than is left, by
            the time that the one before took and the square of the tokens, and one that the
            device has no memory for.
        seconds: What measures.
        now: What tells how much of the budget is left.
    """
    clock = seconds or timing.seconds
    found: dict[str, list[Timed]] = {method.name: [] for method in methods}
    reasons: dict[str, str] = {}
    own = seen.moment.layout
    begin, took, before = now(), 0.0, own
    for layout in ladder(own):
        start = now()
        growth = (layout.tokens / before.tokens) ** 2
        if layout != before and start - begin + took * growth > budget:
            break
        try:
            moment = seen.enlarged(layout)
            dense = clock(moment.asked.dense, moment.asked.query.device)
            judged = {
                method.name: _judged(method, moment, _knowing(clock, moment.asked, dense))
                for method in methods
            }
        except torch.OutOfMemoryError:
            break  # the ladder ends where the device does
        for name, one in judged.items():
            if isinstance(one, str):
                reasons[name] = one
            else:
                timed = (one.tokens, seen.size(layout), one.density, one.dense, one.ours)
                found[name].append(Timed(*timed))
        took, before = now() - start, layout
    return tuple(Payoff(name, tuple(timed), reasons.get(name, "")) for name, timed in found.items())


def _knowing(clock: timing.Clock, asked: Asked, dense: float) -> timing.Clock:
    """A clock that has timed dense attention already."""
    return lambda run, device: dense if run == asked.dense else clock(run, device)


def _judged(method: Sparse, moment: Moment, clock: timing.Clock) -> Judged | str:
    """What a method's engine measures, or why it does not."""
    account = Account(Tally(method.name))
    try:
        answers = method.answers(Choice(AUTO, clock), account)
        answer = answers(moment)
    except AccelError as error:
        return str(error)
    found = answers.pays.judged(moment)
    if found is not None:
        return found
    return answer if isinstance(answer, str) else "it was not measured"
