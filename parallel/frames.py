"""Clip parallelism on UNets with layers along time: AnimateDiff, SVD, ModelScope.

Layers over pictures see the frames of this process alone. Of those along time, convolutions get the
frames next to them, normalisations the moments of the whole clip, attentions both scopes, and what
counts frames counts those of the clip.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from accel.errors import BadInput, UnsupportedModel
from accel.seams.blocks import wrap_call
from accel.seams.denoisers import Call, Denoiser, Inner
from accel.seams.frames import UNETS, cuts_clips, numbered_by, positions_in
from parallel.clips import Clips, Now, Options

if TYPE_CHECKING:
    from accel.attach import Undo
    from accel.report import Tally
    from parallel.mesh import Axis


class FrameClips(Clips):
    """Shares the frames of one UNet out."""

    reads: ClassVar[bool] = True

    def __init__(self, denoiser: Denoiser, axis: Axis, options: Options, tally: Tally) -> None:
        super().__init__(denoiser, axis, options, tally)
        self._dim = UNETS[self._kind]

    def _grid(self, call: Call) -> tuple[int, int]:
        return int(call.sample.shape[self._dim]), 1

    def _layers(self) -> Iterator[Undo]:
        for path, module in self._denoiser.core.named_modules():
            if cuts_clips(module):
                raise UnsupportedModel(
                    f"{self._denoiser.name}.{path} is of FreeNoise, which cuts the clip itself, so "
                    "clip parallelism does not fit: call disable_free_noise()."
                )
            if isinstance(module, nn.Conv3d) and module.kernel_size[0] > 1:
                self._check_convolution(path, module)
                yield wrap_call(module, partial(self._convolution, path, module))
            elif isinstance(module, nn.GroupNorm):
                yield wrap_call(module, partial(self._norm, path, module))
            elif positions_in(module) is not None:
                yield wrap_call(module, partial(self._positions, module))
            elif (numbers := numbered_by(module)) is not None:
                yield wrap_call(numbers, self._numbers)
        yield from self._attentions("temporal")

    def _check_convolution(self, path: str, module: nn.Conv3d) -> None:
        size, padding = module.kernel_size[0], module.padding
        plain = module.padding_mode == "zeros" and not isinstance(padding, str)
        alone = (module.stride[0], module.dilation[0]) == (1, 1)
        if not (plain and alone and 2 * int(padding[0]) + 1 == size):
            raise UnsupportedModel(
                f"{self._denoiser.name}.{path} is a convolution along time that does not pad by "
                "half of its width: it is not known which frames it sees, so clip parallelism does "
                "not fit. Leave it out."
            )

    def _compute(self, call: Call, now: Now, inner: Inner, /) -> Tensor:
        self._check_positions(now)
        arguments = {
            name: _cut(value, len(call.rows), now.scope.frames, now.own)
            for name, value in call.arguments.items()
        }
        own = call.sample.narrow(self._dim, now.own.start, len(now.own))
        arguments[self._denoiser.sample_name] = own
        value = inner(replace(call, arguments=arguments)).value
        return now.exchange.gather(value, now.scope.lengths, self._dim)

    def _check_positions(self, now: Now) -> None:
        """Every run of frames has to have positions, which are counted from its start if need be.

        Raises:
            BadInput: If a run is longer than the network has positions.
        """
        longest = max(now.scope.lengths)
        for module in self._denoiser.core.modules():
            positions = positions_in(module)
            if positions is not None and longest > (known := positions.shape[1]):
                raise BadInput(
                    f"{now.scope.frames} frames in {now.scope.count} processes are {longest} each, "
                    f"and pipe.{self._denoiser.name} has positions for {known}: start "
                    f"{-(-now.scope.frames // known)} processes, or ask for a shorter clip."
                )

    def _convolution(
        self, path: str, module: nn.Conv3d, inner: Callable[..., Tensor], x: Tensor, *more: Any
    ) -> Tensor:
        """A convolution along time is given the frames next to own ones, and answers for all."""
        now = self._now
        if now is None:
            return inner(x, *more)
        near = now.every(int(module.padding[0]))
        whole = self._around(path, x, 2, near, now.every(0))
        begin = now.own.start - near[now.exchange.rank].start
        return inner(whole, *more).narrow(2, begin, len(now.own))

    def _norm(
        self, path: str, module: nn.GroupNorm, inner: Callable[..., Tensor], x: Tensor
    ) -> Tensor:
        """A normalisation; over frames too where it is given a clip, ``[B, C, F, H, W]``."""
        now = self._now
        if now is None or x.ndim != 5:
            return inner(x)
        flat = x.reshape(len(x), module.num_groups, -1).float()
        variance, mean = (one.double() for one in torch.var_mean(flat, -1, correction=0))
        own = torch.stack([mean, variance + mean.square()])
        each = [range(rank, rank + 1) for rank in range(now.scope.count)]
        parts = self._around(path, own[None], 0, [range(now.scope.count)] * len(each), each)
        lengths = torch.tensor(now.scope.lengths, dtype=own.dtype, device=own.device)
        first, second = torch.einsum("r,r...->...", lengths / now.scope.frames, parts)
        scale = (second - first.square() + module.eps).rsqrt().float()[..., None]
        normal = ((flat - first.float()[..., None]) * scale).reshape(x.shape).to(x.dtype)
        if module.weight is None:
            return normal
        form = (1, -1, 1, 1, 1)
        found: Tensor = normal * module.weight.view(form) + module.bias.view(form)
        return found

    def _positions(self, module: nn.Module, inner: Callable[..., Tensor], x: Tensor) -> Tensor:
        """Positions in the clip; in the run of this process where the clip has more than known."""
        now, known = self._now, positions_in(module)
        if now is None or known is None or now.scope.frames > known.shape[1]:
            return inner(x)
        return x + known[:, now.own.start : now.own.stop]

    def _numbers(self, inner: Callable[..., Tensor], numbers: Tensor) -> Tensor:
        """Numbers of frames, which a transformer has counted from 0."""
        return inner(numbers if self._now is None else numbers + self._now.own.start)


def _cut(value: Any, rows: int, frames: int, own: range) -> Any:
    """Own frames of what an argument has of all; what has none stays as it is."""
    if isinstance(value, Mapping):
        return {name: _cut(item, rows, frames, own) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_cut(item, rows, frames, own) for item in value)
    if isinstance(value, Tensor) and value.ndim and len(value) == rows * frames:
        each = value.reshape(rows, frames, *value.shape[1:])
        return each[:, own.start : own.stop].flatten(0, 1)
    return value
