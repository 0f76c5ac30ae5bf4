"""Files from outside: looked at before they are kept, and kept under names of our own."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from secrets import token_hex

from accel.bundled import check_safetensors
from accel.errors import BadInput, BadModel
from app import files
from app.serve.limits import Limits

FORMATS = {"PNG": ".png", "JPEG": ".jpg", "WEBP": ".webp"}
WEIGHTS = ".safetensors"
SHOWN = 60
"""Characters of a sender's file name that an error repeats."""


def keep(folder: Path, name: str, content: bytes | Path, limits: Limits) -> Path:
    """Check a file and keep it; equal contents are kept once.

    Args:
        folder: Where.
        name: What its sender calls it; only for errors.
        content: Its bytes, or where it lies.
        limits: What is admitted.

    Raises:
        BadInput: If it is too large, or neither a picture nor safetensors.
        NotWritten: If the disk is full.
    """
    name = name[:SHOWN]
    size = len(content) if isinstance(content, bytes) else _size(content, name)
    if size > limits.upload_bytes:
        raise BadInput(
            f"{name!r} has {size} bytes, and this server takes at most {limits.upload_bytes}."
        )
    data = content if isinstance(content, bytes) else content.read_bytes()
    suffix = _picture(data, name, limits) or _weights(folder, data, name)
    target = folder / f"{hashlib.sha256(data).hexdigest()[:32]}{suffix}"
    if not target.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        files.write({target: data})
    return target


def _size(path: Path, name: str) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise BadInput(f"{name!r} did not arrive ({error.strerror}): send it again.") from error


def _picture(data: bytes, name: str, limits: Limits) -> str | None:
    """The suffix of a picture; ``None`` for what is none."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data), formats=list(FORMATS)) as picture:
            kind = str(picture.format)
            if max(picture.size) > limits.side:
                raise BadInput(
                    f"{name!r} is {picture.width}x{picture.height} pixels, and this server takes "
                    f"at most {limits.side} a side: scale it down."
                )
            picture.load()
    except UnidentifiedImageError:
        return None
    except BadInput:
        raise
    except Exception as error:  # what a decoder raises on bytes that were made to break it
        raise BadInput(f"{name!r} is a damaged picture ({error}): save it again.") from error
    return FORMATS[kind]


def _weights(folder: Path, data: bytes, name: str) -> str:
    """The suffix of safetensors.

    Raises:
        BadInput: If it is none, or truncated.
    """
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f".{token_hex(8)}.part"
    try:
        part.write_bytes(data)
        check_safetensors(part)
    except BadModel as error:
        raise BadInput(
            f"{name!r} is neither a PNG, JPEG or WebP picture nor whole safetensors: send one of "
            "those."
        ) from error
    finally:
        part.unlink(missing_ok=True)
    return WEIGHTS
