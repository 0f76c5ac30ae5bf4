"""The attentions of the image, one after the other, asked of a method that computes them sparsely.

What is common to all of them: the first steps and layers stay dense, and so does what is no
attention of the image's tokens to themselves, and text. Where tokens lie is asked once a run, which
text is padded once for each mask of a call of the network: one, but for networks that make a mask
in each of their layers (Qwen-Image). State that a method keeps is of one module and one
`Row` (branch and sample): `Moment.rows` says which there are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Protocol

from accel.errors import UnsupportedModel
from accel.seams.attention import Asked, answer_attention, valid_text
from accel.seams.denoisers import Call, Inner, Result, Row
from accel.seams.layout import Layout
from accel.seams.modules import Module, find_modules
from accel.seams.tokens import ROW_BY_ROW, Layouts, refuse_unknown

if TYPE_CHECKING:
    from torch import Tensor

    from accel.attach import Site, Undo
    from accel.attention.account import Account
    from accel.attention.paying import Paying
    from accel.trajectory import Step


@dataclass(frozen=True, eq=False)
class Moment:
    """One attention of the image that is to be computed.

    Attributes:
        asked: Queries, keys and values, ``[B, H, S, D]``. B is the number of rows, or a multiple:
            the entries of one row (frames of a UNet) lie side by side.
        layout: Where the S tokens lie.
        text_mask: Which text is valid, ``[B, text]`` booleans on the CPU; ``None``: all.
        module: Whose attention it is.
        rows: Branch and sample of each row that is being computed.
        step: The evaluation that the run is at.
    """

    asked: Asked
    layout: Layout
    text_mask: Tensor | None
    module: Module
    rows: tuple[Row, ...]
    step: Step

    @property
    def entries(self) -> int:
        """Entries of one row along B."""
        return len(self.asked.query) // len(self.rows)


class Answers(Protocol):
    """What computes sparse attention.

    Attributes:
        pays: Whether it is worth it.
    """

    pays: Paying

    def reset(self) -> None:
        """Forget the run before: what was learned of rows. Tables of layouts may stay."""
        ...

    def __call__(self, moment: Moment) -> Tensor | str:
        """The answer, ``[B, H, S, D]``; or why this one stays dense, to follow a number."""
        ...


@dataclass
class Passing:
    """One call of a network on its way.

    Attributes:
        call: The call.
        masks: Masks that were looked at in it, with what they say.
        turns: By module that attends to one row after the other, its rows and how many it had.
    """

    call: Call
    masks: list[tuple[Tensor, Layout, Tensor | None]] = field(default_factory=list)
    turns: dict[int, tuple[tuple[Row, ...], int]] = field(default_factory=dict)

    def rows(self, module: Module) -> tuple[Row, ...]:
        """Whose the attention is that a module asks for now: of all rows, or of the next one."""
        rows = module.denoiser.rows
        if type(module.denoiser.core).__name__ not in ROW_BY_ROW:
            return rows
        known, turn = self.turns.get(module.index, ((), 0))
        turn = turn if known == rows and turn < len(rows) else 0
        self.turns[module.index] = rows, turn + 1
        return rows[turn : turn + 1]

    def valid_text(self, mask: Tensor, layout: Layout) -> Tensor | None:
        """As `seams.attention.valid_text`, which is asked once for each mask."""
        for known, where, found in self.masks:
            if _same(known, mask) and where == layout:
                return found
        found = valid_text(mask, layout)
        self.masks.append((mask, layout, found))  # held, so that no other takes its address
        return found


def _same(a: Tensor, b: Tensor) -> bool:
    place = (a.data_ptr(), a.shape, a.stride(), a.dtype)
    return place == (b.data_ptr(), b.shape, b.stride(), b.dtype)


class Serving:
    """Puts `Answers` into every attention of the image of a pipeline's networks.

    Args:
        answers: What computes.
        account: Where it is counted.
        warm_up: Share of the first steps that stay dense.
        dense_layers: How many of the first attentions of a network stay dense.
    """

    def __init__(
        self, answers: Answers, account: Account, warm_up: float, dense_layers: int
    ) -> None:
        self._answers = answers
        self._account = account
        self._warm_up = warm_up
        self._dense_layers = dense_layers
        self._layouts = Layouts()
        self._passing: Passing | None = None

    def attach(self, site: Site) -> Iterator[Undo]:
        """Put it into every denoiser.

        Raises:
            UnsupportedModel: For a network whose order of tokens is not known, without attention
                modules, or compiled.
        """
        yield site.on_start(self.reset)
        for denoiser in site.denoisers:
            refuse_unknown(denoiser, site.tally.method)
            yield site.around(denoiser, self._around)
            modules = [module for module in find_modules(denoiser) if module.kind == "self"]
            for place, module in enumerate(modules):
                yield answer_attention(module, partial(self._answer, place, module))

    def reset(self) -> None:
        """Forget the run before."""
        self._layouts = Layouts()
        self._passing = None
        self._account.reset()
        self._answers.reset()

    def _around(self, call: Call, inner: Inner) -> Result:
        self._passing = Passing(call)
        try:
            return inner(call)
        finally:
            self._passing = None

    def _answer(self, place: int, module: Module, asked: Asked) -> Tensor:
        passing = self._passing
        if passing is None or passing.call.denoiser is not module.denoiser:
            return asked.dense()
        rows = passing.rows(module)
        found: Tensor | str | None = self._dense(place, passing.call.step, asked, rows)
        if found is None:
            found = self._sparse(passing, module, asked, rows)
        if isinstance(found, str):
            self._account.left(found)
            return asked.dense()
        return found

    def _dense(self, place: int, step: Step, asked: Asked, rows: tuple[Row, ...]) -> str | None:
        """Why an attention is not looked at any further, or ``None``."""
        if step.index < self._warm_steps(step):
            return "in the first steps"
        if place < self._dense_layers:
            return "in the first layers"
        if asked.options - {"attn_mask", "scale"} or asked.query.ndim != 4:
            return "that are causal, drop weights, or share heads"
        if asked.query.shape != asked.key.shape:
            return "that look at other tokens"
        if len(asked.query) % len(rows):
            return "of parts of rows"
        return None

    def _warm_steps(self, step: Step) -> int:
        if not self._warm_up:
            return 0
        if step.total is None:
            raise UnsupportedModel(
                "This pipeline cuts its schedule where no public call shows it, so a share of its "
                "steps is not known: set warm_up=0."
            )
        return math.ceil(self._warm_up * step.total - 1e-9)

    def _sparse(
        self, passing: Passing, module: Module, asked: Asked, rows: tuple[Row, ...]
    ) -> Tensor | str:
        layout = self._layouts.of(passing.call, asked.query.shape[2])
        text = None
        if asked.attn_mask is not None:
            text = passing.valid_text(asked.attn_mask, layout)
            if text is None:
                return "with a mask that is not of padded text"
            text = None if bool(text.all()) else text.expand(len(asked.query), -1)
        return self._answers(Moment(asked, layout, text, module, rows, passing.call.step))
