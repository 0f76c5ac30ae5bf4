"""Pictures and clips that a benchmark has drawn, kept: for distances of sets, and to show.

They lie in ``pictures/MODEL/WEIGHTS-CODE``, which git ignores; numbers of other weights or other
code look elsewhere. Sets are compared from `ENOUGH` captions on: of smaller ones the Fréchet
distance says little.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from contest import Contestant, Drawn
from PIL import Image

from accel import quality
from accel.scenes import HELD_OUT, Scene, clip, clip_scene, picture, scene

ENOUGH = 64
"""Captions from which on sets are compared."""

REAL = 100_000
"""Real scenes to compare with start this far into the held-out seeds."""

TOO_FEW = "too few"
MISSING = "pictures missing"

KEPT = Path(__file__).parent / "pictures"


@dataclass(frozen=True)
class Album:
    """A folder of what was drawn.

    Attributes:
        folder: Where it lies.
        first: Of the captions of a stage so many are kept, to be shown.
        call: The call's arguments, which say how large a real scene is.
    """

    folder: Path
    first: int
    call: dict[str, Any]

    def keep(self, who: Contestant, subject: Scene, drawn: Drawn, scenes: Sequence[Scene]) -> None:
        """Write down what was drawn, if it is one of those that are needed.

        Args:
            who: By whom.
            subject: Of which caption.
            drawn: What.
            scenes: All captions of the stage: where they are enough to compare sets, all are kept.
        """
        shown = scenes if len(scenes) >= ENOUGH else scenes[: self.first]
        if subject.seed not in {one.seed for one in shown}:
            return
        path = self._path(who.named(), subject.seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(path, frames=_frames(drawn.picture))

    def get(self, named: dict[str, Any], seed: int) -> np.ndarray | None:
        """The picture ``[H, W, 3]`` or clip ``[F, H, W, 3]`` of a setting, if it was kept."""
        path = self._path(named, seed)
        if not path.exists():
            return None
        with np.load(path) as found:
            frames: np.ndarray = found["frames"]
        return frames if "num_frames" in self.call else frames[0]

    def frechet(
        self, named: dict[str, Any], stock: dict[str, Any], seeds: Sequence[int]
    ) -> dict[str, float | str]:
        """Distances of a setting's set to real scenes and to the stock set, or why there is none.

        Args:
            named: The setting.
            stock: The stock pipeline, as a setting.
            seeds: Of the captions.
        """
        if len(seeds) < ENOUGH:
            return {"frechet_real": TOO_FEW, "frechet_stock": TOO_FEW}
        drawn, own = self._set(named, seeds), self._set(stock, seeds)
        if drawn is None or own is None:
            return {"frechet_real": MISSING, "frechet_stock": MISSING}
        real = self.real(len(seeds))
        return {
            "frechet_real": quality.frechet(drawn, real),
            "frechet_stock": quality.frechet(drawn, own),
        }

    def real(self, count: int) -> np.ndarray:
        """So many real scenes, or clips of some, that no model and no caption has seen."""
        seeds = range(HELD_OUT.start + REAL, HELD_OUT.start + REAL + count)
        side = self.call["height"]
        if "num_frames" in self.call:
            frames = self.call["num_frames"]
            return np.stack([clip(clip_scene(seed), side, frames) for seed in seeds])
        return np.stack([picture(scene(seed), side) for seed in seeds])

    def _set(self, named: dict[str, Any], seeds: Sequence[int]) -> np.ndarray | None:
        found = [self.get(named, seed) for seed in seeds]
        there = [one for one in found if one is not None]
        return np.stack(there) if len(there) == len(found) else None

    def _path(self, named: dict[str, Any], seed: int) -> Path:
        name = hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()[:16]
        return self.folder / name / f"{seed}.npz"


def _frames(drawn: Image.Image | list[Image.Image]) -> np.ndarray:
    """``[F, H, W, 3]``, of a picture one frame."""
    frames = drawn if isinstance(drawn, list) else [drawn]
    return np.stack([np.asarray(frame.convert("RGB")) for frame in frames])
