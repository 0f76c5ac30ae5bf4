"""SADA's token-wise part: where the trajectory is stable in part, compute only the unstable tokens.

A whole block runs on the kept tokens – keys and values too – and its answer is written over the
block's last answer at all tokens. Which tokens are kept is decided once a step, for all blocks.

Source: Jiang et al., "SADA: Stability-guided Adaptive Diffusion Acceleration", arXiv 2507.17135
(the token-wise part; `accel.cache.sada` has the others). The authors renumber the positions of the
kept tokens; here they keep their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

from pydantic import Field

from accel.attach import Accelerator, Site, Undo
from accel.errors import BadInput
from accel.tokens.fields import SERVED, MaxDownsample
from accel.tokens.reduction import Reduction, gathered
from accel.tokens.tiles import average, one_of_each, tiles

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from accel.seams.layout import Grid, Layout


class SADA(Accelerator):
    """Where the solver's trajectory is stable, blocks compute few tokens and keep the others.

    The whole block – attention, cross-attention and feed-forward – runs on the tokens whose
    trajectory bends away from its extrapolation, and one more in each cell; the others keep the
    block's last full answer. Decides from the guided output, each sample for itself, and reads
    the device once a sample, step and level. Takes three computed steps to begin.
    """

    name: ClassVar[str] = "tokens.SADA"
    layer: ClassVar[str] = "tokens"
    seam: ClassVar[str] = "blocks"
    supports: ClassVar[str] = (
        SERVED.replace(" Sana,", "")
        + "; no UNet for video, and schedulers of one evaluation a step without noise"
    )
    source: ClassVar[str] = "arXiv 2507.17135, the token-wise part"

    refresh: int = Field(
        default=4, ge=1, description="steps after which a block computes all tokens; 1 is off"
    )
    most: int = Field(
        default=5120,
        ge=0,
        description="tokens computed for their instability. The authors allow 5·1024 (Stable "
        "Diffusion, which at 512² is all) and 10·1024 (SDXL)",
    )
    cell: int = Field(
        default=3, ge=1, description="tokens of a side of a cell, of which one is always computed"
    )
    max_downsample: MaxDownsample = 1
    seed: int = Field(default=0, ge=0, description="draws the token of each cell")

    @classmethod
    def off(cls) -> Self:
        """All tokens at every step."""
        return cls(refresh=1)

    def why_off(self) -> str | None:
        """A refresh at every step."""
        return "refresh is 1" if self.refresh == 1 else None

    def attach(self, site: Site) -> Iterator[Undo]:
        """Put it around every block and in front of ``scheduler.step``.

        Raises:
            UnsupportedModel: For blocks that need the whole grid, or a scheduler that evaluates
                twice a step or adds noise.
            Conflict: If a method of the plan brings such a scheduler.
        """
        from accel.seams.solvers import Solver
        from accel.tokens.pruning import Pruning

        with site.beside("scheduler"):
            solver = Solver(site.pipe.scheduler, self.name)
        yield from Pruning(self, site.tally, solver).attach(site)


def instability(criterion: Tensor, layout: Layout) -> Tensor:
    """The mean of the criterion over channels and over each token's area, ``[B, N]``.

    Args:
        criterion: (x − x̂)·Δ²f of the guided trajectory, ``[B, C, (F,) H, W]``.
        layout: Of the image tokens.
    """
    return average(layout, criterion.float().mean(1))


def unstable(
    score: Tensor,
    layout: Layout,
    most: int,
    generator: torch.Generator | None = None,
    cell: Grid = (1, 3, 3),
) -> Tensor:
    """The tokens to compute, in the order of the grid, ``[M]``: those whose score is not below 0.

    One sample at a time, because samples differ in how many; its branches share the tokens, as the
    criterion is of the guided answer. Reads the device once.

    Args:
        score: `instability` of one sample, ``[N]``.
        layout: Of the image tokens.
        most: Tokens kept for their score, those with the largest; the authors allow 5·1024
            (Stable Diffusion, which at 512² is all) and 10·1024 (SDXL).
        generator: Draws one more token from each cell, which may be among them; the first of each
            cell without one.
        cell: Its size; cells at a ragged border are smaller.

    Raises:
        BadInput: For a score that is not of the layout's image tokens.
    """
    import torch

    if score.shape != (layout.image,):
        raise BadInput(
            f"a score of {tuple(score.shape)} on {layout}: give [{layout.image}], one sample's."
        )
    highest = score.topk(min(max(most, 0), layout.image))
    kept = torch.zeros_like(score, dtype=torch.bool)
    kept[highest.indices] = ~(highest.values < 0.0)  # what is not a number is not stable
    for tile in tiles(layout, cell, score.device):
        kept[tile.gather(1, one_of_each(tile, generator))[:, 0]] = True
    return kept.nonzero()[:, 0]


def refreshes(step: int, latest: int | None, every: int = 4) -> bool:
    """Whether a block computes all tokens at a step.

    Args:
        step: Index of the step.
        latest: Index of the step at which it last did; ``None`` if it never did.
        every: Steps after which it does again, ≥ 1; 1 is off.
    """
    return latest is None or step - latest >= every


def kept(index: Tensor, full: Tensor) -> Kept:
    """The reduction of one block to the kept tokens.

    Args:
        index: Of the kept tokens, ``[M]``.
        full: The block's last answer at all tokens, ``[B, N, …]``. It is not changed.
    """
    import torch

    ones = torch.ones(1, len(index), device=index.device)
    return Kept(tokens=full.shape[1], anchor=index[None], size=ones, full=full)


@dataclass(frozen=True, eq=False, kw_only=True)
class Kept(Reduction):
    """Some tokens are computed, the others keep what they had. Made by `kept`.

    W has one 1 a row; U has the rows of the kept tokens only, the other tokens' share is the
    cached answer's.

    Attributes:
        full: What the others keep, ``[B, N, …]``.
    """

    full: Tensor

    def merge(self, x: Tensor) -> Tensor:
        """The kept tokens."""
        if x.shape[1] != self.tokens:
            raise BadInput(f"{x.shape[1]} tokens in the place of {self.tokens}: refresh first.")
        return gathered(x, self.anchor)

    def unmerge(self, y: Tensor) -> Tensor:
        """The kept tokens over what all had."""
        if y.shape[1:2] + y.shape[:1] != (self.length, *self.full.shape[:1]):
            raise BadInput(
                f"an answer of {tuple(y.shape)} over one of {tuple(self.full.shape)} for "
                f"{self.length} kept tokens: refresh first, or name the rows with take."
            )
        return self.full.index_copy(1, self.anchor[0], y)

    def take(self, rows: Sequence[int]) -> Self:
        """The same tokens over the answers of some rows."""
        from dataclasses import replace

        return replace(self, full=self.full[list(rows)])
