"""From the parts of one model, the pipeline that a request needs.

Text-to-image, image-to-image, inpainting, ControlNet and image-to-video pipelines share their
networks; diffusers maps between them (``AutoPipeline…from_pipe``).
"""

from __future__ import annotations

import inspect
from typing import Any

from accel.errors import BadInput
from app.request import Request

VIDEO = {"LTXPipeline": "LTXImageToVideoPipeline"}
"""Text-to-video pipelines whose networks also continue a picture."""

OPTIONAL = ("FluxKontext", "Flux2")
"""Beginnings of the names of pipelines that take a picture, or none."""


def parameters(pipe: Any) -> dict[str, inspect.Parameter]:
    """The parameters of a pipeline's call, by name."""
    return dict(inspect.signature(type(pipe).__call__).parameters)


def names(pipe: Any) -> dict[str, str]:
    """For each of the options image, last, mask and control that a pipeline takes: its parameter.

    Two options of one parameter go into it as a list.
    """
    from accel.seams import keys

    known = parameters(pipe)
    found = {}
    if "ControlNet" in type(pipe).__name__:
        found["control"] = "control_image" if "control_image" in known else "image"
    if "image" in known and found.get("control") != "image":
        found["image"] = "image"
    if "last_image" in known:
        found["last"] = "last_image"
    elif type(pipe).__name__ in keys.SERVED:
        found["last"] = "image"
    if "mask_image" in known:
        found["mask"] = "mask_image"
    return found


def pipeline_for(pipe: Any, request: Request) -> Any:
    """The pipeline of the same parts that takes the pictures of a request.

    Raises:
        BadInput: If there is none, or the model's own pipeline needs a picture that is missing.
    """
    given = set(request.pictures)
    _check_options(pipe, request)
    lacking = _needed(pipe) - given
    if lacking:
        wanted = " and ".join(f"--{option}" for option in sorted(lacking))
        raise BadInput(f"{type(pipe).__name__} needs {wanted}: give it, or choose another model.")
    if given <= set(names(pipe)):
        return pipe
    other = _converted(pipe, request)
    surplus = given - set(names(other))
    if surplus:
        named = " and ".join(f"--{option}" for option in sorted(surplus))
        raise BadInput(f"{type(other).__name__} takes no {named}: leave it out.")
    return other


def _check_options(pipe: Any, request: Request) -> None:
    if request.last and not request.image:
        raise BadInput("--last needs --image: the picture that the clip begins with.")
    if request.mask and not request.image:
        raise BadInput("--mask needs --image: the picture to paint into.")
    if request.strength is not None and not request.image:
        raise BadInput("--strength needs --image: it says how much of that is redrawn.")
    if request.controlnet and not request.control:
        raise BadInput("--controlnet needs --control: the picture that it follows.")
    if request.control and "ControlNet" not in type(pipe).__name__:
        raise BadInput(
            f"--control needs a ControlNet, and {type(pipe).__name__} has none: give --controlnet."
        )


def _needed(pipe: Any) -> set[str]:
    known = parameters(pipe)
    return {
        option
        for option, parameter in names(pipe).items()
        if option != "last"
        and not type(pipe).__name__.startswith(OPTIONAL)
        and known[parameter].default in (None, inspect.Parameter.empty)
    }


def _converted(pipe: Any, request: Request) -> Any:
    import diffusers

    name = type(pipe).__name__
    if request.image and name in VIDEO:
        other = getattr(diffusers, VIDEO[name]).from_pipe(pipe)
    else:
        other = _mapped(pipe, request)
    other.set_progress_bar_config(disable=True)
    return other


def _mapped(pipe: Any, request: Request) -> Any:
    import diffusers

    if request.mask:
        task, wanted = diffusers.AutoPipelineForInpainting, "--mask"
    elif request.image:
        task, wanted = diffusers.AutoPipelineForImage2Image, "--image"
    else:
        return pipe
    try:
        return task.from_pipe(pipe)
    except ValueError as error:
        raise BadInput(
            f"diffusers has no pipeline that makes {type(pipe).__name__} take {wanted}: leave it "
            "out, or choose a model such as Stable Diffusion, SDXL, SD3 or Flux."
        ) from error
