"""What the server admits, whichever way a request comes in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accel.errors import BadInput
from accel.plan import GUARD, Plan
from app.call import Extent, extent
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
        work: Width × height × frames × steps.
        prompt: Characters of a prompt, and of a negative prompt.
        upload_bytes: Of one uploaded picture.
        lora_bytes: Of one uploaded file of weights.
        uploads_of_owner: Bytes that the uploads of one owner take together.
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
    work: int = 50 * 16 * 2048 * 2048
    prompt: int = 2000
    upload_bytes: int = 32 * MIB
    lora_bytes: int = 1024 * MIB
    uploads_of_owner: int = 4096 * MIB
    repeats: int = 20
    jobs: int = 500
    jobs_of_owner: int = 64
    group: int = 64
    models: tuple[str, ...] = BUNDLED
    roots: tuple[Path, ...] = ()

    @property
    def largest_upload(self) -> int:
        """Bytes of the largest file that is taken, whatever it is."""
        return max(self.upload_bytes, self.lora_bytes)


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
    for name in ("prompt", "negative"):
        _at_most(f"{name} characters", len(getattr(request, name) or ""), limits.prompt)
    for name, path in request.files.items():
        check_path(name, path, (folder, *limits.roots))
    _check_size(extent(request, call), limits)


def check_plan(plan: Plan, limits: Limits, folder: Path) -> None:
    """Refuse a plan that refers to a file outside of the folders that are read from.

    Raises:
        BadInput: Names the field.
    """
    parts = [(method.name, method) for method in plan]
    for part, fields in [*parts, *([(GUARD, plan.guard)] if plan.guard else [])]:
        for name, value in fields:
            if isinstance(value, Path):
                check_path(f"{part}.{name}", value, (folder, *limits.roots))


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


def _check_size(found: Extent, limits: Limits) -> None:
    for name in ("width", "height"):
        _at_most(name, getattr(found, name), limits.side)
    _at_most("frames", found.frames, limits.frames)
    _at_most("width × height × frames", found.pixels, limits.pixels)
    _at_most("steps", found.steps, limits.steps)
    _at_most("width × height × frames × steps", found.pixels * found.steps, limits.work)


def _at_most(name: str, value: int, limit: int) -> None:
    if value > limit:
        raise BadInput(f"{name}: {value}, and this server admits at most {limit}: ask for less.")
