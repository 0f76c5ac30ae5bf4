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

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from pydantic import Field

from accel.errors import BadInput
from accel.seams.memory import bytes_of
from accel.tokens.fields import Merging, why_whole
from accel.tokens.matching import merged_of
from accel.tokens.mixture import Part, directions, mixture, untouched
from accel.tokens.reduction import Reduction, identity, picked
from accel.tokens.tiles import tiles

if TYPE_CHECKING:
    from torch import Tensor

    from accel.seams.denoisers import Call, Result
    from accel.seams.layout import Grid, Layout
    from accel.tokens.merging import Reducer, Wanted


class ToMA(Merging):
    """Attend with the tokens that cover all others, in windows; merge and unmerge are matrices.

    The authors choose destinations every 10 steps and weigh every 5 (24 % less latency of SDXL,
    23 % of Flux), as the defaults do; that four layers share a pattern is ours.
    """

    name: ClassVar[str] = "tokens.ToMA"
    source: ClassVar[str] = "arXiv 2509.10918, section 4"

    steps: int = Field(default=5, ge=1, description="steps that the weights of a pattern serve")
    choose: int = Field(default=10, ge=1, description="steps that a choice of destinations serves")
    layers: int = Field(
        default=4,
        ge=0,
        description="successive layers that share a pattern, made by the first; 0: all of a level",
    )
    window: int = Field(default=8, ge=1, description="tokens of a side of a window")
    temperature: float = Field(
        default=0.02,
        gt=0.0,
        description="of the softmax by which tokens give themselves to destinations",
    )

    def why_off(self) -> str | None:
        """A ratio or windows at which nothing is merged."""
        return super().why_off() or why_whole(self.window, self.ratio)

    def reducer(self) -> Reducer:
        """Destinations that are kept, weighed anew."""
        return Covering(self)


class Choice(NamedTuple):
    """The destinations of a sample: its place among those that they were chosen with, and when."""

    destinations: Destinations
    place: int
    step: int


class Covering:
    """Keeps the destinations of each sample and layer."""

    note = ""

    def __init__(self, method: ToMA) -> None:
        self._method = method
        self._kept: dict[Any, Choice] = {}

    @property
    def bytes(self) -> int:
        """Memory of the destinations."""
        found = {id(choice.destinations): choice.destinations for choice in self._kept.values()}
        return bytes_of(found)

    def reset(self) -> None:
        """Forget the run before."""
        self._kept.clear()

    def observe(self, call: Call, result: Result) -> None:
        """Nothing to see."""

    def state(self, wanted: Wanted) -> Hashable:
        """Which destinations the sample has; ``None`` where they are too old."""
        choice = self._kept.get(self._key(wanted, wanted.samples[0]))
        if choice is None or wanted.step.index - choice.step >= self._method.choose:
            return None
        return id(choice.destinations)

    def reduce(self, x: Tensor, wanted: Wanted) -> Reduction:
        """Weigh by the present content, with the destinations that are kept or chosen now."""
        method, entries = self._method, wanted.entries
        keys = [self._key(wanted, sample) for sample in wanted.samples]
        if self.state(wanted) is None:
            window = (1, method.window, method.window)
            chosen = destinations(x, wanted.layout, method.ratio, window)
            for place, key in enumerate(keys):
                self._kept[key] = Choice(chosen, place, wanted.step.index)
        places = [self._kept[key].place for key in keys]
        rows = [place * entries + entry for place in places for entry in range(entries)]
        return self._kept[keys[0]].destinations.take(rows).weighed(x, method.temperature)

    def _key(self, wanted: Wanted, sample: int) -> Any:
        where = (wanted.denoiser, wanted.layer, wanted.device)
        return *where, wanted.layout, wanted.entries, sample


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

    side = similarity.shape[-1]
    order = torch.arange(side, device=similarity.device)
    rounding = 4 * side * torch.finfo(similarity.dtype).eps
    best = similarity.new_full(similarity.shape[:-1], -1.0)
    taken = torch.zeros_like(best, dtype=torch.bool)
    chosen = []
    for _ in range(count):
        # Two tokens that gain from each other alone gain the same: the first is taken, not the one
        # that the rounding of a batch of this size favours.
        gain = (similarity - best[..., None]).clamp_min(0.0).sum(-2)
        gain = gain.masked_fill(taken, -torch.inf)
        equal = ~(gain < gain.amax(-1, keepdim=True) - rounding)  # all, of what is not a number
        pick = order.where(equal, side).amin(-1, keepdim=True)
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
