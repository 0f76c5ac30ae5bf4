"""What the server admits, whichever way a request comes in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accel.errors import BadInput
from accel.plan import Plan
from app.call import NAMES, SIDES
from app.request import Request

BUNDLED = ("scenes-flux", "scenes-unet", "scenes-wan")
MIB = 2**20


@dataclass(frozen=True)
class Limits:
    """All numbers are positive.

    Attributes:
        side: Width or height, pixels.
        pixels: Width × height × frames.
        frames: Of a clip.
        steps: Of the sampler.
        prompt: Characters of a prompt, and of a negative prompt.
        upload_bytes: Of one uploaded file.
        repeats: Timed runs of each side of a comparison.
        jobs: Waiting, of all owners together.
        jobs_of_owner: Waiting, of one owner.
        group: Jobs submitted at once.
        models: The models that may be named; no others are loaded.
        roots: Folders that input pictures, LoRAs and calibration tables may lie in, beside the
            upload folder of the owner.
    """

    side: int = 2048
    pixels: int = 16 * 2048 * 2048
    frames: int = 257
    steps: int = 200
    prompt: int = 2000
    upload_bytes: int = 32 * MIB
    repeats: int = 20
    jobs: int = 500
    jobs_of_owner: int = 64
    group: int = 64
    models: tuple[str, ...] = BUNDLED
    roots: tuple[Path, ...] = ()


def check(request: Request, limits: Limits, call: Mapping[str, Any], folder: Path) -> None:
    """Refuse a request that goes beyond the limits.

    Args:
        request: With its values checked for type and range (``make``).
        limits: What is admitted.
        call: The model's own call arguments, which count where the request says nothing.
        folder: The upload folder of its owner.

    Raises:
        BadInput: Names the first value that is too large, the model that is not offered, or the
            file that lies elsewhere.
    """
    _check_model(request, limits)
    _check_size(request, limits, call)
    for name in ("prompt", "negative"):
        _at_most(f"{name} characters", len(getattr(request, name) or ""), limits.prompt)
    for name, path in request.files.items():
        check_path(name, path, (folder, *limits.roots))


def check_plan(plan: Plan, limits: Limits, folder: Path) -> None:
    """Refuse a plan that refers to a file outside of the folders that are read from.

    Raises:
        BadInput: Names the field.
    """
    for method in plan:
        for name, value in method:
            if isinstance(value, Path):
                check_path(f"{method.name}.{name}", value, (folder, *limits.roots))


def check_path(name: str, path: Path, roots: Iterable[Path]) -> None:
    """Refuse a path outside of some folders, links followed.

    Raises:
        BadInput: If it is outside, or not there.
    """
    try:
        real = path.resolve()
        inside = any(real.is_relative_to(root.resolve()) for root in roots) and real.is_file()
    except (OSError, ValueError, RuntimeError):  # too long, a zero byte, a loop of links
        inside = False
    if not inside:
        raise BadInput(f"{name}: {path.name} is none of your uploads: upload the file first.")


def check_offered(name: str, limits: Limits, what: str = "model") -> None:
    """Refuse a model that is not on the list.

    Args:
        name: Of the model.
        limits: What is admitted.
        what: The field that names it.

    Raises:
        BadInput: If it is not.
    """
    if name not in limits.models:
        raise BadInput(
            f"{what} {name!r} is not offered here: choose one of {', '.join(limits.models)}, or "
            "let the server be started with --model."
        )


def _check_model(request: Request, limits: Limits) -> None:
    check_offered(request.model, limits)
    if request.controlnet is not None:
        check_offered(request.controlnet, limits, "controlnet")
    if request.revision is not None or request.variant is not None:
        raise BadInput("revision and variant are for the command line: leave them out.")


def _check_size(request: Request, limits: Limits, call: Mapping[str, Any]) -> None:
    width, height = (getattr(request, side) or _own(call, side) or 1 for side in SIDES[::-1])
    frames = request.frames or max(_own(call, name) for name in NAMES["frames"]) or 1
    _at_most("width", width, limits.side)
    _at_most("height", height, limits.side)
    _at_most("frames", frames, limits.frames)
    _at_most("width × height × frames", width * height * frames, limits.pixels)
    _at_most("steps", request.steps or 1, limits.steps)


def _own(call: Mapping[str, Any], name: str) -> int:
    value = call.get(name)
    return value if isinstance(value, int) else 0


def _at_most(name: str, value: int, limit: int) -> None:
    if value > limit:
        raise BadInput(f"{name}: {value}, and this server admits at most {limit}: ask for less.")
