"""Whether sparse attention pays where it is computed, with what it takes to find its pattern."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from accel.attention.account import Account
    from accel.attention.choice import Choice
    from accel.attention.serving import Moment

LONG = 1024
"""Tokens from which a lowering that was forced is judged too: shorter ones are forced for bits."""


@dataclass(frozen=True)
class Judged:
    """What was measured of attentions that take equally long.

    Attributes:
        tokens: How many, text included.
        density: Share of all pairs of tokens that is kept.
        searched: Whether the pattern has to be found.
        ours: Seconds, with the share of the search that falls on one attention.
        dense: Seconds of dense attention.
    """

    tokens: int
    density: float
    searched: bool
    ours: float
    dense: float

    @property
    def pays(self) -> bool:
        """Whether sparse attention is faster."""
        return self.ours < self.dense

    def __str__(self) -> str:
        search = " with the search" if self.searched else ""
        return (
            f"{self.tokens:,} tokens at density {self.density:.2f} take {1000 * self.ours:.1f} ms"
            f"{search}, dense {1000 * self.dense:.1f} ms"
        )


class Paying:
    """Times each layout, shape and dtype once, and advises where dense attention is faster.

    A lowering that was forced is judged from `LONG` tokens on, all others at any length. What is
    found while the model runs differs by what is looked at; the first attention stands for all of
    its layout.

    Args:
        choice: Says whether attention stays dense where that is faster.
        account: Where the advice goes.
    """

    def __init__(self, choice: Choice, account: Account) -> None:
        self._choice = choice
        self._account = account
        self._judged: dict[Any, Judged] = {}

    def judged(self, moment: Moment) -> Judged | None:
        """What was measured of such attentions, if it was."""
        return self._judged.get(_kind(moment))

    def dense(self, moment: Moment) -> str | None:
        """Why an attention stays dense, to follow a number; ``None`` until it was measured."""
        found = self.judged(moment)
        if found is None or found.pays or not self._choice.yields:
            return None
        return f"where dense attention is faster ({found})"

    def __call__(
        self,
        moment: Moment,
        density: float,
        attend: Callable[[], Any],
        search: Callable[[], Any] | None = None,
        share: float = 1.0,
    ) -> str | None:
        """Measure once, and advise in every run.

        Args:
            moment: The attention.
            density: Share of all pairs of tokens that is kept.
            attend: Attends by the pattern.
            search: Finds the pattern, if it has to be found.
            share: Of the steps at which there is a search.

        Returns:
            As `dense`.
        """
        if self._choice.forced and moment.layout.tokens < LONG:
            return None
        kind, device = _kind(moment), moment.asked.query.device
        if kind not in self._judged:
            seconds = self._choice.seconds
            ours, dense = (seconds(run, device) for run in (attend, moment.asked.dense))
            if search is not None:
                ours += share * seconds(search, device)
            tokens = moment.layout.tokens
            self._judged[kind] = Judged(tokens, density, search is not None, ours, dense)
        if not self._judged[kind].pays and not self._choice.yields:
            self._account.advise(
                f"does not pay here: {self._judged[kind]}; from where on it does, says accel "
                "explain --sparse"
            )
        return self.dense(moment)


def _kind(moment: Moment) -> tuple[Any, ...]:
    """What attentions that take equally long have in common."""
    query = moment.asked.query
    return moment.layout, query.shape, query.dtype, query.device
