"""Scales of activations for `weights.Int8Static`, and what each layer's rounding costs.

Calls of the stock pipeline are drawn along its own trajectory (`accel.weights.sampling`) and
replayed three times: for the range of every layer's input in each bin of noise levels; for the
share of it that leaves the least square error; and, with one layer in int8 at a time, for what that
does to the network's output.

Source: Shang et al., arXiv 2211.15736, section 3; the bins and the report are ours.
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from accel.calibration import Calibrated
from accel.errors import BadInput, BadOutput, UnsupportedModel
from accel.weights.int8_static import Int8Static
from accel.weights.sampling import Draw, Sample, Samples
from accel.weights.scales import Floats, Scales
from accel.weights.skipping import skipped

if TYPE_CHECKING:
    from torch import Tensor, nn

    from accel.seams.denoisers import Denoiser

LEVELS = 127
"""Steps from 0 to the end of a range."""

GRID = tuple(float(share) for share in np.linspace(1.0, 0.5, 11))
"""Shares of the largest activation that are tried; of equals the largest wins."""

SMALLEST = 2.0**-23
"""A scale where nothing was seen but zeros; torchao's own."""

SHOWN = 3
"""Layers that the note names."""


class Options(BaseModel):
    """What the calibrator takes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bins: int = Field(default=4, ge=1, description="intervals of noise levels")
    samples: int = Field(default=32, ge=1, description="draws for each prompt")
    draw: Draw = Field(default="normal", description="as PTQ4DM draws steps, or all of them once")
    sensitivity: int = Field(
        default=1, ge=0, description="steps in each bin that a layer is tried on; 0: none"
    )
    outlier: float = Field(
        default=4.0, gt=1.0, description="times the median error from which a layer is skipped"
    )
    skip: tuple[str, ...] = Field(
        default=("recommended",), description="what the plan skips in any case"
    )
    seed: int = Field(default=0, ge=0, description="of the draws")


def calibrate_int8(
    pipe: Any, calls: Iterable[Mapping[str, Any]], options: Mapping[str, Any]
) -> Calibrated:
    """Measure scales for every linear layer, and which layers should stay as they are.

    Raises:
        BadInput: Without a call, or with fewer noise levels than bins.
        BadOutput: If the network gives NaN.
        UnsupportedModel: If torchao is missing, or a network is quantized already or compiled.
    """
    from accel.seams.denoisers import find_denoisers
    from accel.seams.identity import identity
    from accel.seams.quantizing import check, check_torchao

    chosen = Options.model_validate(options)
    check_torchao("int8")
    for denoiser in find_denoisers(pipe):
        check(f"pipe.{denoiser.name}", denoiser.core)
        _check_eager(denoiser)
    recorder = Samples().drawing(chosen.draw, chosen.samples, chosen.seed)
    recorder.watch(pipe, calls)
    found = {
        denoiser.name: Measured.on(denoiser, recorder.kept, chosen)
        for denoiser in find_denoisers(pipe)
    }
    outliers = tuple(path for one in found.values() for path in one.outliers(chosen))
    note = _note(recorder.kept, found, outliers)
    scales = Scales(
        {name: one.edges for name, one in found.items()},
        {name: one.scales for name, one in found.items()},
        {name: one.errors for name, one in found.items() if one.errors},
        identity(pipe),
        note,
    )
    content = scales.to_bytes()
    method = Int8Static(
        skip=(*chosen.skip, *dict.fromkeys(outliers)),
        scales=Path("int8.safetensors"),
        sha256=hashlib.sha256(content).hexdigest(),
    )
    return Calibrated(method, note, {"scales": content})


def _check_eager(denoiser: Denoiser) -> None:
    parts = denoiser.core.modules()
    compiled = any(getattr(part, "_compiled_call_impl", None) is not None for part in parts)
    if compiled or denoiser.module is not denoiser.core:
        raise UnsupportedModel(
            f"pipe.{denoiser.name} is compiled: its layers cannot be watched inside a graph. "
            "Calibrate without compiling; the plan serves the compiled network too."
        )


@dataclass
class Measured:
    """What was found of one network.

    Attributes:
        denoiser: The network.
        edges: Where its bins meet.
        scales: By layer ``[bins, 1, …, 1]``.
        cuts: By layer the share of the largest activation that is kept, ``[bins]``.
        errors: By layer the relative error of the output, ``[bins]``.
        uneven: Layers whose inputs differ in their rank: they have no scale.
    """

    denoiser: Denoiser
    edges: Floats
    scales: dict[str, Floats] = field(default_factory=dict)
    cuts: dict[str, Floats] = field(default_factory=dict)
    errors: dict[str, Floats] = field(default_factory=dict)
    uneven: list[str] = field(default_factory=list)

    @classmethod
    def on(cls, denoiser: Denoiser, kept: Sequence[Sample], options: Options) -> Measured:
        """Measure a network on those of the calls that are its own."""
        from accel.seams.quantizing import linears

        samples = [one for one in kept if one.call.denoiser.name == denoiser.name]
        edges = bin_edges([one.share for one in samples], options.bins, denoiser.name)
        binned = [(int(np.searchsorted(edges, one.share, "right")), one) for one in samples]
        found, layers = cls(denoiser, edges), linears(denoiser.core)
        ranges = Ranges(options.bins)
        _replayed(layers, binned, ranges.see)
        fits = Fits(ranges)
        _replayed({path: layers[path] for path in ranges.largest}, binned, fits.see)
        for path, ranks in ranges.ranks.items():
            if len(ranks) > 1:
                found.uneven.append(path)
                continue
            scale, found.cuts[path] = fits.best(path)
            found.scales[path] = scale.reshape(-1, *(1,) * next(iter(ranks)))
        if options.sensitivity:
            found.errors = sensitivity(denoiser, found.scales, _tried(binned, options.sensitivity))
        return found

    def outliers(self, options: Options) -> list[str]:
        """Layers that should stay as they are, beside what is skipped in any case."""
        means = {path: float(errors.mean()) for path, errors in self.errors.items()}
        others = means.keys() - skipped(self.denoiser.core, means, options.skip).keys()
        if not others:
            return []
        middle = float(np.median([means[path] for path in others]))
        return sorted(path for path in others if means[path] > options.outlier * middle)


def bin_edges(shares: Sequence[float], bins: int, network: str) -> Floats:
    """Where bins meet that hold equally many of the noise levels.

    Raises:
        BadInput: If there are fewer levels than bins.
    """
    levels = np.unique(np.asarray(shares, np.float64))
    if len(levels) < bins:
        raise BadInput(
            f"int8: {network} was called at {len(levels)} of the noise levels that were drawn, too "
            f"few for {bins} bins: raise --steps or samples, or lower bins."
        )
    parts = np.array_split(levels, bins)
    meet = [(a[-1] + b[0]) / 2 for a, b in pairwise(parts)]
    return np.asarray(meet, np.float32)


See = Callable[[str, int, int, "Tensor"], None]
"""Looks at an input: of which layer, in which bin, with which weight, and the tensor."""


def _replayed(
    layers: Mapping[str, nn.Linear], binned: Iterable[tuple[int, Sample]], see: See
) -> None:
    """Replay calls, and look at the input of every layer."""
    for bin_, sample in binned:

        def look(path: str, x: Tensor, at: int = bin_, weight: int = sample.weight) -> None:
            see(path, at, weight, x)

        with watched(layers, look):
            sample.replay()


@contextmanager
def watched(layers: Mapping[str, nn.Linear], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """While it is entered, each input of a layer is shown."""
    handles = []
    for path, layer in layers.items():

        def show(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], path: str = path) -> None:
            see(path, args[0] if args else kwargs["input"])

        handles.append(layer.register_forward_pre_hook(show, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Ranges:
    """The largest absolute input of each layer in each bin.

    Attributes:
        largest: By layer ``[bins]``.
        ranks: By layer the numbers of axes that its inputs had.
    """

    def __init__(self, bins: int) -> None:
        self.bins = bins
        self.largest: dict[str, Tensor] = {}
        self.ranks: dict[str, set[int]] = defaultdict(set)

    def see(self, path: str, bin_: int, _weight: int, x: Tensor) -> None:
        """Take up an input."""
        largest = self.largest.setdefault(path, x.new_zeros(self.bins, dtype=_float32()))
        largest[bin_] = largest[bin_].maximum(x.abs().amax().float())
        self.ranks[path].add(x.ndim)


class Fits:
    """The square error that each share of a range leaves."""

    def __init__(self, ranges: Ranges) -> None:
        self._largest = ranges.largest
        self._errors: dict[str, Tensor] = {}

    def see(self, path: str, bin_: int, weight: int, x: Tensor) -> None:
        """Take up an input."""
        largest = self._largest[path]
        errors = self._errors.setdefault(path, largest.new_zeros(len(largest), len(GRID)))
        scales = candidates(largest[bin_])
        errors[bin_] += weight * square_errors(x.float(), scales)

    def best(self, path: str) -> tuple[Floats, Floats]:
        """The best scale of each bin, and the share of the range that it keeps."""
        errors, largest = self._errors[path].cpu(), self._largest[path].cpu()
        if not (errors.isfinite().all() and largest.isfinite().all()):
            raise BadOutput(
                f"The input of {path} holds NaN or infinite values: there is nothing to calibrate. "
                "Try --dtype bfloat16 or float32."
            )
        chosen = errors.argmin(1)
        scales = candidates(largest[:, None])[range(len(chosen)), chosen]
        return scales.numpy(), np.asarray(GRID)[chosen.numpy()]


def candidates(largest: Tensor) -> Tensor:
    """Scales for each share of ``GRID`` of a range, a number or ``[…, 1]``: ``[…, grid]``."""
    return (largest * largest.new_tensor(GRID) / LEVELS).clamp(min=SMALLEST)


def square_errors(x: Tensor, scales: Tensor) -> Tensor:
    """‖x − Q(x)‖² for each of some scales ``[N]``."""
    import torch

    zero = torch.zeros((), dtype=torch.int32, device=x.device)
    rounded = (
        torch.fake_quantize_per_tensor_affine(x, scale, zero, -LEVELS - 1, LEVELS)
        for scale in scales
    )
    return torch.stack([(x - one).square().sum() for one in rounded])


def _float32() -> Any:
    import torch

    return torch.float32


def _tried(binned: Iterable[tuple[int, Sample]], steps: int) -> dict[int, list[Sample]]:
    """By bin the calls of some steps, evenly chosen, with all their branches."""
    by_step: dict[int, dict[tuple[int, int], list[Sample]]] = defaultdict(lambda: defaultdict(list))
    for bin_, sample in binned:
        by_step[bin_][sample.run, sample.call.step.index].append(sample)
    found = {}
    for bin_, groups in by_step.items():
        listed = list(groups.values())
        places = np.linspace(0, len(listed) - 1, min(steps, len(listed)) + 2)[1:-1].round()
        found[bin_] = [one for place in dict.fromkeys(places) for one in listed[int(place)]]
    return found


def sensitivity(
    denoiser: Denoiser, scales: Mapping[str, Floats], tried: Mapping[int, Sequence[Sample]]
) -> dict[str, Floats]:
    """By layer and bin the relative error of the output where this layer alone is int8."""
    import torch

    from accel.seams.quantizing import linears, quantize, static, unfit

    stock = {bin_: [one.replay() for one in samples] for bin_, samples in tried.items()}
    layers, found = linears(denoiser.core), {}
    for path, table in scales.items():
        if unfit(layers[path]):
            continue
        config = static(torch.from_numpy(table[0].copy()))
        alone = quantize(f"pipe.{denoiser.name}", denoiser.core, {path: config})
        try:
            errors = np.zeros(len(table), np.float32)
            for bin_, samples in tried.items():
                alone.originals[0].set_scale(float(table[bin_].item()))
                answers = [one.replay() for one in samples]
                errors[bin_] = _relative(answers, stock[bin_])
        finally:
            alone.undo()
        found[path] = errors
    return found


def _relative(answers: Sequence[Tensor], stock: Sequence[Tensor]) -> float:
    """‖a − b‖/‖b‖ over all."""
    wrong = sum((a - b).double().square().sum() for a, b in zip(answers, stock, strict=True))
    whole = sum(b.double().square().sum() for b in stock)
    return math.sqrt(wrong / whole)


def _note(kept: Sequence[Sample], found: Mapping[str, Measured], outliers: Sequence[str]) -> str:
    """What the scales rest on, and which layers matter most."""
    cuts = np.concatenate([cut for one in found.values() for cut in one.cuts.values()])
    layers = sum(len(one.scales) for one in found.values())
    bins = sum(len(one.edges) + 1 for one in found.values())
    note = (
        f"{len(kept)} calls, {layers} layers in {bins} bins, ranges cut to {cuts.mean():.2g} of "
        "the largest on average"
    )
    errors = {path: table.mean() for one in found.values() for path, table in one.errors.items()}
    if errors:
        worst = sorted(errors, key=lambda path: -errors[path])[:SHOWN]
        named = ", ".join(f"{path} {errors[path]:.2g}" for path in worst)
        middle = float(np.median(list(errors.values())))
        note += f"; error of one layer alone {middle:.2g} in the middle, most by {named}"
        note += f"; skipped beside the usual: {', '.join(outliers) or 'none'}"
    uneven = [path for one in found.values() for path in one.uneven]
    return note + (f"; of inputs of several ranks: {', '.join(uneven)}" if uneven else "")
