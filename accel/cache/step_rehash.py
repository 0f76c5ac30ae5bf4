"""Step Rehash: compute a calibrated list of steps, fill in the others.

Our reconstruction of an idea whose code was never released: the abstract of HarmoniCa's authors'
project (arXiv 2410.01723) names a step rehash that leaves out steps whose neighbours are alike,
and gives no algorithm. How the list is made, and that any predictor fills in, is ours; nothing
here claims parity with theirs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import Field, NonNegativeInt, PrivateAttr, model_validator

from accel.attach import Accelerator, Fitting, Run, Site, Undo
from accel.cache.fields import Cache
from accel.cache.policies import Listed
from accel.cache.predictors import Kind
from accel.calibration import one_evaluation_a_step
from accel.errors import BadInput, BadOutput

if TYPE_CHECKING:
    from torch import Tensor

    from accel.cache.predictors import Forecast
    from accel.seams.denoisers import Call, Inner, Result, Row

SEQUENCE = "sampler"
"""The layer whose methods say at which steps the networks are asked."""


class StepRehash(Cache):
    """Compute the steps of a list, for runs of one number of evaluations. It reads no device.

    Make a list with `accel.cache.step_rehash.calibrate`. A run of another length is refused.
    """

    name: ClassVar[str] = "cache.StepRehash"
    layer: ClassVar[str] = "step cache"
    seam: ClassVar[str] = "denoiser"
    supports: ClassVar[str] = "every denoiser, every guidance layout"
    source: ClassVar[str] = "our reconstruction; named in the abstract of arXiv 2410.01723"

    steps: tuple[NonNegativeInt, ...] = Field(
        default=(),
        description="indices of the computed steps, from 0, rising; without any it is off",
    )
    total: int = Field(
        default=0,
        ge=0,
        description="evaluations of the runs that the list was made for; others are refused. 0: "
        "serve any run",
    )
    last: bool = Field(default=False, description="always compute the last step")
    predictor: Kind = Field(
        default="newton",
        description="'reuse' keeps v − x; the others keep v: 'newton' (polynomial in the log-SNR), "
        "'taylor', 'hicache', 'foca', 'dmd'",
    )

    @model_validator(mode="after")
    def _is_a_list_of_steps(self) -> Self:
        if any(after <= before for before, after in pairwise(self.steps)):
            raise ValueError("steps must rise without repeats")
        if self.steps and 0 < self.total <= self.steps[-1]:
            raise ValueError(f"step {self.steps[-1]} is none of a run of {self.total} evaluations")
        return self

    @classmethod
    def off(cls) -> Self:
        """An empty list."""
        return cls()

    def why_off(self) -> str | None:
        """A list of none, or of all."""
        if not self.steps:
            return "no steps are listed"
        return "every step is listed" if len(self.steps) == self.total else None

    @classmethod
    def fitter(cls, pipe: Any, calls: Sequence[Mapping[str, Any]]) -> Fitting:
        """Measures lists beside each sequence of steps."""
        return Lists(pipe, calls)

    def attach(self, site: Site) -> Iterator[Undo]:
        """Put the cache around every denoiser."""
        from accel.cache.decisions import Decisions
        from accel.cache.indicators import Unmeasured
        from accel.cache.network import NetworkCache

        yield site.claim("denoiser")
        rule = Listed(self.steps, self.total or None, f"The list of {self.name}")
        decisions = Decisions(Unmeasured, lambda: self.guarded(rule))
        site.tally.reason = lambda: "every step was computed, by the list or by a guard"
        yield from NetworkCache(site.tally, decisions, self.forecast).attach(site)


# Making a list.


class Watched(Accelerator):
    """Looks at what networks answer and changes nothing; for `calibrate`, in no list of methods."""

    name: ClassVar[str] = "cache.Watched"
    layer: ClassVar[str] = "weights"
    seam: ClassVar[str] = "denoiser"
    supports: ClassVar[str] = StepRehash.supports
    source: ClassVar[str] = "accel.cache.step_rehash"

    _answers: Answers = PrivateAttr()

    @classmethod
    def off(cls) -> None:
        """It changes nothing as it is."""

    def why_off(self) -> None:
        """It always looks."""

    def watching(self, answers: Answers) -> Self:
        """The same, which tells ``answers`` of each call."""
        self._answers = answers
        return self

    def attach(self, site: Site) -> Iterator[Undo]:
        """Look at every call, innermost."""

        def watch(call: Call, inner: Inner) -> Result:
            result = inner(call)
            self._answers.note(call, result)
            return result

        for denoiser in site.denoisers:
            yield site.around(denoiser, watch)


def calibrate(
    pipe: Any,
    call: Mapping[str, Any],
    prompts: Sequence[str | Mapping[str, Any]],
    budget: int,
    fields: Mapping[str, Any] | None = None,
) -> StepRehash:
    """Find the steps to compute: a few stock runs are watched, then the best list is looked up.

    Args:
        pipe: The pipeline.
        call: Arguments of its call, with the number of steps, without the prompt.
        prompts: What to measure on; where a pipeline takes no prompt, other arguments of a call.
        budget: Steps to compute, those that are always computed among them.
        fields: Fields of `StepRehash` that choose the predictor and the guards.

    Raises:
        BadInput: Without prompts, or with a budget that is not to be met.
    """
    given = [{"prompt": prompt} if isinstance(prompt, str) else prompt for prompt in prompts]
    return fit_steps(pipe, [dict(call) | dict(part) for part in given], budget, fields)


def fit_steps(
    pipe: Any,
    calls: Iterable[Mapping[str, Any]],
    budget: float = 0.5,
    fields: Mapping[str, Any] | None = None,
) -> StepRehash:
    """The same from calls of the pipeline; a budget below 1 is a share of the steps, rounded up.

    From the dot products of the answers of all steps follows, for each pair of steps that may
    have been computed last and each step behind them, the error of the predictor. The list with
    the least sum of errors over the skipped steps is found by dynamic programming over such
    pairs: the best one for a predictor of at most two values, as far as the answers of a stock
    run stand for those of a cached one.

    Raises:
        BadInput: Without calls, or with a budget that is not to be met.
        BadOutput: If the network gives NaN.
        UnsupportedModel: For a scheduler that evaluates more than once a step.
    """
    form = StepRehash.model_validate(dict(fields or {}))
    return listed(watched(pipe, calls, form), budget, form)


def watched(
    pipe: Any,
    calls: Iterable[Mapping[str, Any]],
    form: StepRehash,
    beside: Sequence[Accelerator] = (),
) -> Answers:
    """What the networks answer at each step of some calls.

    Args:
        pipe: The pipeline.
        calls: Of it.
        form: Says which predictor is to fill in.
        beside: Methods of the layers around it that the list is to go with, outermost first: a
            sampler, fewer steps.

    Raises:
        BadInput: Without calls.
        BadOutput: If the network gives NaN.
        UnsupportedModel: For a scheduler that evaluates more than once a step.
    """
    answers = Answers(form.forecast)
    run = Run((*beside, Watched().watching(answers)), pipe)
    try:
        one_evaluation_a_step(pipe, StepRehash.name, "cache.Custom with an interval")
        for call in calls:
            pipe(**call)
            answers.close()
    finally:
        run.detach()
    if not answers.positions:
        raise BadInput("A calibration rests on what prompts do: give at least one prompt.")
    return answers


def listed(answers: Answers, budget: float, form: StepRehash) -> StepRehash:
    """The best list of so many steps, or of such a share of them, from what was watched.

    Raises:
        BadInput: If the budget is not to be met.
    """
    total = len(answers.positions)
    wanted = math.ceil(total * budget) if budget < 1 else int(budget)
    forced = {*range(min(form.warmup, total)), *answers.switches(), *([total - 1] * form.last)}
    steps = choose(answers.cost, total, wanted, forced, form.max_skips or total)
    return StepRehash.model_validate(form.model_dump() | {"steps": steps, "total": total})


class Lists:
    """Makes lists for a pipeline, while plans are searched for.

    A list is of one sequence of steps: it is measured again beside each sampler, schedule and
    number of steps, and from what was seen there follow the lists of all lengths.

    Args:
        pipe: The stock pipeline.
        calls: Its calls that are watched.
    """

    def __init__(self, pipe: Any, calls: Sequence[Mapping[str, Any]]) -> None:
        self._pipe = pipe
        self._calls = calls
        self._seen: dict[tuple[Accelerator, ...], Answers] = {}

    def __call__(self, beside: Iterable[Accelerator], options: Mapping[str, Any]) -> StepRehash:
        """The method with the best list.

        Args:
            beside: The other methods of the plan.
            options: ``budget``: the share of the steps that is computed.

        Raises:
            AccelError: If there is none, or the other methods do not serve the pipeline.
        """
        from accel.seams.seeding import restarted

        form = StepRehash()
        sequence = tuple(method for method in beside if method.layer == SEQUENCE)
        if sequence not in self._seen:
            calls = [{**c, "generator": restarted(c["generator"])} for c in self._calls]
            self._seen[sequence] = watched(self._pipe, calls, form, sequence)
        return listed(self._seen[sequence], options["budget"], form)


class Answers:
    """The dot products of what networks answer at the steps of a run, over runs and rows.

    Attributes:
        positions: Where the steps lie for the predictor.
    """

    def __init__(self, forecast: Forecast) -> None:
        self.positions: list[float] = []
        self._forecast = forecast
        self._networks: list[str] = []
        self._values: dict[Row, dict[int, Tensor]] = {}
        self._products: Tensor | None = None
        self._costs: dict[tuple[int | None, int, int], float] = {}

    def note(self, call: Call, result: Result) -> None:
        """Write down the answers of one call."""
        from accel.seams.spaces import matching

        step = call.step
        if step.index == len(self.positions):
            self.positions.append(self._forecast.position(step))
            self._networks.append(call.denoiser.name)
        for index, row in enumerate(call.rows):
            x, value = matching(call.sample[index], result.value[index])
            kept = value - x if self._forecast.kind == "reuse" else value.clone()
            self._values.setdefault(row, {})[step.index] = kept.double().flatten()

    def close(self) -> None:
        """A run has ended: keep the dot products, relative to the size of the answers."""
        import torch

        total = len(self.positions)
        for values in self._values.values():
            if len(values) < total:  # a branch that is not asked for at every step
                continue
            stacked = torch.stack([values[index] for index in range(total)])
            products = stacked @ stacked.T
            products = (products / products.diagonal().mean().clamp_min(1e-12)).cpu()
            if not bool(products.isfinite().all()):
                raise BadOutput(
                    "The stock pipeline gives NaN or infinite values: there is nothing to "
                    "calibrate. Try bfloat16 or float32."
                )
            self._products = products if self._products is None else self._products + products
        self._values.clear()

    def switches(self) -> list[int]:
        """Steps at which a second network takes over: it has nothing kept."""
        pairs = enumerate(pairwise(self._networks), 1)
        return [index for index, (before, after) in pairs if before != after]

    def cost(self, older: int | None, newer: int, step: int) -> float:
        """The squared error ‖y − Σ w·y_k‖² of a step filled in from the last computed ones."""
        key = (older, newer, step)
        if key not in self._costs:
            self._costs[key] = self._error(older, newer, step)
        return self._costs[key]

    def _error(self, older: int | None, newer: int, step: int) -> float:
        import torch

        assert self._products is not None
        nodes = [newer]
        if older is not None and self._networks[older] == self._networks[newer]:
            nodes.insert(0, older)
        predictor = self._forecast.make()
        for node, unit in zip(nodes, torch.eye(len(nodes), dtype=torch.float64), strict=True):
            predictor.update(self.positions[node], unit)
        weights = torch.cat([-predictor.predict(self.positions[step]), torch.ones(1)])
        places = [*nodes, step]
        return float(weights @ self._products[places][:, places] @ weights)


Cost = Callable[[int | None, int, int], float]
"""From the last two computed steps, the older one first, and a skipped step: its error."""

Ends = dict[tuple[int | None, int], tuple[float, tuple[int, ...]]]
"""By its last two steps: the best list that ends in them, after its error so far."""


def choose(cost: Cost, total: int, budget: int, forced: set[int], longest: int) -> tuple[int, ...]:
    """The steps whose skipped steps cost least together.

    Args:
        cost: Of one skipped step.
        total: Steps in all.
        budget: Steps to compute.
        forced: Steps that are in the list in any case; so is step 0.
        longest: Consecutive skips at most.

    Raises:
        BadInput: If no list of so many steps has the forced ones and no longer gap.
    """
    forced = {0, *forced}
    best: Ends = {(None, 0): (0.0, (0,))}
    for _ in range(budget - 1):
        best = _extended(best, cost, total, forced, longest)
    ends = [
        (price + sum(cost(*pair, step) for step in range(pair[1] + 1, total)), steps)
        for pair, (price, steps) in best.items()
        if max(forced) <= pair[1] and total - pair[1] - 1 <= longest
    ]
    if not ends or budget < 1:
        raise BadInput(
            f"No list of {budget} out of {total} steps has the {len(forced)} that are always "
            f"computed and at most {longest} skips in a row. Change the budget, or the guards."
        )
    return min(ends)[1]


def _extended(best: Ends, cost: Cost, total: int, forced: set[int], longest: int) -> Ends:
    """The best lists of one step more."""
    longer: Ends = {}
    for pair, (price, steps) in best.items():
        newest = pair[1]
        for following in range(newest + 1, min(total, newest + longest + 2)):
            found = longer.get((newest, following))
            if found is None or price < found[0]:
                longer[newest, following] = (price, (*steps, following))
            if following in forced:
                break
            price += cost(*pair, following)  # noqa: PLW2901
    return longer
