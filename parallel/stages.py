"""A transformer cut into stages, a process each, through which the patches of a picture flow.

A process runs the blocks of its own stage alone: it takes in what the stage before sends, and sends
on what comes out. Each of its attentions keeps the keys and values of the whole picture, of which a
patch that comes through renews its own: patches before it are of this step, those behind it of the
step before. The text goes with the first patch, or with each where a model cannot do without.

At every call the pipeline of stages fills and empties: with N stages and M patches the busiest
process is at work for M of M + N - 1 turns. What overlaps the end of a step with the beginning of
the next would have to step the scheduler patch by patch, between guidance branches that the
pipeline has yet to combine; so it goes with any scheduler, guidance and cache instead.

While the steps are fresh, one patch is the whole picture; then the answer is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from accel.errors import UnsupportedModel
from accel.seams.attention import Asked, answer_attention
from accel.seams.blocks import Block, find_blocks, wrap_call
from accel.seams.denoisers import Call, Denoiser, Inner, Result
from accel.seams.modules import find_modules
from accel.seams.places import Cuts
from accel.seams.token_stream import wrap_inside
from accel.seams.tokens import MASKED_BY_QUERY, NEEDS_TEXT, TEXT_FIRST, TEXT_LAST, refuse_row_by_row
from parallel.age import Age
from parallel.components import Balance
from parallel.elsewhere import Elsewhere

if TYPE_CHECKING:
    from accel.attach import Site, Undo
    from accel.report import Tally
    from parallel.exchange import Exchange, Sent
    from parallel.mesh import Axis


@dataclass(frozen=True)
class Pair:
    """Keys and values of one attention, ``[B, H, S, D]``, of text and picture.

    Attributes:
        mask: Which of them are attended to, by every query alike; ``None``: all.
    """

    key: Tensor
    value: Tensor
    mask: Tensor | None

    @property
    def bytes(self) -> int:
        """Memory that they take."""
        masked = 0 if self.mask is None else self.mask.nbytes
        return self.key.nbytes + self.value.nbytes + masked


@dataclass
class Now:
    """The call that is under way.

    Attributes:
        exchange: The processes.
        counted: Whether it is known which of them runs what; else all run everything.
        pairs: By attention, what is kept for the rows of the call.
        patches: How many there are; 1: the picture is whole.
        patch: Which of them is on its way.
        tokens: Of the picture; known as soon as they are cut.
        parts: What the last stage has answered to the patches before.
        sent: What is under way to the next stage.
        received: Whether the stage before has given what it has to this pass.
        passed: Whether the next stage has been given what it needs.
    """

    exchange: Exchange
    counted: bool
    pairs: dict[str, Pair]
    patches: int
    patch: int = 0
    tokens: int = 0
    parts: list[Tensor] = field(default_factory=list)
    sent: list[Sent] = field(default_factory=list)
    received: bool = False
    passed: bool = False

    def begin(self, patch: int) -> None:
        """A patch comes."""
        self.patch = patch
        self.received = self.exchange.rank == 0
        self.passed = self.last

    def end(self) -> None:
        """It has gone through.

        Raises:
            UnsupportedModel: If no block from the own stage on has been run.
        """
        if not self.received:
            raise UnsupportedModel(
                "The network has left out all blocks of the last stage (skip layers): "
                "parallel.PipeFusion does not fit. Start fewer processes."
            )

    @property
    def last(self) -> bool:
        """Whether this process has the last stage."""
        return self.exchange.rank == self.exchange.size - 1


class Stages:
    """The stages of one network.

    Args:
        denoiser: The network.
        axis: Who shares it.
        patches: In how many parts a picture flows.
        warmup: Steps after the first one in which it flows whole.
        split: Whether the weights of other stages lie elsewhere.
        tally: Is told what was done.

    Raises:
        UnsupportedModel: For a network without a list of blocks, or of which it is not known where
            its tokens are, and its text.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        axis: Axis,
        patches: int,
        warmup: int,
        split: bool,
        tally: Tally,
    ) -> None:
        self._denoiser = denoiser
        self._axis = axis
        self._patches = patches
        self._warmup = warmup
        self._split = split
        self._tally = tally
        kind = type(denoiser.core).__name__
        if kind in MASKED_BY_QUERY:
            raise _masked(kind)
        self._cuts = Cuts(denoiser)
        self._blocks = find_blocks(denoiser)
        self._text_first = _text_first(denoiser, self._cuts)
        self._needs_text = kind in NEEDS_TEXT
        self._balance = Balance(len(self._blocks))
        self._elsewhere = Elsewhere()
        self._kept: dict[Hashable, dict[str, Pair]] = {}
        self._age = Age(self._kept.clear)
        self._now: Now | None = None

    @property
    def bytes(self) -> int:
        """Memory of the keys and values that are kept."""
        return sum(pair.bytes for pairs in self._kept.values() for pair in pairs.values())

    def reset(self) -> None:
        """Forget the run before; what the blocks cost is known for good."""
        self._kept.clear()
        self._age.reset()
        self._now = None
        self._tally.change = None

    def release(self) -> None:
        """Let go of what is kept, and bring the weights back."""
        self._kept.clear()
        self._now = None
        self._elsewhere.bring_back()

    def attach(self, site: Site) -> Iterator[Undo]:
        """Hook the network, its blocks, its attentions, and where its tokens are cut."""
        yield wrap_inside(self._denoiser.core, self._passes)
        for index, block in enumerate(self._blocks):
            yield wrap_call(block.module, partial(self._block, index))
        yield from self._cuts.attach()  # around the blocks: tokens may be cut at the first one
        for one in find_modules(self._denoiser):
            if one.kind == "self":
                yield answer_attention(one, partial(self._attention, one.path))
        yield site.around(self._denoiser, self)

    def __call__(self, call: Call, inner: Inner) -> Result:
        """Run the blocks of one stage here; the answer is that of the last one."""
        if self._axis.size == 1:
            return inner(call)
        exchange = self._axis.exchange(call.sample.device.type)
        key = (call.rows, tuple(call.sample.shape[1:]))
        age = self._age.of(call)
        pairs = self._kept.setdefault(key, {})
        fresh = age <= self._warmup or not pairs
        self._now = now = Now(exchange, self._balance.known, pairs, 1 if fresh else self._patches)
        try:
            result = inner(call)
            for sent in now.sent:
                sent.wait()
        finally:
            self._now = self._cuts.shares = None
        value = exchange.agreed(result.value, exchange.size - 1)
        if now.counted:
            self._say(now)
        else:
            self._settle(now)
        return Result(value, result.fresh)

    def cut(self, value: Tensor, dim: int, text: bool, /) -> Tensor:
        """The tokens of the patch that is on its way, and the text where it goes with it."""
        now = self._now
        assert now is not None
        if text:
            return value if self._with_text(now) else value.narrow(dim, 0, 0)
        now.tokens = value.shape[dim]
        return value.tensor_split(now.patches, dim)[now.patch]

    def joined(self, value: Tensor, dim: int, /) -> Tensor:
        """All tokens: the true ones in the last stage, when the last patch has come through."""
        now = self._now
        assert now is not None
        shape = list(value.shape)
        shape[dim] = now.tokens
        if not now.last:
            return value.new_zeros(shape)
        now.parts.append(value)
        if now.patch < now.patches - 1:
            return value.new_zeros(shape)
        return torch.cat(now.parts, dim)

    def _passes(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The network, once for each patch; the answer to the last one is that to all."""
        now = self._now
        if now is None or not now.counted:
            return inner(*args, **kwargs)
        if now.patches == 1:
            now.begin(0)
            answer = inner(*args, **kwargs)
            now.end()
            return answer
        given = dict(zip(self._denoiser.parameters, args, strict=False)) | kwargs
        self._cuts.shares = self
        for patch in range(now.patches):
            now.begin(patch)
            answer = inner(**self._cuts.arguments(given))
            now.end()
        return answer

    def _block(self, index: int, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        now, block = self._now, self._blocks[index]
        if now is None:
            return inner(*args, **kwargs)
        if not now.counted:
            answer = self._balance.counted(index, inner, *args, **kwargs)
            block.outputs(answer)  # so that it knows how it answers
            return answer
        own = self._span(now)
        if index < own.start:
            return block.returns(block.inputs(block.bind(args, kwargs)))
        if not now.received:
            args, kwargs = self._received(block, args, kwargs, now)
        if index in own:
            return inner(*args, **kwargs)
        streams = block.inputs(block.bind(args, kwargs))
        if not now.passed:
            going = [streams[name] for name in sorted(streams)]
            now.sent.append(now.exchange.send(going, now.exchange.rank + 1))
            now.passed = True
        return block.returns(streams)

    def _received(
        self, block: Block, args: tuple[Any, ...], kwargs: dict[str, Any], now: Now
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of the first block that runs from the own stage on."""
        like = block.inputs(block.bind(args, kwargs))
        names = sorted(like)
        came = now.exchange.receive([like[name] for name in names], now.exchange.rank - 1)
        now.received = True
        return block.given(args, kwargs, dict(zip(names, came, strict=True)))

    def _span(self, now: Now) -> range:
        """The blocks of this process."""
        ends = (0, *self._balance.ends(now.exchange.size))
        return range(ends[now.exchange.rank], ends[now.exchange.rank + 1])

    def _attention(self, path: str, asked: Asked) -> Tensor:
        now = self._now
        if now is None:
            return asked.dense()
        mask = asked.attn_mask
        if mask is not None and mask.shape[-2] != 1:
            raise _masked(f"{self._denoiser.name}.{path}")
        if now.patches == 1:
            held = None if mask is None else mask.clone()
            now.pairs[path] = Pair(asked.key.clone(), asked.value.clone(), held)
            return asked.dense()
        pair = now.pairs[path]
        text = pair.key.shape[2] - now.tokens
        for whole, part in ((pair.key, asked.key), (pair.value, asked.value)):
            self._renew(whole, part, now, text)
        kept = {"key": pair.key, "value": pair.value, "attn_mask": pair.mask}
        return Asked(**{**vars(asked), **kept}).dense()

    def _with_text(self, now: Now) -> bool:
        return now.patch == 0 or self._needs_text

    def _renew(self, whole: Tensor, part: Tensor, now: Now, text: int) -> None:
        """Put what belongs to a patch where it is, in all tokens of an attention."""
        each, more = divmod(now.tokens, now.patches)
        begin = now.patch * each + min(now.patch, more)
        count = each + (now.patch < more)
        carried = text if self._with_text(now) else 0
        at = text if self._text_first else 0
        own = carried if self._text_first else 0
        whole.narrow(2, at + begin, count).copy_(part.narrow(2, own, count))
        if carried:
            source = 0 if self._text_first else count
            target = 0 if self._text_first else now.tokens
            whole.narrow(2, target, text).copy_(part.narrow(2, source, text))

    def _settle(self, now: Now) -> None:
        """Every process has run everything: from now on each has a stage."""
        own = self._span(now)
        others = [one for index, one in enumerate(self._blocks) if index not in own]
        paths = {id(module): path for path, module in self._denoiser.core.named_modules()}
        foreign = tuple(f"{paths[id(block.module)]}." for block in others)
        for path in [path for path in now.pairs if path.startswith(foreign)]:
            del now.pairs[path]
        if self._split:
            for block in others:
                self._elsewhere.put(block.module)

    def _say(self, now: Now) -> None:
        own, exchange = self._span(now), now.exchange
        away = f"; {self._elsewhere.bytes:,} bytes of weights elsewhere" if self._split else ""
        self._tally.change = (
            f"{exchange.size} stages of {len(self._blocks)} blocks, blocks {own.start} to "
            f"{own.stop - 1} here, {self._patches} patches; this process sent "
            f"{exchange.bytes:,} bytes{away}"
        )


def _masked(who: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"{who} attends under a mask that differs between queries, of which patches would need a "
        "part: parallel.PipeFusion does not fit. Use parallel.AsyncDiff."
    )


def _text_first(denoiser: Denoiser, cuts: Cuts) -> bool:
    """Whether text comes before the picture in attention; of no matter where it does not.

    Raises:
        UnsupportedModel: If it is not known.
    """
    refuse_row_by_row(denoiser, "parallel.PipeFusion")
    kind = type(denoiser.core).__name__
    if cuts.ends != 1:
        raise UnsupportedModel(
            f"{kind} answers with more than one stream of tokens, so parallel.PipeFusion does not "
            "fit. Use parallel.AsyncDiff."
        )
    if cuts.of_text and kind not in (*TEXT_FIRST, *TEXT_LAST):
        raise UnsupportedModel(
            f"{kind}: nobody has said whether text comes before or behind the picture in its "
            "attention, so parallel.PipeFusion does not fit. Use parallel.AsyncDiff, or add it "
            "to accel/seams/tokens.py."
        )
    return kind in TEXT_FIRST
