"""Whether sparse attention pays where it is computed, with what it takes to find its pattern."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from accel.attention import timing

if TYPE_CHECKING:
    from accel.attention.account import Account
    from accel.attention.serving import Moment

LONG = 1024
"""Tokens from which it is measured whether a pattern pays."""


class Paying:
    """Times each layout, shape and dtype once, and advises where dense attention is faster.

    From `LONG` tokens on. What is found while the model runs differs by what is looked at; the
    first attention stands for all of its layout.

    Args:
        account: Where the advice goes.
    """

    def __init__(self, account: Account) -> None:
        self._account = account
        self._advice: dict[Any, str | None] = {}

    def __call__(
        self,
        moment: Moment,
        density: float,
        attend: Callable[[], Any],
        search: Callable[[], Any] | None = None,
        share: float = 1.0,
    ) -> None:
        """Measure once, and advise in every run.

        Args:
            moment: The attention.
            density: Share of all pairs of tokens that is kept.
            attend: Attends by the pattern.
            search: Finds the pattern, if it has to be found.
            share: Of the steps at which there is a search.
        """
        if moment.layout.tokens < LONG:
            return
        query = moment.asked.query
        key = (moment.layout, query.shape, query.dtype, query.device)
        if key not in self._advice:
            self._advice[key] = self._judged(moment, density, attend, search, share)
        if advice := self._advice[key]:
            self._account.advise(advice)

    def _judged(
        self,
        moment: Moment,
        density: float,
        attend: Callable[[], Any],
        search: Callable[[], Any] | None,
        share: float,
    ) -> str | None:
        """What to say if dense attention is faster here."""
        device = moment.asked.query.device
        ours, dense = (timing.seconds(run, device) for run in (attend, moment.asked.dense))
        if search is not None:
            ours += share * timing.seconds(search, device)
        if ours < dense:
            return None
        searched = "" if search is None else " with the search"
        return (
            f"does not pay here: {moment.layout.tokens:,} tokens at density {density:.2f} take "
            f"{1000 * ours:.1f} ms{searched}, dense {1000 * dense:.1f} ms"
        )
