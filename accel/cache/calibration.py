"""Numbers that caches need for a model, measured on the stock pipeline.

The observers change nothing. `accel calibrate NAME` runs these functions (`app.calibrators`).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, Field, PrivateAttr, field_validator

from accel.attach import Site, Undo
from accel.cache.magcache import MagCache
from accel.cache.rescaling import Polynomial
from accel.cache.step_rehash import fit_steps
from accel.cache.table import Table, chosen, measure
from accel.cache.teacache import TeaCache
from accel.calibration import Calibrated, Recorder
from accel.errors import BadInput, BadOutput

if TYPE_CHECKING:
    from torch import Tensor

    from accel.seams.blocks import Block
    from accel.seams.denoisers import Call, Inner, Result

DEGREE = 4
DIGITS = 9


class BlockRecorder(Recorder):
    """Looks at the blocks of a run and changes nothing."""

    name: ClassVar[str] = "cache.Recorder"
    layer: ClassVar[str] = "block cache"
    seam: ClassVar[str] = "blocks"
    supports: ClassVar[str] = TeaCache.supports
    source: ClassVar[str] = "accel.cache.calibration"


class Changes(BlockRecorder):
    """How the signal of the first block and the network's output change from step to step.

    Of the conditional branch of every sample.
    """

    _runs: list[list[tuple[Tensor, Tensor]]] = PrivateAttr(default_factory=list)
    _latest: dict[tuple[str, int, int], Trace] = PrivateAttr(default_factory=dict)
    _signal: Tensor | None = PrivateAttr(default=None)

    def _look(self, site: Site) -> Iterator[Undo]:
        from accel.seams.modulation import input_signal

        yield site.on_start(self._latest.clear)
        for denoiser in site.denoisers:
            first = site.blocks(denoiser)[0]
            signal = input_signal(first)

            def listen(
                inner: Callable[..., Any],
                *args: Any,
                block: Block = first,
                signal: Callable[[Block, dict[str, Any]], Tensor] = signal,
                **kwargs: Any,
            ) -> Any:
                self._signal = signal(block, block.bind(args, kwargs)).clone()
                return inner(*args, **kwargs)

            yield site.around(denoiser, self._follow)
            yield first.wrap(listen)

    def _follow(self, call: Call, inner: Inner) -> Result:
        from accel.cache.indicators import relative_l1

        result = inner(call)
        for index in call.where(lambda row: row.branch == "cond"):
            assert self._signal is not None
            key = (call.denoiser.name, call.step.stage, call.rows[index].sample)
            now = (self._signal[index], result.value[index].clone())
            if key in self._latest:
                signal, output = self._latest[key].newest
                pair = (relative_l1(now[0], signal), relative_l1(now[1], output))
                self._latest[key].pairs.append(pair)
                self._latest[key].newest = now
            else:
                self._latest[key] = Trace(now)
                self._runs.append(self._latest[key].pairs)
        return result

    @property
    def runs(self) -> list[list[tuple[float, float]]]:
        """For each sample, step by step: relative change of the signal, and of the output."""
        return [[(float(x), float(y)) for x, y in run] for run in self._runs]


@dataclass
class Trace:
    """One sample on its way.

    Attributes:
        newest: Signal and output of the latest step.
        pairs: Relative changes of both, step by step.
    """

    newest: tuple[Tensor, Tensor]
    pairs: list[tuple[Tensor, Tensor]] = field(default_factory=list)


def _by_step() -> dict[int, list[Tensor]]:
    return defaultdict(list)


class Sizes(BlockRecorder):
    """How the size of what all blocks add changes from step to step.

    Of the leading branch of every sample.
    """

    _ratios: dict[int, list[Tensor]] = PrivateAttr(default_factory=_by_step)
    _total: int = PrivateAttr(default=0)

    def _look(self, site: Site) -> Iterator[Undo]:
        from accel.cache.block_range import BlockRangeCache, Spans, picture_in
        from accel.cache.decisions import Decisions
        from accel.cache.policies import Every, Guarded
        from accel.cache.predictors import Forecast

        decisions = Decisions(
            lambda: Residual(self._ratios), lambda: Guarded(Every(1), 1, 0, last=False)
        )
        cache = BlockRangeCache(
            site.tally,
            decisions,
            lambda count: Spans((range(count),)),
            Forecast("reuse"),
            entry=picture_in,
            told=Residual.added,
        )
        yield from cache.attach(site)
        yield site.on_step(lambda step, _: self._saw(step.turn))

    def _saw(self, index: int) -> None:
        self._total = max(self._total, index + 1)

    @property
    def curve(self) -> list[float]:
        """γ at each step: the ratios of all samples, averaged in the logarithm; 1 where unknown."""
        found = {index: [float(one) for one in ratios] for index, ratios in self._ratios.items()}
        return [_geometric(found.get(index, [1.0])) for index in range(self._total)]


class Residual:
    """The residual of one sample: an indicator that only writes down."""

    def __init__(self, ratios: dict[int, list[Tensor]]) -> None:
        self._ratios = ratios
        self._newest: tuple[int, Tensor] | None = None

    @property
    def bytes(self) -> int:
        """Nothing that counts: it is no part of a plan."""
        return 0

    def measure(self, signal: Tensor) -> None:
        """Nothing: every step is computed."""

    def learn(self, signal: Tensor) -> None:
        """Nothing."""

    def added(self, step: int, gains: Sequence[Tensor]) -> None:
        """Write down the ratio to the step before."""
        from accel.cache.indicators import mean_ratio, token_norms

        older, self._newest = self._newest, (step, token_norms(gains))
        if older is not None and older[0] == step - 1:
            self._ratios[step].append(mean_ratio(self._newest[1], older[1]))


def _geometric(values: Sequence[float]) -> float:
    return math.exp(sum(math.log(max(value, 1e-8)) for value in values) / len(values))


def calibrate_teacache(
    pipe: Any, calls: Iterable[Mapping[str, Any]], fields: Mapping[str, Any]
) -> Calibrated:
    """Fit TeaCache's polynomial: the output's change as one of the signal's, by least squares.

    Without a threshold among the fields it is that at which half of these runs is computed.

    Raises:
        BadInput: Without a call, or with calls of one step.
        BadOutput: If the network gives NaN.
        UnsupportedModel: For a network that TeaCache does not serve.
    """
    recorder = Changes()
    recorder.watch(pipe, calls)
    runs = recorder.runs
    pairs = [pair for run in runs for pair in run]
    _check(len(pairs), [number for pair in pairs for number in pair])
    coefficients, error = fit(pairs)
    estimates = [[max(_at(coefficients, x), 0.0) for x, _ in run] for run in runs]
    signals = [signal for signal, _ in pairs]
    note = (
        f"{len(pairs)} pairs of steps; the signal changes by {min(signals):.3g} to "
        f"{max(signals):.3g} a step, the output by {_mean([y for _, y in pairs]):.3g} on average, "
        f"foretold within {error:.2g}"
    )
    usual = {"threshold": threshold_of_half(estimates)}
    method = TeaCache.model_validate({**usual, **fields, "coefficients": coefficients})
    return Calibrated(method, note)


def calibrate_magcache(
    pipe: Any, calls: Iterable[Mapping[str, Any]], fields: Mapping[str, Any]
) -> Calibrated:
    """Measure MagCache's curve of γ.

    Raises:
        BadInput: Without a call, or with calls of one step.
        BadOutput: If the network gives NaN.
        UnsupportedModel: For a network that MagCache does not serve.
    """
    recorder = Sizes()
    recorder.watch(pipe, calls)
    curve = recorder.curve
    _check(len(curve) - 1, curve)
    note = f"{len(curve)} steps; γ from {min(curve[1:]):.3g} to {max(curve[1:]):.3g}"
    rounded = tuple(round(gamma, 6) for gamma in curve)
    return Calibrated(MagCache.model_validate({**fields, "curve": rounded}), note)


def calibrate_table(
    pipe: Any, calls: Iterable[Mapping[str, Any]], fields: Mapping[str, Any]
) -> Calibrated:
    """Measure how modules change, and make a table of what is computed.

    ``threshold`` among the fields is the summed relative change at which a kind of module in a
    block is computed again (0.1 where it is left out); the others are fields of the table. Runs
    of another number of steps take the nearest line.

    Raises:
        BadInput: Without a call, or with calls of one step.
        BadOutput: If the network gives NaN.
        UnsupportedModel: For a network that Table does not serve.
    """
    own = {"by": "block", "stretch": True, **fields}
    threshold = own.pop("threshold", 0.1)
    changes, columns = measure(pipe, calls, own["by"])
    _check(len(changes) - 1, [number for step in changes for number in step.values()])
    steps = chosen(changes, columns, threshold, own["by"]).steps
    entries = "".join(steps)
    note = (
        f"{len(steps)} steps of {len(columns)} entries; {entries.count('1') / len(entries):.0%} "
        f"are computed, at a threshold of {threshold:g}"
    )
    return Calibrated(Table.model_validate({**own, "steps": steps}), note)


def fit(pairs: Sequence[tuple[float, float]]) -> tuple[Polynomial, float]:
    """The polynomial of degree 4 nearest to pairs (x, y), the highest power first.

    With fewer than five different x the degree is lower, and the first numbers are 0.

    Returns:
        Its five numbers, and the root of the mean square of what is left.
    """
    import torch

    x, y = torch.tensor(pairs, dtype=torch.float64).unbind(1)
    largest = x.abs().max().clamp_min(1e-12)
    degree = min(DEGREE, len(set(x.tolist())) - 1)
    powers = torch.stack([(x / largest) ** k for k in range(degree, -1, -1)], dim=1)
    found = torch.linalg.lstsq(powers, y[:, None], driver="gelsd").solution[:, 0]
    error = (powers @ found - y).square().mean().sqrt().item()
    scaled = [value / largest.item() ** (degree - k) for k, value in enumerate(found.tolist())]
    a, b, c, d, e = [0.0] * (DEGREE - degree) + [float(f"{value:.{DIGITS}g}") for value in scaled]
    return (a, b, c, d, e), error


def threshold_of_half(runs: Sequence[Sequence[float]]) -> float:
    """The smallest threshold, in tenths of the mean, at which half of the steps is computed.

    Args:
        runs: What is summed up at each step but the first, which is computed.
    """
    mean = _mean([value for run in runs for value in run])
    steps = sum(len(run) + 1 for run in runs)
    for tenths in range(10, 40):
        threshold = float(f"{mean * tenths / 10:.3g}")
        if sum(_computes(run, threshold) for run in runs) <= steps / 2:
            break
    return threshold


def _computes(run: Sequence[float], threshold: float) -> int:
    total, count = 0.0, 1
    for value in run:
        total += value
        if not total < threshold:
            total, count = 0.0, count + 1
    return count


def _at(coefficients: Polynomial, x: float) -> float:
    value = 0.0
    for coefficient in coefficients:
        value = value * x + coefficient
    return value


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _check(count: int, numbers: Sequence[float]) -> None:
    if count < 1:
        raise BadInput("A calibration compares steps with those before: take 2 steps or more.")
    if not all(map(math.isfinite, numbers)):
        raise BadOutput(
            "The stock pipeline gives NaN or infinite values: there is nothing to calibrate. Try "
            "--dtype bfloat16 or float32."
        )


class StepOptions(BaseModel, extra="allow"):
    """Options of `calibrate_steps`; what else is given is a field of the method."""

    budget: float = Field(
        default=0.5,
        gt=0.0,
        description="steps to compute, those that are always computed among them; below 1 a share "
        "of the run's steps, rounded up",
    )

    @field_validator("budget")
    @classmethod
    def _whole(cls, value: float) -> float:
        if value >= 1 and value != int(value):
            raise ValueError("give a whole number of steps, or a share below 1")
        return value


def calibrate_steps(
    pipe: Any, calls: Iterable[Mapping[str, Any]], fields: Mapping[str, Any]
) -> Calibrated:
    """Step Rehash's list: those steps from which the others follow best.

    ``budget`` among the fields says how many (`StepOptions`).

    Raises:
        BadInput: If there is no call, a threshold is given, or the budget is not to be met.
    """
    if "threshold" in fields:
        raise BadInput("A list of steps has no threshold: leave --threshold out, or --set budget.")
    own = StepOptions.model_validate(dict(fields)).model_dump()
    method = fit_steps(pipe, calls, own.pop("budget"), own)
    computed = f"{len(method.steps)} of {method.total} steps are computed"
    return Calibrated(method, f"{computed}, the others follow by '{method.predictor}'")
