"""Importance: merge into the tokens on which the prompt acts most, and never merge those.

The difference of the two branches' answers at one step says where the text matters; it is the
importance at the next. ``partition(…).match(x, ratio)`` merges.

Source: Wu et al., "Importance-Based Token Merging for Efficient Image and Video Generation",
arXiv 2411.16720. The authors draw the destinations from a pool of important tokens and merge all
unimportant ones; here the destinations are the pool.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, NamedTuple

from pydantic import Field

from accel.errors import BadInput
from accel.seams.memory import bytes_of
from accel.tokens.fields import Merging
from accel.tokens.matching import Partition, cells
from accel.tokens.tiles import average

if TYPE_CHECKING:
    from torch import Tensor

    from accel.seams.denoisers import Call, Result
    from accel.seams.layout import Layout
    from accel.tokens.merging import Reducer, Wanted
    from accel.tokens.reduction import Reduction


class Importance(Merging):
    """Merge into the tokens on which the prompt acts most, and never merge those.

    What both branches answered at one step decides at the next. At the first step, and where no
    step evaluates both branches (embedded guidance), destinations are drawn as ToMe's are; the
    report says in how many patterns.
    """

    name: ClassVar[str] = "tokens.Importance"
    source: ClassVar[str] = "arXiv 2411.16720"

    share: float = Field(
        default=0.25,
        gt=0.0,
        lt=1.0,
        description="of the tokens that are never merged; up to 1 − share of all can be",
    )
    seed: int = Field(default=0, ge=0, description="draws where nothing is known of importance")

    def reducer(self) -> Reducer:
        """A matching into the important tokens."""
        return Ranked(self)


class Answers(NamedTuple):
    """What both branches of a sample answered: ``[C, (F,) H, W]`` or tokens ``[N, D]``."""

    cond: Tensor
    uncond: Tensor


class Ranked:
    """Keeps the latest answers of both branches of each sample."""

    def __init__(self, method: Importance) -> None:
        self._method = method
        self._known: dict[int, Answers] = {}
        self._latest: dict[tuple[int, str], tuple[int, Tensor]] = {}
        self._drawn = self._made = 0

    @property
    def bytes(self) -> int:
        """Memory of the answers; most are both known and the latest, and count once."""
        latest = [answer for _, answer in self._latest.values()]
        known = [answer for answers in self._known.values() for answer in answers]
        return bytes_of({id(answer): answer for answer in (*latest, *known)})

    @property
    def note(self) -> str:
        """In how many patterns nothing was known."""
        if not self._drawn:
            return ""
        return f"; {self._drawn} of {self._made} patterns drawn, for want of both branches before"

    def reset(self) -> None:
        """Forget the run before."""
        self._known.clear()
        self._latest.clear()
        self._drawn = self._made = 0

    def observe(self, call: Call, result: Result) -> None:
        """Keep what the branches answered; two that answered at one step are a pair."""
        from accel.seams.token_stream import pictures_of

        answers = pictures_of(call, result.value)
        for row, answer in zip(call.rows, answers, strict=True):
            self._latest[row.sample, row.branch] = call.step.index, answer.clone()
        for sample in {row.sample for row in call.rows}:
            pair = [self._latest.get((sample, branch)) for branch in ("cond", "uncond")]
            if pair[0] is not None and pair[1] is not None and pair[0][0] == pair[1][0]:
                self._known[sample] = Answers(pair[0][1], pair[1][1])

    def state(self, wanted: Wanted) -> bool:
        """Whether both branches of the sample have answered."""
        return wanted.samples[0] in self._known

    def reduce(self, x: Tensor, wanted: Wanted) -> Reduction:
        """Match into the important tokens, or into drawn ones."""
        method, known = self._method, self.state(wanted)
        self._made, self._drawn = self._made + 1, self._drawn + (not known)
        drawn = cells(wanted.layout, wanted.generator(method.seed), device=x.device)
        seen = self._seen(wanted).to(x.device) if known else None
        return partition(seen, drawn, method.share).match(x, method.ratio)

    def _seen(self, wanted: Wanted) -> Tensor:
        import torch

        pairs = [self._known[sample] for sample in wanted.samples]
        cond, uncond = (torch.stack(values) for values in zip(*pairs, strict=True))
        if wanted.entries > 1:  # frames are rows of their own: [B, C, F, H, W] as [B·F, C, H, W]
            cond, uncond = (value.transpose(1, 2).flatten(0, 1) for value in (cond, uncond))
        return importance(cond, uncond, wanted.layout)


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
