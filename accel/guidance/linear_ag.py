"""LinearAG: guess the unconditional answer from those that the run has given so far.

Source: Castillo et al., "Adaptive Guidance: Training-free Acceleration of Conditional Diffusion
Models", arXiv 2312.12487, section 5 (LinearAG). The paper leaves open whether guesses are inputs of
later guesses: as sums of the other inputs they would add nothing, and they are left out here. The
fit, with ridge and along the runs that the guesses themselves make, is ours.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import Field

from accel.attach import Site, Undo
from accel.errors import BadInput, UnsupportedModel
from accel.guidance.switching import Switching

if TYPE_CHECKING:
    from torch import Tensor

    from accel.guidance.branches import Missing, Pair
    from accel.seams.denoisers import Call
    from accel.trajectory import Step


class LinearAG(Switching):
    """Guide the first half of the steps, every second one with û = Σ βᶜ_i·c_i + Σ βᵘ_i·u_i.

    The sums run over the answers so far, the present c among them; the second half of the steps is
    conditional alone: 25 evaluations instead of 40 at 20 steps. The network's own answers are
    mixed: ε, or the velocity of a flow. The coefficients (`accel calibrate linear-ag`) hold for one
    model, number of steps, schedule, guidance scale and negative prompt; another model, number of
    steps, scale or negative prompt is refused. Answers of a cache are not taken into the sums;
    where one is missing, the branch is evaluated. No device read but one at attach, and one a run
    where the prompts are given as embeddings.
    """

    name: ClassVar[str] = "guidance.LinearAG"
    layer: ClassVar[str] = "guidance"
    seam: ClassVar[str] = "branches"
    supports: ClassVar[str] = "batched and two-call guidance; not embedded guidance"
    source: ClassVar[str] = "arXiv 2312.12487, section 5 (LinearAG)"

    guided: float = Field(
        default=0.5, ge=0.0, le=1.0, description="share of the steps, at the start, with guidance"
    )
    every: int = Field(
        default=2,
        ge=1,
        description="of the steps with guidance, each so-many-th evaluates both branches; 1: all",
    )
    coefficients: tuple[tuple[float, ...], ...] = Field(
        default=(),
        description="for each estimated step: β of c at steps 0 to its own, then β of u at the "
        "steps before it that evaluated both. Without any it is off, if every is not 1",
    )
    total: int = Field(
        default=0,
        ge=0,
        description="evaluations of the runs that the coefficients are for; others are refused. "
        "0: serve any run",
    )
    scales: tuple[tuple[str, float], ...] = Field(
        default=(),
        description="numbers of the call that set its guidance, by name, that the coefficients "
        "are for; others are refused. Empty: serve any",
    )
    model: str = Field(
        default="",
        description="digest of the network that the coefficients are for, and a sample of its "
        "weights; others are refused. Empty: serve any",
    )
    negative: str = Field(
        default="",
        description="digest of the negative prompt that the coefficients are for, or a sample of "
        "its embeddings; others are refused. Empty: serve any",
    )

    @classmethod
    def off(cls) -> Self:
        """Every step evaluates both branches."""
        return cls(every=1, guided=1.0)

    def why_off(self) -> str | None:
        """All steps are guided and evaluated, or there are no coefficients."""
        if self.every == 1:
            return "every step evaluates both branches" if self.guided == 1 else None
        if not self.coefficients:
            return "it has no coefficients: `accel calibrate linear-ag` makes a plan with them"
        return None

    def attach(self, site: Site) -> Iterator[Undo]:
        """Put it around every denoiser.

        Raises:
            UnsupportedModel: If the coefficients are for another network.
        """
        from accel.guidance.branches import Unconditional, claim_all, resetting

        self._check_model(site.pipe)
        yield from claim_all(site)
        history = History(self, site)
        yield site.on_start(history.reset)
        site.tally.memory = history.memory
        engine = Unconditional(
            site.tally,
            history.needed,
            history.keep,
            history.estimate,
            switched=resetting(site, self),
            guides=lambda call, _: history.guides(call.step),
        )
        yield from engine.attach(site)

    def _check_model(self, pipe: Any) -> None:
        from accel.seams.identity import compared, identity

        differs = compared(self.model, identity(pipe), self.name) if self.model else None
        if differs is not None:
            raise UnsupportedModel(
                f"The coefficients of {self.name} are for {differs}. Calibrate it for this one "
                "(`accel calibrate linear-ag`), or leave it out of the plan."
            )

    def has_guidance(self, step: Step) -> bool:
        """Whether a step lies in the part of the run that is guided.

        Raises:
            UnsupportedModel: If the number of evaluations is not known, or another one.
        """
        if step.total is None:
            raise UnsupportedModel(
                f"{self.name} guides a share of the run, and this pipeline cuts its schedule where "
                "no public call shows it: use guidance.Interval."
            )
        if self.total and step.total != self.total:
            raise UnsupportedModel(
                f"The coefficients of {self.name} are for {self.total} evaluations, and this run "
                f"has {step.total}: calibrate for it (`accel calibrate linear-ag --steps N`)."
            )
        return step.index < math.ceil(self.guided * step.total)

    def evaluates(self, index: int) -> bool:
        """Whether a step with guidance evaluates both branches."""
        return index % self.every == 0

    def line(self, index: int) -> int:
        """Which line of the coefficients is for an estimated step."""
        return index - index // self.every - 1

    def inputs(self, index: int) -> tuple[range, range]:
        """Steps of the c and of the u that an estimated step is a sum of."""
        return range(index + 1), range(0, index, self.every)


class History:
    """The answers of a run so far, by sample."""

    def __init__(self, method: LinearAG, site: Site) -> None:
        self._method = method
        self._pipe = site.pipe
        self._trajectory = site.trajectory
        self._cond: dict[tuple[int, int], Tensor] = {}
        self._uncond: dict[tuple[int, int], Tensor] = {}

    def reset(self) -> None:
        """Forget the run before, and look whether the coefficients are for this one's guidance.

        Raises:
            BadInput: If they are for another guidance scale or negative prompt.
        """
        from accel.seams.pipelines import guidance_of
        from accel.seams.underway import is_another, negative_prompt

        self._cond.clear()
        self._uncond.clear()
        expected, found = dict(self._method.scales), guidance_of(self._pipe)
        for name, scale in expected.items():
            if found.get(name, scale) != scale:
                raise BadInput(
                    f"The coefficients of {self._method.name} were fitted at {name}={scale:g}, and "
                    f"this run has {found[name]:g}: calibrate again (`accel calibrate linear-ag`)."
                )
        fitted = self._method.negative
        if fitted and is_another(fitted, negative_prompt(self._pipe), self._method.name):
            raise BadInput(
                f"The coefficients of {self._method.name} were fitted with another negative prompt "
                "than this run has: use that one, or calibrate again (`accel calibrate linear-ag`)."
            )

    def memory(self) -> int:
        """Bytes that are kept."""
        kept = (*self._cond.values(), *self._uncond.values())
        return sum(value.nbytes for value in kept)

    def guides(self, step: Step) -> bool:
        """Whether there is guidance: at the stages of a solver's step by where it starts."""
        from accel.seams.stages import start_of

        return self._method.has_guidance(start_of(step, self._trajectory.scheduler))

    def needed(self, call: Call, sample: int) -> bool:
        """Whether a step evaluates both branches: by the pattern, or for want of an input."""
        index, method = call.step.index, self._method
        if not self.guides(call.step):
            return False
        return method.evaluates(index) or not self._complete(index, sample)

    def _complete(self, index: int, sample: int) -> bool:
        conds, unconds = self._method.inputs(index)
        known = all((sample, i) in self._cond for i in conds[:-1])
        known = known and all((sample, i) in self._uncond for i in unconds)
        return known and self._method.line(index) < len(self._method.coefficients)

    def keep(self, call: Call, pairs: dict[int, Pair]) -> None:
        """Keep what was evaluated, while it is to be of use."""
        index = call.step.index
        if not self.guides(call.step):
            self._cond.clear()
            self._uncond.clear()
            return
        for sample, pair in pairs.items():
            self._cond[sample, index] = pair.cond.clone()
            self._uncond[sample, index] = pair.uncond.clone()

    def estimate(self, missing: Missing) -> Tensor | None:
        """û where there is guidance, else the conditional answer."""
        step, sample, method = missing.call.step, missing.sample, self._method
        if not self.guides(step):
            return None
        if missing.fresh:
            self._cond[sample, step.index] = missing.cond.clone()
        values = self.columns(sample, step.index, missing.cond)
        line = method.coefficients[method.line(step.index)]
        if len(line) != len(values):
            raise BadInput(
                f"{method.name} has {len(line)} coefficients for step {step.index}, which is a sum "
                f"of {len(values)} answers: calibrate again (`accel calibrate linear-ag`)."
            )
        total = line[0] * values[0].float()
        for beta, value in zip(line[1:], values[1:], strict=True):
            total = total.add(value.float(), alpha=beta)
        return total

    def columns(self, sample: int, index: int, cond: Tensor) -> list[Tensor]:
        """What an estimated step is a sum of; ``cond`` is its own conditional answer."""
        conds, unconds = self._method.inputs(index)
        earlier = [self._cond[sample, i] for i in conds[:-1]]
        return [*earlier, cond, *(self._uncond[sample, i] for i in unconds)]
