"""The clip oracle: reads what moves in a clip, where to and how fast, and all that a picture shows.

The pictures in a clip are read by `accel.scenes.oracle`; a second, smaller network looks at nine
frames at once, at 32 px. It was trained to notice flicker and stutter too, so that its features
tell smooth motion from broken motion. Legend: N clips, F frames, H, W size.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from accel.bundled import asset
from accel.errors import BadModel
from accel.scenes import oracle as pictures
from accel.scenes.oracle import Accuracy, Oracle, Reading
from accel.scenes.pixels import as_clips
from accel.scenes.scene import MOTIONS, Scene

FRAMES = 9
EDGE = 32
WIDTHS = (32, 48, 64)
FEATURES = 32
SHOWN = 5
"""Frames of a clip, evenly spread, whose picture features are averaged."""


class MotionReader(nn.Module):
    """Classifier of what moves, for clips of any length and size from two frames of 32 px on."""

    centre: Tensor
    whiten: Tensor

    def __init__(self) -> None:
        super().__init__()
        inputs = (3 * (FRAMES + 1), *WIDTHS[:-1])
        self.stages = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(before, width, 3, stride=1 if i == 0 else 2, padding=1),
                nn.GroupNorm(8, width),
                nn.SiLU(),
            )
            for i, (before, width) in enumerate(zip(inputs, WIDTHS, strict=True))
        )
        self.squeeze = nn.Linear(WIDTHS[-1] * 16, FEATURES)
        self.heads = nn.ModuleDict(
            {name: nn.Linear(FEATURES, len(values)) for name, values in MOTIONS.items()}
        )
        self.defects = nn.Linear(FEATURES, 2)
        self.register_buffer("centre", torch.zeros(FEATURES))
        self.register_buffer("whiten", torch.eye(FEATURES))

    def maps(self, clips: Tensor) -> list[Tensor]:
        """Feature maps of every stage for clips `[N, 9, 3, 32, 32]` in [0, 1]."""
        still = clips.mean(1, keepdim=True)
        maps, x = [], torch.cat([4 * (clips - still), 2 * still - 1], 1).flatten(1, 2)
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps

    def forward(self, clips: Tensor) -> Reading:
        """Read clips `[N, 9, 3, 32, 32]` in [0, 1], as `small` makes them."""
        pooled = functional.adaptive_avg_pool2d(self.maps(clips)[-1], 4)
        features = functional.silu(self.squeeze(pooled.flatten(1)))
        logits = {name: head(features) for name, head in self.heads.items()}
        white = (features - self.centre) @ self.whiten
        return Reading(logits, white, self.defects(features))

    @torch.no_grad()
    def calibrate(self, clips: Tensor) -> None:
        """Make the features white over clips `[N, 9, 3, 32, 32]`."""
        self.centre.zero_()
        self.whiten.copy_(torch.eye(FEATURES))
        found = torch.cat([self(part).features for part in torch.split(clips, 64)]).double()
        variances, axes = torch.linalg.eigh(torch.cov(found.T))
        self.centre.copy_(found.mean(0))
        self.whiten.copy_(axes / (variances + 1e-3 * variances.max()).sqrt())

    def save(self, folder: Path) -> None:
        """Write `motion.safetensors` and `motion.json` beside the oracle for pictures."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.state_dict(), folder / "motion.safetensors")
        motions = {name: list(values) for name, values in MOTIONS.items()}
        config = {"widths": list(WIDTHS), "features": FEATURES, "frames": FRAMES, "edge": EDGE}
        known = json.dumps(config | {"motions": motions}, indent=2)
        (folder / "motion.json").write_text(known + "\n")


@dataclass(frozen=True, slots=True)
class ClipOracle:
    """Both networks that read a clip: one its pictures, one its motion."""

    picture: Oracle
    motion: MotionReader


def load(folder: Path | None = None) -> ClipOracle:
    """Load the bundled clip oracle, or one from a folder.

    Raises:
        BadModel: the folder holds no clip oracle, or one for other attributes.
    """
    folder = folder or asset("models/oracle")
    path = folder / "motion.json"
    if not path.exists():
        raise BadModel(
            f"found no clip oracle in {folder}; train one with tools/train_scenes.py clip-oracle"
        )
    if json.loads(path.read_text())["motions"] != {k: list(v) for k, v in MOTIONS.items()}:
        raise BadModel(f"the clip oracle in {folder} reads other motions than clips have: retrain")
    reader = MotionReader()
    reader.load_state_dict(load_file(folder / "motion.safetensors"))
    return ClipOracle(pictures.load(folder), reader.eval().requires_grad_(False))


def small(clips: NDArray[np.floating[Any]]) -> Tensor:
    """Nine frames, evenly spread, at 32 px. `[N, F, H, W, 3]` to `[N, 9, 3, 32, 32]`."""
    rows = np.linspace(0, clips.shape[1] - 1, FRAMES).round().astype(int)
    chosen = torch.from_numpy(np.ascontiguousarray(clips[:, rows].transpose(0, 1, 4, 2, 3)))
    pooled = functional.adaptive_avg_pool2d(chosen.flatten(0, 1).float(), EDGE)
    return pooled.reshape(len(clips), FRAMES, *pooled.shape[1:])


def _chunks(clips: Any, size: int = 16) -> list[Any]:
    return [as_clips(clips[low : low + size]) for low in range(0, len(clips), size)]


@torch.no_grad()
def features(clips: Any, judge: ClipOracle | None = None) -> NDArray[np.float64]:
    """Whitened features of clips, `[N, 96]`: of five frames' looks on average, and of motion.

    Raises:
        BadModel: no clip oracle is there.
        BadInput: these are no clips.
    """
    judge, parts = judge or load(), []
    for chunk in _chunks(clips):
        rows = np.linspace(0, chunk.shape[1] - 1, SHOWN).round().astype(int)
        looks = pictures.features(chunk[:, rows], judge.picture)
        looks = looks.reshape(len(chunk), SHOWN, -1).mean(1)
        moves = judge.motion(small(chunk)).features.double().numpy()
        parts.append(np.concatenate([looks, moves], 1))
    return np.concatenate(parts)


@torch.no_grad()
def read(clips: Any, judge: ClipOracle | None = None) -> list[dict[str, str]]:
    """The most likely value of every attribute, per clip; still ones off its middle frame.

    Sides and the like are those of the middle frame because things move: a boat that the caption
    places on the left may end on the right.
    """
    judge = judge or load()
    found: list[dict[str, str]] = []
    for chunk in _chunks(clips):
        still = pictures.read(chunk[:, chunk.shape[1] // 2], judge.picture)
        logits = judge.motion(small(chunk)).logits
        best = {name: value.argmax(1).tolist() for name, value in logits.items()}
        for i, answer in enumerate(still):
            found.append(answer | {name: MOTIONS[name][rows[i]] for name, rows in best.items()})
    return found


def caption_accuracy(
    clips: Any, scenes: Sequence[Scene], judge: ClipOracle | None = None
) -> Accuracy:
    """Judge clips by the attributes that their scenes' captions mention, motion included.

    Raises:
        BadModel: no clip oracle is there.
        BadInput: these are no clips, or clips and scenes differ in number.
    """
    return pictures.tally(read(clips, judge), scenes)
