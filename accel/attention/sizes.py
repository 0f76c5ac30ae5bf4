"""From how many tokens on a sparse attention pays, measured where it would run.

Queries, keys and values are random, of the shape that the network's own have: how long attention
takes does not depend on what is in them. From the layout of a call on, one axis after the other is
doubled (frames of clips, columns, rows), until the next would take too long.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import PrivateAttr

from accel.attach import Accelerator, Site, Undo
from accel.attention import timing
from accel.attention.choice import Choice
from accel.attention.sparse import Patterned
from accel.attention.static import Prepared, said
from accel.errors import BadInput
from accel.seams.attention import Asked, answer_attention
from accel.seams.denoisers import Call, Inner, Result
from accel.seams.layout import Layout
from accel.seams.modules import find_modules
from accel.seams.tokens import layout_of, refuse_unknown

if TYPE_CHECKING:
    from torch import Tensor

BUDGET = 10.0
"""Seconds to measure for; the first layout is measured whatever it takes."""


@dataclass(frozen=True)
class Shape:
    """The attention that a network spends most on.

    Attributes:
        layout: Its tokens.
        rows: B of its queries ``[B, H, S, D]``.
        heads: H.
        width: D.
        dtype: Of its queries.
        device: Of its queries.
    """

    layout: Layout
    rows: int
    heads: int
    width: int
    dtype: torch.dtype
    device: torch.device

    def drawn(self) -> Asked:
        """Random queries, keys and values; the global generator is left as it was."""
        source = torch.Generator().manual_seed(0)
        shape = (3, self.rows, self.heads, self.layout.tokens, self.width)
        return Asked(*torch.randn(shape, generator=source).to(self.device, self.dtype))


class Enough(Exception):
    """The first call of a network is through: there is nothing more to see."""


class Looking(Accelerator):
    """Sees the longest attention of the image in one call of a network, and ends the run."""

    name: ClassVar[str] = "attention.Looking"
    layer: ClassVar[str] = "attention"
    seam: ClassVar[str] = "attention"
    supports: ClassVar[str] = "networks whose order of tokens is known"
    source: ClassVar[str] = "here"

    _found: list[Shape] = PrivateAttr(default_factory=list)

    @classmethod
    def off(cls) -> None:
        """Leave it out."""

    def why_off(self) -> None:
        """It always looks."""

    @property
    def found(self) -> Shape | None:
        """The attention of most tokens, if there is any."""
        return max(self._found, key=lambda shape: shape.layout.tokens, default=None)

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

        def look(asked: Asked) -> Tensor:
            if calls and asked.query.shape == asked.key.shape:
                query = asked.query
                layout = layout_of(calls[-1], query.shape[2])
                rows, heads, _, width = query.shape
                self._found.append(Shape(layout, rows, heads, width, query.dtype, query.device))
            return asked.dense()

        for denoiser in site.denoisers:
            refuse_unknown(denoiser, "Sparse attention")
            yield site.around(denoiser, around)
            for module in find_modules(denoiser):
                if module.kind == "self":
                    yield answer_attention(module, look)


@dataclass(frozen=True)
class Timed:
    """One method on one layout.

    Attributes:
        tokens: How many, text included.
        layout: In words.
        density: Share of pairs that is kept.
        lowering: By what it was computed.
        dense: Seconds of dense attention.
        sparse: Seconds of the method.
    """

    tokens: int
    layout: str
    density: float
    lowering: str
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
            return f"does not pay up to {self.timed[-1].tokens:,} tokens"
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
    shape: Shape,
    methods: Sequence[Patterned],
    budget: float,
    seconds: timing.Clock | None = None,
    now: Callable[[], float] = time.monotonic,
) -> tuple[Payoff, ...]:
    """Measure the methods on larger and larger layouts.

    Args:
        shape: Of the network's attention.
        methods: What is measured.
        budget: Seconds for all of it. A layout is left out if it would take more than is left, by
            the time that the one before took and the square of the tokens.
        seconds: What measures.
        now: What tells how much of the budget is left.
    """
    clock = seconds or timing.seconds
    found: dict[str, list[Timed]] = {method.name: [] for method in methods}
    reasons: dict[str, str] = {}
    begin, took, before = now(), 0.0, shape.layout
    for layout in ladder(shape.layout):
        start = now()
        growth = (layout.tokens / before.tokens) ** 2
        if layout != before and start - begin + took * growth > budget:
            break
        asked = replace(shape, layout=layout).drawn()
        dense = clock(asked.dense, shape.device)
        for method in methods:
            timed = _timed(method, layout, asked, dense, clock)
            if isinstance(timed, str):
                reasons[method.name] = timed
            else:
                found[method.name].append(timed)
        took, before = now() - start, layout
    return tuple(Payoff(name, tuple(timed), reasons.get(name, "")) for name, timed in found.items())


def _timed(
    method: Patterned, layout: Layout, asked: Asked, dense: float, clock: timing.Clock
) -> Timed | str:
    """One measurement, or why there is none."""
    device = asked.query.device
    try:
        prepared = Prepared(method.pattern(layout), layout, device)
    except BadInput as error:
        return str(error)
    if prepared.density == 1.0:
        return f"it keeps all of {said(layout)}"
    choice = Choice(method.lowering, clock)
    name = choice.of(layout, prepared.table, prepared.lowering, asked, None)
    lowering = prepared.lowering(name)
    sparse = clock(partial(lowering, asked.query, asked.key, asked.value, asked.scale), device)
    return Timed(layout.tokens, said(layout), prepared.density, name, dense, sparse)
