"""Whether a pattern that is found while the model runs pays, with what it takes to find it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from accel.attention import timing
from accel.attention.static import LONG

if TYPE_CHECKING:
    import torch

    from accel.attention.account import Account
    from accel.attention.serving import Moment
    from accel.seams.layout import Layout


class Paying:
    """Times each layout once, from `LONG` tokens on, and advises where dense attention is faster.

    What is found differs by what is looked at; the first attention stands for all of its layout.

    Args:
        account: Where the advice goes.
    """

    def __init__(self, account: Account) -> None:
        self._account = account
        self._advice: dict[tuple[Layout, torch.device], str | None] = {}

    def __call__(
        self,
        moment: Moment,
        density: float,
        *,
        search: Callable[[], Any],
        share: float,
        attend: Callable[[], Any],
    ) -> None:
        """Measure once, and advise in every run.

        Args:
            moment: The attention.
            density: Share of all pairs of tokens that is kept.
            search: Finds the pattern.
            share: Of the steps at which there is a search.
            attend: Attends by what was found.
        """
        if moment.layout.tokens < LONG:
            return
        device = moment.asked.query.device
        key = (moment.layout, device)
        if key not in self._advice:
            searching, attending, dense = (
                timing.seconds(run, device) for run in (search, attend, moment.asked.dense)
            )
            ours = share * searching + attending
            self._advice[key] = (
                None
                if ours < dense
                else (
                    f"does not pay here: {moment.layout.tokens:,} tokens at density {density:.2f} "
                    f"take {1000 * ours:.1f} ms with the search, dense {1000 * dense:.1f} ms"
                )
            )
        if advice := self._advice[key]:
            self._account.advise(advice)
