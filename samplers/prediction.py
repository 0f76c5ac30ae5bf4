"""What a network predicts, turned into data and noise at one noise level.

A sample is ``x = α·x0 + σ·ε``. Every prediction type is a linear map away from the prediction of
``x0`` (called ``m`` everywhere in this package) and from the prediction of ``ε`` (called ``e``):
the maps are plain pairs of weights, so that solvers never ask what the network predicts.

Source: arXiv 2202.00512 (v-prediction), 2205.11487 section 2.3 (dynamic thresholding),
2210.02747 (flow matching).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from accel.errors import BadInput

if TYPE_CHECKING:
    from torch import Tensor

Prediction = Literal["epsilon", "v_prediction", "sample", "flow_prediction"]
"""The names that diffusers uses: ε, ``v = αε − σx0``, ``x0``, and ``ε − x0``."""


@dataclass(frozen=True, slots=True)
class Level:
    """One noise level: ``x = alpha·x0 + sigma·ε``.

    Attributes:
        alpha: Signal factor in [0, 1]; 0 at the start of a flow.
        sigma: Noise factor in [0, 1]; 0 at the end of a run.
    """

    alpha: float
    sigma: float

    @property
    def pure_noise(self) -> bool:
        """Whether there is no signal to speak of: α = 0, or 2⁻¹², as zero terminal SNR is written.

        Such a level is an end of the process: what is smooth in λ or ρ elsewhere is not there.
        """
        return self.alpha < 2.0**-11

    @property
    def lam(self) -> float:
        """Half the logarithm of the signal-to-noise ratio, ``λ = ln(α/σ)``; ±∞ at the ends."""
        if self.alpha == 0.0:
            return -math.inf
        return math.inf if self.sigma == 0.0 else math.log(self.alpha / self.sigma)


def vp_level(ratio: float) -> Level:
    """The variance-preserving level (``α² + σ² = 1``) with ``σ/α = ratio``, which may be ∞."""
    if math.isinf(ratio):
        return Level(0.0, 1.0)
    alpha = 1.0 / math.hypot(1.0, ratio)
    return Level(alpha, ratio * alpha)


def flow_level(sigma: float) -> Level:
    """The level of a rectified flow (``α = 1 − σ``); float32 rounding above 1 counts as 1."""
    sigma = min(sigma, 1.0)
    return Level(1.0 - sigma, sigma)


def data_weights(prediction: Prediction, level: Level) -> tuple[float, float]:
    """Weights ``(a, b)`` of ``m = a·x + b·output``.

    Raises:
        BadInput: If ε-prediction is asked for at pure noise, where it holds no data.
    """
    alpha, sigma = level.alpha, level.sigma
    if prediction == "epsilon":
        if alpha == 0.0:
            raise BadInput(
                "An ε-prediction at pure noise (α = 0) says nothing about the data. Start the "
                "schedule below it, or use a network with v, flow or x0 prediction."
            )
        return 1.0 / alpha, -sigma / alpha
    weights = {
        "v_prediction": (alpha, -sigma),
        "sample": (0.0, 1.0),
        "flow_prediction": (1.0, -sigma),
    }
    return weights[prediction]


def noise_weights(prediction: Prediction, level: Level) -> tuple[float, float]:
    """Weights ``(a, b)`` of ``e = a·x + b·output``.

    Raises:
        BadInput: If x0-prediction is asked for at σ = 0, where it holds no noise.
    """
    alpha, sigma = level.alpha, level.sigma
    if prediction == "sample":
        if sigma == 0.0:
            raise BadInput("An x0-prediction at σ = 0 says nothing about the noise: stop above it.")
        return 1.0 / sigma, -alpha / sigma
    weights = {
        "epsilon": (0.0, 1.0),
        "v_prediction": (sigma, alpha),
        "flow_prediction": (1.0, 1.0 - sigma),
    }
    return weights[prediction]


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """How the output of one network becomes ``m``. Field names are those of diffusers configs.

    Attributes:
        prediction_type: What the network predicts.
        variance_type: ``learned`` or ``learned_range`` if the output carries a variance behind
            the channels of the sample; it is cut off.
        thresholding: Clip ``m`` by a quantile of its own, per sample; for pixel-space models.
        dynamic_thresholding_ratio: That quantile, in (0, 1].
        sample_max_value: The largest bound that the quantile may set, at least 1.
    """

    prediction_type: Prediction = "epsilon"
    variance_type: str | None = None
    thresholding: bool = False
    dynamic_thresholding_ratio: float = 0.995
    sample_max_value: float = 1.0

    def __post_init__(self) -> None:
        if self.prediction_type not in get_args(Prediction):
            raise BadInput(
                f"prediction_type is {self.prediction_type!r}; it must be one of "
                f"{', '.join(get_args(Prediction))}."
            )
        if not 0.0 < self.dynamic_thresholding_ratio <= 1.0 or self.sample_max_value < 1.0:
            raise BadInput(
                f"dynamic_thresholding_ratio is {self.dynamic_thresholding_ratio} and "
                f"sample_max_value is {self.sample_max_value}; they must be in (0, 1] and ≥ 1."
            )

    def data(self, output: Tensor, x: Tensor, level: Level) -> Tensor:
        """The x0-prediction ``m`` in the dtype of ``x``; no device synchronisation.

        Args:
            output: The network's output after guidance, ``[B, C, ...]`` (``[B, 2C, ...]`` with a
                learned variance).
            x: The sample that the network saw, ``[B, C, ...]``.
            level: The noise level of ``x``.
        """
        output = self.cut(output, x)
        of_x, of_output = data_weights(self.prediction_type, level)
        data = of_output * output.to(x.dtype)
        if of_x:
            data.add_(x, alpha=of_x)
        return self._threshold(data) if self.thresholding else data

    def noise(self, output: Tensor, x: Tensor, level: Level) -> Tensor:
        """The ε-prediction ``e`` in the dtype of ``x``; no device synchronisation.

        Where ``m`` is clipped (thresholding), ``e`` is that of the clipped ``m``.

        Args:
            output: The network's output after guidance, as for `data`.
            x: The sample that the network saw, ``[B, C, ...]``.
            level: The noise level of ``x``; σ > 0 where ``m`` is predicted or clipped.
        """
        if self.thresholding:
            prediction: Prediction = "sample"
            output = self.data(output, x, level)
        else:
            prediction, output = self.prediction_type, self.cut(output, x)
        of_x, of_output = noise_weights(prediction, level)
        noise = of_output * output.to(x.dtype)
        if of_x:
            noise.add_(x, alpha=of_x)
        return noise

    def velocity(self, output: Tensor, x: Tensor, level: Level) -> Tensor:
        """The prediction of ``ε − x0`` by a flow in the dtype of ``x``; no synchronisation.

        Args:
            output: The network's output after guidance, as for `data`.
            x: The sample that the network saw, ``[B, C, ...]``.
            level: The noise level of ``x``; σ > 0 where ``m`` is clipped.
        """
        if self.thresholding:
            return (x - self.data(output, x, level)).div_(level.sigma)
        return self.cut(output, x).to(x.dtype, copy=True)

    def cut(self, output: Tensor, x: Tensor) -> Tensor:
        """Without the variance that some networks predict behind the sample's channels."""
        learned = self.variance_type in ("learned", "learned_range")
        return output[:, : x.shape[1]] if learned else output

    def _threshold(self, data: Tensor) -> Tensor:
        """Clip each sample to its own quantile and scale it back into [−1, 1]."""
        flat = data.flatten(1)
        bound = flat.abs().quantile(self.dynamic_thresholding_ratio, dim=1, keepdim=True)
        bound = bound.clamp(1.0, self.sample_max_value)
        return (flat.clamp(-bound, bound) / bound).view_as(data)
