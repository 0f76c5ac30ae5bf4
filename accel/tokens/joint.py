"""Reductions of a joint sequence: the text stays as it is, the image tokens are reduced."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from accel.errors import BadInput
from accel.tokens.reduction import Reduction, checked, picked

if TYPE_CHECKING:
    from torch import Tensor

    from accel.seams.layout import Layout


def join(layout: Layout, text: Tensor, image: Tensor, dim: int = 1) -> Tensor:
    """A joint sequence of the layout's order."""
    import torch

    return torch.cat([text, image] if layout.text_first else [image, text], dim=dim)


def split(layout: Layout, x: Tensor, dim: int = 1) -> tuple[Tensor, Tensor]:
    """The tokens of the text and those of the image, however many the latter now are.

    Raises:
        BadInput: If the sequence is shorter than the text.
    """
    image = x.shape[dim] - layout.text
    if image < 0:
        raise BadInput(
            f"a sequence of {x.shape[dim]} tokens cannot hold {layout.text} of a text: give the "
            "joint sequence, or the text's true length."
        )
    if layout.text_first:
        return x.narrow(dim, 0, layout.text), x.narrow(dim, layout.text, image)
    return x.narrow(dim, image, layout.text), x.narrow(dim, 0, image)


def beside_text(layout: Layout, image: Reduction) -> Reduction:
    """The reduction of a whole sequence that leaves its text, if there is one, as it is.

    Raises:
        BadInput: If the image tokens of the layout are not those of the reduction.
    """
    import torch

    if layout.image != image.tokens:
        raise BadInput(
            f"{layout} has {layout.image} image tokens, the reduction {image.tokens}: make one "
            "for this layout."
        )
    if not layout.text:
        return image
    few = image.anchor
    text = torch.arange(layout.text, device=few.device).expand(len(few), -1)
    if layout.text_first:
        few = few + layout.text
    else:
        text = text + image.tokens
    return Joint(
        tokens=layout.tokens,
        anchor=join(layout, text, few),
        size=join(layout, torch.ones_like(text, dtype=image.size.dtype), image.size),
        image=image,
        layout=layout,
    )


@dataclass(frozen=True, eq=False, kw_only=True)
class Joint(Reduction):
    """A reduction of the image tokens of a joint sequence. Made by `beside_text`.

    Attributes:
        image: The reduction of the image tokens.
        layout: Where the text is.
    """

    image: Reduction
    layout: Layout

    def merge(self, x: Tensor) -> Tensor:
        """The text as it is, the image merged."""
        text, image = split(self.layout, checked(x, self.tokens, self.anchor))
        image = self.image.merge(image)
        return join(self.layout, text.expand(len(image), *text.shape[1:]), image)

    def unmerge(self, y: Tensor) -> Tensor:
        """The text as it is, the image unmerged."""
        text, image = split(self.layout, checked(y, self.length, self.anchor))
        image = self.image.unmerge(image)
        return join(self.layout, text.expand(len(image), *text.shape[1:]), image)

    def take(self, rows: Sequence[int]) -> Self:
        """The joint reduction of some rows."""
        anchor, size = picked(self.anchor, rows), picked(self.size, rows)
        return dataclasses.replace(self, anchor=anchor, size=size, image=self.image.take(rows))
