"""Attention by a pattern that is known beforehand: tables are compiled once for each layout."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING

from accel.attention.blocks import compiled
from accel.attention.lowerings import lowered
from accel.attention.patterns.pattern import Pattern
from accel.attention.paying import Paying
from accel.errors import BadInput
from accel.seams.layout import Layout

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from accel.attention.account import Account
    from accel.attention.choice import Choice
    from accel.attention.lowerings.lowering import Lowering
    from accel.attention.serving import Moment

KEPT = 32
"""Layouts whose tables are kept: levels of a UNet, lengths of texts."""


class Prepared:
    """A pattern on one layout and device.

    Args:
        pattern: Which query attends to which key.
        layout: The tokens.
        device: Where they are.

    Raises:
        BadInput: If the pattern does not fit the layout.
    """

    def __init__(self, pattern: Pattern, layout: Layout, device: torch.device) -> None:
        try:
            self.table = compiled(pattern, layout, device)
        except BadInput as error:
            raise BadInput(f"On {said(layout)}: {error}") from error
        self._lowerings: dict[str, Lowering] = {}

    @cached_property
    def density(self) -> float:
        """Share of all pairs of tokens that is kept."""
        return self.table.density

    def lowering(self, name: str) -> Lowering:
        """A lowering of the table, made when it is first asked for."""
        if name not in self._lowerings:
            self._lowerings[name] = lowered(name, self.table)
        return self._lowerings[name]


class Static:
    """Answers by a pattern. Its tables stay as long as the plan is attached.

    Args:
        pattern: From a layout to the pattern on it.
        choice: By what it is computed.
        account: Where it is counted.

    Attributes:
        pays: Whether it is worth it.
    """

    def __init__(
        self, pattern: Callable[[Layout], Pattern], choice: Choice, account: Account
    ) -> None:
        self._pattern = pattern
        self._choice = choice
        self._account = account
        self.pays = Paying(choice, account)
        self._prepared: dict[tuple[Layout, torch.device], Prepared] = {}

    def reset(self) -> None:
        """Nothing is learned of a run."""

    def __call__(self, moment: Moment) -> Tensor | str:
        """The answer, or why it stays dense."""
        asked, layout = moment.asked, moment.layout
        if reason := self.pays.dense(moment):
            return reason
        prepared = self._ready(layout, asked.query.device)
        if prepared.density == 1.0:
            return f"where the pattern keeps all ({said(layout)})"
        key = (layout, asked.query.shape)
        name = self._choice.of(key, prepared.table, prepared.lowering, asked, moment.text_mask)
        lowering = prepared.lowering(name)
        self._account.failed(self._choice.failed)

        def sparse() -> Tensor:
            return lowering(asked.query, asked.key, asked.value, asked.scale, moment.text_mask)

        if reason := self.pays(moment, prepared.density, sparse):
            return reason
        self._account.served(prepared.density, name)
        return sparse()

    def _ready(self, layout: Layout, device: torch.device) -> Prepared:
        key = (layout, device)
        if key not in self._prepared:
            if len(self._prepared) == KEPT:
                del self._prepared[next(iter(self._prepared))]
            self._prepared[key] = Prepared(self._pattern(layout), layout, device)
        return self._prepared[key]


def said(layout: Layout) -> str:
    """A layout in words: ``text 77 + 3 × 30 × 52 tokens``."""
    grid = " × ".join(str(side) for side in layout.grid if side > 1 or layout.image == 1)
    return f"{layout.text} of text + {grid} tokens" if layout.text else f"{grid} tokens"
