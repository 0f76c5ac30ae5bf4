"""Which methods fit a model, and which go together: one matrix."""

from __future__ import annotations

from collections.abc import Iterable

from app.serve.jobs import Entry


class Fits(Entry):
    """The matrix of one model.

    Attributes:
        methods: Why a method does not fit, by name; ``None``: it fits.
        pairs: Why two methods do not go together, by both names in order, joined by a space.
    """

    methods: dict[str, str | None] = {}
    pairs: dict[str, str] = {}

    def reason(self, chosen: Iterable[str], candidate: str) -> str | None:
        """Why a method cannot be added to those that are chosen; ``None``: it can.

        Args:
            chosen: Names of methods; the candidate itself does not count.
            candidate: Name of a method.
        """
        alone = self.methods.get(candidate, f"{candidate} is no method that is installed.")
        if alone is not None:
            return alone
        pairs = (" ".join(sorted((name, candidate))) for name in chosen if name != candidate)
        return next((self.pairs[pair] for pair in pairs if pair in self.pairs), None)
