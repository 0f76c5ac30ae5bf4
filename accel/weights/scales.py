"""Scales of activations by layer and noise level: what a calibration measures, and its file.

The bins are intervals of the noise share ``u = r/(1 + r)``, ``r = σ/α``: 0 is a clean sample, 1 is
pure noise, and of a flow it is σ itself. So a file serves any number of steps and any schedule.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from accel.calibration import content_of
from accel.errors import BadInput

Floats = NDArray[np.floating[Any]]

FORMAT = "diffusers-accel int8 1"
AGAIN = "Make one with `accel calibrate int8`."
REST = "*"
"""In a file that is written by hand: every layer that it does not name."""


def noise_share(ratio: float) -> float:
    """``u`` of a noise level σ/α."""
    return 1.0 if math.isinf(ratio) else ratio / (1.0 + ratio)


@dataclass(frozen=True, eq=False)
class Scales:
    """Scales of activations.

    Attributes:
        edges: By network, where its bins meet, rising: one fewer than there are bins.
        scales: By network and path of a layer ``[bins, 1, …, 1]``, with one axis for each of the
            activation's.
        errors: The same layers: relative error of the network's output where this one alone is
            int8, ``[bins]``; empty where it was not measured.
        model: Identity of the network that it was measured on; empty: serves any.
        note: What it rests on, in words.
    """

    edges: Mapping[str, Floats]
    scales: Mapping[str, Mapping[str, Floats]]
    errors: Mapping[str, Mapping[str, Floats]] = field(default_factory=dict)
    model: str = ""
    note: str = ""

    def bin(self, network: str, ratio: float) -> int:
        """The bin of a noise level σ/α."""
        return bisect_right(self.edges[network].tolist(), noise_share(ratio))

    def of(self, network: str, path: str) -> Floats | None:
        """Scales of a layer; ``None`` where they are not known."""
        known = self.scales.get(network, {})
        return known.get(path, known.get(REST))

    def to_bytes(self) -> bytes:
        """The content of a safetensors file; the same scales give the same bytes."""
        from safetensors.numpy import save

        tensors = {f"{network}/edges": edges for network, edges in self.edges.items()}
        for kind, tables in (("scale", self.scales), ("error", self.errors)):
            tensors |= {
                f"{network}/{kind}/{path}": table
                for network, layers in tables.items()
                for path, table in layers.items()
            }
        about = {"format": FORMAT, "model": self.model, "note": self.note}
        kept = {name: np.ascontiguousarray(one, np.float32) for name, one in tensors.items()}
        return save(kept, {"int8": json.dumps(about, sort_keys=True)})

    @classmethod
    def from_bytes(cls, content: bytes, where: str) -> Self:
        """What `to_bytes` wrote.

        Args:
            content: Of the file.
            where: Its path, for messages.

        Raises:
            BadInput: If it is no file of scales, or a damaged one.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load

        try:
            tensors, about = load(content), _about(content)
        except (SafetensorError, ValueError) as error:
            raise BadInput(f"{where} is no safetensors file of scales: {error}. {AGAIN}") from error
        if about.get("format") != FORMAT:
            raise BadInput(
                f"{where} holds no scales of activations that this version can read (found "
                f"{about.get('format', 'another kind of safetensors file')!r}, needed {FORMAT!r}). "
                f"{AGAIN}"
            )
        edges: dict[str, Floats] = {}
        tables: dict[str, dict[str, dict[str, Floats]]] = {"scale": {}, "error": {}}
        for name, table in tensors.items():
            network, kind, *path = name.split("/")
            if kind == "edges":
                edges[network] = table
            elif kind in tables:
                tables[kind].setdefault(network, {})["/".join(path)] = table
        _check(where, edges, tables["scale"])
        return cls(edges, tables["scale"], tables["error"], about["model"], about["note"])


def _check(
    where: str, edges: Mapping[str, Floats], scales: Mapping[str, Mapping[str, Floats]]
) -> None:
    """Refuse tables that do not fit together.

    Raises:
        BadInput: Naming the first.
    """
    for network, layers in scales.items():
        meet = edges.get(network)
        if meet is None or meet.ndim != 1 or not (np.diff(meet) >= 0).all():
            raise BadInput(f"{where}: the bins of {network} are not known, or fall. {AGAIN}")
        for path, table in layers.items():
            fits = table.ndim > 1 and table.shape == (len(meet) + 1, *(1,) * (table.ndim - 1))
            if not (fits and np.isfinite(table).all() and (table > 0).all()):
                raise BadInput(
                    f"{where}: {network}/{path} holds no positive scale for each of "
                    f"{len(meet) + 1} bins. {AGAIN}"
                )


def _about(content: bytes) -> dict[str, Any]:
    """What the head of a safetensors file says of the scales."""
    length = int.from_bytes(content[:8], "little")
    head = json.loads(content[8 : 8 + length])
    about = json.loads(head.get("__metadata__", {}).get("int8", "{}"))
    return about if isinstance(about, dict) and {"model", "note"} <= about.keys() else {}


def read(path: Path, sha256: str = "") -> Scales:
    """Scales from their file.

    Args:
        path: Of the file.
        sha256: What its content must hash to; empty: not checked.

    Raises:
        BadInput: If it is not there, not what it should be, or another file than was meant.
    """
    content = content_of(path, sha256, what="scales", again=AGAIN)
    return Scales.from_bytes(content, str(path))
