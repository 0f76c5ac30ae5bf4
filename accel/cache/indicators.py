"""How much has changed: one number a sample and step, from what is at hand without computing.

What an indicator keeps between steps counts in the memory that a report states (``bytes``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from accel.seams.memory import bytes_of

if TYPE_CHECKING:
    from torch import Tensor

TINY = 1e-8


def mean_abs(tensor: Tensor) -> Tensor:
    """Mean magnitude in float32: a scalar tensor on the tensor's device."""
    return tensor.abs().float().mean()


def relative_l1(new: Tensor, old: Tensor) -> Tensor:
    """mean|new − old| / mean|old|, a scalar tensor; no device read."""
    return mean_abs(new - old) / mean_abs(old).clamp_min(TINY)


def _relative_l1_of_changed(new: Tensor, old: Tensor, above: float) -> Tensor:
    """`relative_l1` over the tokens ``[tokens, width]`` that change by more than ``above``.

    Over all of them where none does. No device read.
    """
    change = (new - old).abs().float().mean(dim=-1)
    size = old.abs().float().mean(dim=-1)
    counted = change > above * size
    counted = counted | ~counted.any()
    return (change * counted).sum() / (size * counted).sum().clamp_min(TINY)


class Unmeasured:
    """The indicator of rules that need none, at every site."""

    bytes = 0

    def measure(self, *signal: Tensor) -> None:
        """Nothing."""

    def learn(self, *signal: Tensor) -> None:
        """Nothing."""


class InputChange:
    """EasyCache's estimate of the relative change of the output from that of the input.

    After each compute it learns k = mean|v_p − v_q| / mean|x_p − x_q| from the last two computes;
    the increment of a step is k · mean|x_i − x_{i−1}| / mean|v_p|.
    """

    def __init__(self) -> None:
        self._before: Tensor | None = None
        self._computed: tuple[Tensor, Tensor] | None = None
        self._scale: Tensor | None = None

    @property
    def bytes(self) -> int:
        """Memory of the input before, of the last computed input and output, and of k/‖v‖."""
        return bytes_of(self._before, self._computed, self._scale)

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
    """First-Block-Cache's relative change of the first block's residual since the last compute.

    Args:
        above: Only tokens count whose own relative change is above it, where there are any; with
            0 all do (DBCache).
    """

    def __init__(self, above: float = 0.0) -> None:
        self._above = above
        self._kept: Tensor | None = None

    @property
    def bytes(self) -> int:
        """Memory of the residual at the last compute."""
        return bytes_of(self._kept)

    def measure(self, residual: Tensor) -> Tensor | None:
        """The relative change, or ``None`` before the first compute."""
        if self._kept is None:
            return None
        if self._above:
            return _relative_l1_of_changed(residual, self._kept, self._above)
        return relative_l1(residual, self._kept)

    def learn(self, residual: Tensor) -> None:
        """A step was computed."""
        self._kept = residual.clone()


class SignalChange:
    """TeaCache's relative change of a signal from step to step, skipped steps included.

    Args:
        coefficients: Of the polynomial that makes the output's change out of the signal's, the
            highest power first.
        clamp: Whether an estimate below 0 counts as 0: the fits are wild outside the changes
            that they were made from, and a negative sum would skip for long.
    """

    def __init__(self, coefficients: Sequence[float] = (1.0, 0.0), *, clamp: bool = True) -> None:
        self._coefficients = coefficients
        self._clamp = clamp
        self._before: Tensor | None = None

    @property
    def bytes(self) -> int:
        """Memory of the signal of the step before."""
        return bytes_of(self._before)

    def measure(self, signal: Tensor) -> Tensor | None:
        """The estimated change of the output, or ``None`` at the first step."""
        before, self._before = self._before, signal.clone()
        if before is None or before.shape != signal.shape:
            return None
        change = relative_l1(signal, before)
        estimate = polynomial(self._coefficients, change)
        return estimate.clamp_min(0.0) if self._clamp else estimate

    def learn(self, signal: Tensor) -> None:
        """Nothing: the steps are followed, not the computes."""


def polynomial(coefficients: Sequence[float], at: Tensor) -> Tensor:
    """Σ a_k x^k by Horner's rule, the highest power first."""
    import torch

    value = torch.zeros_like(at)
    for coefficient in coefficients:
        value = value * at + coefficient
    return value


class Magnitudes:
    """MagCache's γ, estimated in the run: how the residual's size changes in one step.

    From the residuals R_p and R_q of the last two computed steps p > q: the mean over the tokens
    of ‖R_p‖/‖R_q‖, to the power 1/(p − q).
    """

    def __init__(self) -> None:
        self._newest: tuple[int, Tensor] | None = None
        self._ratio: Tensor | None = None

    @property
    def bytes(self) -> int:
        """Memory of the tokens' norms at the last compute, and of γ."""
        return bytes_of(self._newest, self._ratio)

    def measure(self, signal: Tensor) -> Tensor | None:  # noqa: ARG002
        """γ, or ``None`` before two computes."""
        return self._ratio

    def learn(self, signal: Tensor) -> None:
        """Nothing: it learns from what was added."""

    def added(self, step: int, gains: Sequence[Tensor]) -> None:
        """The residual of a computed step: ``[tokens, width]`` for each part of the stream."""
        older, self._newest = self._newest, (step, token_norms(gains))
        if older is not None and older[0] < step and older[1].shape == self._newest[1].shape:
            self._ratio = mean_ratio(self._newest[1], older[1]) ** (1.0 / (step - older[0]))


def token_norms(gains: Sequence[Tensor]) -> Tensor:
    """The L2 norm of each token, in float32."""
    import torch

    return torch.cat([gain.float().norm(dim=-1).flatten() for gain in gains])


def mean_ratio(new: Tensor, old: Tensor) -> Tensor:
    """The mean over the tokens of the ratio of their norms."""
    return (new / old.clamp_min(TINY)).mean()
