"""How much has changed: one number a sample and step, from what is at hand without computing."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

TINY = 1e-8


def mean_abs(tensor: Tensor) -> Tensor:
    """Mean magnitude in float32: a scalar tensor on the tensor's device."""
    return tensor.abs().float().mean()


def relative_l1(new: Tensor, old: Tensor) -> Tensor:
    """mean|new − old| / mean|old|, a scalar tensor; no device read."""
    return mean_abs(new - old) / mean_abs(old).clamp_min(TINY)


class InputChange:
    """EasyCache's estimate of the relative change of the output from that of the input.

    After each compute it learns k = mean|v_p − v_q| / mean|x_p − x_q| from the last two computes;
    the increment of a step is k · mean|x_i − x_{i−1}| / mean|v_p|.
    """

    def __init__(self) -> None:
        self._before: Tensor | None = None
        self._computed: tuple[Tensor, Tensor] | None = None
        self._scale: Tensor | None = None

    def measure(self, x: Tensor) -> Tensor | None:
        """The increment of this step, or ``None`` before two computes."""
        before, self._before = self._before, x.clone()
        if self._scale is None or before is None:
            return None
        return self._scale * mean_abs(x - before)

    def learn(self, x: Tensor, v: Tensor) -> None:
        """A step was computed."""
        if self._computed is not None:
            x_old, v_old = self._computed
            slope = mean_abs(v - v_old) / mean_abs(x - x_old).clamp_min(TINY)
            self._scale = slope / mean_abs(v).clamp_min(TINY)
        self._computed = (x.clone(), v.clone())


class ProbeChange:
    """First-Block-Cache's relative change of the first block's residual since the last compute."""

    def __init__(self) -> None:
        self._kept: Tensor | None = None

    def measure(self, residual: Tensor) -> Tensor | None:
        """The relative change, or ``None`` before the first compute."""
        return None if self._kept is None else relative_l1(residual, self._kept)

    def learn(self, residual: Tensor) -> None:
        """A step was computed."""
        self._kept = residual.clone()
