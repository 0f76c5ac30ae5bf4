"""What one evaluation of a network is made of: operations, and what would have to be exchanged.

Counted on one real call, by hooks that are gone after it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from accel.errors import UnsupportedModel
from accel.seams.attention import Asked, Interception
from accel.seams.blocks import find_blocks, wrap_call
from accel.seams.denoisers import Call, Denoiser, Inner, Result
from accel.seams.modules import find_modules
from parallel.components import tensors, unet_blocks


@dataclass
class Work:
    """One evaluation of a network for all branches of a call.

    Attributes:
        operations: Multiply-adds count twice.
        branches: Guidance branches that a step evaluates, in one call or in several.
        calls: Calls of the network in a step.
        output: Bytes of the answer.
        rows: Rows of a latent, where the network is a UNet over pictures; else 0.
        borders: Bytes of one border row of every convolution, times the rows that it pads.
        moments: Bytes of the statistics of every normalisation.
        tokens: Bytes of the keys and values of every self-attention.
        units: Operations of each block, of all calls together.
        answers: Bytes that each block answers, likewise.
        whole: Whether every block's answer is asked for later on (a UNet's), or the last one's.
    """

    operations: float = 0.0
    branches: int = 1
    calls: int = 1
    output: float = 0.0
    rows: int = 0
    borders: list[float] = field(default_factory=list)
    moments: list[float] = field(default_factory=list)
    tokens: list[float] = field(default_factory=list)
    units: list[float] = field(default_factory=list)
    answers: list[float] = field(default_factory=list)
    whole: bool = False


class Counting:
    """Counts the work of one network during a run of its pipeline.

    Args:
        denoiser: The network.

    Attributes:
        work: Of the latest evaluation; all branches together.
    """

    def __init__(self, denoiser: Denoiser) -> None:
        self.work = Work()
        self._denoiser = denoiser
        self._step = -1
        self._at = 0

    def attach(self, around: Callable[[Any], Callable[[], None]]) -> ExitStack:
        """Hook the network; leave the stack to take the hooks off."""
        core, stack = self._denoiser.core, ExitStack()
        unet = hasattr(core, "down_blocks")
        for module in core.modules():
            if isinstance(module, nn.Conv2d) and module.kernel_size[0] > 1:
                stack.callback(wrap_call(module, partial(self._convolution, module)))
            elif isinstance(module, nn.GroupNorm):
                stack.callback(wrap_call(module, partial(self._norm, module)))
        for part in _attentions(self._denoiser):
            stack.callback(part.wrap(self._attention))
        for unit in _units(self._denoiser):
            stack.callback(wrap_call(unit, self._unit))
        self._unet = unet
        stack.callback(around(self))
        return stack

    def __call__(self, call: Call, inner: Inner) -> Result:
        """Count one call; the calls of one step are one evaluation."""
        if call.step.index != self._step:
            self._step = call.step.index
            self.work = Work(branches=0, calls=0, whole=self._unet)
        self._at = 0
        with FlopCounterMode(display=False) as counter:
            result = inner(call)
        work = self.work
        work.operations += float(counter.get_total_flops())
        work.branches += len({row.branch for row in call.rows})
        work.calls += 1
        work.output += result.value.nbytes
        work.rows = call.sample.shape[-2] if self._unet and call.sample.ndim == 4 else 0
        return result

    def _convolution(self, module: nn.Conv2d, inner: Any, x: Tensor, *more: Any) -> Any:
        padding = module.padding if isinstance(module.padding, tuple) else (0, 0)
        self.work.borders.append(padding[0] * x.nbytes / x.shape[2])
        return inner(x, *more)

    def _norm(self, module: nn.GroupNorm, inner: Any, x: Tensor) -> Any:
        self.work.moments.append(2.0 * len(x) * module.num_groups * 8)
        return inner(x)

    def _attention(self, inner: Any, *args: Any, **kwargs: Any) -> Any:
        def seen(asked: Asked) -> Tensor:
            self.work.tokens.append(float(asked.key.nbytes + asked.value.nbytes))
            return asked.dense()

        with Interception(seen):
            return inner(*args, **kwargs)

    def _unit(self, inner: Any, *args: Any, **kwargs: Any) -> Any:
        with FlopCounterMode(display=False) as counter:
            answer = inner(*args, **kwargs)
        work, at = self.work, self._at
        if at == len(work.units):
            work.units.append(0.0)
            work.answers.append(0.0)
        work.units[at] += float(counter.get_total_flops())
        work.answers[at] += float(sum(one.nbytes for one in tensors(answer)))
        self._at += 1
        return answer


def _attentions(denoiser: Denoiser) -> list[Any]:
    try:
        return [part for part in find_modules(denoiser) if part.kind == "self"]
    except UnsupportedModel:
        return []


def _units(denoiser: Denoiser) -> list[Any]:
    core = denoiser.core
    if hasattr(core, "down_blocks"):
        return unet_blocks(core)
    try:
        return [block.module for block in find_blocks(denoiser)]
    except UnsupportedModel:
        return []


def work_of(pipe: Any, call: dict[str, Any]) -> dict[str, Work]:
    """The work of a step, by network: two steps of the pipeline are run, and the second counts.

    Args:
        pipe: A pipeline without an attached plan.
        call: Arguments of its call; the number of steps is left out of them.
    """
    from accel.attach import LAYERS
    from accel.plan import Plan

    with ExitStack() as stack:
        run = stack.enter_context(Plan().attach(pipe))
        counting = {one.name: Counting(one) for one in run.denoisers}
        for name, one in counting.items():
            depth = LAYERS.index("parallel")
            stack.enter_context(one.attach(partial(run.onions[name].add, depth)))
        noise = torch.Generator().manual_seed(0)
        pipe(**{**call, "num_inference_steps": 2, "output_type": "latent"}, generator=noise)
    return {name: one.work for name, one in counting.items() if one.work.operations}
