"""Clip parallelism: each process has a run of a clip's frames, and asks for what it sees of others.

What looks along time is given other frames beside its own: attention those of two scopes, one next
to the run and one spread over the clip (`parallel.scopes`). All else is a matter of single frames.
Each process gets from each other one what it sees of its frames, in one message: what a process
sends does not grow with their number. The answer is gathered, and every process goes on with the
whole latent.

Scopes may be weighted: while there is much noise the global one counts more, later the local one.
Where both together are the whole clip and nothing is weighted, this is one process's attention.

UNets with layers along time are in `parallel.frames`; here are transformers whose tokens attend to
all of space and time at once: their tokens are shared out by whole frames.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from accel.errors import UnsupportedModel
from accel.seams.attention import Asked, answer_attention
from accel.seams.denoisers import Call, Denoiser, Inner, Result
from accel.seams.modules import find_modules
from accel.seams.offload import check_whole
from accel.seams.places import Cuts
from accel.seams.tokens import (
    APART,
    FRAME_BY_FRAME,
    PADDED,
    ROW_BY_ROW,
    TEXT_FIRST,
    TEXT_LAST,
    patches_of,
)
from parallel.age import Age
from parallel.exchange import Exchange, Parts
from parallel.scopes import Scope

if TYPE_CHECKING:
    from accel.attach import Site, Undo
    from accel.report import Tally
    from accel.trajectory import Step
    from parallel.mesh import Axis


@dataclass(frozen=True)
class Options:
    """How much of a clip a process sees, and how.

    Attributes:
        reach: Frames on either side of its own.
        anchors: Frames of the whole clip that all see.
        bias: What is added to the logits of the scope that counts more.
        switch: Share of noise from which on that is the global one.
        mode: ``sync``: others' frames are fresh; ``stale``: of the step before.
        warmup: Steps after the first one in which they are fresh all the same.
    """

    reach: int
    anchors: int
    bias: float
    switch: float
    mode: Literal["sync", "stale"]
    warmup: int

    def early(self, step: Step) -> bool:
        """Whether the global scope counts more: by σ/(α + σ), a flow's own time."""
        _, alpha, noise = step.level
        return noise / (alpha + noise) >= self.switch

    def fresh(self, age: int) -> bool:
        """Whether others' frames have to be those of this step, of so many before it."""
        return self.mode == "sync" or age <= self.warmup


@dataclass(eq=False)
class Now:
    """The call that is under way.

    Attributes:
        scope: Who has which frames.
        exchange: The processes.
        who: What is kept is kept for these rows.
        fresh: Whether others' frames have to be of this step.
        early: Whether the global scope counts more.
        tokens: Keys that a frame is in an attention along time.
    """

    scope: Scope
    exchange: Exchange
    who: Hashable
    fresh: bool
    early: bool
    tokens: int
    _bias: Tensor | None = None

    @property
    def own(self) -> range:
        """The frames of this process."""
        return self.scope.own(self.exchange.rank)

    def every(self, reach: int) -> list[range]:
        """Of each process its frames and so many on either side."""
        return [self.scope.near(rank, reach) for rank in range(self.exchange.size)]

    @cached_property
    def seen(self) -> list[tuple[int, ...]]:
        """Of each process the frames of both its scopes."""
        return [self.scope.seen(rank) for rank in range(self.exchange.size)]

    def bias(self, like: Tensor, amount: float) -> Tensor | None:
        """What is added to logits of the frames seen, ``[1, 1, 1, K]``; ``None``: all alike."""
        favoured = self.scope.favoured(self.exchange.rank, self.early)
        if not amount or len(set(favoured)) == 1:
            return None
        if self._bias is None:
            frames = torch.tensor(favoured, dtype=like.dtype, device=like.device) * amount
            self._bias = frames.repeat_interleave(self.tokens).view(1, 1, 1, -1)
        return self._bias


class Clips(ABC):
    """Shares the calls of one network out by frames.

    Args:
        denoiser: The network.
        axis: Who shares.
        options: What they see of each other.
        tally: Is told what was done.

    Attributes:
        reads: Whether it computes with the weights of layers that it does not call.
    """

    reads: ClassVar[bool] = False

    def __init__(self, denoiser: Denoiser, axis: Axis, options: Options, tally: Tally) -> None:
        self._denoiser = denoiser
        self._axis = axis
        self._options = options
        self._tally = tally
        self._kind = type(denoiser.core).__name__
        self._kept: dict[Hashable, Parts] = {}
        self._age = Age(self._forget)
        self._now: Now | None = None

    @property
    def bytes(self) -> int:
        """Memory of what is kept for the next step."""
        return sum(sent.bytes for sent in self._kept.values())

    def reset(self) -> None:
        """Forget the run before."""
        self.release()
        self._age.reset()
        self._tally.change = None

    def release(self) -> None:
        """Let go of what is kept."""
        self._now = None
        self._forget()

    def _forget(self) -> None:
        """Let everything arrive, so that nobody is left waiting."""
        for sent in self._kept.values():
            sent.wait()
        self._kept.clear()

    def attach(self, site: Site) -> Iterator[Undo]:
        """Hook what looks along time.

        Raises:
            UnsupportedModel: If it is not known what something there sees, and for a network that
                is offloaded layer by layer if its layers' weights are read.
        """
        if self.reads:
            with site.beside("places of weights"):
                check_whole(self._denoiser.name, self._denoiser.core)
        yield from self._layers()
        yield site.around(self._denoiser, self)

    def __call__(self, call: Call, inner: Inner) -> Result:
        """Compute the frames of this process; the answer is the whole clip.

        Raises:
            BadInput: If there are fewer frames than processes.
        """
        if self._axis.size == 1:
            return inner(call)
        exchange = self._axis.exchange(call.sample.device.type)
        options, shape = self._options, tuple(call.sample.shape[1:])
        frames, tokens = self._grid(call)
        scope = Scope.of(frames, exchange.size, options.reach, options.anchors)
        fresh, early = options.fresh(self._age.of(call)), options.early(call.step)
        self._now = Now(scope, exchange, (call.rows, shape), fresh, early, tokens)
        try:
            value = self._compute(call, self._now, inner)
        finally:
            self._now = None
        self._tally.change = (
            f"{min(scope.lengths)} to {max(scope.lengths)} of {frames} frames each in "
            f"{exchange.size} processes; this one sent {exchange.bytes:,} bytes"
        )
        return Result(value, (True,) * len(call.rows))

    @abstractmethod
    def _layers(self) -> Iterator[Undo]:
        """Hook what looks along time."""

    @abstractmethod
    def _grid(self, call: Call) -> tuple[int, int]:
        """Frames of the clip as the network sees it, and keys of a frame in an attention."""

    @abstractmethod
    def _compute(self, call: Call, now: Now, inner: Inner, /) -> Tensor:
        """The answer for the whole clip, ``[rows, …]``."""

    def _attentions(self, kind: str) -> Iterator[Undo]:
        """Hook the attentions that go along time."""
        for one in find_modules(self._denoiser):
            if one.kind == kind:
                yield answer_attention(one, partial(self._attention, one.path))

    def _around(
        self,
        place: Hashable,
        x: Tensor,
        dim: int,
        wanted: Sequence[Sequence[int]],
        held: Sequence[range],
    ) -> Tensor:
        """What this process wants of an axis, in order: its own entries, and those of others.

        Args:
            place: What asks for it.
            x: Own entries.
            dim: The axis.
            wanted: The entries that each process wants, all of its own among them, in order.
            held: The entries that each process has.
        """
        now = self._now
        assert now is not None
        rank = now.exchange.rank
        mine = held[rank]
        parts = [
            _taken(
                x, [one - mine.start for one in each if one in mine] if other != rank else [], dim
            )
            for other, each in enumerate(wanted)
        ]
        counts = [sum(one in theirs for one in wanted[rank]) for theirs in held]
        shapes = [(*x.shape[:dim], count, *x.shape[dim + 1 :]) for count in counts]
        found = self._exchanged((place, now.who), now, parts, shapes).arrived()
        return torch.cat([*found[:rank], x, *found[rank + 1 :]], dim)

    def _exchanged(
        self, key: Hashable, now: Now, parts: list[Tensor], shapes: list[tuple[int, ...]]
    ) -> Parts:
        """What the others send: now, or in stale mode at the step before."""
        fresh = now.exchange.begin_parts(parts, shapes)
        if self._options.mode == "sync":
            return fresh
        before = self._kept.pop(key, None)
        self._kept[key] = fresh
        if before is None:
            return fresh
        before.wait()
        return fresh if now.fresh else before

    def _attention(self, path: str, asked: Asked) -> Tensor:
        """Own queries see the frames of both scopes, and all of the text."""
        now = self._now
        if now is None:
            return asked.dense()
        own = len(now.own)
        text = asked.key.shape[2] - own * now.tokens
        self._check(path, asked, text)
        words, frames = self._parts(torch.stack([asked.key, asked.value]), text, 3)
        frames = frames.reshape(*frames.shape[:3], own, now.tokens, frames.shape[4])
        seen = self._around(path, frames, 3, now.seen, now.every(0)).flatten(3, 4)
        key, value = (torch.cat([words, seen], 3) if text else seen).unbind()
        mask = self._mask(now, asked, text)
        return replace(asked, key=key, value=value, attn_mask=mask).dense()

    def _check(self, path: str, asked: Asked, text: int) -> None:
        """Refuse what is not known.

        Raises:
            UnsupportedModel: If it is under a mask, or not the tokens of own frames.
        """
        where, joint = f"{self._denoiser.name}.{path}", self._kind in (*TEXT_FIRST, *TEXT_LAST)
        if text < 0 or (text and not joint):
            raise UnsupportedModel(
                f"{where} attends to {asked.key.shape[2]} tokens, and the frames of this process "
                f"have {asked.key.shape[2] - text}, so clip parallelism does not fit: leave it out "
                "for this pipeline."
            )
        mask = asked.attn_mask
        padded = text and self._kind in PADDED and mask is not None and mask.dtype == torch.bool
        if asked.is_causal or not (mask is None or padded):
            raise UnsupportedModel(
                f"{where} attends under a mask, which clip parallelism does not share out, so it "
                "does not fit: leave it out for this pipeline."
            )

    def _parts(self, x: Tensor, text: int, dim: int) -> tuple[Tensor, Tensor]:
        """What belongs to the text, and what to the frames."""
        frames = x.shape[dim] - text
        if self._kind in TEXT_FIRST:
            return x.narrow(dim, 0, text), x.narrow(dim, text, frames)
        return x.narrow(dim, frames, text), x.narrow(dim, 0, frames)

    def _mask(self, now: Now, asked: Asked, text: int) -> Tensor | None:
        """What is added to the logits of text and frames; ``None``: nothing.

        The text counts as much as the scope that counts more.
        """
        query, given = asked.query, asked.attn_mask
        bias = now.bias(query, self._options.bias)
        if not text or (bias is None and given is None):
            return bias
        words = query.new_full((1, 1, 1, text), 0.0 if bias is None else self._options.bias)
        if given is not None:
            words = torch.where(self._parts(given, text, 3)[0], words, -math.inf)
        if bias is None:
            bias = query.new_zeros(1, 1, 1, len(now.seen[now.exchange.rank]) * now.tokens)
        return torch.cat([words, bias.expand(*words.shape[:3], -1)], 3)


class TokenClips(Clips):
    """Shares the tokens of one transformer out by frames."""

    def __init__(self, denoiser: Denoiser, axis: Axis, options: Options, tally: Tally) -> None:
        super().__init__(denoiser, axis, options, tally)
        self._cuts = Cuts(denoiser)

    def cut(self, value: Tensor, dim: int, text: bool, /) -> Tensor:
        """The tokens of own frames; all of the text's."""
        now = self._now
        assert now is not None
        if text:
            return value
        if value.shape[dim] != now.scope.frames * now.tokens:
            raise UnsupportedModel(
                f"{self._denoiser.name} works on {value.shape[dim]} tokens, which are not "
                f"{now.scope.frames} frames of {now.tokens}, so clip parallelism does not fit: "
                "leave it out for this pipeline."
            )
        return value.narrow(dim, now.own.start * now.tokens, len(now.own) * now.tokens)

    def joined(self, value: Tensor, dim: int, /) -> Tensor:
        """The tokens of all frames."""
        now = self._now
        assert now is not None
        return now.exchange.gather(value, [now.tokens * each for each in now.scope.lengths], dim)

    def _layers(self) -> Iterator[Undo]:
        yield from self._cuts.attach()
        yield from self._attentions("self")

    def _grid(self, call: Call) -> tuple[int, int]:
        frames, height, width = patches_of(call)
        return frames, height * width

    def _compute(self, call: Call, _now: Now, inner: Inner, /) -> Tensor:
        self._cuts.shares = self
        try:
            return inner(replace(call, arguments=self._cuts.arguments(call.arguments))).value
        finally:
            self._cuts.shares = None


def _taken(x: Tensor, entries: Sequence[int], dim: int) -> Tensor:
    """Some entries of an axis."""
    if not entries:
        return x.narrow(dim, 0, 0)
    return torch.cat([x.narrow(dim, entry, 1) for entry in entries], dim)


def clips_of(denoiser: Denoiser, axis: Axis, options: Options, tally: Tally) -> Clips:
    """What shares a network's calls out by frames.

    Raises:
        UnsupportedModel: For a network that makes no clip, or of which it is not known where the
            frames lie.
    """
    from accel.seams.frames import UNETS
    from parallel.frames import FrameClips

    kind = type(denoiser.core).__name__
    if kind in UNETS:
        return FrameClips(denoiser, axis, options, tally)
    if kind in FRAME_BY_FRAME:
        return TokenClips(denoiser, axis, options, tally)
    known = ", ".join(sorted((*UNETS, *FRAME_BY_FRAME)))
    nowhere = "it makes no clip, or nobody has said where its frames lie"
    why = APART if kind in ROW_BY_ROW else nowhere
    raise UnsupportedModel(
        f"{kind}: {why}, so parallel.VideoInfinity does not fit. It serves {known}; use "
        "parallel.CFG or parallel.AsyncDiff."
    )
