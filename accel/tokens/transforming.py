"""Token Transforming: every new token is a mixture of many, and every token goes into many.

Some tokens are kept as centres: those that are told to matter, or evenly spaced ones.
Rows of W are a softmax of the centres' cosines to all tokens, rows of U one of the tokens' cosines
to all centres: neither is exclusive, and U is not W's transpose.

Source: Zeng et al., "Token Transforming: A Unified and Training-Free Token Compression Framework
for Vision Transformer Acceleration", arXiv 2506.05709, for Y = WX with a many-to-many W. No code
is public: how centres are chosen, the way back and both softmaxes are ours.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from accel.errors import BadInput
from accel.tokens.fields import Merging, why_whole
from accel.tokens.matching import merged_of
from accel.tokens.mixture import Part, directions, mixture, untouched
from accel.tokens.reduction import Reduction, identity
from accel.tokens.tiles import tiles

if TYPE_CHECKING:
    from torch import Tensor

    from accel.seams.layout import Grid, Layout
    from accel.tokens.merging import Reducer, Wanted


class Transforming(Merging):
    """Attend with evenly spaced centres, each a mixture of the tokens that are like it.

    No matching: m·n·C multiply-adds a window for the mixtures, and as many for the way there and
    back, so that it pays only where windows are small beside the picture.
    """

    name: ClassVar[str] = "tokens.Transforming"
    source: ClassVar[str] = "arXiv 2506.05709, for Y = WX; the rest is ours"

    window: int = Field(default=16, ge=1, description="tokens of a side of a window")
    temperature: float = Field(
        default=0.02, gt=0.0, description="of both softmaxes; towards 0 the centres stand alone"
    )

    def why_off(self) -> str | None:
        """A ratio or windows at which nothing is merged."""
        return super().why_off() or why_whole(self.window, self.ratio)

    def reducer(self) -> Reducer:
        """Centres, then mixtures around them."""
        from accel.tokens.merging import Stateless

        def reduce(x: Tensor, wanted: Wanted) -> Reduction:
            window = (1, self.window, self.window)
            return transformed(
                x, wanted.layout, self.ratio, window=window, temperature=self.temperature
            )

        return Stateless(reduce)


def transformed(
    x: Tensor,
    layout: Layout,
    ratio: float,
    *,
    matters: Tensor | None = None,
    window: Grid = (1, 16, 16),
    temperature: float = 0.02,
) -> Reduction:
    """Keep ``n − int(n·ratio)`` centres of the n tokens of every window, and mix around them.

    Takes m·n·C multiply-adds a window. Does not read the device.

    Args:
        x: What is compared, ``[B, N, …]``.
        layout: Of the image tokens.
        ratio: Share of the tokens of a window to leave out, in [0, 1); 0 is off.
        matters: How much each token matters, ``[B, N]``: attention that it receives, importance.
            Without, centres are spaced evenly, so that no part of the picture goes without.
        window: Its size; windows at a ragged border are smaller.
        temperature: Of both softmaxes, > 0. Towards 0 W keeps the centres alone.

    Raises:
        BadInput: For a ratio outside of [0, 1), or a temperature of 0 or below.
    """
    import torch

    if temperature <= 0.0:
        raise BadInput(f"a temperature of {temperature}: give one above 0.")
    if merged_of(layout.image, ratio) == 0:
        return identity(layout.image, x.device)
    parts = []
    for index in tiles(layout, window, x.device):
        local = directions(x, index)
        less = merged_of(index.shape[1], ratio)
        if not less:
            parts.append(untouched(index, local))
            continue
        count = index.shape[1] - less
        if matters is None:
            even = torch.arange(count, device=x.device) * index.shape[1] // count
            chosen = even.expand(len(x), len(index), -1)
        else:
            chosen = matters[:, index].topk(count, dim=-1).indices
        logits = local.take_along_dim(chosen[..., None], dim=2) @ local.mT / temperature
        parts.append(Part(index, chosen, logits.softmax(-1), logits.mT.softmax(-1)))
    return mixture(parts)
