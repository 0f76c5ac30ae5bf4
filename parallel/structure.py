"""The engine of ASGDiffusion: first all combs of a picture, held together; then its windows.

In the first stage the network is asked for each comb, which is a small picture of the whole
(`parallel.tiles`). What it says of the first comb is the structure, towards which what it says of
the others is pulled. In the second stage it is asked for windows, whose answers are merged.

Patches are shared out in rounds: in each, every process has one, and while the network looks at
the next one the answers travel. Each patch is a call of its own, whoever makes it, and sums are
made in one order: so the picture does not depend on the number of processes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from accel.seams.canvas import Canvas, Patch
from accel.seams.denoisers import Call, Denoiser, Inner, Result, Row
from accel.seams.grids import Grid, grid_of
from accel.seams.spaces import answer, convert
from parallel.heat import Heat
from parallel.tiles import Shuffle, Tiling, combs, shrinking, woven

if TYPE_CHECKING:
    from accel.attach import Site, Undo
    from accel.report import Tally
    from accel.trajectory import Step
    from parallel.exchange import Exchange
    from parallel.mesh import Axis

Space = Literal["clean", "output"]


@dataclass(frozen=True)
class Options:
    """How a picture is made of patches.

    Attributes:
        side: Of a patch, in pixels of the latents.
        grain: Windows begin at multiples of it.
        overlap: Share of a window that it has in common with the next one at least.
        strength: Weight of the structure at the beginning.
        decay: Power of the time that is left by which it falls.
        until: Share of the schedule that the first stage takes.
        space: What is pulled: clean pictures, or the network's own outputs.
        shuffle: Whether pixels of a cell change places between combs at each step.
        warmup: Steps after the first one with a fresh structure; ``None``: all.
    """

    side: int
    grain: int
    overlap: float
    strength: float
    decay: float
    until: float
    space: Space
    shuffle: bool
    warmup: int | None


@dataclass
class Counts:
    """What was done in a run: calls of either stage, and patches that this process computed."""

    combs: int = 0
    windows: int = 0
    computed: int = 0


class Structure:
    """Makes the picture of one network from patches.

    Args:
        denoiser: The network.
        axis: Who shares the patches.
        options: How.
        heat: Where the structure counts; ``None``: everywhere alike.
        tally: Is told what was done.
    """

    def __init__(
        self, denoiser: Denoiser, axis: Axis, options: Options, heat: Heat | None, tally: Tally
    ) -> None:
        self._denoiser = denoiser
        self._axis = axis
        self._options = options
        self._heat = heat
        self._tally = tally
        self._kept: dict[Row, Tensor] = {}
        self._grids: dict[tuple[int, ...], Grid] = {}
        self._counts = Counts()

    @property
    def bytes(self) -> int:
        """Memory of the structure that is kept for the next step."""
        return sum(kept.nbytes for kept in self._kept.values())

    def reset(self) -> None:
        """Forget the run before."""
        self.release()
        self._counts = Counts()
        self._tally.change = None

    def release(self) -> None:
        """Let go of what is kept."""
        self._kept.clear()
        self._grids.clear()

    def attach(self, site: Site) -> Iterator[Undo]:
        """Put it around the network."""
        if self._heat is not None:
            yield from self._heat.attach()
        yield site.around(self._denoiser, self)

    def __call__(self, call: Call, inner: Inner) -> Result:
        """Compute the patches that are this process's own; the answer is of the whole picture."""
        key = tuple(call.sample.shape[1:])
        if key not in self._grids:
            self._grids[key] = grid_of(call)  # may read the device: once a run
        canvas = Canvas(call, self._options.grain, self._grids[key])
        step = shrinking(canvas.height, canvas.width, self._options.side)
        size = self._axis.size  # refuses a number of processes that does not fit
        if step == 1:
            return inner(call)
        exchange = self._axis.exchange(call.sample.device.type) if size > 1 else None
        asking = Asking(call, inner, canvas, exchange, self._counts)
        left = self._left(call.step)
        whole = self._structured(asking, step, left) if left > 0 else self._detailed(asking)
        self._say(step, exchange)
        return Result(canvas.whole(whole), (True,) * len(call.rows))

    def _left(self, step: Step) -> float:
        """What is left of the first stage, from 1 on; 0 or less: nothing."""
        gone = step.position / len(step.levels.timesteps)
        return 1.0 - gone / self._options.until if self._options.until else 0.0

    def _structured(self, asking: Asking, step: int, left: float) -> Tensor:
        """The first stage: all combs, pulled towards what the first one says."""
        options, call, picture = self._options, asking.call, asking.canvas.picture
        weight = options.strength * left**options.decay
        shuffle = None
        if options.shuffle:
            shuffle = Shuffle(step, picture, call.step.position)
            picture = shuffle.of(picture)
        patches = combs(step)
        pixels = [comb.of(picture) for comb in patches]
        parts = asking.computed(patches, pixels, self._heat if weight else None)
        if weight:
            parts = self._pulled(call, pixels, parts, weight)
        self._counts.combs += 1
        whole = woven(parts, step)
        return whole if shuffle is None else shuffle.undone(whole)

    def _detailed(self, asking: Asking) -> Tensor:
        """The second stage: windows, merged."""
        self._kept.clear()
        options, canvas = self._options, asking.canvas
        tiling = Tiling.of(
            canvas.height, canvas.width, options.side, options.overlap, options.grain
        )
        pixels = [window.of(canvas.picture) for window in tiling.windows]
        parts = asking.computed(tiling.windows, pixels)
        self._counts.windows += 1
        return tiling.merged(parts)

    def _pulled(
        self, call: Call, pixels: Sequence[Tensor], parts: Sequence[Tensor], weight: float
    ) -> list[Tensor]:
        """What was said of the combs, with what was said of the first one in them."""
        heats: list[Tensor | float] = [1.0] * len(parts)
        if self._heat is not None:
            heats = [part[:, -1:].float() for part in parts]
            parts = [part[:, :-1] for part in parts]
        channels = min(parts[0].shape[1], pixels[0].shape[1])  # less a variance, or a mask
        said = [
            self._view(part[:, :channels], one[:, :channels], call)
            for part, one in zip(parts, pixels, strict=True)
        ]
        structure = self._structure(call, said[0])
        found = [parts[0]]
        for part, one, own, heat in list(zip(parts, pixels, said, heats, strict=True))[1:]:
            other = structure[..., : own.shape[-2], : own.shape[-1]]
            pulled = own + weight * heat * (other - own)
            value = self._unview(pulled, one[:, :channels], call).to(part.dtype)
            found.append(torch.cat([value, part[:, channels:]], 1))
        return found

    def _structure(self, call: Call, fresh: Tensor) -> Tensor:
        """The structure of each row, ``[R, C, h, w]``: this step's, or that of the step before."""
        warmup = self._options.warmup
        if warmup is None:
            return fresh
        stale = call.step.index > warmup
        used = [
            self._kept.get(row, one) if stale else one
            for row, one in zip(call.rows, fresh, strict=True)
        ]
        self._kept |= zip(call.rows, fresh, strict=True)
        return torch.stack(used)

    def _view(self, value: Tensor, pixels: Tensor, call: Call) -> Tensor:
        """An output as what is pulled, in float32."""
        if self._options.space == "output":
            return value.float()
        network = type(self._denoiser.core).__name__
        return convert(value.float(), pixels.float(), call.step, "x0", network)

    def _unview(self, value: Tensor, pixels: Tensor, call: Call) -> Tensor:
        """What was pulled as an output."""
        if self._options.space == "output":
            return value
        network = type(self._denoiser.core).__name__
        return answer(pixels.float(), value, call.step, network)

    def _say(self, step: int, exchange: Exchange | None) -> None:
        counts = self._counts
        sent = f", and sent {exchange.bytes:,} bytes" if exchange is not None else ""
        self._tally.change = (
            f"{counts.combs} calls in {step * step} combs, {counts.windows} in windows; this "
            f"process computed {counts.computed} patches{sent}"
        )


@dataclass(frozen=True)
class Asking:
    """One call of the network that is made in patches.

    Attributes:
        call: The call.
        inner: The network.
        canvas: The call's picture.
        exchange: Who shares the patches; ``None``: this process has them all.
        counts: Are told what is computed here.
    """

    call: Call
    inner: Inner
    canvas: Canvas
    exchange: Exchange | None
    counts: Counts

    def computed(
        self, patches: Sequence[Patch], pixels: Sequence[Tensor], heat: Heat | None = None
    ) -> list[Tensor]:
        """What the network says of each patch, ``[R, C, rows, columns]``, from who computes it.

        Args:
            patches: In rounds of one a process.
            pixels: ``[R, C, rows, columns]`` of each.
            heat: Its map is one more channel.
        """
        if self.exchange is None:
            given = zip(patches, pixels, strict=True)
            return [self._one(patch, one, heat) for patch, one in given]
        size, rank = self.exchange.size, self.exchange.rank
        rounds, mine = [], None
        for first in range(0, len(patches), size):
            place = first + rank
            if place < len(patches) or mine is None:  # who has none computes one: for its form
                place = min(place, len(patches) - 1)
                mine = self._one(patches[place], pixels[place], heat)
            shapes = [(*mine.shape[:2], *one.shape[-2:]) for one in pixels[first : first + size]]
            lengths = [math.prod(shape) for shape in shapes] + [0] * (size - len(shapes))
            own = mine.flatten()[: lengths[rank]]
            rounds.append((self.exchange.begin(own, lengths), shapes))
        return [
            part.reshape(shape)
            for pending, shapes in rounds
            for part, shape in zip(pending.parts(), shapes, strict=False)
        ]

    def _one(self, patch: Patch, pixels: Tensor, heat: Heat | None) -> Tensor:
        call = self.canvas.call(patch, pixels)
        self.counts.computed += 1
        with heat.watching() if heat is not None else nullcontext():
            value = self.inner(call).value
            found = self.canvas.answer(patch, value)
            if heat is None:
                return found
            map_ = heat.map(call, *found.shape[-2:])
        return torch.cat([found, map_.to(found.dtype)], 1)
