"""Who is in the table: every method of ours in its sweeps, compositions, and the peers.

A curve of ours is named by its method (``cache.EasyCache``, ``tokens.ToMe, kept``), a composition
by its parts. Whoever cannot serve a model, or rests on what is not here, is named with the reason:
each method that `accel.methods` knows is in the one list or the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import caches
import calibrated
import clip_forms
import contest
import guidance
import peers
import sampling
import tokens
from contest import OURS, STOCK, Benches, Contestant
from sampling import Calibration

import accel
import samplers
from accel import Plan, attention, cache, memory
from accel.errors import AccelError
from accel.seams.layout import Layout

TUNED = Path(__file__).parent / "tuned"
"""Where plans that were tuned for a model lie: ``MODEL-NAME.toml``."""

FEWER_STEPS, PRESET, TUNED_CURVE = "fewer steps:", "preset", "tuned"
NO_TUNED = "there is no tuned plan of this model yet: `benchmarks/tuned` holds none"

SAMPLED = (20, 14, 10, 8)
"""Steps at which our samplers are drawn."""

THRESHOLDS = (0.05, 0.1, 0.15, 0.2, 0.3)

SOLVED = sampling.CALIBRATIONS[:2]
"""Samplers that rest on measured numbers and are no search of schedules: v3 and OLSS."""

ELSEWHERE = {
    "parallel": "it needs several processes: `benchmarks/devices.py` measures it",
    "cache.Custom": "it is a kit of which the other caches are made",
    "attention.Pattern": "it is a kit of which the other sparse attentions are made",
    "samplers.Steps": "it is what the curve of stock in fewer steps is, to the bit",
    "guidance.Residual": "it serves pictures that begin with a picture: here all begin with noise",
}
"""By method or family, why it is not drawn where nobody has drawn it."""

Plans = dict[tuple[str, float], Plan]


@dataclass
class Field:
    """Who contests, and who does not.

    Attributes:
        who: In the order in which they are drawn first.
        left: By name, why it is left out.
    """

    who: list[Contestant] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)

    def add(self, plans: Plans, pipe: Any, settings: int | None, steps: int | None = None) -> None:
        """Add those plans that serve a pipeline, in so many steps; note why the others do not."""
        serving, left = contest.serving(plans, pipe, settings)
        call = {} if steps is None else {"num_inference_steps": steps}
        self.who += [replace(one, call=call) for one in serving]
        self.left |= left


@dataclass(frozen=True)
class Wanted:
    """What a table is asked to hold.

    Attributes:
        model: A bundled one.
        settings: So many of each curve; ``None``: all.
        only: Parts of the names of curves; all without any.
        searched: Whether schedules are searched for, which takes minutes each.
        tuned: Where tuned plans lie.
    """

    model: str
    settings: int | None = None
    only: tuple[str, ...] = ()
    searched: bool = False
    tuned: Path = TUNED

    def wants(self, curve: str) -> bool:
        """Whether a curve is asked for."""
        return not self.only or any(part in curve for part in self.only)

    def chosen(self, plans: Plans) -> Plans:
        """Those of them that are asked for."""
        return {key: plan for key, plan in plans.items() if self.wants(key[0])}


def gather(wanted: Wanted, benches: Benches) -> Field:
    """Everybody who is asked for, with the stock pipeline itself as the first."""
    pipe, call, found = benches.get(OURS)[0], benches.call, Field()
    found.who.append(Contestant(STOCK, STOCK, 0))
    found.who += [one for one in fewer_steps(call, wanted.settings) if wanted.wants(one.method)]
    for plans in (single(pipe, call), composed(), presets()):
        found.add(wanted.chosen(plans), pipe, wanted.settings)
    for steps, plans in [*in_fewer_steps(call).items()][: wanted.settings]:
        found.add(wanted.chosen(plans), pipe, None, steps)
    _measured(wanted, benches, found)
    _tuned(wanted, pipe, found)
    _theirs(wanted, benches, found)
    _account(wanted, found)
    return found


def fewer_steps(call: Mapping[str, Any], settings: int | None) -> list[Contestant]:
    """The stock pipeline in fewer steps: what costs nothing to have."""
    steps = [one for one in peers.FEWER if one < call["num_inference_steps"]]
    return [
        Contestant(STOCK, FEWER_STEPS, one, call={"num_inference_steps": one})
        for one in steps[:settings]
    ]


def single(pipe: Any, call: Mapping[str, Any]) -> Plans:
    """Every method by itself, in as many steps as stock."""
    known = accel.methods()
    found = _family("cache", caches.plans()) | _family("tokens", tokens.plans(pipe))
    for curve, (knob, fields, values) in guidance.CURVES.items():
        kind = known[f"guidance.{curve.split(',')[0]}"]
        plans = {(curve, value): Plan(kind(**fields, **{knob: value})) for value in values}
        found |= _family("guidance", plans)
    found["guidance.SkipAtOne", 0] = Plan(accel.guidance.SkipAtOne())
    sparse = clip_forms.sparse(grid(pipe, call))
    found |= {(f"attention.{name}", 0): Plan(*form) for name, form in sparse.items()}
    found["attention.Backend, _native_math", 0] = Plan(attention.Backend(backend="_native_math"))
    return found | _kept()


def _family(family: str, plans: Plans) -> Plans:
    return {(f"{family}.{curve}", knob): plan for (curve, knob), plan in plans.items()}


def _kept() -> Plans:
    """Methods that save memory, at the price of seconds."""
    return {
        ("memory.FeatureSlicing", 0): Plan(memory.FeatureSlicing()),
        ("memory.OperatorGrouping", 0): Plan(memory.OperatorGrouping()),
        ("memory.LayerwiseCasting, bfloat16", 0): Plan(memory.LayerwiseCasting(storage="bfloat16")),
        ("memory.LayerwiseCasting, float8", 0): Plan(memory.LayerwiseCasting()),
        ("memory.GroupOffload", 0): Plan(memory.GroupOffload()),
    }


def grid(pipe: Any, call: Mapping[str, Any]) -> Layout:
    """The image tokens that attention sees; of a UNet those of the first level that has any."""
    if "num_frames" in call:
        return clip_forms.grid_of(pipe, dict(call))
    side = pipe.vae_scale_factor * 2
    return Layout(0, 1, call["height"] // side, call["width"] // side)


def composed() -> Plans:
    """Methods together: guidance and a cache, at the thresholds of the cache."""
    adaptive, interval = accel.guidance.Adaptive(), accel.guidance.Interval()
    found: Plans = {}
    for value in THRESHOLDS:
        easy = cache.EasyCache(threshold=value)
        blocks = cache.DBCache(threshold=value, predictor="newton")
        found["Adaptive + EasyCache", value] = Plan(adaptive, easy)
        found["Interval + EasyCache", value] = Plan(interval, easy)
        found["Adaptive + DBCache", value] = Plan(adaptive, blocks)
    for every in (2, 3, 4, 6):
        taylor = cache.TaylorSeer(interval=every, site="network")
        found["Adaptive + TaylorSeer, whole network", every] = Plan(adaptive, taylor)
    return found


def presets() -> Plans:
    """The presets, from the most careful on."""
    names = ("exact", "balanced", "fast", "fastest")
    return {(f"{PRESET} {name}", 0): Plan.preset(name) for name in names}


def in_fewer_steps(call: Mapping[str, Any]) -> dict[int, Plans]:
    """By steps: every sampler that needs no measured numbers, alone and with other methods."""
    fitting = [steps for steps in SAMPLED if steps < call["num_inference_steps"]]
    return {steps: _solved(steps) | _solved_with(steps) for steps in fitting}


def _solved(steps: int) -> Plans:
    return {(f"samplers.{name}, steps", steps): plan for name, plan in sampling.PLANS.items()}


def _solved_with(steps: int) -> Plans:
    solver, adaptive = samplers.DPMSolverPP(), accel.guidance.Adaptive()
    found: Plans = {("DPM++ 2M + Adaptive, steps", steps): Plan(solver, adaptive)}
    for value in (0.05, 0.1, 0.2):
        easy = cache.EasyCache(threshold=value)
        found[f"DPM++ 2M + EasyCache {value:g}, steps", steps] = Plan(solver, easy)
        both = Plan(solver, adaptive, easy)
        found[f"DPM++ 2M + Adaptive + EasyCache {value:g}, steps", steps] = both
    return found


# what rests on measured numbers


def _measured(wanted: Wanted, benches: Benches, found: Field) -> None:
    """Add what `accel calibrate` measures, on captions of training seeds."""
    pipe = benches.get(OURS)[0]
    bench = calibrated.Bench.of(wanted.model, pipe, benches.call)
    for family, curves in (("cache", calibrated.CURVES), ("samplers", calibrated.SOLVERS)):
        for curve in curves:
            name, plans = f"{family}.{curve}", partial(_calibrated, family, curve, bench, wanted)
            _try(wanted, found, name, pipe, plans)
    linear = "guidance.LinearAG"
    _try(wanted, found, linear, pipe, partial(_linear, linear, bench))
    for one in sampling.CALIBRATIONS if wanted.searched else SOLVED:
        _try_solver(wanted, benches, found, one)


def _try(wanted: Wanted, found: Field, curve: str, pipe: Any, plans: Callable[[], Plans]) -> None:
    if not wanted.wants(curve):
        return
    try:
        found.add(plans(), pipe, wanted.settings)
    except (AccelError, RuntimeError) as error:
        found.left[curve] = _told(error)


def _told(error: Exception) -> str:
    """What a calibration said was wrong, without the command, or what else was raised."""
    words = " ".join(str(error).split()) or type(error).__name__
    return words.rpartition("error: ")[2]


def _calibrated(family: str, curve: str, bench: calibrated.Bench, wanted: Wanted) -> Plans:
    """A curve by itself, and each of its points under adaptive guidance."""
    values = (calibrated.CURVES | calibrated.SOLVERS)[curve].values
    adaptive = accel.guidance.Adaptive()
    found: Plans = {}
    for value in values[: wanted.settings]:
        plan = calibrated.plan_of(curve, value, bench)
        found[f"{family}.{curve}", value] = plan
        found[f"Adaptive + {curve}", value] = Plan(*plan, adaptive)
    return found


def _linear(curve: str, bench: calibrated.Bench) -> Plans:
    bench.calibrate(guidance.LINEAR_AG)
    ((_, name),) = guidance.LINEAR_AG.files()
    return {(curve, 0): sampling.read(bench.folder / name)}


def _try_solver(wanted: Wanted, benches: Benches, found: Field, one: Calibration) -> None:
    """Add a sampler at each number of steps that it is calibrated for."""
    curve, pipe = f"samplers.{one.name}", benches.get(OURS)[0]
    if not wanted.wants(curve):
        return
    folder = sampling.plans_of(wanted.model, calibrated.digest(pipe))
    try:
        sampling.calibrate(one, wanted.model, folder)
    except RuntimeError as error:
        found.left[curve] = _told(error)
        return
    for count, name in one.files()[-(wanted.settings or len(SAMPLED)) :]:
        for steps in SAMPLED if count is None else (count,):
            plan = sampling.read(folder / name)
            found.add({(f"{curve}, steps", steps): plan}, pipe, None, steps)


def _tuned(wanted: Wanted, pipe: Any, found: Field) -> None:
    """Add the plans that were tuned for the model."""
    files = sorted(wanted.tuned.glob(f"{wanted.model}-*.toml"))
    if not files:
        found.left[TUNED_CURVE] = NO_TUNED
    for path in files:
        name = f"{TUNED_CURVE} {path.stem.removeprefix(f'{wanted.model}-')}"
        _try(wanted, found, name, pipe, partial(_read, name, path))


def _read(name: str, path: Path) -> Plans:
    return {(name, 0): sampling.read(path)}


# others


def _theirs(wanted: Wanted, benches: Benches, found: Field) -> None:
    curves: dict[tuple[str, str], list[peers.Peer]] = {}
    pipe = benches.get("diffusers")[0]
    for one in peers.every(pipe, benches.call):
        curves.setdefault((one.package, one.method), []).append(one)
    for (package, method), points in curves.items():
        if wanted.wants(f"{package}: {method}"):
            found.who += map(_contestant, points[: wanted.settings])
    found.left |= {name: why for name, why in peers.absent(pipe).items() if wanted.wants(name)}


def _contestant(one: peers.Peer) -> Contestant:
    return Contestant(one.package, one.method, one.knob, peer=one, call=one.call)


def _account(wanted: Wanted, found: Field) -> None:
    """Name the methods of ours that nobody draws, each with the reason."""
    drawn = {method.name for one in found.who if one.plan for method in one.plan}
    told = {curve.split(",")[0] for curve in found.left}
    for name in accel.methods():
        if wanted.only or name in drawn or name in told:
            continue
        found.left[name] = _why(name, found)


def _why(name: str, found: Field) -> str:
    of = name.split(".")
    reasons = (ELSEWHERE.get(name), ELSEWHERE.get(of[0]), *_of_curves(of[1], found))
    return next((one for one in reasons if one), "it is in no curve")


def _of_curves(kind: str, found: Field) -> Iterator[str]:
    """What curves whose name holds that of a method were refused for."""
    for curve, why in found.left.items():
        if kind in curve:
            yield why
