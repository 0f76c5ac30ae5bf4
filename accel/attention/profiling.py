"""Heads that take one of several patterns: the one that comes nearest to dense attention.

For each module, step, row and head, some queries are computed densely and by every pattern. Which
queries they are is drawn by the module and the step alone, so that branches, samples of a batch and
runs are judged by the same ones, and nobody's random numbers are touched.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from accel.attention.patterns.pattern import Pattern, relation
from accel.attention.paying import Paying
from accel.attention.static import Prepared
from accel.attention.tables import by_padding
from accel.seams.attention import Asked
from accel.seams.layout import Layout

if TYPE_CHECKING:
    from accel.attention.account import Account
    from accel.attention.choice import Choice
    from accel.attention.serving import Moment

MODULES = 1 << 20
"""More than a network has modules: what keeps the seeds of steps apart."""


class Profiling:
    """Answers head by head by the pattern that loses least.

    Reads the device once an attention; where all heads have one pattern, not at all.

    Args:
        patterns: From a layout to the patterns, by name.
        samples: How many queries are looked at.
        choice: By what it is computed.
        account: Where it is counted.

    Attributes:
        pays: Whether it is worth it.
    """

    def __init__(
        self,
        patterns: Callable[[Layout], Mapping[str, Pattern]],
        samples: int,
        choice: Choice,
        account: Account,
    ) -> None:
        self._patterns = patterns
        self._samples = samples
        self._choice = choice
        self._account = account
        self.pays = Paying(choice, account)
        self._prepared: dict[tuple[Layout, torch.device], dict[Pattern, Prepared]] = {}
        self.reset()

    def reset(self) -> None:
        """Forget the run before."""
        self._heads: Counter[str] = Counter()

    def __call__(self, moment: Moment) -> Tensor | str:
        """The answer, or why it stays dense."""
        if reason := self.pays.dense(moment):
            return reason
        layout, device = moment.layout, moment.asked.query.device
        named = self._patterns(layout)
        names, patterns = list(named), list(named.values())
        prepared = self._prepared.setdefault((layout, device), {})
        for pattern in patterns:
            if pattern not in prepared:
                prepared[pattern] = Prepared(pattern, layout, device)
        if all(prepared[pattern].density == 1.0 for pattern in patterns):
            return "where every pattern keeps all"
        chosen = self._chosen(moment, patterns)
        density = sum(prepared[patterns[number]].density for number in chosen) / len(chosen)
        reason = self.pays(
            moment,
            density,
            lambda: self._attend(moment, patterns, chosen),
            lambda: self._chosen(moment, patterns),
        )
        self._account.failed(self._choice.failed)
        if reason is not None:
            return reason
        answer, name = self._attend(moment, patterns, chosen)
        self._count([names[number] for number in chosen])
        self._account.served(density, name)
        return answer

    def _chosen(self, moment: Moment, patterns: list[Pattern]) -> list[int]:
        """The number of each head's pattern, sample by sample."""
        if len(patterns) > 1:
            found: list[int] = chosen_of(moment, patterns, self._samples).flatten().tolist()
            return found
        return [0] * (len(moment.asked.query) * moment.asked.query.shape[1])

    def _attend(
        self, moment: Moment, patterns: list[Pattern], chosen: list[int]
    ) -> tuple[Tensor, str]:
        """Attention by what was chosen, and the lowerings' names."""
        asked, layout = moment.asked, moment.layout
        prepared = self._prepared[layout, asked.query.device]
        used: set[str] = set()

        def serve(heads: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
            out = torch.empty_like(q)
            mine = [chosen[head] for head in heads.tolist()]
            for number in sorted(set(mine)):
                some = [place for place, other in enumerate(mine) if other == number]
                given = Asked(q[:, some], k[:, some], v[:, some], scale=asked.scale)
                part = prepared[patterns[number]]
                key = (layout, asked.query.shape, patterns[number])
                name = self._choice.of(key, part.table, part.lowering, given, mask)
                lowering = part.lowering(name)
                out[:, some] = lowering(given.query, given.key, given.value, asked.scale, mask)
                used.add(name)
            return out

        answer = by_padding(asked.query, asked.key, asked.value, moment.text_mask, serve)
        return answer, " and ".join(sorted(used))

    def _count(self, chosen: list[str]) -> None:
        self._heads.update(chosen)
        total = self._heads.total()
        said = (f"{count / total:.0%} of heads {name}" for name, count in self._heads.items())
        self._account.note("heads", ", ".join(said))


def drawn(moment: Moment, samples: int) -> Tensor:
    """Numbers of image queries, the same for equal modules, steps and layouts, ``[R]``."""
    generator = torch.Generator().manual_seed(moment.step.index * MODULES + moment.module.index)
    return torch.randperm(moment.layout.image, generator=generator)[:samples].sort().values


def chosen_of(moment: Moment, patterns: list[Pattern], samples: int) -> Tensor:
    """The number of the pattern nearest to dense attention, the first of several: ``[B, H]``."""
    asked, layout, device = moment.asked, moment.layout, moment.asked.query.device
    queries = drawn(moment, samples)
    kept = [relation(pattern, layout, queries.int()) for pattern in patterns]
    rows = queries.to(device) + layout.image_span.start
    scale = asked.scale if asked.scale is not None else asked.query.shape[-1] ** -0.5
    scores = ((asked.query[:, :, rows] * scale) @ asked.key.mT).float()
    if moment.text_mask is not None:
        hidden = ~moment.text_mask.to(device)[:, None, None]
        scores[..., layout.text_span].masked_fill_(hidden, -math.inf)
    value = asked.value.float()
    dense = scores.softmax(-1) @ value
    errors = []
    for pairs in kept:
        masked = scores.clone()
        masked[..., layout.image_span].masked_fill_(~pairs.to(device), -math.inf)
        errors.append((masked.softmax(-1) @ value - dense).square().mean((2, 3)))
    return torch.stack(errors).argmin(0)
