"""ToMA: tokens chosen to cover all others, and merging as a soft attention to them.

Inside windows: the destinations are chosen greedily so that every token is like one of them
(facility location), every token gives itself to the destinations by a softmax of its cosines to
them, and a merged token is the mean of what it was given. ``destinations(…).weighed(x)`` is a whole
ToMA; the destinations can be kept for more layers and steps than the weights.

Source: Lu et al., "ToMA: Token Merge with Attention for Diffusion Models", arXiv 2509.10918. The
authors' weights come of dot products and nearly one-hot, and the first row of a batch chooses for
all; here they come of cosines, and every row chooses for itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from accel.errors import BadInput
from accel.tokens.matching import merged_of
from accel.tokens.mixture import Part, directions, mixture, untouched
from accel.tokens.reduction import Reduction, identity, picked
from accel.tokens.tiles import tiles

if TYPE_CHECKING:
    from torch import Tensor

    from accel.seams.layout import Grid, Layout


def facility_location(similarity: Tensor, count: int) -> Tensor:
    """The tokens that greedily maximise Σ_i max_{d chosen} similarity(i, d).

    The sum, counted from −1 (the least cosine), is monotone and submodular, so that it is at least
    1 − 1/e of the best that ``count`` tokens reach. Takes ``count`` rounds of n² operations a
    window: choose in windows, not over thousands of tokens.

    Args:
        similarity: Of each token ``i`` to each candidate ``d``, ``[…, n, n]``, in [−1, 1].
        count: Tokens to choose, in [1, n].

    Returns:
        ``[…, count]``, in the order of choice.
    """
    import torch

    best = similarity.new_full(similarity.shape[:-1], -1.0)
    taken = torch.zeros_like(best, dtype=torch.bool)
    chosen = []
    for _ in range(count):
        gain = (similarity - best[..., None]).clamp_min(0.0).sum(-2)
        pick = gain.masked_fill(taken, -1.0).argmax(-1, keepdim=True)
        taken = taken.scatter(-1, pick, True)
        reached = similarity.take_along_dim(pick[..., None, :], dim=-1)[..., 0]
        best = torch.maximum(best, reached)
        chosen.append(pick)
    return torch.cat(chosen, dim=-1)


@dataclass(frozen=True, eq=False)
class Destinations:
    """What a choice is: the part of the pattern that can be kept longest.

    Attributes:
        windows: The tokens of each window, ``[w, n]``, one tensor a shape of window.
        chosen: The places of the destinations in each window, ``[B, w, m]``.
    """

    windows: tuple[Tensor, ...]
    chosen: tuple[Tensor, ...]

    def weighed(self, x: Tensor, temperature: float = 0.02) -> Reduction:
        """The reduction with the weights of some content.

        With A the softmax over the destinations of cos(d, i)/temperature, U = Aᵀ and W = A with
        its rows made to sum to 1. Takes m·n·C multiply-adds a window.

        Args:
            x: What is compared, ``[B, N, …]``.
            temperature: > 0. Towards 0 each token goes to its most similar destination alone;
                from about 0.1 on all tokens of a window blend.

        Raises:
            BadInput: For a temperature of 0 or below.
        """
        if temperature <= 0.0:
            raise BadInput(f"a temperature of {temperature}: give one above 0.")
        parts = []
        for index, chosen in zip(self.windows, self.chosen, strict=True):
            local = directions(x, index)
            if chosen.shape[2] == index.shape[1]:
                parts.append(untouched(index, local))
                continue
            few = local.take_along_dim(chosen[..., None], dim=2)
            given = ((local @ few.mT) / temperature).softmax(-1)
            merge = given.mT / given.sum(2)[..., None]
            parts.append(Part(index, chosen, merge, given))
        return mixture(parts)

    def take(self, rows: Sequence[int]) -> Destinations:
        """The destinations of some rows."""
        return Destinations(self.windows, tuple(picked(c, rows) for c in self.chosen))


def destinations(x: Tensor, layout: Layout, ratio: float, window: Grid = (1, 8, 8)) -> Destinations:
    """Choose ``n − int(n·ratio)`` of the n tokens of every window.

    Takes n²·C multiply-adds a window for the similarities and n² · m operations for the choice.
    Does not read the device.

    Args:
        x: What is compared, ``[B, N, …]``.
        layout: Of the image tokens.
        ratio: Share of the tokens of a window to merge, in [0, 1).
        window: Its size; windows at a ragged border are smaller.

    Raises:
        BadInput: For a ratio outside of [0, 1), or a window without tokens.
    """
    windows, chosen = tuple(tiles(layout, window, x.device)), []
    for index in windows:
        local, side = directions(x, index), index.shape[1]
        count = side - merged_of(side, ratio)
        chosen.append(facility_location(local @ local.mT, count))
    return Destinations(windows, tuple(chosen))


def reduction(
    x: Tensor, layout: Layout, ratio: float, window: Grid = (1, 8, 8), temperature: float = 0.02
) -> Reduction:
    """Choose and weigh by the same content; a ratio of 0 is off.

    Args:
        x: As for `destinations`.
        layout: As for `destinations`.
        ratio: As for `destinations`.
        window: As for `destinations`.
        temperature: As for `Destinations.weighed`.
    """
    if merged_of(layout.image, ratio) == 0:
        return identity(layout.image, x.device)
    return destinations(x, layout, ratio, window).weighed(x, temperature)
