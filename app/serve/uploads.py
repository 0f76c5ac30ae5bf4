"""Files from outside: looked at before they are kept, and kept under names of our own."""

from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
import time
from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex
from typing import BinaryIO

from accel.bundled import check_safetensors
from accel.errors import BadInput, BadModel, NotWritten
from app.serve.limits import MIB, Limits

FORMATS = {"PNG": ".png", "JPEG": ".jpg", "WEBP": ".webp"}
WEIGHTS = ".safetensors"
SHOWN = 60
"""Characters of a sender's file name that an error repeats."""

NAME = re.compile(r"[0-9a-f]{32}\.[a-z]+")
"""What a file is called that was kept."""

HEADER = 16 * MIB
"""Bytes of the longest header of weights that is read: it lies in memory as a whole."""

YOUNG = 3600.0
"""Seconds for which an upload stays, whether or not a job names it."""

Content = bytes | Path | BinaryIO
"""A file's bytes, where it lies, or itself, open and seekable."""


def keep(folder: Path, name: str, content: Content, limits: Limits) -> Path:
    """Check a file and keep it; equal contents are kept once.

    Args:
        folder: Where.
        name: What its sender calls it; only for errors.
        content: The file. It is not read as a whole.
        limits: What is admitted.

    Raises:
        BadInput: If it is too large, alone or with what is there, or neither a picture nor
            safetensors.
        NotWritten: If the disk is full.
    """
    name = name[:SHOWN]
    with _opened(content, name) as file:
        size = file.seek(0, os.SEEK_END)
        _check_size(name, size, limits.largest_upload)
        kind = _picture(file, name, size, limits)
        if kind is None:
            _check_size(name, size, limits.lora_bytes)
        target = folder / f"{_digest(file)}{kind or WEIGHTS}"
        if target.is_file():
            target.touch()
            return target
        _check_room(folder, name, size, limits)
        with _copied(file, folder) as part:
            if kind is None:
                _check_weights(part, name)
            part.replace(target)
    return target


def named(text: str) -> set[str]:
    """The names of kept files in a text."""
    return set(NAME.findall(text))


def renew(folder: Path, names: Iterable[str]) -> None:
    """Have some uploads stay for as long as if they had come at this moment."""
    for name in names:
        path = folder / name
        if path.is_file():
            path.touch()


def remove(folder: Path, needed: Container[str]) -> None:
    """Remove the uploads that are not needed any more, except for young ones.

    Args:
        folder: Where they lie.
        needed: File names.

    Raises:
        OSError: If the disk refuses.
    """
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        if path.name not in needed and time.time() - path.stat().st_mtime > YOUNG:
            path.unlink()


@contextmanager
def _opened(content: Content, name: str) -> Iterator[BinaryIO]:
    if isinstance(content, bytes):
        yield io.BytesIO(content)
    elif isinstance(content, Path):
        try:
            file = content.open("rb")
        except OSError as error:
            told = f"{name!r} did not arrive ({error.strerror}): send it again."
            raise BadInput(told) from error
        with file:
            yield file
    else:
        yield content


def _check_size(name: str, size: int, limit: int) -> None:
    if size > limit:
        raise BadInput(
            f"{name!r} has {size} bytes, and this server takes at most {limit} of such a file."
        )


def _check_room(folder: Path, name: str, size: int, limits: Limits) -> None:
    held = sum(path.stat().st_size for path in folder.iterdir()) if folder.is_dir() else 0
    if held + size > limits.uploads_of_owner:
        raise BadInput(
            f"{name!r} has {size / MIB:.1f} MiB, your uploads have {held / MIB:.1f}, and this "
            f"server keeps at most {limits.uploads_of_owner / MIB:.1f} of yours. Delete jobs that "
            "you do not need and empty the trash: that removes the uploads that no job names, "
            "an hour after they came."
        )


def _digest(file: BinaryIO) -> str:
    file.seek(0)
    return hashlib.file_digest(file, "sha256").hexdigest()[:32]  # type: ignore[arg-type]


@contextmanager
def _copied(file: BinaryIO, folder: Path) -> Iterator[Path]:
    """A copy on the disk, which goes if it is not moved away."""
    part = folder / f".{token_hex(8)}.part"
    file.seek(0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with part.open("xb") as copy:
            shutil.copyfileobj(file, copy, MIB)
            copy.flush()
            os.fsync(copy.fileno())
        yield part
    except OSError as error:
        raise NotWritten(
            f"The upload could not be written ({error.strerror}): free some space, then send it "
            "again. Nothing was left behind."
        ) from error
    finally:
        part.unlink(missing_ok=True)


def _picture(file: BinaryIO, name: str, size: int, limits: Limits) -> str | None:
    """The suffix of a picture; ``None`` for what is none."""
    from PIL import Image, UnidentifiedImageError

    file.seek(0)
    try:
        with Image.open(file, formats=list(FORMATS)) as picture:
            kind = str(picture.format)
            _check_size(name, size, limits.upload_bytes)
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


def _check_weights(path: Path, name: str) -> None:
    """Refuse what is no safetensors, or truncated."""
    try:
        with path.open("rb") as file:
            if int.from_bytes(file.read(8), "little") > HEADER:
                raise BadModel("Its header is too large.")
        check_safetensors(path)
    except BadModel as error:
        raise BadInput(
            f"{name!r} is neither a PNG, JPEG or WebP picture nor whole safetensors: send one of "
            "those."
        ) from error
