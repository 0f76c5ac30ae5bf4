"""Which frames of a clip each process has, and which of them it sees.

Each process has a run of frames. Its *local* scope is that run and the frames next to it; the
*global* scope of all of them is a few frames spread evenly over the clip. A frame of both is seen
once.
"""

from __future__ import annotations

from dataclasses import dataclass

from accel.errors import BadInput


@dataclass(frozen=True)
class Scope:
    """The frames of one clip, and the processes that share them.

    Attributes:
        frames: How many; of a transformer, those of its tokens.
        count: Processes.
        reach: Frames on either side of its own that a process sees.
        anchors: Frames of the whole clip that all processes see.
    """

    frames: int
    count: int
    reach: int = 0
    anchors: int = 0

    @classmethod
    def of(cls, frames: int, count: int, reach: int, anchors: int) -> Scope:
        """A scope in which every process has a frame.

        Raises:
            BadInput: If there are fewer frames than processes.
        """
        if frames < count:
            raise BadInput(
                f"The network sees the clip as {frames} frames, and {count} processes share them: "
                f"ask for a longer clip, or start {frames} processes."
            )
        return cls(frames, count, reach, anchors)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Frames of each process: as alike as can be, the first ones have one more."""
        each, more = divmod(self.frames, self.count)
        return tuple(each + (rank < more) for rank in range(self.count))

    def own(self, rank: int) -> range:
        """The frames that a process has."""
        begin = sum(self.lengths[:rank])
        return range(begin, begin + self.lengths[rank])

    def near(self, rank: int, reach: int) -> range:
        """They, and so many on either side of them."""
        own = self.own(rank)
        return range(max(0, own.start - reach), min(self.frames, own.stop + reach))

    @property
    def spread(self) -> tuple[int, ...]:
        """The global scope: the middles of as many equal parts of the clip."""
        parts = min(self.anchors, self.frames)
        return tuple((2 * part + 1) * self.frames // (2 * parts) for part in range(parts))

    def seen(self, rank: int) -> tuple[int, ...]:
        """Both scopes of a process, in order."""
        return tuple(sorted({*self.near(rank, self.reach), *self.spread}))

    def favoured(self, rank: int, early: bool) -> tuple[bool, ...]:
        """For each frame that a process sees, whether it is of the scope that counts more now.

        Args:
            rank: Of the process.
            early: Whether it is the global scope.
        """
        scope = self.spread if early else self.near(rank, self.reach)
        return tuple(frame in scope for frame in self.seen(rank))
