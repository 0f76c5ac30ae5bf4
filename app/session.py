"""A session: a model, loaded once, that runs requests under plans."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accel.attach import Run
from accel.bundled import check_safetensors
from accel.errors import AccelError, AccelWarning, BadInput, BadOutput
from accel.loop.vibid import ViBiD
from accel.plan import Plan
from accel.report import Report
from app import models
from app.call import arguments, recorded, stacked, unstacked
from app.modes import names, parameters, pipeline_for
from app.request import Request, Source

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from torch import Tensor

    from app.compiling import Regions

Watch = Callable[[Run], None]


@dataclass(frozen=True)
class Outcome:
    """What a run gave.

    Attributes:
        pictures: One picture, or the frames of a clip.
        clip: Whether it is a clip.
        call: The arguments of the pipeline's call that are plain data.
        seconds: The whole call, from the prompt to the picture, with the work of the device; its
            share of a call for several.
        report: What the plan did; ``None`` for a bare run. Of a call for several, it is of all.
        together: How many were made in the same call.
        place: Which of them it is, from 0.
    """

    pictures: list[Image.Image]
    clip: bool
    call: dict[str, Any]
    seconds: float
    report: Report | None
    together: int = 1
    place: int = 0


class Session:
    """A loaded model. Runs one request after another; nothing is kept between them.

    Args:
        model: From ``models.load``, or any pipeline in a ``models.Model``.
    """

    def __init__(self, model: models.Model) -> None:
        self.model = model
        self._lora: Path | None = None
        self._regions: Regions | None = None

    @classmethod
    def open(cls, source: Source) -> Session:
        """Load a model and open a session on it; see ``models.load`` for errors."""
        return cls(models.load(source))

    def run(
        self, request: Request, plan: Plan, watch: Watch | None = None, *, memory: bool = False
    ) -> Outcome:
        """Run a request under a plan.

        Args:
            request: With a seed, and of this session's source.
            plan: The methods; an empty plan only counts.
            watch: Called with the attached run before it starts; may add observers.
            memory: Whether to measure what it takes at its peak: for runs that are not timed,
                because free memory is given back first.

        Raises:
            BadInput: If the pipeline does not take what was asked for.
            BadOutput: If latents or picture hold NaN or infinite values.
            Conflict: If methods of the plan do not go together.
            UnsupportedModel: If the pipeline cannot be served.
        """
        return self.together([request], plan, watch, memory=memory)[0]

    def together(
        self,
        requests: Sequence[Request],
        plan: Plan,
        watch: Watch | None = None,
        *,
        memory: bool = False,
    ) -> list[Outcome]:
        """Run requests in one call of the pipeline, each with its own noise; one as ``run`` does.

        Args:
            requests: At least one; they differ in prompts, seeds and the contents of pictures.
            plan: The methods.
            watch: As for ``run``.
            memory: As for ``run``.

        Raises:
            AccelError: As ``run``; and ``BadInput`` if the pipeline does not take them together.
        """
        first = requests[0]
        pipe, call = self.prepare(requests, plan)
        with plan.attach(pipe) as run:
            latest: list[Any] = [None]
            run.trajectory.observers.append(lambda _step, result: _keep(latest, result))
            if watch is not None:
                watch(run)
            device = models.device_of(first.device)
            measuring = run.report.measuring_memory(device) if memory else nullcontext()
            with _refusals(pipe, run), measuring:
                outcomes = self._call(pipe, requests, call, run.report)
            _check_finite(latest[0], first)
        return outcomes

    def warm(self) -> None:
        """Make a picture of two steps for nobody: the first run of a process takes longer."""
        asked = {f.name: getattr(self.model.source, f.name) for f in fields(Source)}
        self.bare(Request(**asked, prompt="a picture", seed=0, steps=2))

    def bare(self, request: Request) -> Outcome:
        """Run a request on the stock pipeline, with nothing attached."""
        return self.bare_together([request])[0]

    def bare_together(self, requests: Sequence[Request]) -> list[Outcome]:
        """Run requests in one call of the stock pipeline, with nothing attached."""
        pipe, call = self.prepare(requests, Plan())
        return self._call(pipe, requests, call, None)

    def prepare(self, requests: Sequence[Request], plan: Plan) -> tuple[Any, dict[str, Any]]:
        """The pipeline of some requests that go into one call, and its arguments.

        Raises:
            BadInput: If a request is for another model, or its last picture for another plan.
        """
        first = requests[0]
        for request in requests:
            if request.source != self.model.source:
                raise BadInput(
                    f"This session has {self.model.source}, the request wants {request.source}: "
                    "open another session."
                )
        pipe = pipeline_for(self.model.pipe, first)
        _check_ends(pipe, first, plan)
        self._set_lora(first.lora)
        self._compile(first, plan)
        return pipe, stacked([arguments(pipe, one, self.model.call) for one in requests])

    def _set_lora(self, lora: Path | None) -> None:
        if lora == self._lora:
            return
        pipe = self.model.pipe
        if self._lora is not None:
            pipe.unload_lora_weights()
            self._lora = None
        if lora is not None:
            _load_lora(pipe, lora)
            self._lora = lora

    def _compile(self, request: Request, plan: Plan) -> None:
        """Before the plan is attached: its hooks go around the graphs."""
        if self._regions is None and not request.compile:
            return
        from app.compiling import Regions, parts_for

        self._regions = self._regions or Regions(self.model.pipe)
        self._regions.put_on(parts_for(plan) if request.compile else None)

    def _call(
        self,
        pipe: Any,
        requests: Sequence[Request],
        call: dict[str, Any],
        report: Report | None,
    ) -> list[Outcome]:
        form = {"output_type": "pil"} if "output_type" in parameters(pipe) else {}
        noise = [noise_of(request) for request in requests]
        start = time.perf_counter()
        with _nan_is_an_error(requests[0]):
            made = pipe(**{**call, **form}, generator=noise[0] if len(noise) == 1 else noise)[0]
        seconds = (time.perf_counter() - start) / len(requests)
        if len(made) != len(requests):
            raise BadInput(
                f"{type(pipe).__name__} made {len(made)} of {len(requests)} that were asked for in "
                "one call: ask for one at a time."
            )
        outcomes = []
        for place, (result, own) in enumerate(zip(made, unstacked(call, len(made)), strict=True)):
            clip = isinstance(result, list)
            pictures = result if clip else [result]
            _check_size(pictures[0], own)
            outcomes.append(
                Outcome(pictures, clip, recorded(own), seconds, report, len(made), place)
            )
        return outcomes


def _check_ends(pipe: Any, request: Request, plan: Plan) -> None:
    """A pipeline that takes no end needs a method that makes a clip between two pictures."""
    if request.last is None or names(pipe)["last"] != names(pipe)["image"]:
        return
    if ViBiD.name not in {method.name for method in plan}:
        raise BadInput(
            f"{type(pipe).__name__} makes a clip from its first picture alone, so --last needs "
            f"{ViBiD.name} in the plan: add --set {ViBiD.name}.scale=1, or leave --last out."
        )


def noise_of(request: Request) -> torch.Generator:
    """The source of a request's noise, at its start."""
    import torch

    assert request.seed is not None
    return torch.Generator("cpu").manual_seed(request.seed)


def _keep(latest: list[Any], result: Any) -> None:
    """Hold on to the latest latents; they are looked at once, after the run."""
    latest[0] = result[0]


@contextmanager
def _refusals(pipe: Any, run: Run) -> Iterator[None]:
    """What a pipeline refuses before its first network call, it refuses of the input."""
    try:
        yield
    except AccelError:
        raise
    except (ValueError, TypeError) as error:
        if run.report.calls:
            raise
        raise BadInput(f"{type(pipe).__name__} refuses the call: {error}") from error


@contextmanager
def _nan_is_an_error(request: Request) -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "invalid value encountered in cast", RuntimeWarning)
        try:
            yield
        except RuntimeWarning as error:
            raise _bad_output("The picture", request) from error


def _check_finite(latents: Tensor | None, request: Request) -> None:
    """Look at the last latents; one device read, after the run."""
    if latents is not None and not bool(latents.isfinite().all()):
        raise _bad_output("The run", request)


def _check_size(picture: Image.Image, call: dict[str, Any]) -> None:
    """Some pipelines make another size than they are asked for, without an error."""
    asked = (call.get("width", picture.width), call.get("height", picture.height))
    if picture.size != asked:
        warnings.warn(
            f"asked for {asked[0]}x{asked[1]}, the pipeline made {picture.width}x{picture.height}",
            AccelWarning,
            stacklevel=4,
        )


def _bad_output(what: str, request: Request) -> BadOutput:
    half = request.dtype == "float16"
    advice = "try --dtype bfloat16 or float32" if half else "check the model's weights"
    return BadOutput(
        f"{what} holds NaN or infinite values, so nothing was written: {advice}; if "
        "`--preset exact` gives a picture, leave methods out of the plan one by one."
    )


def _load_lora(pipe: Any, path: Path) -> None:
    if not path.is_file() or path.suffix != ".safetensors":
        raise BadInput(f"--lora {path}: give a .safetensors file that is there.")
    check_safetensors(path)
    put_on = getattr(pipe, "load_lora_weights", None)
    if put_on is None:
        raise BadInput(f"{type(pipe).__name__} takes no --lora: leave it out.")
    try:
        put_on(path.parent, weight_name=path.name, local_files_only=True, use_safetensors=True)
    except (ValueError, KeyError, RuntimeError) as error:
        first = (str(error).strip().splitlines() or [""])[0]
        raise _stranger(pipe, path, first) from error
    if not pipe.get_list_adapters():
        raise _stranger(pipe, path, "none of its weights belongs to a network of the pipeline")


def _stranger(pipe: Any, path: Path, reason: str) -> BadInput:
    return BadInput(
        f"--lora {path} does not fit {type(pipe).__name__} ({reason}): give one made for this "
        "model."
    )
