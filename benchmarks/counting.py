"""How much of a network's blocks was computed, whatever cache sits above.

A cache may skip a network, a block, or a module in a block; hooks on blocks or modules would fire
all the same where another hook answers in their place. So what is counted is below all hooks: the
``forward`` of the linear and convolution layers themselves, wrapped before anything else is put on
the pipeline. Attention's own products and norms are not counted. Evaluations of the network are
counted in the same way: a cache that answers in the whole network's place makes none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial, wraps
from typing import Any

import torch
from torch import nn

from accel.tuning.work import layers, products

BLOCKS = ("TransformerBlock", "ResnetBlock2D", "Transformer2DModel")
"""Endings of the names of classes that count as a block; one inside of another does not."""


class Counter:
    """Rows of blocks that were computed; a block of which a part ran counts in proportion.

    A block's share is its layers' multiplications over those that one row takes in a whole pass.
    What one row takes is learned in `calibrate`.

    Args:
        pipe: A pipeline that nothing has been put on yet.
        layers: Whether it looks into blocks. Not into those that are to be compiled, which would
            trace what counts: each evaluation is then taken for all blocks.
    """

    def __init__(self, pipe: Any, layers: bool = True) -> None:
        network = getattr(pipe, "unet", None) or pipe.transformer
        self.blocks = list(_outermost(network))
        self.evaluations = 0
        self._done = [0] * len(self.blocks)
        self._whole: list[int] = []
        self._layers = layers
        network.forward = self._evaluated(network.forward)
        if layers:
            self._count_layers()

    def _evaluated(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(inner)  # what others put on a network looks at its signature
        def forward(*args: Any, **named: Any) -> Any:
            sample = args[0] if args else named.get("hidden_states", named.get("sample"))
            self.evaluations += len(sample)
            return inner(*args, **named)

        return forward

    def _count_layers(self) -> None:
        for index, block in enumerate(self.blocks):
            for layer in layers(block):
                layer.forward = partial(self._count, index, layer, layer.forward)

    def _count(
        self, index: int, layer: Any, inner: Callable[..., torch.Tensor], *args: Any, **named: Any
    ) -> torch.Tensor:
        returned = inner(*args, **named)
        self._done[index] += products(layer, returned)
        return returned

    def calibrate(self, draw: Callable[[], object]) -> None:
        """Learn from a run of the stock pipeline what one row of each block takes."""
        self.reset()
        draw()
        self._whole = [done // self.evaluations for done in self._done]
        self.reset()

    def reset(self) -> None:
        """Begin anew."""
        self._done = [0] * len(self.blocks)
        self.evaluations = 0

    @property
    def rows(self) -> float:
        """Rows of blocks since the last reset."""
        if not self._layers:
            return float(self.evaluations * len(self.blocks))
        return sum(done / whole for done, whole in zip(self._done, self._whole, strict=True))


def _outermost(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if type(child).__name__.endswith(BLOCKS):
            yield child
        else:
            yield from _outermost(child)
