"""Where the tokens of a joint attention lie: text before or after the frames of a picture or clip.

Image tokens are row-major: frame after frame, row after row. A picture has one frame.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from accel.errors import BadInput

if TYPE_CHECKING:
    from torch import Tensor

Grid = tuple[int, int, int]
"""Something for each axis: frames, height, width."""

AXES = ("frames", "height", "width")


class Places(NamedTuple):
    """Coordinates of image tokens: integer tensors that broadcast against each other."""

    frame: Tensor
    row: Tensor
    column: Tensor


@dataclass(frozen=True)
class Layout:
    """The tokens of one sample, in the order in which the model hands them to attention.

    Attributes:
        text: Text tokens, padded ones included; 0 where text has an attention of its own.
        frames: Frames of image tokens; 1 for a picture.
        height: Rows of image tokens.
        width: Columns of image tokens.
        text_first: Whether text comes before the image (Flux, Qwen-Image, CogVideoX) or after it
            (SD3, HunyuanVideo, Mochi).

    Raises:
        BadInput: If there is no image token, or fewer than no text.
    """

    text: int
    frames: int
    height: int
    width: int
    text_first: bool = True

    def __post_init__(self) -> None:
        if self.text < 0 or min(self.grid) < 1:
            raise BadInput(
                f"{self} has no image tokens, or fewer than no text: frames, height and width are "
                "counted in tokens and are at least 1, text is at least 0."
            )

    @property
    def grid(self) -> Grid:
        """Frames, height and width."""
        return (self.frames, self.height, self.width)

    @property
    def frame(self) -> int:
        """Image tokens of one frame."""
        return self.height * self.width

    @property
    def image(self) -> int:
        """All image tokens."""
        return math.prod(self.grid)

    @property
    def tokens(self) -> int:
        """All tokens, text and image."""
        return self.text + self.image

    @property
    def text_span(self) -> slice:
        """Where the text tokens are."""
        start = 0 if self.text_first else self.image
        return slice(start, start + self.text)

    @property
    def image_span(self) -> slice:
        """Where the image tokens are."""
        start = self.text if self.text_first else 0
        return slice(start, start + self.image)

    def places(self, tokens: Tensor) -> Places:
        """Coordinates of image tokens, given by their number among the image tokens."""
        inside = tokens % self.frame
        return Places(tokens // self.frame, inside // self.width, inside % self.width)

    def index(self, places: Places) -> Tensor:
        """Numbers of the image tokens at coordinates; the inverse of `places`."""
        return (places.frame * self.height + places.row) * self.width + places.column

    def pixel_index(self, places: Places) -> Tensor:
        """Numbers in pixel-major order, in which all frames of one place lie side by side."""
        return (places.row * self.width + places.column) * self.frames + places.frame
