"""What the methods of a plan bring to a stream, and what a stream tells them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

IDLE = "it acts in a stream of frames (accel.loop.Stream), and this was a call of the pipeline"


Skips = Callable[["Tensor", bool], bool]


@dataclass
class Parts:
    """Shared by the methods of one plan (`accel.attach.Site.shared`), and read by its stream.

    Attributes:
        streaming: Whether there is a stream at all.
        in_flight: Frames that share a call; 0: one a level.
        negative: What the virtual negative of residual guidance leads back to.
        delta: Its scale δ.
        skips: Asked for each frame ``[1, 3, H, W]``, and whether the stream is filled: whether the
            picture before may stand for it.
        cuts: Asked for each frame that is processed whether it begins another scene.
        resets: Called when the stream begins, and when prompt or size change.
        enters: Called before each call with the levels whose frame begins another scene.
        told: Called after each frame: what the report says is as of now.
        widest: Most frames that shared a call.
        spared: Rows of the negative prompt that were not computed.
    """

    streaming: bool = False
    in_flight: int = 1
    negative: Literal["none", "self", "onetime"] = "none"
    delta: float = 1.0
    skips: Skips | None = None
    cuts: Callable[[Tensor], bool] | None = None
    resets: list[Callable[[], None]] = field(default_factory=list)
    enters: list[Callable[[frozenset[int]], None]] = field(default_factory=list)
    told: list[Callable[[], None]] = field(default_factory=list)
    widest: int = 0
    spared: int = 0


def added(items: list[T], item: T) -> Callable[[], None]:
    """Add to a list; returns the undo."""
    items.append(item)
    return lambda: items.remove(item)
