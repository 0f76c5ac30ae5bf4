"""Empirical model statistics: what DPM-Solver-v3 knows of a network, and the file that holds it.

Three functions of λ are measured: the linear part ``l`` of a network's noise prediction, and the
scale ``s`` and bias ``b`` of how the rest of it changes along a trajectory. Here they are tables on
a uniform grid of λ, for each element of a latent (``none``), for each channel, or one number for
all (``scalar``); between the points of the grid they are straight, beyond its ends constant. What
is measured makes steps exact for a network that is like that; any statistics give solvers of the
same order, so that a coarse table costs accuracy, never consistency.

Source: Zheng et al., "DPM-Solver-v3", arXiv 2310.13268, section 3.2 and appendix C.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from accel.calibration import content_of
from accel.errors import BadInput
from samplers.ems_numbers import Scalars
from samplers.fingerprint import Fingerprint

Floats = NDArray[np.floating[Any]]
Reduce = Literal["none", "channel", "scalar"]
NAMES = ("l", "s", "b")
FORMAT = "diffusers-accel ems 1"
AGAIN = "Make one with `accel calibrate ems`."


@dataclass(frozen=True, eq=False)
class EMS:
    """Empirical model statistics on a uniform grid of λ.

    Attributes:
        lams: The grid ``[N + 1]``, ascending: from noise to data.
        l: Linear part of σ·ε in x, ``[N + 1, *D]``; D is empty for one number a level, ``[C]``, or
            the shape of a latent without its batch.
        s: Scale of the change of ``f = (σε − l·x)/α`` with λ along the trajectory, as ``l``.
        b: Bias of that change, as ``l``.
        axis: Where the channels of a latent are, its batch counted; for one number a channel.
        measured: What they were measured on; ``None``: they serve any model.
        note: What they rest on, in words.
    """

    lams: Floats
    l: Floats  # noqa: E741
    s: Floats
    b: Floats
    axis: int = 1
    measured: Fingerprint | None = None
    note: str = ""

    def __post_init__(self) -> None:
        shapes = {getattr(self, name).shape for name in NAMES}
        if len(shapes) > 1 or self.lams.ndim != 1 or len(self.lams) != len(self.l):
            raise BadInput(
                f"The statistics have a grid of {self.lams.shape} and tables of "
                f"{', '.join(map(str, sorted(shapes)))}; they must have one line a level, all of "
                f"one shape. {AGAIN}"
            )
        steps = np.diff(self.lams)
        uniform = len(steps) > 0 and (steps > 0).all() and np.ptp(steps) < 1e-6 * np.ptp(self.lams)
        if not uniform or not all(np.isfinite(getattr(self, name)).all() for name in NAMES):
            raise BadInput(
                "The statistics are not finite numbers on a uniform, ascending grid of two levels "
                f"or more: the file is damaged. {AGAIN}"
            )

    @property
    def reduce(self) -> Reduce:
        """Over what they were averaged."""
        kinds: dict[int, Reduce] = {1: "scalar", 2: "channel"}
        return kinds.get(self.l.ndim, "none")

    @property
    def span(self) -> tuple[float, float]:
        """First and last λ."""
        return float(self.lams[0]), float(self.lams[-1])

    def at(self, lams: Floats) -> tuple[Floats, Floats, Floats]:
        """The statistics at some λ, each ``[len(lams), *D]`` in float64."""
        low, high = self.span
        place = np.clip((lams - low) / (high - low), 0.0, 1.0) * (len(self.lams) - 1)
        below = np.minimum(place.astype(int), len(self.lams) - 2)
        share = (place - below).reshape(-1, *[1] * (self.l.ndim - 1))
        l, s, b = (  # noqa: E741
            (1.0 - share) * table[below] + share * table[below + 1]
            for table in (self.l, self.s, self.b)
        )
        return l, s, b

    @classmethod
    def from_scalars(cls, scalars: Scalars) -> Self:
        """Statistics as they stand in a plan."""
        lams = np.linspace(scalars.low, scalars.high, len(scalars.l))
        l, s, b = (np.array(getattr(scalars, name)) for name in NAMES)  # noqa: E741
        return cls(lams, l, s, b, measured=scalars.measured)

    def to_scalars(self, digits: int = 6) -> Scalars:
        """The same to stand in a plan, rounded to some significant digits.

        Raises:
            BadInput: If they are more than one number a level.
        """
        if self.reduce != "scalar":
            raise BadInput(
                f"Statistics with reduce={self.reduce!r} are too large for a plan: keep them in "
                "their file."
            )
        tables = {name: _rounded(getattr(self, name), digits) for name in NAMES}
        low, high = (float(f"{lam:.{digits}g}") for lam in self.span)
        return Scalars(low=low, high=high, measured=self.measured, **tables)

    def to_bytes(self) -> bytes:
        """The content of a safetensors file; the same statistics give the same bytes."""
        from safetensors.numpy import save

        measured = None if self.measured is None else self.measured.model_dump(mode="json")
        about = {
            "format": FORMAT,
            "reduce": self.reduce,
            "axis": self.axis,
            "grid": len(self.lams) - 1,
            "lambda": self.span,
            "measured": measured,
            "note": self.note,
        }
        tensors = {name: np.ascontiguousarray(getattr(self, name)) for name in ("lams", *NAMES)}
        return save(tensors, {"ems": json.dumps(about, sort_keys=True)})

    @classmethod
    def from_bytes(cls, content: bytes, where: str) -> Self:
        """What `to_bytes` wrote.

        Args:
            content: Of the file.
            where: Its path, for messages.

        Raises:
            BadInput: If it is no file of statistics, or a damaged one.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load

        try:
            tensors, about = load(content), _about(content)
        except (SafetensorError, ValueError) as error:
            raise BadInput(f"{where} is no safetensors file of statistics: {error}. {AGAIN}") from (
                error
            )
        if about.get("format") != FORMAT or not {"lams", *NAMES} <= set(tensors):
            raise BadInput(
                f"{where} holds no statistics of a model that this version can read (found "
                f"{about.get('format', 'another kind of safetensors file')!r}, needed {FORMAT!r}). "
                f"{AGAIN}"
            )
        try:
            measured = about["measured"]
            fingerprint = None if measured is None else Fingerprint.model_validate(measured)
            axis, note = int(about["axis"]), str(about["note"])
        except (KeyError, TypeError, ValidationError) as error:
            raise BadInput(f"{where} does not say what it was measured on. {AGAIN}") from error
        lams, l, s, b = (tensors[name] for name in ("lams", *NAMES))  # noqa: E741
        return cls(lams, l, s, b, axis, fingerprint, note)

    def write(self, path: Path) -> str:
        """Write the file; its SHA-256."""
        content = self.to_bytes()
        path.write_bytes(content)
        return hashlib.sha256(content).hexdigest()


def read(path: Path, sha256: str = "") -> EMS:
    """Statistics from their file.

    Args:
        path: Of the file.
        sha256: What its content must hash to; empty: not checked.

    Raises:
        BadInput: If it is not there, not what it should be, or another file than was meant.
    """
    content = content_of(path, sha256, what="statistics", again=AGAIN)
    return EMS.from_bytes(content, str(path))


def _about(content: bytes) -> dict[str, Any]:
    """What the head of a safetensors file says of the statistics."""
    length = int.from_bytes(content[:8], "little")
    head = json.loads(content[8 : 8 + length])
    about = json.loads(head.get("__metadata__", {}).get("ems", "{}"))
    return about if isinstance(about, dict) else {}


def _rounded(table: Floats, digits: int) -> tuple[float, ...]:
    return tuple(float(f"{value:.{digits}g}") for value in table.tolist())


def statistics(given: str | Path | Mapping[str, Any] | Scalars | EMS) -> EMS:
    """Statistics from a path, from numbers as they stand in a plan, or as they are.

    Raises:
        BadInput: If they are not to be had.
    """
    if isinstance(given, EMS):
        return given
    if isinstance(given, str | Path):
        return read(Path(given))
    try:
        return EMS.from_scalars(Scalars.model_validate(given))
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        raise BadInput(f"statistics: {name}: {first['msg']}. {AGAIN}") from error
