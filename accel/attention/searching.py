"""Sparse attention that is searched for while the model runs: indicator × selection × schedule.

An *indicator* (`masses`, `clusters`) tells how much groups of queries attend to cells of keys, a
*selection* (`selection`) which of them are kept, a *schedule* at which steps there is a search.
What is found is used at once, and until the next search. Any goes with any.

What is found, and what a search leaves to the next one, is of one module and one row (branch and
sample), whatever its company: where it stands in a call, and who else is in it, changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from accel.attention.lowerings import lowered
from accel.attention.masses import Estimate, Heads, Indicator, Memory
from accel.attention.paying import Paying
from accel.attention.selection import Selection
from accel.attention.tables import Found, by_padding, joined
from accel.errors import UnsupportedModel
from accel.seams.attention import Asked
from accel.seams.denoisers import Row
from accel.seams.layout import Layout
from accel.seams.memory import bytes_of

if TYPE_CHECKING:
    from accel.attention.account import Account
    from accel.attention.blocks import BlockSparse, ByHead
    from accel.attention.choice import Choice
    from accel.attention.lowerings.lowering import Lowering
    from accel.attention.serving import Moment
    from accel.trajectory import Step


@dataclass(frozen=True)
class Schedule:
    """At which steps there is a search.

    Attributes:
        shares: Of the run, rising; a step that is left out searches at the next one that is not.
            Empty: each step searches.
    """

    shares: tuple[float, ...] = ()

    def due(self, step: Step) -> int | None:
        """The number of the search that a step's tables come from; ``None``: one of its own.

        Raises:
            UnsupportedModel: If the pipeline cuts its schedule unseen.
        """
        if not self.shares:
            return None
        if step.total is None:
            raise UnsupportedModel(
                "This pipeline cuts its schedule where no public call shows it, so shares of its "
                "steps are not known: search at every step."
            )
        return sum(round(share * step.total) <= step.index for share in self.shares)

    def frequency(self, step: Step) -> float:
        """About at which share of the steps there is a search."""
        if not self.shares or step.total is None:
            return 1.0
        return min(1.0, len(self.shares) / step.total)


class Place(NamedTuple):
    """Whose attention a table is of."""

    denoiser: str
    module: int
    layout: Layout
    row: Row


@dataclass(frozen=True, eq=False)
class Known:
    """What was found for the heads of one row.

    Attributes:
        search: The number of the search, where there is a schedule.
        found: Who attends to whom.
        memory: What the next search is given.
    """

    search: int | None
    found: Found
    memory: Memory

    @property
    def bytes(self) -> int:
        """Memory of it."""
        return self.found.bytes + bytes_of(self.memory)


class Searching:
    """Answers by tables that it searches for.

    Tables are kept until the next search. Lowerings of them are made at each attention: what they
    list, key by key for each group, would fill the memory of a device.

    Args:
        indicator: Tells how much attention there is.
        selection: Says what of it is kept.
        schedule: Says when to look.
        choice: By what it is computed.
        account: Where it is counted.

    Attributes:
        pays: Whether it is worth it.
    """

    def __init__(
        self,
        indicator: Indicator,
        selection: Selection,
        schedule: Schedule,
        choice: Choice,
        account: Account,
    ) -> None:
        self._indicator = indicator
        self._selection = selection
        self._schedule = schedule
        self._choice = choice
        self._account = account
        self.pays = Paying(choice, account)
        self._known: dict[Place, Known] = {}
        account.keeps(lambda: sum(known.bytes for known in self._known.values()))
        self.reset()

    def reset(self) -> None:
        """Forget the run before."""
        self._known.clear()
        self._searched = self._reused = 0

    def __call__(self, moment: Moment) -> Tensor | str:
        """The answer, or why it stays dense."""
        if reason := self.pays.dense(moment):
            return reason
        rows = self._looked_up(moment)
        found = joined([known.found for known in rows])
        density = found.density(moment.layout)
        if density == 1.0:
            return "where everything was kept"
        reason = self.pays(
            moment,
            density,
            lambda: self._attend(moment, found),
            lambda: self._search(moment, range(len(rows)), [known.memory for known in rows], None),
            self._schedule.frequency(moment.step),
        )
        self._account.failed(self._choice.failed)
        if reason is not None:
            return reason
        answer, name = self._attend(moment, found)
        self._account.served(density, name)
        self._account.note("searches", f"{self._searched} searches, {self._reused} tables reused")
        return answer

    def _attend(self, moment: Moment, found: Found) -> tuple[Tensor, str]:
        """Attention by what was found, and the lowering's name."""
        asked, layout, used = moment.asked, moment.layout, set[str]()

        def serve(heads: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
            table = found.of(heads).table(layout)
            given = Asked(q, k, v, scale=asked.scale)
            key, make = (layout, asked.query.shape), partial(_lowered, table)
            name = self._choice.of(key, table, make, given, mask)
            used.add(name)
            return make(name)(q, k, v, asked.scale, mask)

        answer = by_padding(asked.query, asked.key, asked.value, moment.text_mask, serve)
        return answer, " and ".join(sorted(used))

    def _looked_up(self, moment: Moment) -> list[Known]:
        """What is known of each row, searched for where it is due."""
        due = self._schedule.due(moment.step)
        module = moment.module
        places = [
            Place(module.denoiser.name, module.index, moment.layout, row) for row in moment.rows
        ]
        before = [self._known.get(place) for place in places]
        stale = [row for row, known in enumerate(before) if known is None or not fresh(known, due)]
        firsts = [row for row in stale if before[row] is None]
        for rows in (firsts, [row for row in stale if row not in firsts]):
            if rows:
                memories = [known.memory for row in rows if (known := before[row]) is not None]
                found = self._search(moment, rows, memories, due)
                self._known.update(zip([places[row] for row in rows], found, strict=True))
        self._searched += len(stale)
        self._reused += len(places) - len(stale)
        return [self._known[place] for place in places]

    def _search(
        self, moment: Moment, rows: Sequence[int], memories: list[Memory], due: int | None
    ) -> list[Known]:
        """Look at some rows; there is a memory for each, or for none."""
        heads = heads_of(moment, rows)
        estimate = self._indicator(heads, _stacked(memories))
        count = moment.asked.query.shape[1]
        by_sample = estimate.mass.view(-1, count, *estimate.mass.shape[1:])
        kept = self._selection(by_sample).flatten(0, 1)
        if estimate.needed is not None:
            kept = kept | estimate.needed
        return _by_row(estimate, kept, due, len(rows))


def _lowered(table: BlockSparse | ByHead, name: str) -> Lowering:
    return lowered(name, table)


def fresh(known: Known, due: int | None) -> bool:
    """Whether what is known is from the search that is due."""
    return due is not None and known.search == due


def heads_of(moment: Moment, rows: Sequence[int]) -> Heads:
    """Queries and keys of some rows' heads, the entries of a row one after the other."""
    asked, layout, entries = moment.asked, moment.layout, moment.entries
    given = [number * entries + entry for number in rows for entry in range(entries)]
    query, key = (
        (x if len(given) == len(x) else x[given]).flatten(0, 1) for x in (asked.query, asked.key)
    )
    valid = None
    if moment.text_mask is not None:
        mask = moment.text_mask[given].to(query.device)
        valid = torch.repeat_interleave(mask, asked.query.shape[1], dim=0)
    scale = asked.scale if asked.scale is not None else query.shape[-1] ** -0.5
    image, text = layout.image_span, layout.text_span
    return Heads(query[:, image], key[:, image], key[:, text], valid, scale)


def _stacked(memories: list[Memory]) -> Memory:
    """What rows remember, one after the other; the same things each."""
    names = memories[0] if memories else ()
    return {name: torch.cat([memory[name] for memory in memories]) for name in names}


def _by_row(estimate: Estimate, kept: Tensor, due: int | None, rows: int) -> list[Known]:
    """What was found for each row: the heads of a row lie side by side."""
    found = Found(estimate.groups, estimate.cells, kept)
    heads = len(kept) // rows
    parts = [slice(row * heads, (row + 1) * heads) for row in range(rows)]
    return [
        Known(due, found.of(part), {name: x[part] for name, x in estimate.memory.items()})
        for part in parts
    ]
