"""Edit a picture: invert it to noise, then run its prompt and another one from there.

Source: Ju et al., "Direct Inversion: Boosting Diffusion-based Editing with 3 Lines of Code", arXiv
2310.01506, section 4. The source's own latents, kept from the inversion, take the place of what the
source row of the edit would drift to under guidance, so it gives the picture back exactly; the row
of the edit is left alone. Nothing is optimised.

Served are ChromaPipeline, FluxPipeline (guided by ``true_cfg_scale``), StableDiffusionPipeline,
StableDiffusionXLPipeline and StableDiffusion3Pipeline, each with an AutoencoderKL; other classes
are refused by name (`accel.seams.pictures`).

    source = accel.edit.invert(pipe, image, "a red fox in the snow")
    kept, edited = source.edit("a white fox in the snow", guidance=7.5).images
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from accel import hooks
from accel.errors import BadInput, Conflict

if TYPE_CHECKING:
    from torch import Tensor

    from accel.seams.solver_maps import Maps


@dataclass(frozen=True, eq=False)
class Inversion:
    """A picture on its way to noise.

    Attributes:
        pipe: The pipeline.
        prompt: What the picture shows.
        latents: z*_0 … z*_T, from noise to the picture's own latents, each ``[1, …]``, in the
            pipeline's form and scale.
        height: In pixels, after the pipeline's own rounding.
        width: In pixels.
        steps: Steps of the schedule, as the pipeline was asked for.
        call: What else the pipeline was called with.
        timesteps: Of the schedule, from noise to the picture.
        solver: Class and config of the scheduler.
    """

    pipe: Any
    prompt: str
    latents: tuple[Tensor, ...]
    height: int
    width: int
    steps: int
    call: Mapping[str, Any] = field(repr=False)
    timesteps: tuple[float, ...] = field(repr=False)
    solver: tuple[str, Mapping[str, Any]] = field(repr=False)

    def reconstruct(self, output_type: str = "pil") -> Any:
        """The picture as the autoencoder gives it back: what the source row of an edit is.

        It is decoded beside a copy of itself, since in a batch of two an autoencoder rounds
        otherwise than alone.
        """
        from accel.seams.pictures import decode

        two = self.latents[-1].expand(2, *self.latents[-1].shape[1:])
        return decode(self.pipe, two, self.height, self.width, output_type)[:1]

    def edit(
        self,
        prompt: str,
        guidance: float = 7.5,
        negative_prompt: str | None = None,
        **call: Any,
    ) -> Any:
        """Run the source's prompt and another one from the same noise, as two rows.

        A plan may be attached meanwhile, but for one that changes the sampler.

        Args:
            prompt: What the picture is to show.
            guidance: Scale w of u + w·(c − u), for both rows; 1: none.
            negative_prompt: For both rows.
            **call: More arguments of the pipeline's call; they win over those of the inversion.

        Returns:
            What the pipeline returns: first the source, exactly as it was, then the edit.

        Raises:
            BadInput: If the pipeline has another scheduler or schedule than at the inversion.
        """
        from accel.seams.pictures import scale_name

        scale = scale_name(self.pipe)
        if negative_prompt is None and scale == "true_cfg_scale" and guidance > 1:
            negative_prompt = ""  # without one these pipelines do not guide
        negatives = {} if negative_prompt is None else {"negative_prompt": [negative_prompt] * 2}
        arguments = {
            **self.call,
            "prompt": [self.prompt, prompt],
            **negatives,
            scale: guidance,
            "num_inference_steps": self.steps,
            "height": self.height,
            "width": self.width,
            **call,
        }
        with self._followed():
            return self.pipe(**arguments)

    @contextmanager
    def _followed(self) -> Iterator[None]:
        """Start both rows from z*_0, and put z* in the place of the source row at each step."""
        if _solver(self.pipe) != self.solver:
            raise BadInput(
                f"The picture was inverted with {self.solver[0]}, and the pipeline now has a "
                f"{_solver(self.pipe)[0]} or another config of it: invert again, or put it back."
            )
        scheduler, place = self.pipe.scheduler, 0

        def begin(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            nonlocal place
            result, place = inner(*args, **kwargs), 0
            if _numbers(scheduler) != self.timesteps:
                raise BadInput(
                    f"The picture was inverted along {len(self.timesteps)} timesteps, and this run "
                    "has others: call edit without num_inference_steps, timesteps and sigmas."
                )
            return result

        def replace(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            nonlocal place
            result = inner(*args, **kwargs)
            place += 1
            result[0][:1] = self.latents[place].to(result[0])
            return result

        with ExitStack() as stack:
            start = self.latents[0]
            stack.callback(hooks.wrap(self.pipe, "prepare_latents", _starting(start)))
            stack.callback(hooks.wrap(scheduler, "set_timesteps", begin))
            stack.callback(hooks.wrap(scheduler, "step", replace))
            yield


def invert(
    pipe: Any, image: Any, prompt: str, steps: int = 50, refine: int = 0, **call: Any
) -> Inversion:
    """Follow the solver backwards from a picture to noise, by its prompt alone, without guidance.

    At each step the output at the noisier level is taken from the latents of the cleaner one, as
    DDIM inversion does; with ``refine`` it is taken again from the latents found, which comes
    nearer to the latents from which the solver would give the picture back by itself, if the
    output changes little within a step (more steps help). An edit gives the source back exactly in
    any case.

    Args:
        pipe: Stable Diffusion 1, 2, XL, 3, Flux or Chroma, text to image, with a deterministic
            solver of one step (DDIM, Euler, Euler for flows).
        image: A PIL picture, or what else the pipeline's image processor takes: one.
        prompt: What it shows.
        steps: Steps of the schedule.
        refine: Evaluations more a step, of which the default is none.
        **call: More arguments of the pipeline's call, as ``max_sequence_length``.

    Raises:
        BadInput: If an argument asks for noise, or for more than one picture.
        Conflict: If a plan is attached.
        UnsupportedModel: For another pipeline, or a solver of several steps or with noise.
        BadOutput: If the autoencoder gives NaN.
    """
    from accel.seams.denoisers import find_denoisers
    from accel.seams.pictures import check, encode, scale_name

    check(pipe, "accel.edit.invert")
    if any(hooks.in_place(d.module, d.entry) for d in find_denoisers(pipe)):
        raise Conflict(
            "accel.edit.invert runs the stock pipeline, and a plan is attached to it: detach the "
            "plan, invert, attach again. Edits may run under the plan."
        )
    if call.get("eta") or not isinstance(prompt, str):
        raise BadInput(
            "accel.edit.invert follows one picture, told by one prompt, along a path without "
            f"noise: found eta={call.get('eta', 0)} and a prompt of {type(prompt).__name__}."
        )
    solver = _solver(pipe)
    clean, height, width = encode(pipe, image)
    backwards = Backwards(pipe, clean, refine)
    with backwards.attached():
        pipe(
            **{
                **call,
                "prompt": [prompt],
                scale_name(pipe): 1.0,
                "num_inference_steps": steps,
                "height": height,
                "width": width,
                "output_type": "latent",
            }
        )
    latents, timesteps = tuple(backwards.latents), backwards.maps.timesteps
    return Inversion(pipe, prompt, latents, height, width, steps, call, timesteps, solver)


class Backwards:
    """Makes a pipeline's loop run from the picture to noise.

    Attributes:
        latents: Those found so far, from the noisiest to the picture's own.
        maps: The steps of the solver.
    """

    maps: Maps

    def __init__(self, pipe: Any, clean: Tensor, refine: int) -> None:
        self._pipe = pipe
        self._clean = clean
        self._evaluations = 1 + refine
        self._count = 0
        self.latents: list[Tensor] = []

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Give the pipeline a scheduler that runs backwards, and the picture to start from."""
        before = self._pipe.scheduler
        scheduler = copy.deepcopy(before)
        with ExitStack() as stack:
            stack.callback(
                hooks.wrap(self._pipe, "prepare_latents", _starting(self._clean, self._begin))
            )
            hooks.wrap(scheduler, "set_timesteps", self._schedule(before, scheduler))
            hooks.wrap(scheduler, "step", self._step)
            if hasattr(scheduler, "scale_model_input"):
                hooks.wrap(scheduler, "scale_model_input", self._scale)
            self._pipe.scheduler = scheduler
            stack.callback(setattr, self._pipe, "scheduler", before)
            yield

    def _schedule(self, before: Any, scheduler: Any) -> Callable[..., Any]:
        def backwards(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            from accel.seams.solver_maps import maps_of

            self.maps, self._count = maps_of(before, args, kwargs), 0
            inner(*args, **kwargs)
            flipped = scheduler.timesteps.flip(0)
            scheduler.timesteps = flipped.repeat_interleave(self._evaluations)

        return backwards

    def _begin(self, clean: Tensor) -> None:
        self.latents = [clean]

    @property
    def _index(self) -> int:
        """The step that is gone backwards."""
        return len(self.maps.timesteps) - 1 - self._count // self._evaluations

    def _scale(self, _inner: Callable[..., Any], sample: Any, *_: Any, **__: Any) -> Any:
        scale = self.maps.scales[self._index]
        return sample if scale == 1.0 else sample * scale

    def _step(
        self,
        _inner: Callable[..., Any],
        output: Tensor,
        _timestep: Any,
        sample: Tensor,
        return_dict: bool = True,
        **_: Any,
    ) -> Any:
        found = self.maps.back(self._index, self.latents[0].float(), output.float())
        found = found.to(sample.dtype)
        self._count += 1
        if self._count % self._evaluations == 0:
            self.latents.insert(0, found)
        return SimpleNamespace(prev_sample=found) if return_dict else (found,)


def _starting(
    latents: Tensor, told: Callable[[Tensor], None] = lambda _: None
) -> Callable[..., Any]:
    """Goes around ``prepare_latents``: the run starts from these, as many rows as it has."""

    def start(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        prepared = inner(*args, **kwargs)
        noise = prepared[0] if isinstance(prepared, tuple) else prepared
        if noise.shape[1:] != latents.shape[1:]:
            raise BadInput(
                f"The picture's latents are {tuple(latents.shape[1:])}, and the run's "
                f"{tuple(noise.shape[1:])}: leave height and width to accel.edit."
            )
        own = latents.to(noise)
        told(own)
        rows = own.expand_as(noise).clone()
        return (rows, *prepared[1:]) if isinstance(prepared, tuple) else rows

    return start


def _solver(pipe: Any) -> tuple[str, Mapping[str, Any]]:
    return type(pipe.scheduler).__name__, dict(pipe.scheduler.config)


def _numbers(scheduler: Any) -> tuple[float, ...]:
    return tuple(float(timestep) for timestep in scheduler.timesteps.tolist())
