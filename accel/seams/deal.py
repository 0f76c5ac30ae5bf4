"""Questions of a loop's owner that do not wait for each other, and who asks them.

An owner (`accel.seams.loop`) that asks about several things at one step, such as the windows of a
picture, hands its questions over together. They are asked here, one after the other, unless a
method that splits work over processes deals them out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from torch import Tensor

Undo = Callable[[], None]
Question = Callable[[], Tensor]


class Dealer(Protocol):
    """Sees to it that questions are answered."""

    def __call__(self, questions: Sequence[Question], like: Tensor, /) -> Iterator[Tensor]:
        """The answers, in the order of the questions; as for `Deal.answers`."""
        ...


def here(questions: Sequence[Question], _like: Tensor, /) -> Iterator[Tensor]:
    """Ask one after the other."""
    for question in questions:
        yield question()


class Deal:
    """The questions of one plan: ``site.shared(Deal)`` is that of all its methods."""

    def __init__(self) -> None:
        self._dealer: Dealer = here

    def to(self, dealer: Dealer) -> Undo:
        """Have a dealer see to all questions from now on."""
        self._dealer = dealer

        def undo() -> None:
            self._dealer = here

        return undo

    def answers(self, questions: Sequence[Question], like: Tensor) -> Iterator[Tensor]:
        """The answers, in the order of the questions; all have to be taken.

        Args:
            questions: Of one step; no answer may depend on whether, or when, another was asked.
            like: Of the shape, type and device of every answer; it is not read.
        """
        for answer in self._dealer(questions, like):
            yield answer.to(like.dtype)
