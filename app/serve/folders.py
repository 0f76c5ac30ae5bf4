"""Where things lie below the server's folder. No name that a user typed becomes a path."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path

from app.files import slug


@dataclass(frozen=True)
class Folders:
    """The folder of one server."""

    root: Path

    @property
    def database(self) -> Path:
        """The queue and the history."""
        return self.root / "jobs.sqlite3"

    @property
    def lock(self) -> Path:
        """Held by the server that runs."""
        return self.root / "lock"

    @property
    def outputs(self) -> Path:
        """Results: all that may be served as files."""
        return self.root / "outputs"

    @property
    def baselines(self) -> Path:
        """Stock sides of comparisons."""
        return self.root / "baselines"

    def job(self, owner: str, id: str) -> Path:
        """The folder of a job."""
        return self.outputs / _name(owner) / id

    def uploads(self, owner: str) -> Path:
        """What an owner has uploaded."""
        return self.root / "uploads" / _name(owner)

    def free(self) -> int:
        """Bytes that may still be written."""
        return shutil.disk_usage(self.root).free


def _name(owner: str) -> str:
    """An owner as a folder: readable, and another one for every other owner."""
    return f"{slug(owner, 24)}-{hashlib.sha256(owner.encode()).hexdigest()[:16]}"


def sweep(folder: Path) -> None:
    """Remove what a crash left half-written in a folder."""
    for part in folder.glob(".*.part"):
        part.unlink(missing_ok=True)
