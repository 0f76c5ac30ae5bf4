"""Rotary positions, in whatever form a network hands them to its attention.

The forms: one table or a pair of cosines and sines, each of which has the tokens along one axis
(``[S, D]``, ``[1, S, 1, D]``, ``[B, S, D]``, …) and stands for the image or for the whole joint
sequence; or a pair of complex tables, the image's and the text's (Qwen-Image).
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from accel.errors import UnsupportedModel
from accel.seams.layout import Layout


class Fewer(Protocol):
    """Fewer tokens in the place of many, as `accel.tokens` makes them."""

    def merge(self, x: Tensor) -> Tensor:
        """``[B, N, …]`` as ``[B, M, …]``."""
        ...

    def rows(self, rotary: Tensor, dim: int = 0) -> Tensor:
        """What belongs to the kept places, along an axis."""
        ...


def kept_positions(value: Any, joint: Layout, image: Fewer, whole: Fewer, network: str) -> Any:
    """The positions of the tokens that are left, in the form in which they came.

    Args:
        value: What the network hands to its attention.
        joint: The tokens that attend to each other.
        image: Fewer image tokens.
        whole: The same with the text beside.
        network: For the refusal.

    Raises:
        UnsupportedModel: If the form is none of those above.
    """

    def kept(table: Tensor) -> Tensor:
        axis = _axis(table, joint, network)
        return (image if table.shape[axis] == joint.image else whole).rows(table, axis)

    tables = _tables(value, network)
    if isinstance(value, Tensor):
        return kept(value)
    if all(table.is_complex() for table in tables):
        return type(value)([kept(tables[0]), *tables[1:]])
    return type(value)([kept(table) for table in tables])


def shared_positions(value: Any, joint: Layout, network: str) -> bool:
    """Whether a table has no axis for the rows of a batch: all must then keep the same tokens."""
    return value is not None and _axis(_tables(value, network)[0], joint, network) == 0


def _tables(value: Any, network: str) -> list[Tensor]:
    tables = list(value) if isinstance(value, (tuple, list)) else [value]
    known = len(tables) <= 2 and all(isinstance(table, Tensor) for table in tables)
    if not known or len({table.is_complex() for table in tables}) > 1:
        raise _unknown(network, f"{len(tables)} parts")
    return tables


def _axis(table: Tensor, joint: Layout, network: str) -> int:
    """The axis of the tokens: never the last, which is that of the rotations."""
    lengths = (joint.image, joint.tokens)
    axes = [axis for axis in range(table.ndim - 1) if table.shape[axis] in lengths]
    if len(axes) != 1:
        raise _unknown(network, f"a table of {tuple(table.shape)} for {joint}")
    return axes[0]


def _unknown(network: str, found: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"{network} hands its attention rotary positions in a form that is not known ({found}): "
        "its tokens cannot be reduced, so methods of tokens do not fit. Leave them out of the "
        "plan, or add the form to accel/seams/rotary.py."
    )
