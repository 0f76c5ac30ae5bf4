"""What a run of the original leaves behind for its edits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from accel.seams.memory import bytes_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from accel.seams.denoisers import Row

Keep = Literal["native", "bfloat16", "cpu"]


def stored(value: Tensor, keep: Keep) -> Tensor:
    """A tensor as it is kept: a copy of its own, the last axis side by side."""
    import torch

    form = torch.contiguous_format
    if keep == "bfloat16":
        return value.to(torch.bfloat16, copy=True, memory_format=form)
    if keep == "cpu":
        return value.to("cpu", copy=True, memory_format=form)
    return value.clone(memory_format=form)


@dataclass(frozen=True, eq=False)
class Kept:
    """What the parts of a network had in one call.

    Attributes:
        rows: What the rows of the tensors are.
        values: By part, tensors ``[rows, …]``.
    """

    rows: tuple[Row, ...]
    values: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)

    def places(self, rows: Sequence[Row]) -> list[int]:
        """Where some rows are in the tensors."""
        return [self.rows.index(row) for row in rows]


class Place(NamedTuple):
    """A row of an evaluation of a network."""

    network: str
    evaluation: int
    row: Row


class Answer(NamedTuple):
    """What a row was answered, ``[…]``, and whether it was computed in full."""

    value: Tensor
    fresh: bool


@dataclass(frozen=True)
class Input:
    """What a network was given for a row in its first call of a run.

    Attributes:
        sample: The latents ``[…]``.
        text: The conditioning, or ``None``.
    """

    sample: Tensor
    text: Tensor | None


@dataclass(eq=False)
class Recording:
    """One run of the original.

    Attributes:
        size: Height and width of the picture in pixels.
        bytes: What it takes in memory; edits that go on from it take no more.
        timesteps: By evaluation, its noise level as the scheduler has it.
        inputs: By network and row, the first input.
        seconds: The samples of the second call: by them is seen where an edit leaves the original.
        answers: What every row of every evaluation was answered.
        kept: By row of an evaluation, what the parts of the network had.
    """

    size: tuple[int, int] = (0, 0)
    bytes: int = 0
    timesteps: dict[int, float] = field(default_factory=dict)
    inputs: dict[tuple[str, Row], Input] = field(default_factory=dict)
    seconds: dict[tuple[str, Row], Tensor] = field(default_factory=dict)
    answers: dict[Place, Answer] = field(default_factory=dict)
    kept: dict[Place, Kept] = field(default_factory=dict)

    def add(self, network: str, evaluation: int, kept: Kept) -> None:
        """Keep what the parts of a network had in one call."""
        for row in kept.rows:
            self.kept[Place(network, evaluation, row)] = kept
        self.bytes += bytes_of(kept.values)

    def answered(self, answers: dict[Place, Answer]) -> None:
        """Keep what rows were answered."""
        self.answers |= answers
        self.bytes += bytes_of([answer.value for answer in answers.values()])

    def given(self, network: str, row: Row, first: Input) -> None:
        """Keep a row's first input."""
        if (network, row) not in self.inputs:
            self.inputs[network, row] = first
            self.bytes += bytes_of([first.sample, first.text])


class Changes:
    """What an edit would change of the recording, put aside until the run has ended well.

    Attributes:
        bytes: What it takes in memory.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self._written: list[tuple[Tensor, list[int], int, torch.Tensor, Tensor]] = []
        self._replaced: list[tuple[dict[Any, Any], Any, Any]] = []

    def write(
        self, target: Tensor, rows: list[int], dim: int, index: torch.Tensor, values: Tensor
    ) -> None:
        """Write values ``[rows, …]`` to some places along an axis of a kept tensor."""
        self._written.append((target, rows, dim, index, values.to(target, copy=True)))
        self.bytes += values.numel() * target.element_size()

    def put(self, into: dict[Any, Any], key: Any, value: Any) -> None:
        """Put something in the place of what is there."""
        self._replaced.append((into, key, value))

    def apply(self) -> None:
        """The edit becomes the original of the edits that follow."""
        for target, rows, dim, index, values in self._written:
            places = index.to(target.device)
            for row, value in zip(rows, values, strict=True):
                target[row].index_copy_(dim - 1, places, value)
        for into, key, value in self._replaced:
            into[key] = value
