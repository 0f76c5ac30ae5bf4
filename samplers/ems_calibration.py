"""Measure the statistics of DPM-Solver-v3 on trajectories of a pipeline: ``accel calibrate ems``.

The pipeline runs as it is, guidance included, on a scheduler that follows the trajectory by
DPM-Solver++ and looks at every evaluation: at x, at the noise prediction ε after guidance, and at
the Jacobian's product with a random direction of signs. The product is exact where all operations
of the network have a forward derivative (the latents carry the direction through the pipeline as
dual numbers); else each noise level is evaluated three times and it is a central difference.

``l`` is the mean of ``σ·(J v)∘v``, which has the diagonal of ``σ·∂ε/∂x`` as its mean; ``s`` and
``b`` are the least-squares fit of f' by f, with the change of ε along the trajectory from its
neighbours there. Means are over samples, and over the elements that the statistics pool.

Source: Zheng et al., arXiv 2310.13268, section 3.2 and appendix C.1 (statistics); Hutchinson's
estimator of a diagonal. Trajectories in place of noised data, and pooling, are ours.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, cast

import numpy as np
import torch
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from accel.attach import Run, Site, Undo
from accel.calibration import Calibrated, Recorder
from accel.errors import BadInput, BadOutput, UnsupportedModel
from accel.seams.seeding import Generator
from samplers.dpmsolver_v3 import DPMSolverV3
from samplers.dpmsolverpp_scheduler import DPMSolverPPScheduler
from samplers.ems import EMS, Floats, Reduce
from samplers.fingerprint import Fingerprint
from samplers.prediction import Level

FEWEST = 4
"""Noise levels that a calibration needs at least."""

PRIOR = 16
"""Samples that the statistics of single elements are filled up with, each like their channel on
average: a few samples alone would give slopes that no solver survives."""


class Options(BaseModel):
    """What ``accel calibrate ems`` can be told."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    reduce: Reduce = Field(
        default="scalar", description="one number for all, for each channel, or none: each element"
    )
    order: Literal[1, 2, 3, 4] = Field(default=2, description="of the solver in the plan")
    grid: int = Field(default=100, ge=2, le=10_000, description="pieces that λ is divided in")
    jacobian: Literal["auto", "exact", "difference"] = Field(
        default="auto", description="how the Jacobian's product is taken; auto: exact if it can be"
    )
    distance: float = Field(
        default=0.05, gt=0.0, le=1.0, description="of a central difference, in units of latents"
    )
    trim: float = Field(
        default=0.002, ge=0.0, lt=0.5, description="levels with less signal or noise are left out"
    )
    axis: int | None = Field(
        default=None, description="of the channels; default: the last of three, else the second"
    )


@dataclass(frozen=True)
class Point:
    """One noise level of a trajectory.

    Attributes:
        level: The noise level.
        x: The sample ``[B, C, ...]``.
        noise: ε at it.
        product: ``(J v)∘v``, where it was taken.
    """

    level: Level
    x: Tensor
    noise: Tensor
    product: Tensor | None


class Walk(DPMSolverPPScheduler):
    """Follows the trajectory and looks.

    Attributes:
        exact: Whether samples carry a direction as dual numbers, or evaluations are repeated.
        distance: Of central differences.
        points: What was seen in the latest run.
    """

    exact = True
    distance = 0.05
    points: list[Point]

    def watch(self, *, exact: bool, distance: float, seed: int) -> None:
        """Say how to look, and where random directions begin."""
        self.exact, self.distance = exact, distance
        self._signs = torch.Generator("cpu").manual_seed(seed)

    def _prepare(self, levels: Sequence[Level]) -> None:
        """As the base does it; where differences are taken, with every timestep three times."""
        super()._prepare(levels)
        self.points, self._seen = [], cast("list[Tensor]", [])
        if not self.exact:
            self.timesteps = self.timesteps.repeat_interleave(3)
            inner, end = self.sigmas[:-1], self.sigmas[-1:]
            self.sigmas = torch.cat([inner.repeat_interleave(3), end])

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start of the run; only at the first position.

        Raises:
            BadInput: For another one.
        """
        if begin_index:
            raise BadInput("Statistics are measured on whole trajectories: calibrate from noise.")
        super().set_begin_index(begin_index)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Generator = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """As the base does it; where differences are taken, with the third of three outputs."""
        if self.exact:
            return super().step(model_output, timestep, sample, generator, return_dict)
        if not self._seen:
            self._base, self._direction = sample, self.distance * self._random_signs(sample)
        self._seen.append(model_output)
        if len(self._seen) == 3:
            return super().step(self._seen[0], timestep, self._base, generator, return_dict)
        moved = self._base + (self._direction if len(self._seen) == 1 else -self._direction)
        return SchedulerOutput(prev_sample=moved) if return_dict else (moved,)

    def _advance(self, index: int, output: Tensor, sample: Tensor, generator: Generator) -> Tensor:
        level = self._levels[index]
        look = self._look_exactly if self.exact else self._look_around
        x, plain, noise, product = look(output, sample, level)
        self.points.append(Point(level, x, noise, product))
        moved = super()._advance(index, plain, x, generator)
        if self.exact and self._levels[index + 1].sigma:
            direction = self._random_signs(moved)
            moved = cast("Tensor", forward_ad.make_dual(moved, direction))  # type: ignore[no-untyped-call]
        return moved

    def _look_exactly(
        self, output: Tensor, sample: Tensor, level: Level
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """The derivative that came along, except at the first level."""
        x, direction = _unpacked(sample)
        if direction is None:
            self._random_signs(x)  # differences need them here: later ones are then the same
        noise, change = _unpacked(self._conversion.noise(output, sample, level))
        plain, carried = _unpacked(output)
        if direction is not None and carried is None:
            raise NotImplementedError("the network's output does not carry a derivative")
        product = None if direction is None or change is None else change * direction
        return x, plain, noise, product

    def _look_around(
        self, output: Tensor, sample: Tensor, level: Level
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """The central difference over what rounding left of the direction."""
        sign = -1.0 if self._noise_inverted else 1.0
        ends = [
            (sample + self._direction, self._seen[1]),
            (sample - self._direction, self._seen[2]),
        ]
        self._seen = []
        x = [end.to(self._base.dtype).to(sample.dtype) for end, _ in ends]
        noise = [
            self._conversion.noise(sign * seen, place, level)
            for place, (_, seen) in zip(x, ends, strict=True)
        ]
        gap = x[0] - x[1]
        change = (noise[0] - noise[1]) / torch.where(gap == 0, 1.0, gap)  # rounded away: no change
        product = torch.where(gap == 0, 0.0, change)
        return sample, output, self._conversion.noise(output, sample, level), product

    def _random_signs(self, like: Tensor) -> Tensor:
        """Random signs, the same on every device."""
        signs = torch.randint(0, 2, like.shape, generator=self._signs) * 2 - 1
        return signs.to(like.device, like.dtype)


def _unpacked(value: Tensor) -> tuple[Tensor, Tensor | None]:
    """A dual number's value and its derivative."""
    value, tangent = forward_ad.unpack_dual(value)  # type: ignore[no-untyped-call]
    return value, tangent


class Trajectories(Recorder):
    """Puts a `Walk` in the scheduler's place."""

    name: ClassVar[str] = "samplers.Trajectories"
    layer: ClassVar[str] = "sampler"
    seam: ClassVar[str] = "scheduler"
    supports: ClassVar[str] = DPMSolverV3.supports
    source: ClassVar[str] = "samplers.ems_calibration"

    _walk: Walk = PrivateAttr()
    _guidance: dict[str, float] = PrivateAttr(default_factory=dict)

    def through(self, walk: Walk) -> Self:
        """The same, on this scheduler."""
        self._walk = walk
        return self

    @property
    def guidance(self) -> dict[str, float]:
        """What sets the guidance of the latest call."""
        return self._guidance

    def _look(self, site: Site) -> Iterator[Undo]:
        from accel.seams.pipelines import guidance_of

        def look() -> None:
            self._guidance = guidance_of(site.pipe)

        yield site.swap_scheduler(self._walk)
        yield site.on_start(look)


def calibrate_ems(
    pipe: Any, calls: Iterable[Mapping[str, Any]], options: Mapping[str, Any]
) -> Calibrated:
    """Measure the statistics of a pipeline; 50 steps and a few prompts are enough for scalars.

    Raises:
        BadInput: Without a call, with too few steps, or with calls of different schedules or
            guidance.
        BadOutput: If the network gives NaN.
        UnsupportedModel: For a noise process that is not served, or a network without forward
            derivatives where they are asked for.
    """
    chosen = Options.model_validate(options)
    ems, how = measure(pipe, calls, chosen)
    low, high = ems.span
    note = (
        f"{how}, λ from {low:.3g} to {high:.3g}, l from {ems.l[0].mean():.3g} to "
        f"{ems.l[-1].mean():.3g}"
    )
    if ems.reduce == "scalar":
        return Calibrated(DPMSolverV3(order=chosen.order, numbers=ems.to_scalars()), note)
    content = replace(ems, note=how).to_bytes()
    method = DPMSolverV3(
        order=chosen.order,
        statistics=Path("ems.safetensors"),
        sha256=hashlib.sha256(content).hexdigest(),
    )
    return Calibrated(method, note, {"statistics": content})


def measure(pipe: Any, calls: Iterable[Mapping[str, Any]], options: Options) -> tuple[EMS, str]:
    """The statistics, and what they rest on in words."""
    try:
        walk = Walk.from_config(pipe.scheduler.config, order=2)
    except BadInput as error:
        raise UnsupportedModel(f"ems on {type(pipe.scheduler).__name__}: {error}") from error
    recorder = Trajectories().through(walk)
    exact, moments, guidance = options.jacobian != "difference", Moments(options), None
    run = Run((recorder,), pipe)
    try:
        for number, call in enumerate(calls):
            exact = _walk_once(pipe, call, walk, options, exact=exact, seed=number)
            if guidance not in (None, recorder.guidance):
                raise BadInput(
                    f"Two calls differ in guidance ({guidance} and {recorder.guidance}): "
                    "statistics hold for one."
                )
            guidance = recorder.guidance
            moments.add(walk.points)
    finally:
        run.detach()
    if guidance is None:
        raise BadInput("A calibration rests on what prompts do: give at least one prompt.")
    ems = moments.statistics(Fingerprint.of(pipe, walk, guidance))
    kind = "exact" if exact else f"by differences of {options.distance:g}"
    how = f"{moments.samples} samples at {len(moments.levels)} noise levels, derivatives {kind}"
    return ems, how


def _walk_once(
    pipe: Any, call: Mapping[str, Any], walk: Walk, options: Options, *, exact: bool, seed: int
) -> bool:
    """One call; whether derivatives were exact."""
    if exact:
        state = _noise_state(call)
        walk.watch(exact=True, distance=options.distance, seed=seed)
        try:
            with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
                pipe(**call)
        except NotImplementedError as error:
            if options.jacobian == "exact":
                raise UnsupportedModel(
                    f"{type(pipe).__name__} has no forward derivative ({error}): use "
                    "jacobian=difference."
                ) from error
            _restore(call, state)
        else:
            return True
    walk.watch(exact=False, distance=options.distance, seed=seed)
    pipe(**call)
    return False


def _generators(call: Mapping[str, Any]) -> list[torch.Generator]:
    given = call.get("generator")
    listed = given if isinstance(given, list) else [given]
    return [one for one in listed if isinstance(one, torch.Generator)]


def _noise_state(call: Mapping[str, Any]) -> list[Tensor]:
    return [generator.get_state() for generator in _generators(call)]


def _restore(call: Mapping[str, Any], states: Sequence[Tensor]) -> None:
    for generator, state in zip(_generators(call), states, strict=True):
        generator.set_state(state)


PAIRS = ("xx", "xe", "ee", "xd", "ed")


class Moments:
    """Means over samples of what the statistics are made of, level by level.

    Of x, ε, its change d with λ along the trajectory, their products, and ``σ·(J v)∘v``; what is
    pooled over is summed at once, so that memory does not grow with the number of samples.

    Attributes:
        levels: The noise levels.
        samples: How many there were.
    """

    def __init__(self, options: Options) -> None:
        self._options = options
        self.levels: list[Level] = []
        self.samples = 0
        self._sums: dict[str, Tensor] = {}
        self._calls = 0
        self._axis = 1

    def add(self, points: Sequence[Point]) -> None:
        """Take up one run.

        Raises:
            BadInput: If it has too few levels, or others than the runs before.
            BadOutput: If there are NaN in it.
        """
        trim = self._options.trim
        kept = [p for p in points if min(p.level.alpha, p.level.sigma) > trim]
        levels = [point.level for point in kept]
        if len(levels) < FEWEST:
            raise BadInput(
                f"Statistics need {FEWEST} steps or more between the ends of the noise; this run "
                f"has {len(levels)}. Raise --steps: 50 are good."
            )
        if self.levels not in ([], levels):
            raise BadInput(
                "Two calls differ in their noise levels: statistics need the same steps and size."
            )
        self.levels = levels
        self.samples += len(kept[0].x)
        self._calls += 1
        for name, value in self._seen(kept).items():
            self._sums[name] = self._sums.get(name, torch.zeros(())) + value

    def _seen(self, points: Sequence[Point]) -> dict[str, Tensor]:
        x, e = (_wide([getattr(p, name) for p in points]) for name in ("x", "noise"))
        if not (x.isfinite().all() and e.isfinite().all()):
            raise BadOutput(
                "The run holds NaN or infinite values: there is nothing to calibrate. Try "
                "--dtype bfloat16 or float32."
            )
        lams = torch.tensor([p.level.lam for p in points], dtype=torch.float64)
        (d,) = torch.gradient(e, spacing=(lams,), dim=(0,), edge_order=2)
        known = {"x": x, "e": e, "d": d}
        found = {name: self._pooled(value) for name, value in known.items()}
        found |= {pair: self._pooled(known[pair[0]] * known[pair[1]]) for pair in PAIRS}
        taken = [(i, p) for i, p in enumerate(points) if p.product is not None]
        slope = _wide([cast("Tensor", p.product) * p.level.sigma for _, p in taken])
        self._sloped = [i for i, _ in taken]
        return found | {"slope": self._pooled(slope)}

    def _pooled(self, values: Tensor) -> Tensor:
        """``[levels, B, C, ...]``, summed over samples and averaged over what is pooled."""
        total = values.sum(1)
        axis = self._options.axis
        if axis is None:
            axis = -1 if values.ndim == 4 else 1
        self._axis = axis
        if self._options.reduce == "none":
            return total
        kept = axis % (values.ndim - 1) if self._options.reduce == "channel" else 0
        others = [dim for dim in range(1, total.ndim) if dim != kept]
        return total.mean(others) if others else total

    def statistics(self, measured: Fingerprint) -> EMS:
        """The statistics on a uniform grid."""
        if self._options.reduce == "none" and self.samples < 2:
            raise BadInput("reduce=none needs two samples or more: raise --count.")
        mean = {name: self._mean(total) for name, total in self._sums.items()}
        lams = np.array([level.lam for level in self.levels])
        l = resampled(mean.pop("slope"), lams[self._sloped], lams)  # noqa: E741
        s, b = fitted(mean, self.levels, l, lams)
        grid = np.linspace(lams[0], lams[-1], self._options.grid + 1)
        tables = (resampled(table, lams, grid) for table in (l, s, b))
        if self._options.reduce == "none":
            tables = (table.astype(np.float32) for table in tables)
        l, s, b = tables  # noqa: E741
        return EMS(grid, l, s, b, self._axis, measured)

    def _mean(self, total: Tensor) -> Floats:
        """The mean over samples; for elements, with some more that are as their channel is."""
        mean = total / self.samples
        if self._options.reduce == "none":
            others = [dim for dim in range(1, mean.ndim) if dim != self._axis % mean.ndim]
            pooled = mean.mean(others, keepdim=True) if others else mean
            mean = (total + PRIOR * pooled) / (self.samples + PRIOR)
        return cast("Floats", mean.numpy())


def _wide(values: Sequence[Tensor]) -> Tensor:
    return torch.stack([value.to("cpu", torch.float64) for value in values])


def fitted(
    mean: Mapping[str, Floats],
    levels: Sequence[Level],
    l: Floats,  # noqa: E741
    lams: Floats,
) -> tuple[Floats, Floats]:
    """The line ``s·f + b`` nearest to f', from means of x, ε, its change d and their products.

    With ``k = σ/α`` is ``f = k·ε − (l/α)·x`` and ``f' = k·((l − 1)·ε + d) − (l̇/α)·x``.
    """
    tall = (-1, *[1] * (l.ndim - 1))
    alpha = np.array([level.alpha for level in levels]).reshape(tall)
    k = np.exp(-lams).reshape(tall)
    of_f = {"e": k, "x": -l / alpha}
    of_change = {"e": k * (l - 1.0), "d": k, "x": -np.gradient(l, lams, axis=0) / alpha}
    f = sum((weight * mean[name] for name, weight in of_f.items()), np.zeros(()))
    change = sum((weight * mean[name] for name, weight in of_change.items()), np.zeros(()))
    square = _product(mean, of_f, of_f) - f * f
    common = _product(mean, of_f, of_change) - f * change
    floor = 1e-12 * (_product(mean, of_f, of_f) + 1e-300)
    s = np.where(square > floor, common / np.maximum(square, floor), 0.0)
    return s, change - s * f


def _product(
    mean: Mapping[str, Floats], left: Mapping[str, Floats], right: Mapping[str, Floats]
) -> Floats:
    """The mean of the product of two sums of x, ε and d."""
    total: Floats = np.zeros(())
    for a, first in left.items():
        for b, second in right.items():
            pair = a + b if a + b in mean else b + a
            total = total + first * second * mean[pair]
    return total


def resampled(table: Floats, lams: Floats, at: Floats) -> Floats:
    """A table at other λ: straight between the levels, constant beyond them."""
    above = np.clip(np.searchsorted(lams, at), 1, len(lams) - 1)
    share = np.clip((at - lams[above - 1]) / (lams[above] - lams[above - 1]), 0.0, 1.0)
    share = share.reshape(-1, *[1] * (table.ndim - 1))
    return np.asarray((1.0 - share) * table[above - 1] + share * table[above])
