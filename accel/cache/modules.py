"""The cache of single modules: site of FORA, PAB, TaylorSeer and of static tables.

It keeps what attention and feed-forward modules answer *before* the block's gate, so that on a
skipped step the present gate acts on what was kept. Modules are decided about in groups; inside
one pass through the network all rows agree, because a call whose rows do not is split by rows.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from accel.cache.conditions import Watch
from accel.cache.decisions import Decisions
from accel.cache.indicators import Unmeasured, relative_l1
from accel.cache.policies import Every, Guarded
from accel.cache.predictors import Forecast, Predictor
from accel.errors import AccelError, UnsupportedModel
from accel.guard.gate import OPEN, Gate
from accel.seams.denoisers import Call, Inner, Result, Row
from accel.seams.modules import Module, find_modules
from accel.seams.rows import scatter

if TYPE_CHECKING:
    from accel.attach import Site, Undo
    from accel.report import Tally

MIB = 2**20
SAVING = 0.7
"""Share of an evaluation that modules are taken for, where a guard weighs methods."""


class Place(NamedTuple):
    """One call of a module within a pass.

    Attributes:
        denoiser: The network.
        stage: Which evaluation of its step the solver makes.
        module: The module's index.
        turn: How many calls the module had before in the same pass.
        shape: Shapes of what one row gave it: texts may be padded to their neighbours' length.
    """

    denoiser: str
    stage: int
    module: int
    turn: int
    shape: tuple[Hashable, ...]


@dataclass
class Pass:
    """One call of the network, all rows of which are decided alike, on its way.

    Attributes:
        call: The call.
        skip: Groups of modules that are not to be computed.
        turns: Calls that each module had in this pass.
        kinds: Of the modules that were answered for.
        guess: Whether it only shows what would be answered: nothing is learned of it.
    """

    call: Call
    skip: frozenset[Hashable]
    turns: dict[int, int] = field(default_factory=dict)
    kinds: set[str] = field(default_factory=set)
    guess: bool = False


class ModuleCache:
    """Answers for modules from what they gave before; one for all denoisers of a pipeline.

    State is one predictor for each denoiser, sample, branch, stage of the solver, module and
    output. It never reads the device (but for predictor ``dmd``).

    Args:
        tally: Where it says what it did.
        group: From a module to the group that it is decided about with; ``None`` leaves the
            module alone.
        policy: From a group to a fresh policy for one sample.
        forecast: How it fills in.
        limit: MiB that it may come to keep; 0 for no limit.

    Attributes:
        groups: By denoiser, its groups in order.
    """

    def __init__(
        self,
        tally: Tally,
        group: Callable[[Module], Hashable],
        policy: Callable[[Hashable], Guarded],
        forecast: Forecast,
        limit: float = 0,
    ) -> None:
        self.groups: dict[str, tuple[Hashable, ...]] = {}
        self._tally = tally
        self._group = group
        self._policy = policy
        self._forecast = forecast
        self._limit = limit
        self._conditions = Watch()
        self._decisions: dict[Hashable, Decisions[Unmeasured]] = {}
        self._kept: dict[Place, dict[Row, list[Predictor]]] = {}
        self._forms: dict[Place, Form] = {}
        self._pass: Pass | None = None
        self._over = False
        self._gate: Gate = OPEN
        self._refused: dict[tuple[str, int], tuple[int, frozenset[Hashable]]] = {}

    def attach(self, site: Site) -> Iterator[Undo]:
        """Put the cache into every denoiser of a pipeline.

        Raises:
            UnsupportedModel: For a network without such modules, or with compiled blocks.
        """
        site.tally.memory = self._bytes
        site.tally.reason = self._why_idle
        self._gate = site.gate(SAVING)
        yield site.on_start(self.reset)
        yield from self._conditions.attach(site)
        for denoiser in site.denoisers:
            grouped = [(module, self._group(module)) for module in find_modules(denoiser)]
            modules = {module: group for module, group in grouped if group is not None}
            self.groups[denoiser.name] = tuple(dict.fromkeys(modules.values()))
            for group in self.groups[denoiser.name]:
                policy = partial(self._policy, group)
                self._decisions.setdefault(group, Decisions(Unmeasured, policy, self._conditions))
            yield site.around(denoiser, self)
            for module, group in modules.items():
                yield module.wrap(partial(self._module, module, group))

    def reset(self) -> None:
        """Forget the run before."""
        for decisions in self._decisions.values():
            decisions.reset()
        self._kept.clear()
        self._forms.clear()
        self._refused.clear()
        self._pass, self._over = None, False
        self._tally.planned = 0

    def __call__(self, call: Call, inner: Inner) -> Result:
        """Run the network, once for each set of rows that are decided alike."""
        parts = self._parts(call)
        if len(parts) == 1:
            (skip,) = parts
            return self._run(call, skip, inner)
        results = [(rows, self._run(call.take(rows), skip, inner)) for skip, rows in parts.items()]
        value = scatter([(rows, result.value) for rows, result in results], len(call.rows))
        fresh = {
            row: done
            for rows, result in results
            for row, done in zip(rows, result.fresh, strict=True)
        }
        return Result(value, tuple(fresh[row] for row in range(len(call.rows))))

    def _parts(self, call: Call) -> dict[frozenset[Hashable], list[int]]:
        """Rows by the groups of modules that they skip."""
        groups, decided = self.groups[call.denoiser.name], dict[int, None]()
        for group in groups:
            decisions = self._decisions[group]
            leaders = decisions.leaders(call)
            if leaders:
                decisions.decide(call, dict.fromkeys(leaders))
                decided |= dict.fromkeys(leaders)
        for sample in decided:
            self._ask(call, sample)
        parts: dict[frozenset[Hashable], list[int]] = {}
        for index, row in enumerate(call.rows):
            skip = frozenset(group for group in groups if not self._due(group, call, row))
            parts.setdefault(skip, []).append(index)
        return parts

    def _ask(self, call: Call, sample: int) -> None:
        """Ask the guard whether a sample may do without its groups that are not due."""
        states = {
            group: self._decisions[group].sample(call, sample)
            for group in self.groups[call.denoiser.name]
        }
        skip = frozenset(
            group for group, one in states.items() if not (one.compute or one.newest is None)
        )
        reach = [newest for group in skip if (newest := states[group].newest) is not None]
        if not skip or self._gate.allows(call, sample, min(reach)):
            return
        self._refused[call.denoiser.name, sample] = (call.step.index, skip)
        for group in skip:
            self._decisions[group].overrule(call, sample)

    def _due(self, group: Hashable, call: Call, row: Row) -> bool:
        return self._decisions[group].sample(call, row.sample).must_compute(row.branch)

    def _run(self, call: Call, skip: frozenset[Hashable], inner: Inner) -> Result:
        guesses = self._guesses(call)
        passed = self._pass = Pass(call, skip)
        try:
            result = inner(call)
        finally:
            self._pass = None
        if self._over:
            self._refuse()
        for index, newest, guess in guesses:
            self._gate.compare(call, [index], guess.value, result.value[[index]], newest)
        for group in self.groups[call.denoiser.name]:
            if group not in skip:
                self._learned(group, call)
        whole = not passed.kinds
        state = "computed" if whole else self._forecast.state
        self._tally.record(call.step.index, call.rows, state, parts=passed.kinds)
        fresh = tuple(whole and row for row in result.fresh)
        return Result(result.value, fresh, result.native)

    def _guesses(self, call: Call) -> list[tuple[int, int, Result]]:
        """What rows would come to that the guard wants computed: index, newest step, answer."""
        found = []
        for index, row in enumerate(call.rows):
            step, skip = self._refused.get((call.denoiser.name, row.sample), (-1, frozenset()))
            if step != call.step.index or not self._gate.wants(call, row.sample):
                continue
            states = [self._decisions[group].sample(call, row.sample) for group in skip]
            newest = [state.learned.get(row.branch) for state in states]
            reach = [one for one in newest if one is not None]
            if len(reach) == len(newest):
                found.append((index, min(reach), self._guess(call.take([index]), skip)))
        return found

    def _guess(self, call: Call, skip: frozenset[Hashable]) -> Result:
        self._pass = Pass(call, skip, guess=True)
        try:
            return self._gate.dense(call)
        finally:
            self._pass = None

    def _learned(self, group: Hashable, call: Call) -> None:
        for row in call.rows:
            sample = self._decisions[group].sample(call, row.sample)
            sample.learned[row.branch] = call.step.index

    def _module(
        self, module: Module, group: Hashable, inner: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        passed = self._pass
        if passed is None or passed.call.denoiser is not module.denoiser:
            return inner(*args, **kwargs)
        place = self._place(module, passed, args, kwargs)
        kept = self._kept.get(place, {})
        if group in passed.skip and all(row in kept for row in passed.call.rows):
            passed.kinds.add(module.kind)
            return self._answer(place, passed.call)
        returned = inner(*args, **kwargs)
        if not passed.guess:
            self._update(place, module, passed.call, returned)
        return returned

    def _valid(self, module: Module, call: Call, row: Row) -> bool:
        """Whether what is kept of a row goes on, or begins anew with what it is computing."""
        state = self._decisions[self._group(module)].sample(call, row.sample)
        return row.branch in state.learned

    def _place(
        self, module: Module, passed: Pass, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Place:
        turn = passed.turns.get(module.index, 0)
        passed.turns[module.index] = turn + 1
        given = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        shape = (len(given[0]) // len(passed.call.rows), *(tuple(x.shape[1:]) for x in given))
        call = passed.call
        return Place(call.denoiser.name, call.step.stage, module.index, turn, shape)

    def _update(self, place: Place, module: Module, call: Call, returned: Any) -> None:
        form = self._forms[place] = Form.of(module, returned)
        position = self._forecast.position(call.step)
        values = [module.rows(value, len(call.rows)) for value in form.tensors(returned)]
        kept = self._kept.setdefault(place, {})
        for index, row in enumerate(call.rows):
            if row not in kept:
                self._plan(value[index] for value in values)
            if row not in kept or not self._valid(module, call, row):
                kept[row] = [self._forecast.make() for _ in values]
            if not self._over:
                for predictor, value in zip(kept[row], values, strict=True):
                    predictor.update(position, value[index])

    def _plan(self, values: Iterator[Tensor]) -> None:
        """Count what one row of a module will take, before anything of it is kept."""
        for value in values:
            size = 2 if self._forecast.keep == "bfloat16" else value.element_size()
            self._tally.planned += self._forecast.depth * value.numel() * size
        if 0 < self._limit * MIB < self._tally.planned and not self._over:
            self._over = True  # the pass goes on, to learn what all of it would take
            for kept in self._kept.values():
                kept.update(
                    {row: [self._forecast.make() for _ in old] for row, old in kept.items()}
                )

    def _refuse(self) -> None:
        rows = len({row for kept in self._kept.values() for row in kept})
        raise AccelError(
            f"{self._tally.method} would keep {self._tally.planned / MIB:.3g} MiB: "
            f"{self._forecast.depth} values of each of {len(self._kept)} modules for {rows} rows; "
            f"memory_limit is {self._limit:g} MiB. Lower the order, set keep = 'bfloat16' or "
            "'cpu', or cache blocks or the whole network instead."
        )

    def _answer(self, place: Place, call: Call) -> Any:
        position = self._forecast.position(call.step)
        kept = [self._kept[place][row] for row in call.rows]
        outputs = zip(*kept, strict=True)
        return self._forms[place].fill([_joined(output, position) for output in outputs])

    def _bytes(self) -> int:
        return sum(
            predictor.bytes
            for kept in self._kept.values()
            for predictors in kept.values()
            for predictor in predictors
        )

    def _why_idle(self) -> str:
        steps = len({event.step for event in self._tally.events})
        return f"all {steps} steps were computed in full: too few, or none that may be skipped"


class ModuleWatch(ModuleCache):
    """Measures how much what modules answer changes from step to step; skips nothing."""

    def __init__(self, tally: Tally, group: Callable[[Module], Hashable]) -> None:
        super().__init__(
            tally, group, lambda _: Guarded(Every(1), 1, 0, last=False), Forecast("reuse")
        )
        self._changes: list[dict[Hashable, list[Tensor]]] = []

    def reset(self) -> None:
        """Forget the run before."""
        super().reset()
        self._changes.clear()

    def changes(self) -> list[dict[Hashable, float]]:
        """Step by step, the mean relative L1 change of each group since the step before."""
        return [
            {group: torch.stack(values).mean().item() for group, values in step.items()}
            for step in self._changes
        ]

    def _update(self, place: Place, module: Module, call: Call, returned: Any) -> None:
        step = call.step.index
        while len(self._changes) <= step:
            self._changes.append({})
        before = self._kept.get(place, {})
        if all(row in before for row in call.rows):
            old = Form.of(module, returned).tensors(self._answer(place, call))
            new = Form.of(module, returned).tensors(returned)
            values = self._changes[step].setdefault(self._group(module), [])
            values += map(relative_l1, new, old)
        super()._update(place, module, call, returned)


@dataclass(frozen=True)
class Form:
    """How a module wraps its answer: a tensor, or a tuple of tensors and others.

    Attributes:
        others: For each entry of the tuple, what it is where it is no tensor; ``None``: a tensor
            alone.
    """

    others: tuple[Any, ...] | None

    @classmethod
    def of(cls, module: Module, returned: Any) -> Form:
        """The form of an answer.

        Raises:
            UnsupportedModel: If it is none of the two.
        """
        if isinstance(returned, Tensor):
            return cls(None)
        if not isinstance(returned, tuple):
            raise UnsupportedModel(
                f"{module.denoiser.name}.{module.path} answers a {type(returned).__name__}, "
                "neither a tensor nor a tuple: module caches do not fit. Use a block or network "
                "cache."
            )
        return cls(tuple(_TENSOR if isinstance(x, Tensor) else x for x in returned))

    def tensors(self, returned: Any) -> list[Tensor]:
        """The tensors in an answer."""
        return [returned] if self.others is None else [x for x in returned if isinstance(x, Tensor)]

    def fill(self, values: Sequence[Tensor]) -> Any:
        """An answer of this form."""
        if self.others is None:
            return values[0]
        left = iter(values)
        return tuple(next(left) if other is _TENSOR else other for other in self.others)


_TENSOR = object()


def _joined(predictors: Sequence[Predictor], position: float) -> Tensor:
    """The rows of one output, as the module gives them."""
    values = [predictor.predict(position) for predictor in predictors]
    return values[0] if len(values) == 1 else torch.cat(values)
