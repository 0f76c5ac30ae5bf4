"""The plans that are searched: of each family a method or none, with the knobs that matter.

What is here are names and ranges only, so that a method of any package takes part by a line of its
own. A combination that does not go together is no plan: attaching says so, and the search goes on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any, Protocol

from accel.attach import Fitting
from accel.errors import AccelError
from accel.plan import Plan, build, entry_points_by_name, method_class

NONE = "none"
STEPS = "samplers.Steps"
STEP_LIST = "cache.StepRehash"
FITTED_STEPS = "samplers.OLSS"
LEAST = 4
"""Steps below which no plan goes."""


@dataclass(frozen=True)
class Real:
    """A field with a range; ``log``: small values matter as much as large ones."""

    field: str
    low: float
    high: float
    log: bool = False


@dataclass(frozen=True)
class Whole:
    """A field with whole numbers, both ends included."""

    field: str
    low: int
    high: int


@dataclass(frozen=True)
class Pick:
    """A field with a few values."""

    field: str
    values: tuple[Any, ...]


Knob = Real | Whole | Pick

PREDICTOR = Pick("predictor", ("newton", "taylor", "reuse"))
SITE = Pick("site", ("blocks", "modules", "network"))
RATIO = Real("ratio", 0.1, 0.7)

FAMILIES: dict[str, dict[str, tuple[Knob, ...]]] = {
    "sampler": {
        "samplers.DPMSolverPP": (Pick("order", (2, 3)),),
        "samplers.UniPC": (Pick("order", (2, 3)),),
        "samplers.DEIS": (Pick("order", (2, 3)),),
        "samplers.PseudoCorrector": (),
        FITTED_STEPS: (Whole("evaluations", 2, 14),),
    },
    "schedule": {
        "samplers.Schedule": (
            Pick("kind", ("arctan", "uniform_lambda", "polynomial", "sqrt_time")),
        ),
    },
    "guidance": {
        "guidance.Adaptive": (Real("threshold", 0.9, 0.9995), Real("min_guided", 0.05, 0.6)),
        "guidance.Interval": (Real("low", 0.05, 2.0, log=True),),
        "guidance.CFGCache": (Whole("interval", 2, 6),),
        "guidance.Residual": (Pick("negative", ("onetime", "self")), Real("delta", 0.5, 1.0)),
        "guidance.SkipAtOne": (),
    },
    "cache": {
        "cache.EasyCache": (
            Real("threshold", 0.02, 0.6, log=True),
            PREDICTOR,
            Whole("warmup", 2, 4),
        ),
        "cache.FirstBlock": (
            Real("threshold", 0.02, 0.6, log=True),
            PREDICTOR,
            Whole("warmup", 1, 4),
        ),
        "cache.DBCache": (
            Real("threshold", 0.02, 0.6, log=True),
            PREDICTOR,
            Whole("front", 1, 3),
            Whole("warmup", 1, 4),
        ),
        "cache.TeaCache": (Real("threshold", 0.05, 1.0, log=True),),
        "cache.MagCache": (Real("threshold", 0.02, 0.5, log=True), PREDICTOR),
        "cache.DeepCache": (
            Whole("interval", 2, 7),
            PREDICTOR,
            Pick("schedule", ("uniform", "nonuniform")),
        ),
        "cache.DeltaDiT": (Whole("interval", 2, 4),),
        "cache.FORA": (Whole("interval", 2, 4),),
        "cache.TaylorSeer": (Whole("interval", 2, 6), SITE),
        "cache.HiCache": (Whole("interval", 2, 6), SITE),
        "cache.FoCa": (Whole("interval", 2, 6), SITE),
        "cache.SADA": (Whole("max_skips", 1, 4), Pick("lagrange", (1.0, 0.48))),
        "cache.ZEUS": (Whole("interval", 2, 4), Pick("lagrange", (1.0, 0.48))),
        STEP_LIST: (Real("budget", 0.12, 0.6, log=True),),
    },
    "tokens": {
        "tokens.ToMe": (RATIO,),
        "tokens.ToMA": (RATIO,),
        "tokens.ToDo": (),
    },
    "attention": {
        "attention.Neighbourhood": (),
        "attention.SVG": (Real("keep", 0.1, 0.6),),
    },
}
"""By family, the methods that are tried and their knobs. Of a family a plan has one, or none."""

FITTED = (FITTED_STEPS, STEP_LIST)
"""Methods whose fields are measured (`Accelerator.fitter`), outermost first; knobs say how."""

SETTING_STEPS = (FITTED_STEPS,)
"""Methods that say by themselves how many steps are made."""

SEEDS: tuple[tuple[float, Mapping[str, Mapping[str, Any]]], ...] = (
    (1.0, {"cache.EasyCache": {"threshold": 0.1}}),
    (0.5, {"samplers.DPMSolverPP": {"order": 2}}),
    (0.5, {}),
    (1.0, {"guidance.Adaptive": {"threshold": 0.99}}),
    (1.0, {STEP_LIST: {"budget": 0.3}}),
    (1.0, {STEP_LIST: {"budget": 0.22}}),
    (1.0, {FITTED_STEPS: {"evaluations": 8}}),
    (1.0, {FITTED_STEPS: {"evaluations": 4}}),
    (1.0, {FITTED_STEPS: {"evaluations": 7}, "guidance.Interval": {"low": 1.0}}),
    (1.0, {FITTED_STEPS: {"evaluations": 5}, "guidance.Interval": {"low": 0.5}}),
    (1.0, {"cache.EasyCache": {"threshold": 0.2}, "guidance.Adaptive": {"threshold": 0.99}}),
    (1.0, {STEP_LIST: {"budget": 0.25}, "guidance.Adaptive": {"threshold": 0.99}}),
    (1.0, {STEP_LIST: {"budget": 0.2}, "guidance.Interval": {"low": 0.3}}),
    (0.7, {"samplers.DPMSolverPP": {"order": 2}, "cache.EasyCache": {"threshold": 0.1}}),
    (1.0, {"cache.FirstBlock": {"threshold": 0.1}}),
    (1.0, {"cache.DeepCache": {"interval": 3}}),
    (1.0, {"cache.TaylorSeer": {"interval": 3, "site": "network"}}),
    (
        0.6,
        {
            "samplers.DPMSolverPP": {"order": 2},
            "guidance.Adaptive": {"threshold": 0.98},
            "cache.EasyCache": {"threshold": 0.1},
        },
    ),
)
"""Where the search begins: shares of the steps, and methods that are good on most pipelines."""


class Trial(Protocol):
    """What asks for values: a trial of Optuna."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        """A number of a range."""
        ...

    def suggest_int(self, name: str, low: int, high: int) -> int:
        """A whole number, both ends included."""
        ...

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        """One of some values."""
        ...


@dataclass(frozen=True)
class Space:
    """What may be tried on one pipeline.

    Attributes:
        steps: What the call asks for.
        families: By family the methods that fit, and their knobs.
        fits: By name what measures the fields of a method (`FITTED`), in the order in which they
            are measured, each beside those before.
    """

    steps: int
    families: Mapping[str, Mapping[str, tuple[Knob, ...]]]
    fits: Mapping[str, Fitting] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        pipe: Any,
        steps: int,
        families: Mapping[str, Any] = FAMILIES,
        fits: Mapping[str, Fitting] | None = None,
    ) -> Space:
        """The methods that attach to a pipeline; their own ``none`` is always there."""
        known = dict(fits or {})
        fitting = {
            family: {
                name: knobs
                for name, knobs in kinds.items()
                if (name in known or name not in FITTED) and _fits(pipe, name)
            }
            for family, kinds in families.items()
        }
        return cls(steps, {family: kinds for family, kinds in fitting.items() if kinds}, known)

    @property
    def digest(self) -> str:
        """Of what may be tried: a study holds trials of one space."""
        return sha256(f"{self.steps} {self.families}".encode()).hexdigest()[:12]

    def suggest(self, trial: Trial) -> Plan:
        """The plan that a trial stands for.

        Raises:
            AccelError: If its values make none.
        """
        return self.plan(*self.chosen(trial))

    def chosen(self, trial: Trial) -> tuple[int, dict[str, dict[str, Any]]]:
        """The steps of a trial, and by name the knobs of its methods."""
        methods = {}
        for family, kinds in self.families.items():
            chosen = trial.suggest_categorical(family, [NONE, *kinds])
            if chosen != NONE:
                methods[chosen] = {
                    knob.field: _asked(trial, f"{chosen}.{knob.field}", knob)
                    for knob in kinds[chosen]
                }
        return trial.suggest_int("steps", min(LEAST, self.steps), self.steps), methods

    def plan(self, count: int, methods: Mapping[str, Mapping[str, Any]]) -> Plan:
        """A plan that makes so many steps, with some methods by name and knobs.

        Raises:
            AccelError: If there is no such plan.
        """
        stays = count >= self.steps or not methods.keys().isdisjoint(SETTING_STEPS)
        fewer = {} if stays else {STEPS: {"share": count / self.steps}}
        known = {name: knobs for name, knobs in methods.items() if name not in self.fits}
        found = Plan(*(build(name, knobs) for name, knobs in {**fewer, **known}.items()))
        for name, fit in self.fits.items():
            if name in methods:
                found = Plan(*found, fit(found, methods[name]))
        return found

    def seeds(self) -> list[dict[str, Any]]:
        """The parameters of the trials that come first: those of `SEEDS` that fit."""
        found = []
        for share, methods in SEEDS:
            parameters: dict[str, Any] = dict.fromkeys(self.families, NONE)
            parameters["steps"] = max(min(LEAST, self.steps), round(share * self.steps))
            known = {name: family for family, kinds in self.families.items() for name in kinds}
            if not methods.keys() <= known.keys():
                continue
            for name, fields in methods.items():
                parameters[known[name]] = name
                parameters |= {f"{name}.{field}": value for field, value in fields.items()}
            found.append(parameters)
        return found


def fits(pipe: Any, calls: Sequence[Mapping[str, Any]]) -> dict[str, Fitting]:
    """What measures the fields of methods (`FITTED`), of those that are installed.

    Args:
        pipe: The stock pipeline.
        calls: Of it, each with a generator.
    """
    known = entry_points_by_name()
    made = {name: method_class(name).fitter(pipe, calls) for name in FITTED if name in known}
    return {name: fit for name, fit in made.items() if fit is not None}


def _fits(pipe: Any, name: str) -> bool:
    """Whether a method is installed and attaches as it is."""
    if name not in entry_points_by_name():
        return False
    try:
        Plan(build(name, {})).attach(pipe).detach()
    except AccelError:
        return False
    return True


def _asked(trial: Trial, name: str, knob: Knob) -> Any:
    match knob:
        case Real():
            return trial.suggest_float(name, knob.low, knob.high, log=knob.log)
        case Whole():
            return trial.suggest_int(name, knob.low, knob.high)
        case Pick():
            return trial.suggest_categorical(name, list(knob.values))
