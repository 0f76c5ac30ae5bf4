"""A picture-to-picture pipeline taken apart: what it does before its loop, in it, and behind it.

The stock pipeline is called once, with the first picture. Meanwhile every call that it makes of its
own parts is remembered with its arguments – of the image processor, of ``prepare_latents``, of what
unpacks latents – and its networks are not run: their calls are read by `accel.seams.loop`. Each
part can then be called again with another picture (`Replay`), so that nothing of a pipeline is
copied here but one formula, of how latents are scaled for the decoder; it is held against what the
pipeline itself gave its decoder, and a pipeline that has another one is refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from accel import hooks
from accel.errors import BadInput, UnsupportedModel
from accel.seams.denoisers import Denoiser, Row
from accel.seams.loop import UNCOND, Evaluation, Question
from accel.seams.rows import form, join_rows, take_rows
from accel.seams.spaces import answer, convert
from accel.trajectory import Levels, Step

COND = "cond"
SAME = 1e-3
"""How far latents may lie from the pipeline's own, relative to their size: rounding of bfloat16."""

FEEDS = ("controlnet", "adapter", "image_encoder")
"""Parts of a pipeline that make something of the picture, or of the latents, beside the network."""

Undo = Callable[[], None]


class Replay:
    """One method of a pipeline's part, which can be called again as the pipeline called it.

    Args:
        owner: The part.
        name: Of the method.
    """

    def __init__(self, owner: Any, name: str) -> None:
        self._method: Callable[..., Any] = getattr(owner, name)
        self._owner, self._name = owner, name
        self._signature = inspect.signature(self._method)
        self._called: inspect.BoundArguments | None = None

    @property
    def called(self) -> bool:
        """Whether the pipeline has called it."""
        return self._called is not None

    def listen(self) -> Undo:
        """Remember the pipeline's call; returns the undo."""
        return hooks.wrap(self._owner, self._name, self._hear)

    def _hear(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._called = self._signature.bind(*args, **kwargs)
        return inner(*args, **kwargs)

    def again(self, value: Any, **changed: Any) -> Any:
        """Call it with another first argument; ``changed`` are others, where it has them."""
        assert self._called is not None
        given = self._called.arguments
        first = next(iter(self._signature.parameters))
        known = {name: one for name, one in changed.items() if name in self._signature.parameters}
        options = given.get("kwargs", {})
        arguments = {name: one for name, one in given.items() if name != "kwargs"}
        return self._method(**(arguments | options | known | {first: value}))


class Ends:
    """What a pipeline does with a picture before its loop, and with latents behind it.

    Args:
        pipe: The pipeline.
        seed: Of all that it draws: the noise, and the encoder's own.

    Raises:
        UnsupportedModel: If it takes no picture, or needs more than that.
    """

    def __init__(self, pipe: Any, seed: int) -> None:
        self._pipe, self._seed = pipe, seed
        check(pipe)
        self._pixels = Replay(pipe.image_processor, "preprocess")
        self._latents = Replay(pipe, "prepare_latents")
        self._picture = Replay(pipe.image_processor, "postprocess")
        self._unpack = Replay(pipe, "_unpack_latents") if hasattr(pipe, "_unpack_latents") else None
        checker = getattr(pipe, "safety_checker", None)
        self._checked = None if checker is None else Replay(pipe, "run_safety_checker")
        self._decoded: Tensor | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """While it is entered, the pipeline's calls of its parts are remembered."""
        parts = (self._pixels, self._latents, self._picture, self._unpack, self._checked)
        with ExitStack() as stack:
            for part in filter(None, parts):
                stack.callback(part.listen())
            stack.callback(hooks.wrap(self._pipe.vae, "decode", self._on_decode))
            yield

    def _on_decode(
        self, inner: Callable[..., Any], latents: Tensor, *args: Any, **more: Any
    ) -> Any:
        self._decoded = latents
        return inner(latents, *args, **more)

    def generator(self) -> torch.Generator:
        """A new one, of the seed: as the pipeline's own was."""
        return torch.Generator("cpu").manual_seed(self._seed)

    def pixels(self, picture: Any) -> Tensor:
        """A picture as the pipeline prepares it, ``[1, 3, H, W]`` from -1 to 1."""
        found: Tensor = self._pixels.again(picture)
        return found

    def clean(self, pixels: Tensor) -> Tensor:
        """The latents of a picture in the form of the loop, without noise: ``[1, …]``."""
        return self._prepared(pixels, lambda clean, _noise: clean, self.generator())

    def noises(self, pixels: Tensor, count: int) -> list[Tensor]:
        """Noises of as many levels: the pipeline's own, and what its generator gives behind it."""
        generator = self.generator()
        first = self._prepared(pixels, lambda _clean, noise: noise, generator)
        rest = [torch.randn(first.shape, generator=generator) for _ in range(count - 1)]
        return [first, *(noise.to(first.device) for noise in rest)]

    def _prepared(
        self, pixels: Tensor, choose: Callable[[Tensor, Tensor], Tensor], drawn: torch.Generator
    ) -> Tensor:
        """What ``prepare_latents`` makes where its scheduler adds no noise, but chooses."""
        scheduler = self._pipe.scheduler
        with ExitStack() as stack:
            for name, order in ORDER.items():
                if hasattr(scheduler, name):
                    stack.callback(hooks.wrap(scheduler, name, _instead(order, choose)))
            found = self._latents.again(pixels, generator=drawn)
        latents: Tensor = found[0] if isinstance(found, tuple) else found
        return latents.float()

    def picture(self, latents: Tensor) -> Any:
        """The picture of latents ``[1, …]``, in the form that the first call asked for."""
        pixels = self._pipe.vae.decode(self._scaled(latents), return_dict=False)[0]
        if self._checked is not None:
            pixels = self._checked.again(pixels)[0]
        return self._picture.again(pixels)[0]

    def _scaled(self, latents: Tensor) -> Tensor:
        """Latents of the loop as the decoder takes them."""
        vae = self._pipe.vae
        if self._unpack is not None:
            latents = self._unpack.again(latents)
        scaled: Tensor = latents / vae.config.scaling_factor + (
            vae.config.get("shift_factor") or 0.0
        )
        return scaled.to(vae.dtype)

    def verify(self, noisy: Tensor, begun: Tensor, finished: Tensor) -> None:
        """Hold what is replayed against what the pipeline did with the first picture.

        Args:
            noisy: Its latents with noise, as they are made here.
            begun: The same as the pipeline's loop was given them.
            finished: The latents that the loop ended with.

        Raises:
            UnsupportedModel: If they differ.
        """
        decoded = self._decoded
        if not close(noisy, begun):
            self._refuse("begins its loop with other latents than a noised picture")
        if decoded is None or not close(self._scaled(finished), decoded):
            self._refuse("scales latents for its decoder in a way that is not known")
        self._decoded = None

    def _refuse(self, what: str) -> None:
        name = type(self._pipe).__name__
        raise UnsupportedModel(
            f"{name} {what}, so it cannot be streamed. Use a picture-to-picture pipeline such as "
            "StableDiffusionImg2ImgPipeline or FluxImg2ImgPipeline, in float32 or bfloat16."
        )


ORDER = {
    "add_noise": ("original_samples", "noise", "timesteps"),
    "scale_noise": ("sample", "timestep", "noise"),
}
"""Parameters of the methods of a scheduler that add noise, in order."""


def _instead(order: tuple[str, ...], choose: Callable[[Tensor, Tensor], Tensor]) -> hooks.Around:
    """In the place of adding noise: one of both."""

    def around(_inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
        given = dict(zip(order, args, strict=False)) | kwargs
        clean = given["original_samples"] if "original_samples" in given else given["sample"]
        return choose(clean, given["noise"])

    return around


def close(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal up to rounding."""
    if a.shape != b.shape:
        return False
    return bool((a.float() - b.float()).abs().max() <= SAME * b.float().abs().max().clamp(min=1.0))


def check(pipe: Any) -> None:
    """Refuse a pipeline that does not make a picture of one picture alone.

    Raises:
        UnsupportedModel: By name.
    """
    name = type(pipe).__name__
    known = inspect.signature(type(pipe).__call__).parameters
    lacking = [word for word in ("image", "strength") if word not in known]
    extra = [word for word in FEEDS if getattr(pipe, word, None) is not None]
    if lacking or extra or "mask_image" in known or not hasattr(pipe, "prepare_latents"):
        raise UnsupportedModel(
            f"{name} is no plain picture-to-picture pipeline"
            + (f" (it has {', '.join(extra)})" if extra else "")
            + ": a stream needs one that takes `image` and `strength` and nothing beside, such as "
            "StableDiffusionImg2ImgPipeline or FluxImg2ImgPipeline made of the same parts."
        )


@dataclass(frozen=True)
class Level:
    """One noise level of a stream: an evaluation that the pipeline would have made.

    Attributes:
        index: From the noisiest, 0, on.
        evaluation: What the pipeline asks there, and how it guides.
        skip: c_skip of a consistency model: x0 = c_out·F + c_skip·x.
        out: Its c_out; 0 and 1 for all others.
    """

    index: int
    evaluation: Evaluation
    skip: float = 0.0
    out: float = 1.0

    @property
    def step(self) -> Step:
        """Where the evaluation was."""
        return self.evaluation.step

    @property
    def guided(self) -> bool:
        """Whether the pipeline evaluates a negative prompt."""
        return UNCOND in self.evaluation.weights and self.evaluation.weights[UNCOND] != 0.0

    def noised(self, clean: Tensor, noise: Tensor) -> Tensor:
        """α·x0 + σ·n."""
        _, alpha, sigma = self.step.level
        return alpha * clean + sigma * noise

    def clean(self, output: Tensor, x: Tensor, network: str) -> Tensor:
        """The clean latents that an output leads to."""
        found = convert(output, x, self.step, "x0", network)
        return self.out * found + self.skip * x if self.skip else found

    def implied(self, negative: Tensor, x: Tensor, network: str) -> Tensor:
        """The clean latents that the answer to a negative prompt leads to."""
        return convert(negative[:, : x.shape[1]], x, self.step, "x0", network)

    def virtual(self, x: Tensor, origin: Tensor, network: str, delta: float) -> Tensor:
        """What a network would answer that saw the origin in x; at a flow's pure noise δ is 1."""
        scale = delta if self.step.level[1] > 0.0 else 1.0
        return answer(x, origin, self.step, network, scale)


def level_of(index: int, evaluation: Evaluation, scheduler: Any) -> Level:
    """A level of a stream.

    Raises:
        UnsupportedModel: If no clean sample can be read at this noise.
    """
    step = evaluation.step
    _, alpha, _ = step.level
    if alpha <= 1e-3 and step.levels.prediction == "epsilon":
        raise UnsupportedModel(
            "The noisiest level of this stream is pure noise, where a network that predicts noise "
            "says nothing of the picture: ask for a strength below 1."
        )
    find = getattr(scheduler, "get_scalings_for_boundary_condition_discrete", None)
    if find is None:
        return Level(index, evaluation)
    skip, out = find(step.timestep)
    return Level(index, evaluation, float(skip), float(out))


class Ticks(Levels):
    """In place of a noise level, for a call whose rows are at several."""

    def __init__(self) -> None:
        super().__init__(None)

    def at(self, _position: int) -> tuple[float, float, float]:
        """There is none.

        Raises:
            UnsupportedModel: Always.
        """
        raise UnsupportedModel(
            "A stream's rows are at several noise levels at once, and a method of the plan asks "
            "for the one of the call: leave out methods that follow the noise level."
        )


@dataclass
class Network:
    """The network of a pipeline, asked for rows of several levels in one call.

    Args:
        levels: What is asked at each level.
    """

    levels: Sequence[Level]
    _joined: dict[tuple[Row, ...], Any] = field(default_factory=dict)
    _ticks: Ticks = field(default_factory=Ticks)

    def __post_init__(self) -> None:
        denoisers = {q.call.denoiser.name for one in self.levels for q in one.evaluation.questions}
        if len(denoisers) != 1:
            raise UnsupportedModel(
                f"The pipeline has several networks ({', '.join(sorted(denoisers))}), each for "
                "some noise levels: rows of several levels do not go into one call."
            )
        for question in self.levels[0].evaluation.questions:
            self._check_time(question)

    @property
    def denoiser(self) -> Denoiser:
        """The network."""
        return self.levels[0].evaluation.questions[0].call.denoiser

    @property
    def name(self) -> str:
        """Class name of the network."""
        return type(self.denoiser.core).__name__

    def answers(self, xs: dict[Row, Tensor], tick: int) -> dict[Row, Tensor]:
        """Ask it.

        Args:
            xs: The latents ``[1, …]`` of each row: a branch at the level that ``sample`` names.
            tick: The number of the call, for methods below.

        Returns:
            What it answers, ``[1, …]`` in float32.
        """
        found: dict[Row, Tensor] = {}
        for rows, arguments, question in self._calls(tuple(xs)):
            given = torch.cat([xs[row] for row in rows]).to(question.dtype)
            sample = {self.denoiser.sample_name: given}
            step = Step(tick, None, tick, self._ticks)
            call = replace(question.call, step=step, rows=rows, arguments=arguments | sample)
            value = question.below(call).value.float()
            found |= {row: value[place : place + 1] for place, row in enumerate(rows)}
        return found

    def _calls(self, rows: tuple[Row, ...]) -> list[tuple[tuple[Row, ...], Any, Question]]:
        """The calls that rows make together: one, unless branches differ in the form of texts."""
        if rows not in self._joined:
            groups: dict[Any, list[tuple[Row, Any, Question]]] = {}
            for row in rows:
                question, arguments = self._one(row)
                groups.setdefault(form(arguments), []).append((row, arguments, question))
            self._joined[rows] = [
                (
                    tuple(row for row, _, _ in group),
                    join_rows([a for _, a, _ in group]),
                    group[0][2],
                )
                for group in groups.values()
            ]
        found: list[tuple[tuple[Row, ...], Any, Question]] = self._joined[rows]
        return found

    def _one(self, row: Row) -> tuple[Question, dict[str, Any]]:
        """What is asked for one row, alone."""
        for question in self.levels[row.sample].evaluation.questions:
            for place, asked in enumerate(question.call.rows):
                if asked == Row(row.branch, 0):
                    count = len(question.call.rows)
                    return question, take_rows(question.call.arguments, [place], count, 1)
        raise UnsupportedModel(
            f"The pipeline does not evaluate the branch '{row.branch}': guidance needs a scale "
            "above 1 and, in some pipelines, a negative prompt (an empty one will do)."
        )

    def _check_time(self, question: Question) -> None:
        """Refuse a network that is told the time by a number of the host."""
        time = question.call.arguments.get("timestep")
        if not isinstance(time, Tensor):
            raise UnsupportedModel(
                f"{self.name} is given the timestep as {type(time).__name__}, one for all rows: "
                "rows of several levels do not go into one call."
            )


class Recorder:
    """Owns the loop of the one call that a stream makes of its pipeline; see `seams.loop.Owner`.

    Attributes:
        evaluations: What the pipeline asked.
        begun: The latents that it began with, in the scale of its network.
        finished: Those that it ended with.
    """

    def __init__(self) -> None:
        self.evaluations: list[Evaluation] = []
        self.begun: Tensor | None = None
        self.finished: Tensor | None = None

    def begin(self, latents: Tensor, solver: Any) -> None:
        """The call begins.

        Raises:
            UnsupportedModel: For more than one picture, or for clips.
        """
        self.evaluations.clear()
        if len(latents) != 1 or latents.ndim > 4:
            raise BadInput(
                f"A stream takes one picture at a time, and the pipeline makes {len(latents)} of "
                f"shape {tuple(latents.shape[1:])}: give one prompt, and one picture a prompt."
            )
        self.begun = _as_input(solver, latents)

    def evaluate(self, evaluation: Evaluation) -> Tensor:
        """Remember it; the latents stay as they are."""
        levels = evaluation.step.levels
        assert levels.sigmas and levels.timesteps  # read while the schedule is that of this call
        self.evaluations.append(evaluation)
        self.finished = evaluation.latents
        return evaluation.latents

    def levels(self, chosen: Sequence[int], scheduler: Any) -> list[Level]:
        """Some of the evaluations as levels of a stream."""
        return [level_of(i, self.evaluations[at], scheduler) for i, at in enumerate(chosen)]


def _as_input(solver: Any, latents: Tensor) -> Tensor:
    """Latents at the first step of a run in the scale of the network's input."""
    if not hasattr(solver, "scale_model_input"):
        return latents
    begin = getattr(solver, "begin_index", None) or 0
    found: Tensor = solver.scale_model_input(latents, solver.timesteps[begin])
    return found
