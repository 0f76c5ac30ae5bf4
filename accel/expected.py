"""What a preset may be expected to do on a pipeline, and how sure that is.

No figure stands in this file: those that were measured are in the asset ``figures.json``, which
``tools/write_figures.py`` makes of the results in ``benchmarks``. What follows from a plan alone
(how much of a run it computes in any case) is counted from its methods.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from typing import Any

from accel.bundled import asset
from accel.errors import AccelError
from accel.plan import PRESETS, Plan
from accel.tuned import Network, differences, numbers_of

STEPS = "num_inference_steps"
ASSET = "figures.json"


class Certainty(StrEnum):
    """How sure it is what a preset does.

    Attributes:
        MEASURED: On this network with this scheduler, for a call of these numbers.
        DERIVED: It follows from the plan alone, on any model.
        TRANSFERRED: It was measured on other models, or for other numbers of the call.
        UNKNOWN: It was measured nowhere.
    """

    MEASURED = "measured"
    DERIVED = "derived"
    TRANSFERRED = "transferred"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Figures:
    """What was measured of one plan on one model, against stock in the same run.

    Attributes:
        model: Name of the bundled model.
        plan: Digest of the plan; a preset that was changed since has no figures.
        speedup: Median over the captions.
        low: Lower quartile of it.
        high: Upper quartile.
        ssim: Mean against the stock picture of the same caption and seed.
        ssim_worst: Of the captions; ``None``: not kept.
        psnr: Mean, dB; equal pictures count as 100.
        nfe: Evaluations a picture, mean; ``None``: not kept.
        stock_nfe: Of stock.
        captions: How many.
        call: Numbers of the call, by name.
        machine: What the seconds were measured on.
        date: When, as ``2026-11-21``.
        source: File of ``benchmarks/results`` that says so.
    """

    model: str
    plan: str
    speedup: float
    low: float
    high: float
    ssim: float
    ssim_worst: float | None
    psnr: float
    nfe: float | None
    stock_nfe: float | None
    captions: int
    call: dict[str, float]
    machine: str
    date: str
    source: str

    def __str__(self) -> str:
        worst = "" if self.ssim_worst is None else f" (worst {self.ssim_worst:.3f})"
        counted = ""
        if self.nfe is not None and self.stock_nfe is not None:
            counted = f", by {self.nfe:.1f} of {self.stock_nfe:g} evaluations,"
        return (
            f"{self.speedup:.2f} times as fast (quartiles {self.low:.2f}–{self.high:.2f}){counted} "
            f"at SSIM {self.ssim:.3f}{worst} on {self.captions} captions"
        )

    @property
    def conditions(self) -> str:
        """What all figures of its file were measured for, and where."""
        numbers = ", ".join(f"{name}={value:g}" for name, value in self.call.items())
        return (
            f"{self.source}: {self.model}, {numbers}, on {self.machine}, {self.date}; seconds, and "
            "so speed-ups, are of that machine"
        )


@dataclass(frozen=True)
class Measured:
    """All figures that ship.

    Attributes:
        networks: By name of the model, what they were measured on.
        figures: One entry for each plan and model.
        sources: By file of ``benchmarks/results``, a digest of what they were made from.
    """

    networks: dict[str, Network]
    figures: tuple[Figures, ...]
    sources: dict[str, str]

    def of(self, plan: Plan) -> tuple[Figures, ...]:
        """Those of one plan."""
        return tuple(one for one in self.figures if one.plan == plan.digest)


@dataclass(frozen=True)
class Expectation:
    """What one preset may be expected to do on a pipeline.

    Attributes:
        preset: Its name.
        reason: Why it does not serve the pipeline; ``None``: it does.
        certainty: How sure the figures are for this pipeline.
        figures: Of this very network where there are some, else of all others.
        own: Whether they are of this network.
        steps: Of the run that is reckoned with; ``None``: not known.
        least: Evaluations of the networks that it computes at so many steps, whatever the picture;
            ``None`` where its methods do not state it.
        evaluations: Of the stock run.
    """

    preset: str
    reason: str | None
    certainty: Certainty
    figures: tuple[Figures, ...] = ()
    own: bool = False
    steps: int | None = None
    least: int | None = None
    evaluations: int | None = None

    def __str__(self) -> str:
        if self.reason is not None:
            return f"does not serve this pipeline: {self.reason}"
        return " ".join(filter(None, [self._expected, self.bound]))

    @property
    def bound(self) -> str:
        """What its fixed parts leave to be computed, in a sentence; empty where not known."""
        if self.least is None or self.least == self.evaluations:
            return ""
        return (
            f"At {self.steps} steps at least {self.least} of {self.evaluations} evaluations are "
            "computed, whatever the picture."
        )

    @property
    def _expected(self) -> str:
        match self.certainty:
            case Certainty.MEASURED:
                [found] = self.figures
                return f"{found}, measured on this model ({found.source})."
            case Certainty.DERIVED:
                return "the stock picture, bit for bit: nothing is left out, whatever the model."
            case Certainty.TRANSFERRED:
                return self._transferred
            case Certainty.UNKNOWN:
                return f"measured on no model. {self._way_out}"

    @property
    def _transferred(self) -> str:
        known = "; ".join(f"{one} of {one.model} ({one.source})" for one in self.figures)
        missing = "for these numbers of the call" if self.own else "on this model"
        return f"not measured {missing}. Known are {known}. {self._way_out}"

    @property
    def _way_out(self) -> str:
        return (
            f"`accel compare --preset {self.preset}` measures yours, `accel tune` finds a plan "
            "for it."
        )


@cache
def measured() -> Measured:
    """The figures that ship."""
    from pydantic import TypeAdapter

    return TypeAdapter(Measured).validate_json(asset(ASSET).read_bytes())


def expected(
    pipe: Any, settings: Mapping[str, Any], branches: int | None
) -> tuple[Expectation, ...]:
    """What each preset may be expected to do on a pipeline.

    Args:
        pipe: The pipeline.
        settings: Numbers of the call that is meant, as far as they are known: figures for other
            numbers are no figures of that call.
        branches: Of its guidance; ``None``: not known.
    """
    known = measured()
    own = _model(pipe, known)
    return tuple(_expectation(name, pipe, settings, branches, own) for name in PRESETS)


def _expectation(
    preset: str, pipe: Any, settings: Mapping[str, Any], branches: int | None, own: str | None
) -> Expectation:
    plan = Plan.preset(preset)
    try:
        plan.attach(pipe).detach()
    except AccelError as error:
        return Expectation(preset, str(error), Certainty.UNKNOWN)
    everywhere = measured().of(plan)
    here = tuple(one for one in everywhere if one.model == own)
    figures = here or everywhere
    steps = settings.get(STEPS, _usual_steps(pipe))
    least = evaluations = None
    if steps is not None and branches is not None and pipe.scheduler.order == 1:
        least, evaluations = computed_at_least(plan, steps, branches), steps * branches
    certainty = _certainty(plan, here, everywhere, settings)
    return Expectation(preset, None, certainty, figures, bool(here), steps, least, evaluations)


def _certainty(
    plan: Plan,
    here: tuple[Figures, ...],
    everywhere: tuple[Figures, ...],
    settings: Mapping[str, Any],
) -> Certainty:
    numbers = numbers_of(settings)
    if here and differences(tuple(here[0].call.items()), numbers) is None:
        return Certainty.MEASURED
    if not any(method.why_off() is None for method in plan):
        return Certainty.DERIVED
    return Certainty.TRANSFERRED if everywhere else Certainty.UNKNOWN


def _model(pipe: Any, known: Measured) -> str | None:
    """The model that a pipeline is, of those that were measured."""
    here = Network.of(pipe)
    return next((name for name, one in known.networks.items() if not one.difference(here)), None)


def _usual_steps(pipe: Any) -> int | None:
    """What the pipeline takes where nothing is said."""
    parameter = inspect.signature(pipe.__call__).parameters.get(STEPS)
    usual = None if parameter is None else parameter.default
    return usual if isinstance(usual, int) else None


def computed_at_least(plan: Plan, steps: int, branches: int) -> int | None:
    """Evaluations that a plan computes whatever the picture; ``None``: its methods do not say.

    Args:
        plan: The plan.
        steps: Of the run, one evaluation of every branch each.
        branches: Of the guidance; methods of that layer leave out all but one of them.
    """
    whole = guided = frozenset(range(steps))
    for method in plan:
        fixed = whole if method.why_off() is not None else method.fixed(steps)
        if fixed is None:
            return None
        guided &= fixed
        whole = whole if method.layer == "guidance" else whole & fixed
    return len(whole) + (branches - 1) * len(guided)
