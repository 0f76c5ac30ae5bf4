"""The oracle: a small network that reads a scene's attributes off a picture.

It judges how well pictures keep to their captions, and its features carry the perceptual,
Fréchet and kernel distances of `accel.quality`. It was trained to read sharpness and noise too,
so that its features notice lost detail. Legend: N pictures, C channels, H, W size.
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
from accel.errors import BadInput, BadModel
from accel.scenes.pixels import as_floats
from accel.scenes.scene import ATTRIBUTES, MOTIONS, Scene

_ORDER = (*ATTRIBUTES, *MOTIONS)

WIDTHS = (32, 64, 96, 128)
FEATURES = 64


@dataclass(frozen=True, slots=True)
class Accuracy:
    """How well pictures keep to what their captions mention; shares in [0, 1].

    `mean` is the mean over all mentioned attributes, `all_correct` the share of pictures with
    every mentioned attribute right, `by_attribute` the share per attribute.
    """

    mean: float
    all_correct: float
    by_attribute: dict[str, float]


@dataclass(frozen=True, slots=True)
class Reading:
    """What the network says: logits per attribute, features `[N, 64]`, defects `[N, 2]`.

    Features are white over training renders, so that distances weigh faint traits such as
    sharpness as much as the loud ones that tell day from night.
    """

    logits: dict[str, Tensor]
    features: Tensor
    defects: Tensor


class Oracle(nn.Module):
    """Attribute classifier for pictures of 64 to 128 px."""

    centre: Tensor
    whiten: Tensor

    def __init__(self) -> None:
        super().__init__()
        inputs = (3, *WIDTHS[:-1])
        self.stages = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(before, width, 3, stride=1 if i == 2 else 2, padding=1),
                nn.GroupNorm(8, width),
                nn.SiLU(),
            )
            for i, (before, width) in enumerate(zip(inputs, WIDTHS, strict=True))
        )
        self.squeeze = nn.Linear(WIDTHS[-1] * 16, FEATURES)
        self.heads = nn.ModuleDict(
            {name: nn.Linear(FEATURES, len(values)) for name, values in ATTRIBUTES.items()}
        )
        self.defects = nn.Linear(FEATURES, 2)
        self.register_buffer("centre", torch.zeros(FEATURES))
        self.register_buffer("whiten", torch.eye(FEATURES))

    def maps(self, pixels: Tensor) -> list[Tensor]:
        """Feature maps of every stage for pixels `[N, 3, H, W]` in [0, 1]."""
        maps, x = [], pixels * 2 - 1
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps

    def forward(self, pixels: Tensor) -> Reading:
        """Read pictures `[N, 3, H, W]` in [0, 1]."""
        pooled = functional.adaptive_avg_pool2d(self.maps(pixels)[-1], 4)
        features = functional.silu(self.squeeze(pooled.flatten(1)))
        logits = {name: head(features) for name, head in self.heads.items()}
        white = (features - self.centre) @ self.whiten
        return Reading(logits, white, self.defects(features))

    @torch.no_grad()
    def calibrate(self, pictures: Sequence[Any]) -> None:
        """Make the features white over sets of pictures, one set per size."""
        self.centre.zero_()
        self.whiten.copy_(torch.eye(FEATURES))
        found = np.concatenate([features(group, self) for group in pictures])
        variances, axes = np.linalg.eigh(np.cov(found.T))
        scales = 1.0 / np.sqrt(variances + 1e-3 * variances.max())
        self.centre.copy_(torch.from_numpy(found.mean(0)))
        self.whiten.copy_(torch.from_numpy(axes * scales))

    def save(self, folder: Path) -> None:
        """Write `model.safetensors` and `config.json`."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.state_dict(), folder / "model.safetensors")
        attributes = {name: list(values) for name, values in ATTRIBUTES.items()}
        config = {"widths": list(WIDTHS), "features": FEATURES, "attributes": attributes}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def load(folder: Path | None = None) -> Oracle:
    """Load the bundled oracle, or one from a folder.

    Raises:
        BadModel: the folder holds no oracle, or one for other attributes.
    """
    folder = folder or asset("models/oracle")
    config = folder / "config.json"
    if not config.exists():
        raise BadModel(f"found no oracle in {folder}; train one with tools/train_scenes.py oracle")
    known = json.loads(config.read_text())["attributes"]
    if known != {name: list(values) for name, values in ATTRIBUTES.items()}:
        raise BadModel(
            f"the oracle in {folder} reads other attributes than scenes have: retrain it"
        )
    oracle = Oracle()
    oracle.load_state_dict(load_file(folder / "model.safetensors"))
    return oracle.eval().requires_grad_(False)


def pixels(images: Any) -> Tensor:
    """Pictures in any usual form as a tensor `[N, 3, H, W]` in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(as_floats(images).transpose(0, 3, 1, 2)))


@torch.no_grad()
def features(images: Any, oracle: Oracle | None = None) -> NDArray[np.float64]:
    """Whitened penultimate features of pictures, `[N, 64]`."""
    oracle = oracle or load()
    parts = [oracle(part).features for part in torch.split(pixels(images), 64)]
    result: NDArray[np.float64] = torch.cat(parts).double().numpy()
    return result


@torch.no_grad()
def read(images: Any, oracle: Oracle | None = None) -> list[dict[str, str]]:
    """The most likely value of every attribute, per picture."""
    oracle = oracle or load()
    found: list[dict[str, str]] = []
    for part in torch.split(pixels(images), 64):
        best = {name: logits.argmax(1).tolist() for name, logits in oracle(part).logits.items()}
        found += [
            {name: ATTRIBUTES[name][rows[i]] for name, rows in best.items()}
            for i in range(len(part))
        ]
    return found


def caption_accuracy(
    images: Any, scenes: Sequence[Scene], oracle: Oracle | None = None
) -> Accuracy:
    """Judge pictures by the attributes that their scenes' captions mention.

    Of a clip's caption, a picture can show all but the motion: that is left to
    `accel.scenes.motion`.

    Raises:
        BadModel: no oracle is there.
        BadInput: pictures and scenes differ in number.
    """
    return tally(read(images, oracle), scenes)


def tally(answers: Sequence[dict[str, str]], scenes: Sequence[Scene]) -> Accuracy:
    """Compare answers with what the captions mention; what no answer tells is not judged.

    Raises:
        BadInput: answers and scenes differ in number.
    """
    if len(answers) != len(scenes):
        raise BadInput(
            f"found {len(answers)} pictures for {len(scenes)} scenes, needed is one each"
        )
    hits: dict[str, list[bool]] = {}
    whole = []
    for scene, answer in zip(scenes, answers, strict=True):
        wanted = {name: value for name, value in scene.wanted.items() if name in answer}
        right = {name: answer[name] == value for name, value in wanted.items()}
        whole.append(all(right.values()))
        for name, hit in right.items():
            hits.setdefault(name, []).append(hit)
    every = [hit for many in hits.values() for hit in many]
    by_attribute = {name: float(np.mean(hits[name])) for name in _ORDER if name in hits}
    return Accuracy(float(np.mean(every)), float(np.mean(whole)), by_attribute)
