"""Which network this is: what numbers that were measured on one are held against.

An identity is text: a digest of the classes and configs of a pipeline's denoisers, and a sample of
their weights. The weights are compared as numbers and not by a digest, because float16 and bfloat16
round the same weight to different values: a sample agrees where every number is within one step of
bfloat16 of the other.
"""

from __future__ import annotations

import base64
import hashlib
import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from accel.errors import AccelWarning
from accel.seams.denoisers import find_denoisers

if TYPE_CHECKING:
    from torch import Tensor

TENSORS = 128
"""Weights that are looked at in each denoiser, one a tensor."""

COMPARED = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""What is stored otherwise (quantized, or elsewhere than in memory) has no value to compare."""

ROUNDING = 2.0**-7
"""One step of bfloat16, relative."""

SMALLEST = 1.2e-7
"""Two steps of float16 near zero."""

SEPARATOR = ":"
"""Between the digest and the sample."""


def identity(pipe: Any) -> str:
    """Digest of classes and configs of a pipeline's denoisers, and a sample of their weights.

    One value is read from each of up to 128 tensors a denoiser, by one read of the device. A LoRA
    that acts is part of the weights, fused or not; one that is loaded but disabled is not.
    """
    denoisers = find_denoisers(pipe)
    described = [
        (
            denoiser.name,
            type(denoiser.core).__name__,
            {k: v for k, v in denoiser.core.config.items() if not k.startswith("_")},
        )
        for denoiser in denoisers
    ]
    text = json.dumps(described, sort_keys=True, default=str)
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return digest + SEPARATOR + _encoded([_sample(denoiser.core) for denoiser in denoisers])


def difference(expected: str, found: str) -> str | None:
    """In what two identities differ, in words; ``None`` where they are of one network."""
    (model, _, weights), (other, _, others) = (
        one.partition(SEPARATOR) for one in (expected, found)
    )
    if model != other:
        return f"another network: {model}, not {other}"
    if not weights or not others:
        return None
    try:
        pair = _decoded(weights), _decoded(others)
    except ValueError:
        return "a network whose description is damaged"
    changed = _changed(*pair)
    if changed is None:
        return "a network of other tensors"
    if changed:
        return (
            "a network of this class with other weights (fine-tuned, or with a LoRA): "
            f"{changed} of {len(pair[0])} that were looked at differ"
        )
    return None


def compared(expected: str, found: str, owner: str) -> str | None:
    """In what two identities differ, in words; warns where there are no weights to compare.

    Args:
        expected: Of the network that the numbers were measured on.
        found: Of the network at hand.
        owner: Whose numbers they are, for the warning.
    """
    differs = difference(expected, found)
    unknown = [
        text
        for one, text in ((expected, "its numbers do"), (found, "the network (quantized?) does"))
        if not _knows_weights(one)
    ]
    if differs is None and unknown:
        warnings.warn(
            f"{owner}: {unknown[0]} not tell the weights, so whether they are those that it was "
            "calibrated on is not known. If in doubt, calibrate again (`accel calibrate`).",
            AccelWarning,
            stacklevel=3,
        )
    return differs


def _knows_weights(text: str) -> bool:
    """Whether there are values: old identities have none, and quantized networks neither."""
    _, _, weights = text.partition(SEPARATOR)
    return bool(weights) and bool(_decoded(weights).isfinite().any())


@dataclass(frozen=True)
class Place:
    """One value of a tensor.

    Attributes:
        module: The module that holds the tensor.
        tensor: The tensor.
        index: Of the value, in the flat tensor.
    """

    module: Any
    tensor: Tensor
    index: int

    def value(self) -> Tensor:
        """The value in float32, what active LoRAs add to it included; NaN where it has none."""
        tensor = self.tensor.detach()
        plain = type(tensor) is torch.Tensor and tensor.dtype in COMPARED and not tensor.is_meta
        if not plain or not tensor.numel():
            return torch.full((), torch.nan)
        found = tensor.flatten()[self.index].float()
        return found + sum(self._added())

    def _added(self) -> Iterator[Tensor]:
        """What LoRAs that act, and are not fused, add to it."""
        layer = self.module
        if not hasattr(layer, "lora_A") or layer.disable_adapters or layer.merged:
            return
        for name in layer.active_adapters:
            if name in layer.lora_A and self.tensor.ndim > 1:
                down, up = (part[name].weight for part in (layer.lora_A, layer.lora_B))
                row, column = divmod(self.index, self.tensor[0].numel())
                product = up.flatten(1)[row].float() @ down.flatten(1)[:, column].float()
                yield product * layer.scaling[name]


def _sample(core: Any) -> Tensor:
    """Values of some weights of a network, ``[N]`` in float32, in an order of their names."""
    modules = dict(core.named_modules())
    places = {}
    for name, tensor in core.named_parameters():
        owner, _, _ = name.rpartition(".")
        if ".lora_" in name:
            continue
        below, _, wrapped = owner.rpartition(".")
        module = modules[below if wrapped == "base_layer" else owner]
        places[name.replace(".base_layer.", ".")] = module, tensor
    chosen = sorted((hashlib.sha256(name.encode()).digest(), name) for name in places)[:TENSORS]
    values = []
    for digest, name in chosen:
        module, tensor = places[name]
        index = int.from_bytes(digest[:8], "big") % max(tensor.numel(), 1)
        values.append(Place(module, tensor, index).value())
    if not values:
        return torch.empty(0)
    return torch.stack([value.to(values[0].device) for value in values])


def _encoded(samples: list[Tensor]) -> str:
    values = torch.cat([sample.cpu() for sample in samples]).bfloat16()
    return base64.b64encode(values.view(torch.uint8).numpy().tobytes()).decode()


def _decoded(text: str) -> Tensor:
    """The sample ``[N]`` in float32.

    Raises:
        ValueError: If the text is none.
    """
    content = bytearray(base64.b64decode(text, validate=True))
    if len(content) % 2:
        raise ValueError("a value of bfloat16 has two bytes")
    return torch.frombuffer(content, dtype=torch.bfloat16).float()


def _changed(a: Tensor, b: Tensor) -> int | None:
    """How many values differ by more than rounding; ``None`` for samples of other lengths."""
    if a.shape != b.shape:
        return None
    allowed = ROUNDING * torch.maximum(a.abs(), b.abs()) + SMALLEST
    return int(((a - b).abs() > allowed).sum())  # NaN compares as equal: there is no value
