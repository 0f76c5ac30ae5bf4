"""The arguments of one pipeline call, from a request and the model's own defaults."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accel.errors import BadInput
from app.modes import names, parameters
from app.request import Request

if TYPE_CHECKING:
    from PIL import Image

NAMES = {
    "steps": ("num_inference_steps",),
    "frames": ("num_frames", "video_length"),
    "negative": ("negative_prompt",),
    "strength": ("strength",),
}
SIDES = ("height", "width")
TEXTS = ("prompt", "negative_prompt")
PER_ROW = ("image", "mask_image", "control_image")
"""Arguments of which each picture of a call may have its own."""

GUIDANCE = ("guidance_scale", "max_guidance_scale")

SIDE, STEPS = 1024, 50
"""Pixels of a side, and steps, of a model that does not say what a normal call of it is."""

TURNED = range(5, 9)
"""The EXIF orientations in which width and height are exchanged."""


@dataclass(frozen=True)
class Extent:
    """How much a run computes: pixels, frames, steps."""

    width: int
    height: int
    frames: int
    steps: int

    @property
    def pixels(self) -> int:
        """Of all frames."""
        return self.width * self.height * self.frames


def extent(request: Request, defaults: Mapping[str, Any]) -> Extent:
    """What a request will compute, by what is known before its model is loaded.

    A side that is not asked for is the model's own, or that of the first picture: which of them,
    its pipeline decides, so that the larger one counts. In a clip, the model's own comes first.

    Args:
        request: What was asked for.
        defaults: The model's own call arguments.

    Raises:
        BadInput: If a picture cannot be read.
    """

    def own(*names: str) -> int | None:
        found = (defaults.get(name) for name in names)
        return max((value for value in found if isinstance(value, int)), default=None)

    frames = request.frames or own(*NAMES["frames"]) or 1
    path = next(iter(request.pictures.values()), None)
    drawn = (0, 0) if path is None else picture_size(path)
    stated = {side: own(side) or 0 for side in SIDES}
    width, height = (
        getattr(request, side)
        or (stated[side] if frames > 1 and stated[side] else max(stated[side], pixels))
        or SIDE
        for side, pixels in zip(("width", "height"), drawn, strict=True)
    )
    return Extent(width, height, frames, request.steps or own(*NAMES["steps"]) or STEPS)


def arguments(pipe: Any, request: Request, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call of ``pipe``; the noise is not among them.

    Args:
        pipe: The pipeline that the request needs (``modes.pipeline_for``).
        request: What was asked for.
        defaults: The model's own call arguments; those that the pipeline does not take are left
            out.

    Raises:
        BadInput: If the pipeline does not take an option, or a picture cannot be read.
    """
    known = parameters(pipe)
    call = {name: value for name, value in defaults.items() if name in known}
    call |= _prompt(pipe, request)
    for option, parameter in NAMES.items():
        value = getattr(request, option)
        if value is not None:
            call[_parameter(pipe, f"--{option}", parameter)] = value
    if request.guidance is not None:
        call |= _guidance(pipe, request.guidance, call)
    pictures = {option: read_picture(path) for option, path in request.pictures.items()}
    call |= _sides(pipe, request, call, pictures)
    return call


def stacked(calls: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The arguments of one call for several: texts and pictures become lists, one for each.

    One call stays as it is.

    Args:
        calls: From ``arguments``, at least one.

    Raises:
        BadInput: If they differ in something that there is only one of in a call.
    """
    first = dict(calls[0])
    if len(calls) == 1:
        return first
    if any(isinstance(first.get(name), list) for name in PER_ROW):
        raise BadInput("A clip between two pictures is a call by itself: ask for one at a time.")
    made = {}
    for name, value in first.items():
        values = [call.get(name) for call in calls]
        if value is not None and name in (*TEXTS, *PER_ROW):
            made[name] = values
        elif all(one == value for one in values):
            made[name] = value
        else:
            raise BadInput(f"{name} differs within a call ({value!r}, …): it has to be one.")
    return made


def unstacked(call: Mapping[str, Any], count: int) -> list[dict[str, Any]]:
    """The arguments of each of several that were made in one call."""
    if count == 1:
        return [dict(call)]
    listed = {*TEXTS, *PER_ROW}
    return [
        {
            name: value[place] if name in listed and isinstance(value, list) else value
            for name, value in call.items()
        }
        for place in range(count)
    ]


def recorded(call: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a call's arguments that is plain data."""
    plain = (str, int, float, bool, type(None))
    return {name: value for name, value in call.items() if isinstance(value, plain)}


def read_picture(path: Path) -> Image.Image:
    """A picture in RGB.

    Raises:
        BadInput: If there is none, or it cannot be read.
    """
    from PIL import ImageOps

    with _opened(path) as picture:
        turned: Image.Image = ImageOps.exif_transpose(picture)
        return turned.convert("RGB")


def picture_size(path: Path) -> tuple[int, int]:
    """Width and height of a picture as ``read_picture`` gives it; its pixels are not read.

    Raises:
        BadInput: If there is none, or it cannot be read.
    """
    from PIL.ExifTags import Base

    with _opened(path) as picture:
        width, height = picture.size
        turned = picture.getexif().get(Base.Orientation) in TURNED
    return (height, width) if turned else (width, height)


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """A picture; what cannot be read of it inside is bad input too."""
    from PIL import Image

    try:
        with Image.open(path) as picture:
            yield picture
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise BadInput(f"{path} cannot be read as a picture: {reason}") from error


def _parameter(pipe: Any, option: str, wanted: tuple[str, ...]) -> str:
    known = parameters(pipe)
    for name in wanted:
        if name in known:
            return name
    raise BadInput(f"{type(pipe).__name__} takes no {option}: leave it out.")


def _prompt(pipe: Any, request: Request) -> dict[str, Any]:
    if "prompt" in parameters(pipe):
        if not request.prompt.strip():
            raise BadInput("PROMPT is empty: say what to draw.")
        return {"prompt": request.prompt}
    if request.prompt:
        raise BadInput(f"{type(pipe).__name__} takes no prompt: leave it out.")
    return {}


def _guidance(pipe: Any, scale: float, call: Mapping[str, Any]) -> dict[str, Any]:
    """True guidance where the model's own call uses it, or its network has none embedded.

    It takes effect only with a negative prompt, so an empty one is given where there is none.
    """
    network = getattr(pipe, "transformer", None)
    embedded = network is not None and bool(network.config.get("guidance_embeds", False))
    if "true_cfg_scale" in call or ("true_cfg_scale" in parameters(pipe) and not embedded):
        negative = call.get("negative_prompt")
        return {"true_cfg_scale": scale, "negative_prompt": "" if negative is None else negative}
    return {_parameter(pipe, "--guidance", GUIDANCE): scale}


def _sides(
    pipe: Any, request: Request, call: Mapping[str, Any], pictures: dict[str, Image.Image]
) -> dict[str, Any]:
    """Pictures and size: the size asked for, the model's own, or that of the picture."""
    known, parameter = parameters(pipe), names(pipe)
    step = _multiple(pipe)
    asked = {side: getattr(request, side) for side in SIDES if getattr(request, side) is not None}
    for side, pixels in asked.items():
        if pixels % step:
            raise BadInput(
                f"--{side} {pixels}: {type(pipe).__name__} makes multiples of {step}; the nearest "
                f"are {pixels // step * step or step} and {(pixels // step + 1) * step}."
            )
    if set(SIDES) <= set(known):
        first = next(iter(pictures.values()), None)
        own = {} if first is None else {side: getattr(first, side) // step * step for side in SIDES}
        stated = {side: call[side] for side in SIDES if call.get(side) is not None}
        return {**_given(parameter, pictures), **own, **stated, **asked}
    if asked and not pictures:
        raise BadInput(f"{type(pipe).__name__} takes no --{next(iter(asked))}: leave it out.")
    sized = {option: _resized(picture, asked) for option, picture in pictures.items()}
    return _given(parameter, sized)


def _given(
    parameter: Mapping[str, str], pictures: Mapping[str, Image.Image]
) -> dict[str, Image.Image | list[Image.Image]]:
    """Pictures by parameter; of one that takes several, in the order of the options."""
    several: dict[str, list[Image.Image]] = {}
    for option, picture in pictures.items():
        several.setdefault(parameter[option], []).append(picture)
    return {name: found if len(found) > 1 else found[0] for name, found in several.items()}


def _resized(picture: Image.Image, asked: Mapping[str, int]) -> Image.Image:
    if not asked:
        return picture
    return picture.resize((asked.get("width", picture.width), asked.get("height", picture.height)))


def _multiple(pipe: Any) -> int:
    """What the sides of a picture must be multiples of: a latent, or a patch of latents."""
    for name in ("image_processor", "video_processor"):
        processor = getattr(pipe, name, None)
        if processor is not None:
            return int(processor.config.vae_scale_factor)
    return 1
