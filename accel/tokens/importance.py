"""Importance: merge into the tokens on which the prompt acts most, and never merge those.

The difference of the two branches' answers at one step says where the text matters; it is the
importance at the next. ``partition(…).match(x, ratio)`` merges.

Source: Wu et al., "Importance-Based Token Merging for Efficient Image and Video Generation",
arXiv 2411.16720. The authors draw the destinations from a pool of important tokens and merge all
unimportant ones; here the destinations are the pool.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from accel.errors import BadInput
from accel.tokens.matching import Partition
from accel.tokens.tiles import average

if TYPE_CHECKING:
    from torch import Tensor

    from accel.seams.layout import Layout


def importance(cond: Tensor, uncond: Tensor, layout: Layout) -> Tensor:
    """‖ε_c − ε_u‖ at each token, ``[B, N]``, as a root mean square over channels and area.

    Args:
        cond: The network's answer with the prompt: latents ``[B, C, (F,) H, W]``, or tokens
            ``[B, N, D]``.
        uncond: Its answer without, of the same shape.
        layout: Of the image tokens; latents are averaged over each token's share of them.

    Raises:
        BadInput: For tokens that are not those of the layout.
    """
    square = (cond.float() - uncond.float()).square()
    if square.ndim > 3:
        return average(layout, square.mean(1)).sqrt()
    if square.shape[1] != layout.image:
        raise BadInput(
            f"answers of {square.shape[1]} tokens on {layout}, which has {layout.image}: give "
            "the image tokens alone, and their layout."
        )
    return square.mean(-1).sqrt()


def partition(seen: Tensor | None, otherwise: Partition, share: float = 0.25) -> Partition:
    """The most important tokens are the destinations, all others sources.

    Args:
        seen: The importance at the step before, ``[B, N]``. ``None`` at the first step, and where
            no step evaluates both branches.
        otherwise: What to use without: a partition of random cells.
        share: Of the tokens that are destinations, in (0, 1). A ratio of up to 1 − share can be
            merged.

    Raises:
        BadInput: For a share outside of (0, 1).
    """
    if not 0.0 < share < 1.0:
        raise BadInput(f"a share of {share}: give the part of tokens never to merge, in (0, 1).")
    if seen is None:
        return otherwise
    order = seen.argsort(dim=1, descending=True, stable=True)
    count = max(1, int(seen.shape[1] * share))
    return Partition(seen.shape[1], order[:, count:], order[:, :count])
