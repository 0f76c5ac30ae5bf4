"""Writing files: whole or not at all."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from secrets import token_hex

from accel.errors import BadInput, NotWritten

_FOLDERS = re.compile(r"(?<![\w:/.])/(?:[^\s/:'\"]+/)+(?=[^\s/])")


def without_folders(text: str) -> str:
    """A text with the names of files in the place of their absolute paths."""
    return _FOLDERS.sub("", text)


def slug(prompt: str, length: int = 48) -> str:
    """A prompt as part of a file name: ASCII letters, digits and hyphens, cut at a word."""
    plain = unicodedata.normalize("NFKD", prompt).encode("ascii", "ignore").decode().lower()
    words = re.findall(r"[a-z0-9]+", plain)
    name = ""
    for word in words:
        longer = f"{name}-{word}" if name else word[:length]
        if len(longer) > length:
            break
        name = longer
    return name or "picture"


def check_target(path: Path, overwrite: bool) -> None:
    """Refuse a file that cannot be written, before any work is done for it.

    Raises:
        BadInput: If it is there already, or its folder is not there or not writable.
    """
    if path.is_dir():
        raise BadInput(f"{path} is a folder: give the name of a file.")
    if path.exists() and not overwrite:
        raise BadInput(f"{path} is there already: give another --out, or --overwrite.")
    if not path.parent.is_dir():
        raise BadInput(f"The folder {path.parent} of --out is not there: create it first.")
    if not os.access(path.parent, os.W_OK):
        raise BadInput(f"The folder {path.parent} cannot be written to: give another --out.")


def write(files: Mapping[Path, bytes]) -> None:
    """Write some files: all are on the disk in full before the first one gets its name.

    Raises:
        NotWritten: If the disk is full or refuses. Nothing is left behind.
    """
    with ExitStack() as staged:
        parts = {path: _stage(path, content, staged) for path, content in files.items()}
        for path, part in parts.items():
            try:
                os.replace(part, path)
            except OSError as error:
                raise NotWritten(
                    f"{path} could not be written ({error.strerror}): see what is in its place."
                ) from error


def _stage(path: Path, content: bytes, staged: ExitStack) -> Path:
    """Write a temporary file beside ``path``; the stack removes it if it is still there."""
    part = path.with_name(f".{path.name}.{token_hex(4)}.part")
    staged.callback(part.unlink, missing_ok=True)
    try:
        with part.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise NotWritten(
            f"{path} could not be written ({error.strerror}, {len(content)} bytes): free some "
            "space or give another --out. Nothing was left behind."
        ) from error
    return part


def check_folder(folder: Path, names: Iterable[str], overwrite: bool) -> None:
    """Refuse a folder that files of these names cannot be written to; it may not be there yet.

    Raises:
        BadInput: As ``check_target``.
    """
    if not folder.exists():
        check_target(folder, overwrite)
    elif not folder.is_dir():
        raise BadInput(f"{folder} is a file: give a folder as --out.")
    else:
        for name in names:
            check_target(folder / name, overwrite)
