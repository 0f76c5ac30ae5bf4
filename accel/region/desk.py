"""What the runs of an attached plan are for: nothing of this, a recording, or an edit of it.

A plan is frozen, and a recording is none of its fields: they meet here. `accel.edit.sparse` is
what puts the recordings and the regions on the desk.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from accel.errors import BadInput
from accel.region.recording import Changes, Recording

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(eq=False)
class Edit:
    """One edit that is under way.

    Attributes:
        region: What somebody drew, ``[height, width]`` of the picture; ``None``: what differs
            between the inputs.
        changes: What becomes of the recording at its end; ``None``: it stays as it is.
        shares: For each evaluation of a sample, the share of the picture that was computed.
    """

    region: Tensor | None
    changes: Changes | None
    shares: list[float] = field(default_factory=list)

    @property
    def share(self) -> float:
        """Of the picture, over all evaluations."""
        return sum(self.shares) / len(self.shares) if self.shares else 0.0


@dataclass(eq=False)
class Desk:
    """Shared by `region.SIGE` and whoever edits.

    Attributes:
        recording: The original, once it is recorded.
        under_way: The recording that is being made.
        edit: The edit that is under way.
    """

    recording: Recording | None = None
    under_way: Recording | None = None
    edit: Edit | None = None

    @contextmanager
    def recorded(self) -> Iterator[Recording]:
        """The run inside is recorded; if it fails, the recording before stays."""
        self.under_way = Recording()
        try:
            yield self.under_way
            self.recording = self.under_way
        finally:
            self.under_way = None

    @contextmanager
    def edited(self, region: Tensor | None, onward: bool) -> Iterator[Edit]:
        """The run inside is an edit; if it fails, the recording stays as it is.

        Args:
            region: Where, ``[height, width]`` of the picture; ``None``: where inputs differ.
            onward: Whether later edits start from this one.

        Raises:
            BadInput: If nothing is recorded.
        """
        if self.recording is None:
            raise BadInput("Nothing is recorded that could be edited: record the original first.")
        self.edit = edit = Edit(region, Changes() if onward else None)
        try:
            yield edit
            if edit.changes is not None:
                edit.changes.apply()
        finally:
            self.edit = None
