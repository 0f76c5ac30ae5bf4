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
from collections.abc import Iterable, Iterator, Mapping
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

KNOWN = 0.75
"""From this share of values on the weights count as known. Norms and biases, which is what a
quantized network keeps as it was, are a half or a bit more, and no LoRA changes them."""

WRAPPERS = ("base_layer.", "_orig_mod.")
"""What a LoRA and `torch.compile` put into the names of the weights below them."""

FUSED = ("to_qkv", "to_kv", "to_added_qkv", "to_added_kv")
"""Copies that ``fuse_qkv_projections`` makes; the projections that they are made of stay."""


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
    return digest + SEPARATOR + encoded(_sample(denoiser.core) for denoiser in denoisers)


def difference(expected: str, found: str) -> str | None:
    """In what two identities differ, in words; ``None`` where they are of one network."""
    (model, _, weights), (other, _, others) = (
        one.partition(SEPARATOR) for one in (expected, found)
    )
    if model != other:
        return f"another network: {model}, not {other}"
    try:
        pair = decoded(weights), decoded(others)
    except ValueError:
        return "a network whose description is damaged"
    if not all(map(len, pair)):
        return None
    changed = count_changed(*pair)
    if changed is None:
        return "a network of other tensors"
    if changed:
        return (
            "a network of this class with other weights (fine-tuned, or with a LoRA): "
            f"{changed} of {len(pair[0])} that were looked at differ"
        )
    return None


def compared(expected: str, found: str, owner: str) -> str | None:
    """In what two identities differ, in words; warns where too few weights can be compared.

    Args:
        expected: Of the network that the numbers were measured on.
        found: Of the network at hand.
        owner: Whose numbers they are, for the warning.
    """
    differs = difference(expected, found)
    if differs is not None:
        return differs
    unknown = [
        text
        for one, text in ((expected, "its numbers do"), (found, "the network as it is stored does"))
        if not _knows_weights(one)
    ]
    if unknown:
        warnings.warn(
            f"{owner}: {unknown[0]} not tell most weights (quantized, cast to 8 bits, or offloaded "
            "to disk?), so whether they are those that it was calibrated on is not known. If in "
            "doubt, calibrate again (`accel calibrate`).",
            AccelWarning,
            stacklevel=3,
        )
    return None


def _knows_weights(text: str) -> bool:
    """Whether most values are there: old identities have none, and quantized networks few."""
    _, _, weights = text.partition(SEPARATOR)
    values = decoded(weights)
    return bool(len(values) and values.isfinite().sum() >= KNOWN * len(values))


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
    places, lost = _weights(core), _on_disk(core)
    chosen = sorted((hashlib.sha256(name.encode()).digest(), name) for name in places)[:TENSORS]
    values = []
    for digest, name in chosen:
        module, tensor = places[name]
        index = int.from_bytes(digest[:8], "big") % max(tensor.numel(), 1)
        known = tensor not in lost
        values.append(Place(module, tensor, index).value() if known else torch.tensor(torch.nan))
    if not values:
        return torch.empty(0)
    # those without a value are on the CPU, whatever the network is on
    device = next((v.device for v in values if v.device.type != "cpu"), values[0].device)
    return torch.stack([value.to(device) for value in values])


def _weights(core: Any) -> dict[str, tuple[Any, Tensor]]:
    """The weights of a network and the modules that hold them, by the names they were loaded by."""
    modules = dict(core.named_modules())
    found = {}
    for name, tensor in core.named_parameters():
        owner, _, _ = name.rpartition(".")
        if ".lora_" in name or _is_copy(owner, modules):
            continue
        below, _, wrapped = owner.rpartition(".")
        plain = name
        for wrapper in WRAPPERS:
            plain = plain.replace(wrapper, "")
        found[plain] = modules[below if wrapped == "base_layer" else owner], tensor
    return found


def _is_copy(owner: str, modules: Mapping[str, Any]) -> bool:
    """Whether a module is fused of projections that are there as well."""
    attention, _, own = owner.removesuffix(".base_layer").rpartition(".")
    return own in FUSED and hasattr(modules[attention], "to_k")


def _on_disk(core: Any) -> set[Tensor]:
    """The weights that group offloading wrote to disk: what is in memory then is uninitialised."""
    from accel.seams.offload import groups_of

    groups = (group for group in groups_of(core) if group._is_offloaded_to_disk)
    return {tensor for group in groups for tensor in group.tensor_to_key}


def encoded(samples: Iterable[Tensor]) -> str:
    """Samples ``[N]`` one after the other, rounded to bfloat16, as text."""
    values = torch.cat([sample.cpu() for sample in samples]).bfloat16()
    return base64.b64encode(values.view(torch.uint8).numpy().tobytes()).decode()


def decoded(text: str) -> Tensor:
    """What `encoded` made a text of, ``[N]`` in float32.

    Raises:
        ValueError: If the text is none of its.
    """
    content = bytearray(base64.b64decode(text, validate=True))
    if len(content) % 2:
        raise ValueError("a value of bfloat16 has two bytes")
    if not content:
        return torch.empty(0)
    return torch.frombuffer(content, dtype=torch.bfloat16).float()


def count_changed(a: Tensor, b: Tensor, slack: float = SMALLEST) -> int | None:
    """How many values differ by more than rounding; ``None`` for samples of other lengths.

    Args:
        a: Sample, ``[N]``.
        b: Another.
        slack: What a value may differ by beyond one step of bfloat16.
    """
    if a.shape != b.shape:
        return None
    allowed = ROUNDING * torch.maximum(a.abs(), b.abs()) + slack
    return int(((a - b).abs() > allowed).sum())  # NaN compares as equal: there is no value
