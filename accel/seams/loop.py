"""The denoising loop in other hands: a method makes the latents by evaluations of its own.

The pipeline's loop still runs, and tells step by step what it would have done: which networks it
calls with which arguments for each guidance branch, and how it guides. Its calls are answered
without a network. Before each ``scheduler.step`` the method that owns the loop is told of the
evaluation (`Evaluation`) and may make any others in its stead, on any latents, with the arguments
of any step seen so far; what it gives back are the latents that the pipeline goes on from. So
after the last step it comes out, and decodes, what the method made. What a pipeline computes beside
its networks (a ControlNet's residuals) is of the latents that it was given back.

How a pipeline guides is found out by what its calls are answered with: each branch a tensor of
zeros and ones of its own, from which the guided output shows the weight of each branch. A rule
that is no weighted mean of the branches at each place, the same for all places, is refused – but
for owners that guide by themselves, which do not ask.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from accel.errors import UnsupportedModel
from accel.seams.branches import Layout
from accel.seams.denoisers import Call, Denoiser, Inner, Layer, Result
from accel.seams.rows import index_rows
from accel.seams.token_stream import FOLDED
from accel.seams.tokens import FRAMES_SECOND
from accel.trajectory import Editor, Reviser, Step, Update

Undo = Callable[[], None]

UNCOND = "uncond"
CLOSE = 1e-3
"""How far a guided output may lie from a weighted mean whose weights sum to 1."""


@dataclass(frozen=True)
class Question:
    """A call that the pipeline made of a network, without its latents.

    Attributes:
        call: Its rows, step and arguments; the network's input is left out.
        below: The methods below the loop, and the network.
        dtype: Of the input that was left out.
        beside: The channels of it behind those of the latents, ``[rows, …]``: a picture, a mask.
    """

    call: Call
    below: Inner
    dtype: torch.dtype
    beside: Tensor | None = None

    def answers(self, samples: Tensor, **changed: Any) -> dict[str, Tensor]:
        """Ask it of other latents, through the methods below.

        Args:
            samples: ``[B, …]``, a sample each.
            **changed: Arguments to be given other values.

        Returns:
            By branch, ``[B, …]``.
        """
        return self.apart(self.below(self.asking(samples, **changed)).value)

    def asking(self, samples: Tensor, **changed: Any) -> Call:
        """The call that asks it of other latents ``[B, …]``; see `answers`."""
        rows = self.call.rows
        given = samples if len(rows) == len(samples) else samples[[row.sample for row in rows]]
        whole = given.to(self.dtype)
        if self.beside is not None:
            whole = torch.cat([whole, self.beside], _channels(self.call.denoiser))
        sample = {self.call.denoiser.sample_name: whole}
        return replace(self.call, arguments=self.call.arguments | changed | sample)

    def answers_of(self, sample: int, latents: Tensor) -> dict[str, Tensor]:
        """Ask it of other latents under what is given for one sample of the batch alone.

        Args:
            sample: Its place in the batch.
            latents: ``[1, …]``, scaled as the network wants it.

        Returns:
            By branch, ``[1, …]``.
        """
        count = 1 + max(row.sample for row in self.call.rows)
        call = self.asking(latents.expand(count, *latents.shape[1:]))
        alone = call.take(call.where(lambda row: row.sample == sample))
        return replace(self, call=alone).apart(self.below(alone).value)

    def apart(self, value: Tensor) -> dict[str, Tensor]:
        """An answer ``[rows, …]`` by branch, ``[B, …]``."""
        places: dict[str, list[int]] = {}
        for index, row in enumerate(self.call.rows):
            places.setdefault(row.branch, []).append(index)
        return {branch: index_rows(value, found) for branch, found in places.items()}


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of the pipeline's loop: what it asks, and how it guides.

    Attributes:
        step: Where it is.
        latents: What the pipeline has come to, ``[B, …]``.
        questions: The calls that it makes.
        channels: Of the answers, how many ``scheduler.step`` is given: some learn a variance too.
        weights: What each branch counts in the guided output; they sum to 1. Empty for an owner
            that guides by itself.
        options: What ``scheduler.step`` is given beside output, timestep and sample.
    """

    step: Step
    latents: Tensor
    questions: tuple[Question, ...]
    channels: int
    weights: dict[str, float]
    options: dict[str, Any]

    def guided(self, answers: dict[str, Tensor]) -> Tensor:
        """The answers of all branches as the pipeline would combine them."""
        return self.mixed(answers)[:, : self.channels]

    def mixed(self, answers: dict[str, Tensor]) -> Tensor:
        """The same with all that the network answers, a variance included."""
        branches = list(answers)
        base = UNCOND if UNCOND in branches else branches[-1]
        value = answers[base]
        for branch in branches:
            if branch != base:
                value = value + self.weights[branch] * (answers[branch] - answers[base])
        return value


class Site(Protocol):
    """What the loop needs of `accel.attach.Site`; its method is of the layer ``loop``."""

    pipe: Any
    denoisers: tuple[Denoiser, ...]
    layout: Layout

    def claim(self, seam: str) -> Undo:
        """Hold a seam alone."""
        ...

    def on_start(self, reset: Undo) -> Undo:
        """Call something when a run starts."""
        ...

    def around(self, denoiser: Denoiser, layer: Layer) -> Undo:
        """Put a layer around the calls of a network."""
        ...

    def edit_step(self, editor: Editor) -> Undo:
        """Be asked before each ``scheduler.step``."""
        ...

    def edit_result(self, reviser: Reviser) -> Undo:
        """Be asked after each ``scheduler.step``."""
        ...


class Owner(Protocol):
    """A method that owns the loop."""

    def begin(self, latents: Tensor, solver: Any) -> None:
        """A run begins.

        Args:
            latents: What it starts from, ``[B, …]``; not to be written to.
            solver: A copy of the pipeline's scheduler before its first step, for the owner.
        """
        ...

    def evaluate(self, evaluation: Evaluation) -> Tensor:
        """The latents ``[B, …]`` that the pipeline goes on from, behind an evaluation.

        Of the type that its scheduler would give: the next call of a network may take no other.
        """
        ...


class Loop:
    """Puts an owner in the place of a pipeline's loop.

    Args:
        owner: The method.
        guides: Whether it combines the branches by itself, whatever the pipeline's rule is.
    """

    def __init__(self, owner: Owner, *, guides: bool = False) -> None:
        self._owner, self._guides = owner, guides
        self._order: tuple[str, ...] = ()
        self._pipe: Any = None
        self._questions: list[Question] = []
        self._evaluation: Evaluation | None = None

    def attach(self, site: Site) -> Iterator[Undo]:
        """Take the loop.

        Raises:
            Conflict: If another method of the plan owns it.
        """
        self._order, self._pipe = site.layout.order, site.pipe
        yield site.claim("loop")
        yield self._reset
        yield site.on_start(self._reset)
        for denoiser in site.denoisers:
            yield site.around(denoiser, self._ask)
        yield site.edit_step(self._learn)
        yield site.edit_result(self._step)

    def _reset(self) -> None:
        self._questions.clear()
        self._evaluation = None

    def _ask(self, call: Call, below: Inner) -> Result:
        """Write down a call of the pipeline, and answer it without a network."""
        name = call.denoiser.sample_name
        arguments = {key: value for key, value in call.arguments.items() if key != name}
        asked = replace(call, arguments=arguments)
        beside = _beside(call)
        self._questions.append(Question(asked, below, call.sample.dtype, beside))
        marks = self._marks(call)
        native = (marks,) if not call.arguments.get("return_dict", True) else _Sample(marks)
        return Result(marks, (True,) * len(call.rows), native)

    def _marks(self, call: Call) -> Tensor:
        """An answer that shows in the guided output where it went: ones in columns of its own."""
        shape = [*call.sample.shape]
        answered = _answered(call)
        if answered is not None:
            shape[_channels(call.denoiser)] = answered  # some learn a variance as well
        for row in call.rows:
            if row.branch not in self._order:
                raise UnsupportedModel(
                    f"{type(self._pipe).__name__} asks its network beside its guidance "
                    f"({row.branch}), so a method that owns the loop does not fit. Turn that off, "
                    "or leave the method out of the plan."
                )
        columns = torch.arange(shape[-1], device=call.sample.device) % len(self._order)
        mine = [columns == self._order.index(row.branch) for row in call.rows]
        marks = torch.stack(mine).float().view(len(mine), *[1] * (len(shape) - 2), shape[-1])
        return marks.expand(shape)

    def _learn(self, update: Update) -> Any:
        """Write down the evaluation."""
        weights = {} if self._guides else self._weights(update)
        if update.step.index == 0:
            self._owner.begin(update.sample, _plain(self._pipe.scheduler))
        self._evaluation = Evaluation(
            step=update.step,
            latents=update.sample,
            questions=tuple(self._questions),
            channels=update.output.shape[1],
            weights=weights,
            options=update.options,
        )
        self._questions.clear()
        return update.output

    def _weights(self, update: Update) -> dict[str, float]:
        """Read off the guided output what each branch counts."""
        asked = {row.branch for question in self._questions for row in question.call.rows}
        columns = torch.arange(update.output.shape[-1]) % len(self._order)
        found = update.output.float()
        first = found.flatten()[: len(self._order)]
        error = (found - first[columns.to(first.device)]).abs().max()
        *counts, off = torch.cat([first, error[None]]).tolist()
        weights = {name: count for name, count in zip(self._order, counts, strict=True)}
        total = sum(weights[branch] for branch in asked)
        if off > CLOSE or abs(total - 1.0) > CLOSE:
            raise UnsupportedModel(
                f"{type(self._pipe).__name__} combines its guidance branches otherwise than by a "
                "weighted mean at each place (guidance rescale, or the like), so a method that "
                "owns the loop does not fit. Turn that off, or leave the method out of the plan."
            )
        return weights

    def _step(self, _step: Step, _sample: Any) -> Any:
        """Let the owner go on, in the place of what the scheduler gives."""
        evaluation, self._evaluation = self._evaluation, None
        assert evaluation is not None
        return self._owner.evaluate(evaluation)


def _channels(denoiser: Denoiser) -> int:
    """The axis of a network's input that counts channels."""
    return 2 if type(denoiser.core).__name__ in (*FRAMES_SECOND, *FOLDED) else 1


def _answered(call: Call) -> int | None:
    """The channels that a network answers, where its input has all that it takes on that axis."""
    config, shape = call.denoiser.core.config, call.sample.shape
    if len(shape) > 3 and config.get("in_channels") == shape[_channels(call.denoiser)]:
        answered: int | None = config.get("out_channels")
        return answered
    return None


def _beside(call: Call) -> Tensor | None:
    """What of a network's input is no latents: the channels beyond those that it answers."""
    axis, answered = _channels(call.denoiser), _answered(call)
    if answered is None or answered >= call.sample.shape[axis]:
        return None
    return call.sample.narrow(axis, answered, call.sample.shape[axis] - answered)


def _plain(scheduler: Any) -> Any:
    """A copy that steps as its class does, whoever put something around the original's step."""
    solver = copy.deepcopy(scheduler)
    vars(solver).pop("step", None)
    return solver


class _Sample(tuple[Tensor]):
    """A network's answer with the one field that pipelines read."""

    def __new__(cls, sample: Tensor) -> _Sample:
        return super().__new__(cls, (sample,))

    @property
    def sample(self) -> Tensor:
        return self[0]
