"""``accel calibrate schedule``: search the noise levels that are best for a model.

What each method costs, in evaluations of the network a prompt, with a teacher of N steps and a
schedule of K:

* ``gits`` – N; one teacher serves every K.
* ``ays`` – 2 N: a teacher for the pictures, and one run led through noisings of them.
* ``oss`` – K N: a teacher, and for each step after the first a run led through the students.
* ``autodiffusion`` – N, and K for every schedule that is tried: about 50 a generation, for all
  prompts.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from accel.attach import Accelerator
from accel.calibration import Calibrated
from accel.errors import BadInput, BadOutput
from samplers.fingerprint import Fingerprint
from samplers.schedule_method import Schedule, Searched
from samplers.schedule_teacher import COUNT, GridKind, Trace, Traced, rerun, traced_run, tracing
from samplers.schedules.aligned import brownian, descend_finer, step_costs
from samplers.schedules.evolution import Evolution, Gene, Search
from samplers.schedules.gits import GAMMAS, Metric, Scale, jump_costs
from samplers.schedules.oss import median_schedule, student_schedule
from samplers.schedules.shortest import shortest

Nodes = NDArray[np.int64]
Calls = Sequence[Mapping[str, Any]]
TEACHER = 60


class Options(BaseModel):
    """What `accel calibrate schedule` takes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: Literal["gits", "ays", "oss", "autodiffusion"] = "gits"
    sampler: Literal["DPMSolverPP", "UniPC", "own"] = Field(
        default="DPMSolverPP",
        description="what the plan uses the schedule with, and autodiffusion tries it with: a "
        "sampler of ours, or own for the pipeline's scheduler",
    )
    teacher: int = Field(default=TEACHER, ge=4, le=1000, description="steps of the teacher")
    grid: GridKind = Field(
        default="own",
        description="the teacher's levels, among which is chosen: those of the pipeline's schedule "
        "(own), or even in (σ/α)^(1/7), as the authors of GITS have them (polynomial)",
    )
    metric: Metric = Field(default="l2", description="gits: l2 or dev")
    scale: Scale | None = Field(
        default=None,
        description="gits: compare x/α (ratio) or x (sample); by default ratio, as the authors, "
        "and sample for a flow",
    )
    gamma: float | None = Field(
        default=None,
        gt=0.0,
        description="gits: weight of what follows a jump; by default 1.15 with ratio, as the "
        "authors, and 1 with sample",
    )
    optimum: Literal["exact", "descent"] = Field(
        default="exact",
        description="ays: the lowest objective on the teacher's levels, or the authors' descent "
        "from few knots to many",
    )
    population: int = Field(default=50, ge=2, description="autodiffusion: genes in a generation")
    epochs: int = Field(default=10, ge=0, description="autodiffusion: generations")
    chance: float = Field(default=0.1, ge=0.0, le=1.0, description="autodiffusion: of a mutation")
    fitness: Literal["latent", "perceptual"] = Field(
        default="latent",
        description="autodiffusion: mean square error of the latents to the teacher's, or the "
        "distance that the bundled oracle sees (pictures of scenes only)",
    )
    seed: int = Field(default=0, ge=0, description="of what is drawn in the search")


def calibrate_schedule(
    pipe: Any, calls: Iterable[Mapping[str, Any]], options: Mapping[str, Any]
) -> Calibrated:
    """Search a schedule of as many steps as the calls make.

    Raises:
        BadInput: If there is no call, or one says no number of steps.
        BadOutput: If the network gives numbers that are not finite.
        UnsupportedModel: If the pipeline cannot be followed, or takes no list of levels.
    """
    asked = Options.model_validate(dict(options))
    _check_use(pipe, asked)
    found = SEARCHES[asked.method](pipe, calls, asked)
    sampler = _sampler(asked)
    used = sampler.name if sampler else type(pipe.scheduler).__name__
    note = f"{asked.method}, {found.count} steps of {asked.teacher}, for {used}; {found.note}"
    searched = Searched(
        method=asked.method,
        levels=found.levels,
        sampler=used,
        fingerprint=found.fingerprint,
        note=note,
    )
    return Calibrated(
        Schedule(kind="listed", file=Path("schedule.json")),
        note,
        {"file": searched.to_bytes()},
        () if sampler is None else (sampler,),
    )


class Found(BaseModel):
    """What a search came to."""

    model_config = ConfigDict(frozen=True)

    levels: tuple[float, ...]
    fingerprint: Fingerprint
    note: str

    @property
    def count(self) -> int:
        """Number of steps."""
        return len(self.levels)


def _sampler(asked: Options) -> Accelerator | None:
    import samplers

    return None if asked.sampler == "own" else getattr(samplers, asked.sampler)()


def _check_use(pipe: Any, asked: Options) -> None:
    """Refuse before the work what could not be used after it."""
    _plan(asked, (1.0,)).attach(pipe).detach()


def _plan(asked: Options, levels: tuple[float, ...]) -> Any:
    from accel.plan import Plan

    return Plan(*filter(None, [_sampler(asked)]), Schedule(kind="listed", levels=levels))


def _count(call: Mapping[str, Any], asked: Options) -> int:
    """How many steps a call makes.

    Raises:
        BadInput: If it does not say so, or the teacher has no more.
    """
    count = call.get(COUNT)
    if count is None:
        raise BadInput("A schedule is searched for a number of steps: give --steps.")
    if int(count) >= asked.teacher:
        raise BadInput(
            f"A schedule of {count} steps cannot be chosen among {asked.teacher} of the teacher: "
            "give more by --set teacher=, or a lower --steps."
        )
    return int(count)


def _first(pipe: Any, traced: Traced, trace: Trace) -> Fingerprint:
    if not (np.isfinite(trace.data).all() and np.isfinite(trace.states).all()):
        raise BadOutput(
            "The network gave NaN or infinity, so there is nothing to calibrate: run the pipeline "
            "in a wider dtype."
        )
    return Fingerprint.of(pipe, traced, trace.guidance)


def _levels(trace: Trace, nodes: Nodes) -> tuple[float, ...]:
    """σ/α at the nodes that are evaluated."""
    return tuple(float(trace.ratios[node]) for node in nodes if node < len(trace.ratios))


def _terminal(traced: Traced) -> bool:
    return bool(traced.config.get("shift_terminal"))


class _Runs:
    """The teachers' runs of some calls, one after another."""

    def __init__(self, pipe: Any, calls: Iterable[Mapping[str, Any]], asked: Options) -> None:
        self._pipe, self._calls, self._asked = pipe, calls, asked
        self.count = 0
        self.samples = 0
        self.fingerprint: Fingerprint | None = None
        self.trace: Trace | None = None

    def each(self, traced: Traced) -> Iterable[tuple[Mapping[str, Any], Trace]]:
        """Each call and its run.

        Raises:
            BadInput: If there is none, or they are of different schedules.
        """
        for call in self._calls:
            self.count = self.count or _count(call, self._asked)
            trace = traced_run(traced, call, self._asked.teacher)
            self.fingerprint = _first(self._pipe, traced, trace)
            if self.trace is not None and trace.levels != self.trace.levels:
                raise BadInput(
                    "The calls have different schedules (by their size): search on calls of one."
                )
            self.trace = trace
            self.samples += trace.states.shape[1]
            yield call, trace
        if self.trace is None:
            raise BadInput("A calibration rests on what prompts do: give at least one prompt.")

    def found(self, nodes: Nodes, note: str) -> Found:
        """The schedule of some nodes."""
        assert self.trace is not None and self.fingerprint is not None
        return Found(levels=_levels(self.trace, nodes), fingerprint=self.fingerprint, note=note)


def _gits(pipe: Any, calls: Iterable[Mapping[str, Any]], asked: Options) -> Found:
    runs, total = _Runs(pipe, calls, asked), np.zeros(())
    with tracing(pipe, asked.grid) as traced:
        flow = traced.config.prediction_type == "flow_prediction"
        scale: Scale = asked.scale or ("sample" if flow else "ratio")
        for _, trace in runs.each(traced):
            for k in range(trace.states.shape[1]):
                total = total + jump_costs(
                    trace.levels, trace.states[:, k], trace.data[:, k], asked.metric, scale
                )
        if _terminal(traced):
            total[:-2, -1] = math.inf
    gamma = asked.gamma or GAMMAS[scale]
    nodes = shortest(total, runs.count, gamma)
    return runs.found(nodes, f"{asked.metric} of {scale}, gamma {gamma:g}, {runs.samples} samples")


def _ays(pipe: Any, calls: Iterable[Mapping[str, Any]], asked: Options) -> Found:
    runs, total = _Runs(pipe, calls, asked), np.zeros(())
    rng = np.random.default_rng(asked.seed)
    with tracing(pipe, asked.grid) as traced:
        for call, trace in runs.each(traced):
            noised = traced_run(traced, call, asked.teacher, _noisings(trace, rng))
            for k in range(noised.data.shape[1]):
                total = total + step_costs(noised.ratios, noised.data[:, k].astype(np.float64))
        ends = 0 if _terminal(traced) else 1
    jumps = runs.count - 1 + ends
    if jumps < 1:
        raise BadInput("Align Your Steps needs 2 steps or more here: give a higher --steps.")
    even = np.linspace(0, len(total) - 1, jumps + 1).round().astype(np.int64)
    best = shortest(total, jumps)
    nodes = best if asked.optimum == "exact" else descend_finer(total, jumps)
    costs = [sum(total[a, b] for a, b in itertools.pairwise(n)) for n in (nodes, best, even)]
    shares = [cost / costs[2] for cost in costs]
    note = f"objective {shares[0]:.3f} of that of even steps, the optimum {shares[1]:.3f}"
    return runs.found(nodes[: runs.count], f"{note}, {runs.samples} samples")


def _noisings(trace: Trace, rng: np.random.Generator) -> dict[int, NDArray[np.float32]]:
    """The end of a run, noised along one Brownian path a sample: states by node."""
    end, ratios = trace.states[-1].astype(np.float64), trace.ratios
    noises = rng.standard_normal((len(ratios), end.size))
    first = trace.levels[0]
    start = (trace.states[0] / first.alpha - end).reshape(-1) if first.alpha else None
    path = brownian(ratios, noises, start)
    return {
        i: (level.alpha * (end + path[i].reshape(end.shape))).astype(np.float32)
        for i, level in enumerate(trace.levels[:-1])
        if i > 0
    }


def _oss(pipe: Any, calls: Iterable[Mapping[str, Any]], asked: Options) -> Found:
    runs, found = _Runs(pipe, calls, asked), []
    with tracing(pipe, asked.grid) as traced:
        for call, trace in runs.each(traced):
            student = _Students(traced, call, trace, asked.teacher)
            before = asked.teacher - 1 if _terminal(traced) else None
            found.append(
                student_schedule(
                    trace.levels,
                    trace.states.reshape(len(trace.levels), -1),
                    student.predict,
                    runs.count,
                    before,
                )
            )
    return runs.found(median_schedule(np.stack(found)), f"median of {len(found)} runs")


class _Students:
    """Evaluates the network at the states of students, one run of the pipeline for all."""

    def __init__(self, traced: Traced, call: Mapping[str, Any], trace: Trace, steps: int) -> None:
        self._traced, self._call, self._trace, self._steps = traced, call, trace, steps

    def predict(self, states: Mapping[int, Any]) -> dict[int, Any]:
        """x0-predictions at the states by node; the first node's is the teacher's."""
        if set(states) == {0}:
            return {0: self._trace.data[0].reshape(-1)}
        shape = self._trace.states[0].shape
        led = {i: np.asarray(x, np.float32).reshape(shape) for i, x in states.items()}
        data = traced_run(self._traced, self._call, self._steps, led).data
        return {i: data[i].reshape(-1) for i in states if i < len(data)}


def _autodiffusion(pipe: Any, calls: Iterable[Mapping[str, Any]], asked: Options) -> Found:
    calls = list(calls)
    runs = _Runs(pipe, calls, asked)
    with tracing(pipe, asked.grid) as traced:
        ends = [trace.states[-1] for _, trace in runs.each(traced)]
        fixed = {0, asked.teacher - 1} if _terminal(traced) else {0}
    trace = runs.trace
    assert trace is not None
    judge = _perceptual(pipe, calls, asked) if asked.fitness == "perceptual" else _to(ends)

    def fitness(gene: Gene) -> float:
        with _plan(asked, _levels(trace, np.array(gene))).attach(pipe):
            return judge(pipe, calls)

    size = asked.population  # of 50, the authors have 10 parents, 25 mutations, 10 to 15 crossovers
    settings = Evolution(
        population=size,
        epochs=asked.epochs,
        parents=max(size // 5, 1),
        mutations=size // 2,
        crossovers=size // 4,
        chance=asked.chance,
    )
    search = Search(
        size=runs.count,
        nodes=asked.teacher,
        fitness=fitness,
        settings=settings,
        rng=np.random.default_rng(asked.seed),
        fixed=frozenset(fixed),
    )
    last = asked.teacher - 1 if len(fixed) > 1 else asked.teacher * (1.0 - 1.0 / runs.count)
    seed = tuple(int(node) for node in np.linspace(0, last, runs.count).round())
    best = search.run(seed)
    note = (
        f"{asked.fitness} {search.known[best]:.4g}, even steps {search.known[seed]:.4g}, "
        f"{len(search.known)} schedules tried on {runs.samples} samples"
    )
    return runs.found(np.array(best), note)


Judge = Callable[[Any, Calls], float]
"""How far what a pipeline makes of some calls is from what it should make."""


def _to(ends: Sequence[NDArray[np.float32]]) -> Judge:
    """Mean square error of the final latents to these."""

    def judge(pipe: Any, calls: Calls) -> float:
        errors = [
            float(np.mean((_final(pipe, call) - end) ** 2))
            for call, end in zip(calls, ends, strict=True)
        ]
        return float(np.mean(errors))

    return judge


def _final(pipe: Any, call: Mapping[str, Any]) -> NDArray[np.float32]:
    """The latents that a call ends at, ``[samples, D]``."""
    from accel import hooks

    kept: list[Any] = []

    def keep(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        result = inner(*args, **kwargs)
        kept[:] = [result[0] if isinstance(result, tuple) else result.prev_sample]
        return result

    undo = hooks.wrap(pipe.scheduler, "step", keep)
    try:
        rerun(pipe, call, {})
    finally:
        undo()
    found: NDArray[np.float32] = kept[0].detach().float().cpu().flatten(1).numpy()
    return found


def _perceptual(pipe: Any, calls: Calls, asked: Options) -> Judge:
    """The oracle's distance to the teacher's pictures."""
    from accel import quality

    form = {"output_type": "np"}
    with tracing(pipe, asked.grid):
        goals = [rerun(pipe, call, {COUNT: asked.teacher, **form})[0] for call in calls]

    def judge(pipe: Any, calls: Calls) -> float:
        made = [rerun(pipe, call, form)[0] for call in calls]
        return float(np.mean([quality.perceptual(a, b) for a, b in zip(made, goals, strict=True)]))

    return judge


SEARCHES: dict[str, Callable[[Any, Iterable[Mapping[str, Any]], Options], Found]] = {
    "gits": _gits,
    "ays": _ays,
    "oss": _oss,
    "autodiffusion": _autodiffusion,
}
"""By the name that ``--method`` gives."""
