"""Stock sides of comparisons, kept on disk: pictures without loss, times, what was counted.

Under the hash of all that their bits depend on: request, files that go in, model, machine.
"""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from accel.report import Report
from app import files, metadata
from app.compare import Side, Timing
from app.session import Outcome

if TYPE_CHECKING:
    from app.models import Model
    from app.request import Request

LATEST = 20
"""How many times of a side are kept."""


@dataclass(frozen=True)
class Baselines:
    """A folder of stock sides.

    Attributes:
        folder: Made when there is something to keep.
        bytes: How much is kept; the longest unused go first.
    """

    folder: Path
    bytes: int = 2**30

    def has(self, request: Request, model: Model) -> bool:
        """Whether there is a stock side of a request."""
        return self._path(request, model).is_file()

    def read(self, request: Request, model: Model) -> Side | None:
        """The stock side of a request, if there is one."""
        path = self._path(request, model)
        if not path.is_file():
            return None
        path.touch()
        with np.load(path) as held:
            frames, told = held["frames"], json.loads(str(held["told"]))
        return _side(frames, told)

    def keep(self, request: Request, model: Model, side: Side) -> None:
        """Keep a stock side, in the place of the one before.

        Raises:
            NotWritten: If the disk is full or refuses.
        """
        outcome = side.outcome
        frames = np.stack([np.asarray(picture.convert("RGB")) for picture in outcome.pictures])
        buffer = io.BytesIO()
        np.savez_compressed(buffer, frames=frames, told=np.array(json.dumps(_told(side))))
        if len(buffer.getvalue()) > self.bytes:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        files.write({self._path(request, model): buffer.getvalue()})
        self._prune()

    def _path(self, request: Request, model: Model) -> Path:
        depends = {
            "request": request.to_dict(),
            "inputs": metadata.digests(request),
            "fingerprint": metadata.fingerprint(model).model_dump(),
        }
        text = json.dumps(depends, sort_keys=True)
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()}.npz"

    def _prune(self) -> None:
        held = [(path, path.stat()) for path in self.folder.glob("*.npz")]
        total = sum(about.st_size for _, about in held)
        for path, about in sorted(held, key=lambda one: one[1].st_mtime):
            if total <= self.bytes:
                return
            path.unlink()
            total -= about.st_size


def _told(side: Side) -> dict[str, Any]:
    report = side.report
    return {
        "clip": side.outcome.clip,
        "call": side.outcome.call,
        "took": side.outcome.seconds,
        "seconds": side.timing.seconds[-LATEST:],
        "report": {
            "pipeline": report.pipeline,
            "steps": report.steps,
            "calls": report.calls,
            "rows": report.rows,
            "samples": report.samples,
            "step_seconds": report.step_seconds,
        },
    }


def _side(frames: Any, told: dict[str, Any]) -> Side:
    from PIL import Image

    report = Report(tallies=[], **told["report"])
    pictures = [Image.fromarray(frame) for frame in frames]
    outcome = Outcome(pictures, told["clip"], told["call"], told["took"], report)
    return Side(outcome, Timing(tuple(told["seconds"])))
