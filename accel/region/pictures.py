"""A UNet, or a decoder, that computes the active places of its levels alone.

The network's own code runs: what flows between its parts is ``[B, C, n, 1]``, the active places as
a picture of one column. Only three kinds of parts look beyond a place, and are answered here:

* a convolution is given windows (`accel.region.active`), without padding;
* a norm over groups uses statistics of the recorded input with the active places written over it,
  found from the original's by what changes at these places; or those that the original had;
* self-attention asks with the active places and looks at the recorded keys and values, the active
  ones written over them.

Source: Li et al., arXiv 2211.02048, section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from accel.errors import BadInput, UnsupportedModel
from accel.region.active import Active, Geometry, Side
from accel.region.recording import Changes, Keep, Kept, stored
from accel.seams.attention import UNREACHED, Asked
from accel.seams.rows import index_rows
from accel.seams.spatial import (
    Moments,
    Part,
    answering,
    find_parts,
    group_moments,
    group_scaling,
    levels_of,
    moved,
    refuse_filters,
    unpadded,
)

if TYPE_CHECKING:
    from torch import Tensor

    from accel.attach import Undo


@dataclass(frozen=True)
class Sparse:
    """A pass over some places.

    Attributes:
        kept: What the original had.
        rows: Where the rows of this pass are in it.
        active: The places.
        changes: Where to note what the edit changes; ``None``: nowhere.
    """

    kept: Kept
    rows: list[int]
    active: Active
    changes: Changes | None

    def of(self, path: str) -> tuple[Tensor, ...]:
        """What a part had, for the rows of this pass."""
        values = self.kept.values[path]
        if len(self.rows) == len(self.kept.rows) and self.rows == sorted(self.rows):
            return values
        return tuple(index_rows(value, self.rows) for value in values)

    def write(self, path: str, place: int, dim: int, index: Tensor, values: Tensor) -> None:
        """Note new values of a part, ``[rows, …]``."""
        if self.changes is not None:
            self.changes.write(self.kept.values[path][place], self.rows, dim, index, values)


class Pictures:
    """Records and runs one network of convolutions.

    Args:
        core: The network.
        name: Of the method, for refusals.
        recomputed: Whether norms take statistics of the edit.
        keep: How what is recorded is stored.

    Raises:
        UnsupportedModel: For a network with parts that are not known.
    """

    def __init__(self, core: Any, name: str, recomputed: bool, keep: Keep) -> None:
        self._core = core
        self._name = name
        self._recomputed = recomputed
        self._keep = keep
        self._parts = find_parts(core, name)
        self._factor = 2 ** levels_of(core)
        self._weights: dict[str, Tensor] = {}
        self._geometries: dict[str, Geometry] = {}
        self._grids: dict[int, Side] = {}
        self._recorded: Kept | None = None
        self._sparse: Sparse | None = None

    def attach(self) -> Iterator[Undo]:
        """Put it around the network's parts."""
        answers = {
            "convolution": self._convolution,
            "norm": self._norm,
            "attention": self._attention,
        }
        for part in self._parts:
            yield part.wrap(partial(answers[part.kind], part))

    def reset(self) -> None:
        """A run starts: weights may be others."""
        self._weights.clear()

    @contextmanager
    def recording(self, kept: Kept, sample: Tensor) -> Iterator[None]:
        """While it is entered, the parts' values of a dense pass are kept.

        Raises:
            BadInput: For pictures whose levels are no halves of each other.
            UnsupportedModel: For attention that does not go through torch's, or filters.
        """
        refuse_filters(self._core, self._name)
        self._check(sample)
        self._recorded = kept
        try:
            yield
        finally:
            self._recorded = None
        missing = [p.path for p in self._parts if p.kind == "attention" and self._lacks(kept, p)]
        if missing:
            raise UnsupportedModel(f"{self._name}: no attention of {missing[0]} {UNREACHED}.")

    def _lacks(self, kept: Kept, part: Part) -> bool:
        return part.path not in kept.values

    def _check(self, sample: Tensor) -> None:
        height, width = sample.shape[-2:]
        if sample.ndim != 4 or (self._halves and (height % self._factor or width % self._factor)):
            raise BadInput(
                f"{self._name} takes latents apart into levels of half the size, and "
                f"{height}×{width} cannot be halved {self._factor.bit_length() - 1} times: choose "
                f"a size whose latents are multiples of {self._factor}."
            )

    @property
    def _halves(self) -> bool:
        return hasattr(self._core, "down_blocks")

    @contextmanager
    def computing(self, sparse: Sparse) -> Iterator[None]:
        """While it is entered, the network computes the active places alone."""
        refuse_filters(self._core, self._name)
        self._sparse = sparse
        try:
            with unpadded(self._parts):
                yield
        finally:
            self._sparse = None

    # The parts.

    def _convolution(self, part: Part, inner: Callable[..., Any], x: Tensor) -> Tensor:
        if self._recorded is not None:
            result: Tensor = inner(x)
            self._learn(part, x, result)
            if not part.first:  # what comes first is given in full to every pass
                self._recorded.values[part.path] = (stored(_places_first(x), self._keep),)
            return result
        if self._sparse is None:
            result = inner(x)
            return result
        geometry = self._geometry(part, x)
        active = self._sparse.active
        windows = active.windows(geometry)
        recorded = None if part.first else self._sparse.of(part.path)[0]
        if recorded is not None:
            self._sparse.write(part.path, 0, 1, windows.given, x.flatten(2).transpose(1, 2))
        if x.device.type == "cpu" and not part.hooked:
            weight = self._weight(part).to(x.dtype)
            places = functional.linear(windows.columns(x, recorded), weight, part.module.bias)
        else:
            result = inner(windows.gathered(x, recorded))
            places = result.permute(0, 2, 3, 1).reshape(len(x), -1, result.shape[1])
        return places.transpose(1, 2).unsqueeze(-1)

    def _weight(self, part: Part) -> Tensor:
        """A convolution's weight ``[out, kernel · kernel · in]``, laid out once a run.

        On a CPU a small convolution takes longer to lay out its weight at every call than to sum.
        """
        if part.path not in self._weights:
            self._weights[part.path] = part.module.weight.permute(0, 2, 3, 1).flatten(1)
        return self._weights[part.path]

    def _learn(self, part: Part, x: Tensor, result: Tensor) -> None:
        conv = part.module
        source, target = ((side.shape[-2], side.shape[-1]) for side in (x, result))
        given = "all" if part.first else "active"
        geometry = Geometry(
            source, target, conv.kernel_size[0], conv.stride[0], conv.padding[0], given
        )
        self._geometries[part.path] = geometry
        self._grids |= {source[0] * source[1]: source, target[0] * target[1]: target}

    def _geometry(self, part: Part, x: Tensor) -> Geometry:
        geometry = self._geometries[part.path]
        upsampled = x.shape[-1] == 2 and not part.first  # nearest: the four children of a place
        return replace(geometry, given="children") if upsampled else geometry

    def _norm(self, part: Part, inner: Callable[..., Any], x: Tensor) -> Tensor:
        if self._recorded is not None:
            moments = group_moments(part.module, x)
            values = (stored(_places_first(x), self._keep),) if self._recomputed else ()
            self._recorded.values[part.path] = (*moments, *values)
            return self._plain(inner, x)
        if self._sparse is None:
            return self._plain(inner, x)
        moments = self._moments(part, self._sparse, x)
        scale, shift = group_scaling(part.module, *moments, x.dtype)
        ends = (...,) + (None,) * (x.ndim - 2)
        normed: Tensor = shift[ends].addcmul(scale[ends], x)
        return normed

    def _plain(self, inner: Callable[..., Any], x: Tensor) -> Tensor:
        result: Tensor = inner(x)
        return result

    def _moments(self, part: Part, sparse: Sparse, x: Tensor) -> Moments:
        """Of a norm's groups in this pass."""
        variance, mean, *inputs = sparse.of(part.path)
        if not inputs:
            return variance, mean
        recorded = inputs[0]
        pixels = sparse.active.pixels(self._grids[recorded.shape[1]])
        before = recorded.index_select(1, pixels.to(recorded.device)).to(x)
        flowing = _places_first(x)
        moments = moved(part.module, (variance, mean), before, flowing, recorded.shape[1])
        if sparse.changes is not None:
            sparse.write(part.path, 2, 1, pixels, flowing)
            every = torch.arange(variance.shape[1], device=x.device)
            for place, value in enumerate(moments):
                sparse.write(part.path, place, 1, every, value)
        return moments

    def _attention(self, part: Part, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._recorded is not None:
            return answering(inner, partial(self._keep_keys, part, self._recorded), *args, **kwargs)
        if self._sparse is not None:
            return answering(inner, partial(self._attend, part, self._sparse), *args, **kwargs)
        return inner(*args, **kwargs)

    def _keep_keys(self, part: Part, kept: Kept, asked: Asked) -> Tensor:
        both = (asked.key, asked.value)
        kept.values[part.path] = tuple(stored(value, self._keep) for value in both)
        return asked.dense()

    def _attend(self, part: Part, sparse: Sparse, asked: Asked) -> Tensor:
        keys, values = (value.to(asked.key) for value in sparse.of(part.path))
        pixels = sparse.active.pixels(self._grids[keys.shape[2]])
        for place, flowing in enumerate((asked.key, asked.value)):
            sparse.write(part.path, place, 2, pixels, flowing)
        return replace(
            asked,
            key=keys.index_copy(2, pixels, asked.key),
            value=values.index_copy(2, pixels, asked.value),
        ).dense()


def _places_first(x: Tensor) -> Tensor:
    """``[B, C, …]`` as ``[B, places, C]``, each place's channels side by side."""
    return x.flatten(2).transpose(1, 2)


def written(answer: Tensor, before: Tensor, active: Active) -> Tensor:
    """What the active places were answered, over what was there: ``[rows, C, H, W]``."""
    grid = (before.shape[-2], before.shape[-1])
    flat = before.to(answer).flatten(2)
    return flat.index_copy(2, active.pixels(grid), answer.flatten(2)).view(before.shape)
