"""Where a run is: which evaluation of how many, at which noise level.

Followed through the public calls ``scheduler.set_timesteps``, ``set_begin_index`` and ``step``;
never inferred from timestep values or from counting calls of the network.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from accel import hooks
from accel.errors import BrokenAttachment, UnsupportedModel

STEP_ARGUMENTS = ("model_output", "timestep", "sample")
"""What ``scheduler.step`` takes first, by the convention of diffusers."""


class Levels:
    """The noise levels of one schedule, read when first asked for (one device read a run)."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler

    @cached_property
    def prediction(self) -> str:
        """``epsilon``, ``v_prediction``, ``sample`` or ``flow_prediction``."""
        config = self._scheduler.config
        name = type(self._scheduler).__name__
        if name.startswith("FlowMatch") or config.get("use_flow_sigmas"):
            return "flow_prediction"
        return str(config.get("prediction_type", "epsilon"))

    @cached_property
    def sigmas(self) -> list[float]:
        """σ/α, or σ for a flow, at each timestep of the schedule."""
        timesteps = self._scheduler.timesteps
        sigmas = getattr(self._scheduler, "sigmas", None)
        if sigmas is not None and len(sigmas) >= len(timesteps):
            inverted = self._scheduler.config.get("invert_sigmas", False)  # Mochi: 1 − σ
            return [1.0 - sigma if inverted else float(sigma) for sigma in sigmas.tolist()]
        products = self._scheduler.alphas_cumprod.tolist()
        kept = (products[int(t)] for t in timesteps.tolist())
        return [math.sqrt((1.0 - product) / max(product, 1e-12)) for product in kept]

    @cached_property
    def timesteps(self) -> list[float]:
        """The timesteps of the schedule."""
        return [float(timestep) for timestep in self._scheduler.timesteps.tolist()]

    def at(self, position: int) -> tuple[float, float, float]:
        """The triple (σ/α, α, σ) at a position of the schedule."""
        level = self.sigmas[min(position, len(self.sigmas) - 1)]
        if self.prediction == "flow_prediction":
            alpha = 1.0 - level
            return (level / alpha if alpha > 0 else math.inf), alpha, level
        alpha = 1.0 / math.sqrt(1.0 + level * level)
        return level, alpha, level * alpha


@dataclass(frozen=True)
class Step:
    """One evaluation of a run.

    Attributes:
        index: 0-based, counts from the first evaluation that the run really makes.
        total: Evaluations in the run; ``None`` where a pipeline cuts the schedule unseen.
        position: The same place in the whole schedule (img2img starts in its middle).
        order: Evaluations that the solver makes for each of its steps (Heun: 2); 1 where that
            number differs from step to step.
    """

    index: int
    total: int | None
    position: int
    levels: Levels
    order: int = 1

    @property
    def stage(self) -> int:
        """Which evaluation of its solver's step this is, from 0, by the scheduler's ``order``.

        The stages of a solver are sequences of their own: Heun's corrector looks at another state
        than its predictor, so what one gave is no answer for the other. Solvers whose steps differ
        in their number of evaluations have an ``order`` of 1, and this is 0 throughout: where
        their steps start, `accel.seams.stages` knows.
        """
        return self.index % self.order

    @property
    def turn(self) -> int:
        """The solver's step, from 0: how many evaluations of this stage went before."""
        return self.index // self.order

    @property
    def turns(self) -> int | None:
        """Steps of the solver in the run, the last one maybe of fewer stages; see ``total``."""
        return None if self.total is None else -(-self.total // self.order)

    @property
    def closing(self) -> bool:
        """Whether this is the last evaluation of its stage; of a usual solver: of the run.

        Raises:
            UnsupportedModel: If the pipeline cuts its schedule unseen.
        """
        return self.last or (self.total is not None and self.index + self.order >= self.total)

    @property
    def last(self) -> bool:
        """Whether this is the last evaluation of the run.

        Raises:
            UnsupportedModel: If the pipeline cuts its schedule unseen.
        """
        if self.total is None:
            raise UnsupportedModel(
                "This pipeline cuts its schedule where no public call shows it, so the last step "
                "is not known: set last=False, or use a scheduler that has set_begin_index."
            )
        return self.index == self.total - 1

    @cached_property
    def level(self) -> tuple[float, float, float]:
        """(σ/α, α, σ): the noise level in the units of EDM, and both factors of the input."""
        return self.levels.at(self.position)

    @property
    def time(self) -> float:
        """ln((α + c)/(σ + c)), c = 0.02: the half log-SNR λ, kept finite at both ends.

        Networks change evenly in it, so it is what predictors extrapolate in.
        """
        _, alpha, noise = self.level
        return math.log((alpha + 0.02) / (noise + 0.02))

    @property
    def timestep(self) -> float:
        """What the scheduler calls this noise level, mostly 1000 to 0. Tells no position."""
        return self.levels.timesteps[min(self.position, len(self.levels.timesteps) - 1)]

    @property
    def sigma(self) -> float:
        """Noise level σ/α (the units of EDM); infinite at the start of a flow."""
        return self.level[0]


@dataclass(frozen=True)
class Update:
    """What ``scheduler.step`` is about to be given.

    Attributes:
        step: The evaluation that it follows.
        output: The network's output after guidance, ``[rows, …]``.
        sample: The latents, ``[rows, …]``.
        options: The keywords beside output, timestep and sample.
        filled: Rows of the latents whose output a method filled in: the network did not compute
            it in full at this step. By the ``cond`` branch, where there is one.
        computed: For each row of the latents the branches that were.
    """

    step: Step
    output: Any
    sample: Any
    options: dict[str, Any]
    filled: tuple[int, ...] = ()
    computed: tuple[frozenset[str], ...] = ()


Editor = Callable[[Update], Any]
"""From what ``scheduler.step`` would be given to the output that it is given instead."""

Reviser = Callable[[Step, Any], Any]
"""From the sample that ``scheduler.step`` reached to the one that the pipeline goes on from."""


@dataclass(slots=True)
class Trajectory:
    """Follows one scheduler of one pipeline.

    Attributes:
        truncated: Asked at the first evaluation: how many evaluations the run makes, or ``None``
            where that cannot be known (from the pipeline's adapter).
        starts: Called when a run starts: every method drops its state.
        observers: Called after each ``scheduler.step`` with the step and its result.
        editors: Asked before each ``scheduler.step``, in order, for the output that it is given.
        revisers: Asked after each ``scheduler.step``, before the observers, for its sample.
    """

    pipe: Any
    truncated: Callable[[int], int | None]
    scheduler: Any = None
    levels: Levels | None = None
    index: int = -1
    begin: int | None = None
    total: int | None = None
    starts: list[Callable[[], None]] = field(default_factory=list)
    observers: list[Callable[[Step, Any], None]] = field(default_factory=list)
    editors: list[tuple[int, Editor]] = field(default_factory=list)
    revisers: list[Reviser] = field(default_factory=list)
    _step: Step | None = None
    _computed: dict[int, dict[str, bool]] = field(default_factory=dict)

    def attach(self) -> list[Callable[[], None]]:
        """Follow the pipeline's present scheduler; returns the undos."""
        self.scheduler = self.pipe.scheduler
        undos = [
            hooks.wrap(self.scheduler, "set_timesteps", self._on_set_timesteps),
            hooks.wrap(self.scheduler, "step", self._on_step),
        ]
        if hasattr(self.scheduler, "set_begin_index"):
            undos.append(hooks.wrap(self.scheduler, "set_begin_index", self._on_begin))
        return undos

    @property
    def running(self) -> bool:
        """Whether a run has begun and not yet made all its steps.

        Raises:
            BrokenAttachment: If the pipeline's scheduler was replaced after the plan was attached.
        """
        self._check_scheduler()
        return self.levels is not None and (self.total is None or self.index < self.total)

    @property
    def now(self) -> Step:
        """The evaluation that the run is at.

        Raises:
            BrokenAttachment: If the pipeline's scheduler was replaced after the plan was attached.
        """
        self._check_scheduler()
        if self._step is None:
            self._step = self._locate()
        return self._step

    def _check_scheduler(self) -> None:
        if self.pipe.scheduler is not self.scheduler:
            raise BrokenAttachment(
                f"pipe.scheduler was replaced by a {type(self.pipe.scheduler).__name__} while a "
                f"plan that follows the {type(self.scheduler).__name__} is attached. Detach, set "
                "the scheduler, attach again – or put the sampler into the plan."
            )

    def _locate(self) -> Step:
        assert self.levels is not None
        scheduled = len(self.scheduler.timesteps)
        if self.index == 0:
            self.total = self._count(scheduled)
            if self.begin is None:
                self.begin = self._skipped(scheduled)
        position = (self.begin or 0) + self.index
        order = int(getattr(self.scheduler, "order", 1))
        return Step(self.index, self.total, position, self.levels, order)

    def _count(self, scheduled: int) -> int | None:
        told = self.truncated(scheduled)
        if told is None and self.begin is not None:
            return scheduled - self.begin
        return told

    def _skipped(self, scheduled: int) -> int:
        """How many leading timesteps a run left out where no ``set_begin_index`` told so."""
        if self.total is None or getattr(self.pipe, "denoising_end", None) is not None:
            return 0
        return scheduled - self.total

    def _on_set_timesteps(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        result = inner(*args, **kwargs)
        self.levels = Levels(self.scheduler)
        self.index, self.begin, self.total, self._step = 0, None, None, None
        self._computed.clear()
        for start in self.starts:
            start()
        return result

    def _on_begin(self, inner: Callable[..., Any], begin_index: int = 0) -> Any:
        result = inner(begin_index)
        self.begin, self._step = begin_index, None
        return result

    def answered(self, sample: int, branch: str, computed: bool) -> None:
        """Learn whether a branch of a sample was computed in full at this step."""
        branches = self._computed.setdefault(sample, {})
        branches[branch] = computed and branches.get(branch, True)

    def _filled(self, rows: int) -> tuple[int, ...]:
        """Rows of the latents whose sample was not; DiT's pipeline steps both branches of it."""
        samples = {
            sample
            for sample, branches in self._computed.items()
            if not branches.get("cond", all(branches.values()))
        }
        return tuple(row for row in range(rows) if row % max(len(self._computed), 1) in samples)

    def _branches(self, rows: int) -> tuple[frozenset[str], ...]:
        """For each row of the latents the branches of its sample that were computed in full."""
        samples = max(len(self._computed), 1)
        return tuple(
            frozenset(
                branch
                for branch, computed in self._computed.get(row % samples, {}).items()
                if computed
            )
            for row in range(rows)
        )

    def edit(self, depth: int, editor: Editor) -> Callable[[], None]:
        """Put an editor in front of ``scheduler.step``: the deeper, the earlier it is asked.

        Args:
            depth: Its layer in the onion, so that what is nearer to the network comes first.
            editor: Returns the output that the next editor, or the scheduler, is given.

        Returns:
            The undo. Editors can be taken off in any order.
        """
        entry = (depth, editor)
        self.editors.append(entry)
        self.editors.sort(key=lambda item: -item[0])
        return lambda: self.editors.remove(entry)

    def _edited(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of ``scheduler.step`` with the output that the editors made of it."""
        given = dict(zip(STEP_ARGUMENTS, args, strict=False)) | kwargs
        options = {name: value for name, value in given.items() if name not in STEP_ARGUMENTS}
        output, rows = given["model_output"], len(given["sample"])
        told = options, self._filled(rows), self._branches(rows)
        for _, editor in self.editors:
            output = editor(Update(self.now, output, given["sample"], *told))
        if args:
            return (output, *args[1:]), kwargs
        return args, kwargs | {"model_output": output}

    def _on_step(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.editors and self.running:
            args, kwargs = self._edited(args, kwargs)
        result = inner(*args, **kwargs)
        if self.running:
            step = self.now
            for revise in self.revisers:
                result = _with_sample(result, revise(step, result[0]))
            self.index, self._step = self.index + 1, None
            self._computed.clear()
            for observe in self.observers:
                observe(step, result)
        return result


def _with_sample(result: Any, sample: Any) -> Any:
    """What ``scheduler.step`` returned, with another sample: a tuple or an output of diffusers."""
    if isinstance(result, tuple):
        return (sample, *result[1:])
    result["prev_sample"] = sample
    return result
