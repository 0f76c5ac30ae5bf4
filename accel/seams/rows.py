"""Take some rows of a call: slice every batched argument, leave the others alone.

A call of a network has ``count`` rows (branches × samples). Which arguments carry rows is told by
their first dimension, but for those that a first dimension would mislead about: position tables
have none below three dimensions, and per-row lists are lists of one entry a row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from accel.errors import UnsupportedModel

POSITIONS = frozenset(
    {
        "img_ids",
        "txt_ids",
        "image_rotary_emb",
        "rotary_emb",
        "freqs_cis",
        "visual_rope_pos",
        "text_rope_pos",
        "ids",
    }
)
"""Arguments that belong to the token grid: ``[S, D]`` is shared, ``[rows, S, D]`` is batched."""

PER_ROW = frozenset({"x", "cap_feats", "siglip_feats", "img_shapes", "txt_seq_lens"})
"""Arguments that are lists with one entry a row."""


def take_rows(arguments: Mapping[str, Any], rows: Sequence[int], count: int, frames: int) -> Any:
    """Slice a call's arguments.

    Args:
        arguments: By parameter name.
        rows: Rows to keep, each in ``[0, count)``.
        count: Rows of the call.
        frames: Frames that a video UNet folds into the first dimension of some arguments; 1
            where there are none.
    """
    return {name: _take(name, value, rows, count, frames) for name, value in arguments.items()}


def index_rows(tensor: Tensor, rows: Sequence[int]) -> Tensor:
    """Rows of a tensor ``[count, …]``: a view where they are adjacent, else a copy."""
    first, last = rows[0], rows[-1]
    if list(rows) == list(range(first, last + 1)):
        return tensor[first : last + 1]
    return tensor[list(rows)]


def _take(name: str, value: Any, rows: Sequence[int], count: int, frames: int) -> Any:
    if isinstance(value, Tensor):
        return _take_tensor(name, value, rows, count, frames)
    if isinstance(value, Mapping):
        return {key: _take(key, item, rows, count, frames) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        if name in PER_ROW and len(value) == count:
            return [value[row] for row in rows]
        return type(value)(_take(name, item, rows, count, frames) for item in value)
    return value


def _take_tensor(name: str, value: Tensor, rows: Sequence[int], count: int, frames: int) -> Tensor:
    if value.ndim == 0 or (name in POSITIONS and value.ndim < 3):
        return value
    if value.shape[0] == count:
        return index_rows(value, rows)
    if frames > 1 and value.shape[0] == count * frames:
        return index_rows(value.reshape(count, frames, *value.shape[1:]), rows).flatten(0, 1)
    return value


def scatter(parts: Sequence[tuple[Sequence[int], Tensor]], count: int) -> Tensor:
    """Put rows ``[(rows, values [len(rows), …]), …]`` that cover ``count`` rows back together."""
    order = [row for rows, _ in parts for row in rows]
    values = torch.cat([value for _, value in parts])
    if order == list(range(count)):
        return values
    where = sorted(range(count), key=order.__getitem__)
    return values[where]


def join_rows(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The arguments of one call of as many rows as there are calls of one row: `take_rows` undone.

    A step's timestep, which pipelines give as a scalar, becomes one number a row.

    Args:
        parts: The arguments of each row, as `take_rows` cuts them out.

    Raises:
        UnsupportedModel: If the rows differ in something that is no tensor a row.
    """
    return {name: _join(name, [part.get(name) for part in parts]) for name in parts[0]}


def form(arguments: Any) -> Any:
    """What the arguments of rows must have in common to be joined: shapes, and which are given."""
    if isinstance(arguments, Tensor):
        return (*arguments.shape, arguments.dtype)
    if isinstance(arguments, Mapping):
        return tuple((name, form(value)) for name, value in arguments.items())
    if isinstance(arguments, (list, tuple)):
        return tuple(map(form, arguments))
    return arguments is None


def _join(name: str, values: Sequence[Any]) -> Any:
    first = values[0]
    if isinstance(first, Tensor):
        return _join_tensors(name, list(values))
    if isinstance(first, Mapping):
        return {key: _join(key, [value[key] for value in values]) for key in first}
    if isinstance(first, (list, tuple)):
        if name in PER_ROW and len(first) == 1:
            return [item for value in values for item in value]
        return type(first)(_join(name, list(items)) for items in zip(*values, strict=True))
    if any(value is not first and value != first for value in values):
        raise UnsupportedModel(
            f"A network is given {name} = {first!r} for one row and another value for the next, "
            "and it takes one for all: rows of several noise levels do not go into one call."
        )
    return first


def _join_tensors(name: str, values: list[Tensor]) -> Tensor:
    first = values[0]
    shared = name in POSITIONS and first.ndim < 3
    if shared:
        return first
    return torch.stack(values) if first.ndim == 0 else torch.cat(values)
