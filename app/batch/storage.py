"""Where a job's files lie: a folder, or a place that fsspec knows (``s3://…``, ``memory://…``)."""

from __future__ import annotations

import fnmatch
import hashlib
import os
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

from accel.errors import BadInput, NotWritten
from app import files


class Storage(Protocol):
    """A place for files with names such as ``a/b.png``. Every file is there whole, or not."""

    @property
    def where(self) -> str:
        """What a person calls it."""
        ...

    def prepare(self) -> None:
        """Make sure that it can be written to, before any work is done.

        Raises:
            BadInput: If it cannot.
        """
        ...

    def names(self, pattern: str) -> list[str]:
        """Names of the files at its top that match a pattern, in order."""
        ...

    def empty(self) -> bool:
        """Whether there is nothing at all."""
        ...

    def exists(self, name: str) -> bool:
        """Whether a file is there."""
        ...

    def get(self, name: str) -> bytes:
        """The content of a file.

        Raises:
            NotWritten: If it cannot be read.
        """
        ...

    def put(self, contents: dict[str, bytes]) -> None:
        """Write some files, in the place of those of the same names.

        Raises:
            NotWritten: If the place is full or refuses.
        """
        ...

    def append(self, name: str, content: bytes) -> None:
        """Add lines to a file; what a crash has torn off there stays a line of its own.

        Raises:
            NotWritten: If the place is full or refuses, or somebody has taken the file away.
        """
        ...

    def free(self) -> int | None:
        """Bytes that may still be written; ``None``: nobody knows."""
        ...

    def sweep(self, age: float = 0.0) -> None:
        """Remove what a crash has left half-written.

        Args:
            age: Seconds for which nobody has written to it: others may be at work here.
        """
        ...


def open_storage(place: str) -> Storage:
    """The storage of a folder, or of an address with ``://``.

    Raises:
        BadInput: If nobody knows such addresses.
    """
    if "://" in place and not place.startswith("file://"):
        return Remote(place)
    return Folder(Path(place.removeprefix("file://")))


def digest(storage: Storage, name: str) -> str | None:
    """SHA-256 of a file; ``None``: it is not there."""
    if not storage.exists(name):
        return None
    return hashlib.sha256(storage.get(name)).hexdigest()


class Folder:
    """A folder of a file system, local or shared.

    Args:
        root: It is created where it is not there; its parent has to be.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._logs: dict[str, tuple[int, int]] = {}

    @property
    def where(self) -> str:
        """Its path."""
        return str(self._root)

    def prepare(self) -> None:
        """Create the folder."""
        if self._root.exists() and not self._root.is_dir():
            raise BadInput(f"{self._root} is a file: give a folder as --out.")
        if not self._root.parent.is_dir():
            raise BadInput(
                f"The folder {self._root.parent} of --out is not there: create it first."
            )
        try:
            self._root.mkdir(exist_ok=True)
            probe = self._root / f".{uuid4().hex}.part"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise BadInput(
                f"The folder {self._root} cannot be written to ({error.strerror}): give another "
                "--out."
            ) from error

    def names(self, pattern: str) -> list[str]:
        """Names at the top that match."""
        return sorted(path.name for path in self._root.glob(pattern) if path.is_file())

    def empty(self) -> bool:
        """Whether there is nothing in it; hidden files do not count."""
        try:
            return all(path.name.startswith(".") for path in self._root.iterdir())
        except FileNotFoundError:
            return True

    def exists(self, name: str) -> bool:
        """Whether it is a file."""
        return (self._root / name).is_file()

    def get(self, name: str) -> bytes:
        """Its bytes."""
        try:
            return (self._root / name).read_bytes()
        except OSError as error:
            raise NotWritten(f"{self._root / name} cannot be read ({error.strerror}).") from error

    def put(self, contents: dict[str, bytes]) -> None:
        """Write all to the disk, then give each its name."""
        if not self._root.is_dir():
            raise NotWritten(
                f"{self._root} was removed while the job ran: run the same command again; it makes "
                "what is missing."
            )
        paths = {self._root / name: content for name, content in contents.items()}
        for folder in {path.parent for path in paths}:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise NotWritten(f"{folder} cannot be created ({error.strerror}).") from error
        files.write(paths)

    def append(self, name: str, content: bytes) -> None:
        """Add to the end and wait for the disk; a torn end gets its line break first."""
        path = self._root / name
        try:
            with path.open("ab") as file:
                self._check(path, os.fstat(file.fileno()))
                torn = file.tell() > 0 and not _ends_in_break(path)
                file.write(b"\n" * torn + content)
                file.flush()
                os.fsync(file.fileno())
                found = os.fstat(file.fileno())
        except OSError as error:
            raise NotWritten(
                f"{path} could not be written ({error.strerror}): free some space; the same "
                "command goes on where this one stopped."
            ) from error
        self._logs[name] = (found.st_ino, found.st_size)

    def _check(self, path: Path, found: os.stat_result) -> None:
        """Refuse to go on in a file that is not the one that was written before."""
        known = self._logs.get(path.name)
        if known is not None and (found.st_ino != known[0] or found.st_size < known[1]):
            raise NotWritten(
                f"{path} was removed or cut while the job ran, and with it the record of what is "
                "done: run the same command again; it makes what is missing."
            )

    def free(self) -> int:
        """Bytes that are free on its disk."""
        there = next(path for path in (self._root, *self._root.absolute().parents) if path.is_dir())
        return shutil.disk_usage(there).free

    def sweep(self, age: float = 0.0) -> None:
        """Remove temporary files."""
        for part in self._root.rglob(".*.part"):
            with suppress(FileNotFoundError):
                if time.time() - part.stat().st_mtime >= age:
                    part.unlink()


def _ends_in_break(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


class Remote:
    """An object storage, through fsspec; what a store cannot do, append, is done by many objects.

    Args:
        address: Such as ``s3://bucket/folder``; needs fsspec's package for it.
    """

    def __init__(self, address: str) -> None:
        import fsspec

        try:
            system, root = fsspec.core.url_to_fs(address)
        except (ValueError, ImportError) as error:
            raise BadInput(
                f"--out {address}: {error}. Install fsspec's package for it, or give a folder."
            ) from error
        self._address = address
        self._system: Any = system
        self._root = str(root).rstrip("/")

    @property
    def where(self) -> str:
        """Its address."""
        return self._address

    def prepare(self) -> None:
        """Write an object, and take it away again."""
        try:
            self._system.makedirs(self._root, exist_ok=True)
            probe = self._path(f".{uuid4().hex}.part")
            self._system.pipe_file(probe, b"")
            self._system.rm_file(probe)
        except Exception as error:  # whatever the package of this storage raises
            raise BadInput(f"{self._address} cannot be written to: {error}") from error

    def names(self, pattern: str) -> list[str]:
        """Names at the top that match."""
        self._system.invalidate_cache()
        found = self._system.ls(self._root, detail=False) if self._there() else []
        names = (str(path).rpartition("/")[2] for path in found)
        return sorted(name for name in names if fnmatch.fnmatch(name, pattern))

    def _there(self) -> bool:
        return bool(self._system.exists(self._root))

    def empty(self) -> bool:
        """Whether there is no object below the address."""
        return not (self._there() and self._system.ls(self._root, detail=False))

    def exists(self, name: str) -> bool:
        """Whether there is such an object."""
        return bool(self._system.isfile(self._path(name)))

    def get(self, name: str) -> bytes:
        """Its bytes."""
        try:
            return bytes(self._system.cat_file(self._path(name)))
        except Exception as error:
            raise NotWritten(f"{self._address}/{name} cannot be read: {error}") from error

    def put(self, contents: dict[str, bytes]) -> None:
        """Write objects: each is there whole, or not."""
        for name, content in contents.items():
            path = self._path(name)
            try:
                self._system.makedirs(path.rpartition("/")[0], exist_ok=True)
                self._system.pipe_file(path, content)
            except Exception as error:
                raise NotWritten(
                    f"{self._address}/{name} could not be written: {error}. The same command goes "
                    "on where this one stopped."
                ) from error

    def append(self, name: str, content: bytes) -> None:
        """Write the lines as an object of their own, beside those of before."""
        stem, dot, suffix = name.rpartition(".")
        self.put({f"{stem}-{time.time_ns()}-{uuid4().hex[:8]}{dot}{suffix}": content})

    def free(self) -> None:
        """Nobody knows."""
        return

    def sweep(self, age: float = 0.0) -> None:
        """There is nothing half-written."""

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"
