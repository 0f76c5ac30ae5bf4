"""A queue of blocks of a clip at falling noise, and the layers that a process computes for them.

Each iteration appends a block of noise at the tail, takes every block of the queue through the
network for one step, the tail first, and pops the head once it is clean. A block sees the end of
the one before it as frames of its own call, and the beginning of the one behind it by the keys and
values that this one has left in every layer just before.

The layers lie in the processes one after the other, and blocks flow through them: the first
process holds the queue and its solvers and sends on; the last one guides, and sends the guided
output back; the first waits for it only when it needs the block again, an iteration later.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from accel import hooks
from accel.errors import BadInput, UnsupportedModel
from accel.seams.attention import UNREACHED, Asked, answer_attention
from accel.seams.blocks import Block, find_blocks
from accel.seams.clips import Positions
from accel.seams.modules import find_modules
from parallel.components import cut, tensors

if TYPE_CHECKING:
    from accel.attach import Site, Undo
    from accel.report import Tally
    from accel.seams.denoisers import Denoiser
    from accel.seams.loop import Evaluation, Question
    from parallel.dualparal import Left, Noise
    from parallel.exchange import Exchange, Sent
    from parallel.mesh import Axis

UNDER_WAY = 2
"""Messages to the next process that may be on their way at once."""


@dataclass(frozen=True)
class Window:
    """The frames of one call.

    Attributes:
        start: Place of the first one in the clip.
        before: How many are of the block before.
        frames: All.
        context: Of the block's own, how many the block before it will see.
    """

    start: int
    before: int
    frames: int
    context: int


class Layers:
    """The layers of one network that this process computes, and what they keep for the next block.

    Args:
        denoiser: The network.

    Raises:
        UnsupportedModel: For a network whose frames are not known.
    """

    def __init__(self, denoiser: Denoiser) -> None:
        self._denoiser = denoiser
        self._positions = Positions(denoiser)
        config = denoiser.core.config
        if config.in_channels != config.out_channels:
            raise UnsupportedModel(
                f"This {type(denoiser.core).__name__} is given {config.in_channels} channels and "
                f"answers {config.out_channels}: a picture or control goes beside the clip, and "
                "blocks of a clip fit only clips from text. Leave parallel.DualParal out."
            )
        self._blocks: tuple[Block, ...] = find_blocks(denoiser)
        self._modules = [each for each in find_modules(denoiser) if each.kind == "self"]
        self._window: Window | None = None
        self._exchange: Exchange | None = None
        self._own = range(len(self._blocks))
        self._kept: dict[Hashable, tuple[Tensor, Tensor]] = {}
        self._sent: deque[Sent] = deque()
        self._away: dict[int, torch.device] = {}

    def __len__(self) -> int:
        return len(self._blocks)

    @property
    def own(self) -> range:
        """Those that this process computes."""
        return self._own

    @property
    def bytes(self) -> int:
        """Memory of keys and values, and of what is on its way to the next process."""
        kept = sum(tensor.nbytes for pair in self._kept.values() for tensor in pair)
        return kept + sum(sent.flat.nbytes for sent in self._sent)

    def attach(self) -> Iterator[Undo]:
        """Hook the layers, their attention and the positions."""
        for block in self._blocks:
            yield block.wrap(partial(self._layer, block))
        for module in self._modules:
            yield answer_attention(module, partial(self._attend, module.index))
        yield hooks.wrap(self._positions.rope, "forward", self._rotary)
        yield self._bring_back

    def begin(self, exchange: Exchange | None) -> None:
        """A run begins; the layers are shared out so that the processes compute alike.

        Raises:
            BadInput: If there are more processes than layers.
        """
        self.release()
        self._exchange = exchange
        if exchange is not None:  # the tokens are the same everywhere: weights tell the operations
            weights = [sum(p.numel() for p in one.module.parameters()) for one in self._blocks]
            ends = (0, *cut(weights, exchange.size))
            self._own = range(ends[exchange.rank], ends[exchange.rank + 1])
            self._put_away()

    def release(self) -> None:
        """Let go of what is kept."""
        self.forget()
        self._sent.clear()
        self._window = self._exchange = None
        self._own = range(len(self._blocks))

    def _put_away(self) -> None:
        """Let the weights of the other processes' layers wait on the host."""
        for block in self._blocks:
            device = next(block.module.parameters()).device
            if block.index not in self._own and device.type != "cpu":
                self._away[block.index] = device
                block.module.to("cpu")

    def _bring_back(self) -> None:
        for index, device in self._away.items():
            self._blocks[index].module.to(device)
        self._away.clear()

    def forget(self) -> None:
        """What is kept is of no neighbour: the next block is the tail."""
        self._kept.clear()

    def finish(self) -> None:
        """Let everything arrive."""
        while self._sent:
            self._sent.popleft().wait()

    @contextmanager
    def window(self, window: Window) -> Iterator[None]:
        """While it is entered, calls of the network are of these frames.

        Raises:
            UnsupportedModel: If no attention was reached that keeps something.
        """
        self._window = window
        try:
            yield
        finally:
            self._window = None
        if window.context and not self._kept:
            raise UnsupportedModel(
                f"No attention of {type(self._denoiser.core).__name__} {UNREACHED}. So blocks of a "
                "clip do not fit: they could not see each other. Undo that, or set context to 0."
            )

    def _layer(self, block: Block, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        exchange = self._exchange
        if self._window is None or exchange is None:
            return inner(*args, **kwargs)
        arguments = block.bind(args, kwargs)
        hidden: Tensor = arguments[block.hidden]
        if block.index not in self._own:
            return hidden  # which nobody reads: what counts here comes from the process before
        if block.index == self._own.start and exchange.rank > 0:
            [hidden] = exchange.receive([hidden], exchange.rank - 1)
        answer = inner(**(arguments | {block.hidden: hidden}))
        if block.index == self._own.stop - 1 and exchange.rank < exchange.size - 1:
            while len(self._sent) >= UNDER_WAY:
                self._sent.popleft().wait()
            self._sent.append(exchange.send([answer], exchange.rank + 1))
        return answer

    def _attend(self, index: int, asked: Asked) -> Tensor:
        """Look also at what the block behind has left here; leave as much for the one before."""
        window = self._window
        if window is None or not window.context:
            return asked.dense()
        frame = asked.key.shape[-2] // window.frames
        own = slice(window.before * frame, (window.before + window.context) * frame)
        key = (self._denoiser.rows, index)
        behind = self._kept.get(key)
        self._kept[key] = asked.key[..., own, :].clone(), asked.value[..., own, :].clone()
        if behind is None:
            return asked.dense()
        keys = torch.cat([asked.key, behind[0]], -2)
        return replace(asked, key=keys, value=torch.cat([asked.value, behind[1]], -2)).dense()

    def _rotary(self, inner: Callable[..., Any], x: Tensor) -> Any:
        return inner(x) if self._window is None else self._positions.of(x, self._window.start)


@dataclass(eq=False)
class Part:
    """A block of the clip on its way through the queue.

    Attributes:
        start: Place of its first frame in the clip.
        latents: ``[B, C, F, H, W]``; noise that nobody reads where the process holds no queue.
        solver: Its own copy of the pipeline's scheduler.
        ending: Its last frames as they were before the latest step that was begun.
        at: Steps that were begun.
    """

    start: int
    latents: Tensor
    solver: Any
    ending: Tensor
    at: int = 0

    @property
    def frames(self) -> int:
        """How many it has."""
        return self.latents.shape[2]

    @property
    def bytes(self) -> int:
        """Memory of its latents and of what its solver looks back on."""
        kept = [] if self.solver is None else list(vars(self.solver).values())
        return sum(tensor.nbytes for tensor in (self.latents, self.ending, *tensors(kept)))


@dataclass(frozen=True)
class Waiting:
    """A guided output that the last process has not sent yet."""

    part: Part
    evaluation: Evaluation
    like: Tensor


class BlockQueue:
    """Owns the loop of a pipeline: see `accel.seams.loop.Owner`.

    Args:
        frames: Latent frames of a block.
        context: Frames that it sees of each neighbour.
        left: Whether those of the one before are as noisy as the block, or the latest there are.
        noise: Whether each block has noise of its own, or that of the first ones in another order.
        axis: Who shares the layers.
        tally: Is told what was done.
    """

    def __init__(
        self, frames: int, context: int, left: Left, noise: Noise, axis: Axis, tally: Tally
    ) -> None:
        self._frames, self._context = frames, context
        self._left, self._noise = left, noise
        self._axis, self._tally = axis, tally
        self._layers: dict[str, Layers] = {}
        self._clear()

    def attach(self, site: Site) -> Iterator[Undo]:
        """Hook every network."""
        for denoiser in site.denoisers:
            self._layers[denoiser.name] = layers = Layers(denoiser)
            yield from layers.attach()
        yield self.release
        yield site.on_start(self.reset)

    def reset(self) -> None:
        """A run starts: forget the one before."""
        self.release()
        self._tally.change = None

    def release(self) -> None:
        """Let go of everything; what is still under way arrives first, or else it would later."""
        self._drain()
        for layers in self._layers.values():
            layers.release()
        self._clear()

    def _clear(self) -> None:
        self._evaluations: list[Evaluation] = []
        self._complete = False
        self._parts: deque[Part] = deque()
        self._waiting: deque[Waiting] = deque()
        self._returned: deque[Sent] = deque()
        self._done: list[Part] = []
        self._clip: Tensor | None = None
        self._solver: Any = None
        self._exchange: Exchange | None = None

    @property
    def bytes(self) -> int:
        """Memory of the queue and of the layers, all but the clip's latents, begun or finished."""
        parts = sum(part.bytes for part in (*self._done[-1:], *self._parts))
        under_way = sum(sent.flat.nbytes for sent in self._returned)
        return parts + under_way + sum(each.bytes for each in self._layers.values())

    # what the loop's seam asks for

    def begin(self, latents: Tensor, solver: Any) -> None:
        """A run begins.

        Raises:
            BadInput: If the context is longer than a block, or the latents are no clip.
        """
        if latents.ndim != 5 or latents.shape[2] < 1:
            raise BadInput(f"parallel.DualParal takes clips [B, C, F, H, W], not {latents.shape}.")
        self._clip, self._solver = latents, solver
        if self._axis.size > 1:
            self._exchange = self._axis.exchange(latents.device.type)
        for layers in self._layers.values():
            layers.begin(self._exchange)

    def evaluate(self, evaluation: Evaluation) -> Tensor:
        """Go on by one iteration; behind the pipeline's last step by all that are left.

        The pipeline's latents stay the noise that they were until then.
        """
        assert self._clip is not None
        questions = tuple(_timed(question) for question in evaluation.questions)
        self._evaluations.append(replace(evaluation, latents=self._clip, questions=questions))
        self._complete = evaluation.step.last
        self._iterate()
        if not self._complete:
            return self._clip
        while self._parts or self._next < self._count:
            self._iterate()
        return self._finished()

    # the queue

    @property
    def _next(self) -> int:
        """The block that is appended next."""
        return len(self._done) + len(self._parts)

    @property
    def _count(self) -> int:
        """Blocks of the clip."""
        assert self._clip is not None
        return -(-self._clip.shape[2] // self._frames)

    def _iterate(self) -> None:
        """Append a block, take all through the network once, pop what is clean."""
        if self._next < self._count:
            self._append(self._next)
        for layers in self._layers.values():
            layers.forget()
        line: list[Part | None] = [*self._parts]
        line.insert(0, self._done[-1] if self._done else None)
        for before, part in reversed([*zip(line, self._parts, strict=False)]):
            self._advance(part, before)
        self._tally.peak = max(self._tally.peak, self.bytes)
        if self._complete and self._parts[0].at == len(self._evaluations):
            self._done.append(self._parts.popleft())

    def _append(self, index: int) -> None:
        latents = self._begun(index)
        solver = copy.deepcopy(self._solver) if self._steps_here else None
        self._parts.append(Part(index * self._frames, latents, solver, self._ending(latents)))

    @property
    def _steps_here(self) -> bool:
        """Whether this process holds the queue and its solvers."""
        return self._exchange is None or self._exchange.rank == 0

    def _begun(self, index: int) -> Tensor:
        """What a block begins with: its part of the clip's noise, or the first one's, shuffled."""
        assert self._clip is not None
        start = index * self._frames
        own = self._clip[:, :, start : start + self._frames]
        if self._noise == "own" or not index:
            return own
        draw = torch.Generator().manual_seed(index)
        order = torch.randperm(self._frames, generator=draw)[: own.shape[2]]
        return self._clip[:, :, order.to(self._clip.device)]

    def _ending(self, latents: Tensor) -> Tensor:
        """The frames that the block behind sees."""
        return latents[:, :, max(latents.shape[2] - self._context, 0) :].clone()

    def _advance(self, part: Part, before: Part | None) -> None:
        """Take a block through the network for a step."""
        evaluation = self._evaluations[part.at]
        self._settle(part)
        x, shown = part.latents, 0
        if before is not None and self._context:
            seen = self._seen(before)
            x, shown = torch.cat([seen, x], 2), seen.shape[2]
        window = Window(part.start - shown, shown, x.shape[2], min(self._context, part.frames))
        answers: dict[str, Tensor] = {}
        for question in evaluation.questions:
            with self._layers[question.call.denoiser.name].window(window):
                found = question.answers(x)
            answers |= {branch: value[:, :, shown:] for branch, value in found.items()}
        part.at += 1
        part.ending = self._ending(part.latents)
        self._guide(part, evaluation, evaluation.guided(answers))

    def _seen(self, before: Part) -> Tensor:
        """What a block sees of the one before, which is a step ahead of it."""
        if self._left == "level":
            return before.ending
        self._settle(before)
        return self._ending(before.latents)

    def _guide(self, part: Part, evaluation: Evaluation, guided: Tensor) -> None:
        """Step the block, or bring its guided output to the process that does."""
        exchange = self._exchange
        if exchange is None:
            self._step(part, evaluation, guided)
        elif exchange.rank == exchange.size - 1:
            # over the host: between devices, messages the other way would have to wait for it
            self._returned.append(exchange.send([guided.cpu()], 0))
            while len(self._returned) > 2 * self._longest:
                self._returned.popleft().wait()
        elif exchange.rank == 0:
            like = torch.empty(1, dtype=guided.dtype).expand(guided.shape)
            self._waiting.append(Waiting(part, evaluation, like))

    @property
    def _longest(self) -> int:
        """The most blocks that the queue comes to hold, and one."""
        total = self._evaluations[0].step.total
        return 1 + min(self._count, total or self._count)

    def _step(self, part: Part, evaluation: Evaluation, guided: Tensor) -> None:
        timestep = part.solver.timesteps[evaluation.step.position]
        part.latents = part.solver.step(guided, timestep, part.latents, **evaluation.options)[0]

    def _settle(self, part: Part) -> None:
        """Wait until a block has made all its steps that were begun."""
        while any(one.part is part for one in self._waiting):
            self._receive()

    def _receive(self) -> None:
        """Make the step that was begun first of those that were not made."""
        assert self._exchange is not None
        one = self._waiting.popleft()
        [guided] = self._exchange.receive([one.like], self._exchange.size - 1)
        self._step(one.part, one.evaluation, guided.to(one.part.latents.device))

    def _drain(self) -> None:
        """Make all steps that were begun, and let arrive what was sent."""
        while self._waiting:
            self._receive()
        for sent in self._returned:
            sent.wait()
        self._returned.clear()
        for layers in self._layers.values():
            layers.finish()

    def _finished(self) -> Tensor:
        """The clip, in every process."""
        assert self._clip is not None
        self._drain()
        found = torch.cat([part.latents for part in self._done], 2).to(self._clip.dtype)
        if self._exchange is not None:
            likes = [[found], *([[]] * (self._exchange.size - 1))]
            mine = [found] if self._exchange.rank == 0 else []
            found = self._exchange.share(mine, likes)[0][0]
        self._tell()
        return found

    def _tell(self) -> None:
        """Say what was done."""
        assert self._clip is not None
        frames, count, exchange = self._clip.shape[2], self._count, self._exchange
        if count == 1 and exchange is None:
            self._tally.reason = lambda: (
                f"the clip has {frames} latent frames, which one block of {self._frames} holds"
            )
            return
        told = (
            f"{frames} latent frames in {count} blocks of {self._frames}, "
            f"{self._longest - 1} of them under way at most"
        )
        if exchange is not None:
            layers = next(iter(self._layers.values()))
            told += (
                f"; layers {layers.own.start + 1} to {layers.own.stop} of {len(layers)} here; "
                f"this process sent {exchange.bytes:,} bytes"
            )
        self._tally.change = told


def _timed(question: Question) -> Question:
    """The same with one timestep a row, where there is one for each token (Wan 2.2 TI2V).

    Raises:
        UnsupportedModel: If they differ: some frames are given, and no noise.
    """
    given = question.call.arguments
    times = given.get("timestep")
    if not isinstance(times, Tensor) or times.ndim < 2:
        return question
    if bool((times != times[:, :1]).any()):
        raise UnsupportedModel(
            "This pipeline gives some frames of the clip (a picture that it begins with), and "
            "blocks of a clip fit only what is made from noise alone. Leave parallel.DualParal out."
        )
    changed = given | {"timestep": times[:, 0]}
    return replace(question, call=replace(question.call, arguments=changed))
