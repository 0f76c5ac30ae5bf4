"""The coefficients of LinearAG: least squares along the runs that the guesses themselves make.

Step by step: the steps in front are run as the method will run them, with the coefficients found so
far; at the step in question both branches are evaluated, the sums are fitted, and the run ends.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr

from accel.attach import Accelerator, Run, Site, Undo
from accel.calibration import Calibrated
from accel.errors import BadInput, BadOutput
from accel.guidance.branches import Pair, Unconditional, claim_all
from accel.guidance.linear_ag import History, LinearAG
from accel.seams.identity import identity
from accel.seams.pipelines import guidance_of
from accel.seams.underway import is_another, negative_prompt

if TYPE_CHECKING:
    from torch import Tensor

    from accel.seams.denoisers import Call

DIGITS = 6


class Options(BaseModel):
    """What `accel calibrate linear-ag` takes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    guided: float = Field(default=0.5, gt=0.0, le=1.0, description="field of the method")
    every: int = Field(default=2, ge=2, description="field of the method")
    ridge: float = Field(
        default=1e-8, ge=0.0, description="added to the squares, relative to their mean"
    )


def calibrate_linear_ag(
    pipe: Any, calls: Iterable[Mapping[str, Any]], options: Mapping[str, Any]
) -> Calibrated:
    """Fit LinearAG's coefficients on some calls of equal length, all with guidance.

    Raises:
        BadInput: Without a call; without guidance; or with too few steps to estimate one.
        BadOutput: If the network gives NaN.
    """
    asked = Options.model_validate(dict(options))
    kept = list(calls)
    if not kept:
        raise BadInput("A calibration rests on what prompts do: give at least one prompt.")
    method = LinearAG(guided=asked.guided, every=asked.every)
    fitting = Fitting(method=method)
    errors: list[tuple[float, float]] = []
    for index in fitting.steps(pipe, kept[0]):
        normal = fitting.watch(pipe, kept, index)
        beta = normal.solve(asked.ridge)
        conds, unconds = method.inputs(index)
        errors.append(normal.errors(beta, len(conds), [*unconds][-1]))
        rounded = tuple(float(f"{value:.{DIGITS}g}") for value in beta)
        fitting.method = method = method.model_copy(
            update={"coefficients": (*method.coefficients, rounded)}
        )
    found = method.model_dump() | {
        "total": fitting.total,
        "scales": fitting.scales,
        "model": identity(pipe),
        "negative": fitting.negative,
    }
    ours, last = (f"{min(e):.2g} to {max(e):.2g}" for e in zip(*errors, strict=True))
    note = (
        f"{len(errors)} of {fitting.total} steps are estimated; error relative to u − c: {ours} "
        f"(that of the u − c before: {last})"
    )
    return Calibrated(LinearAG.model_validate(found), note)


class Normal:
    """The normal equations of u ≈ Σ β_k·y_k: dot products of all y and u, summed over samples."""

    def __init__(self) -> None:
        self._products: Tensor | None = None

    def add(self, columns: Sequence[Tensor], target: Tensor) -> None:
        """One sample more.

        Raises:
            BadOutput: If it is not finite.
        """
        import torch

        rows = [value.detach().cpu().double().flatten() for value in (*columns, target)]
        stacked = torch.stack(rows)
        products = stacked @ stacked.T
        if not bool(products.isfinite().all()):
            raise BadOutput(
                "The stock pipeline gives NaN or infinite values: there is nothing to calibrate. "
                "Try --dtype bfloat16 or float32."
            )
        self._products = products if self._products is None else self._products + products

    @property
    def empty(self) -> bool:
        """Whether nothing was added."""
        return self._products is None

    def solve(self, ridge: float) -> list[float]:
        """The coefficients with the least squares.

        Args:
            ridge: Weight of Σ β², relative to the mean square of the y.
        """
        import torch

        assert self._products is not None
        square, right = self._products[:-1, :-1], self._products[:-1, -1]
        small = ridge * square.diagonal().mean() * torch.eye(len(square), dtype=square.dtype)
        found = torch.linalg.lstsq(square + small, right[:, None], driver="gelsd").solution
        return [float(value) for value in found[:, 0]]

    def errors(self, beta: Sequence[float], conds: int, newest: int) -> tuple[float, float]:
        """‖û − u‖ / ‖c − u‖ of the coefficients, and of the last u − c taken again.

        Args:
            beta: The coefficients.
            conds: How many of the y are conditional; the last of them is the present one.
            newest: Step of the last u, whose c is there too; that u is the last of the y.
        """
        import torch

        assert self._products is not None
        size = len(self._products) - 1
        plain = torch.zeros(size, dtype=torch.float64)
        plain[conds - 1] = 1.0
        again = plain.clone()
        again[newest] -= 1.0
        again[size - 1] += 1.0
        whole = self._error(plain)
        return self._error(torch.tensor(beta, dtype=torch.float64)) / whole, self._error(
            again
        ) / whole

    def _error(self, beta: Tensor) -> float:
        import torch

        assert self._products is not None
        weights = torch.cat([beta, -torch.ones(1, dtype=beta.dtype)])
        return float((weights @ self._products @ weights).clamp_min(1e-30).sqrt())


class Reached(Exception):
    """The step in question has been evaluated: the run need not go on."""


class Fitting(Accelerator):
    """Runs LinearAG up to a step and fits that step; in no list of methods."""

    model_config = ConfigDict(frozen=False)

    name: ClassVar[str] = "guidance.Fitting"
    layer: ClassVar[str] = "guidance"
    seam: ClassVar[str] = "branches"
    supports: ClassVar[str] = LinearAG.supports
    source: ClassVar[str] = "accel.guidance.calibration"

    method: LinearAG
    _index: int = PrivateAttr(default=0)
    _normal: Normal = PrivateAttr(default_factory=Normal)
    _total: int = PrivateAttr(default=0)
    _scales: dict[str, float] = PrivateAttr(default_factory=dict)
    _negative: str = PrivateAttr(default="")

    @classmethod
    def off(cls) -> None:
        """It changes what it looks at."""

    def why_off(self) -> None:
        """It always looks."""

    @property
    def total(self) -> int:
        """Evaluations of a run."""
        return self._total

    @property
    def scales(self) -> tuple[tuple[str, float], ...]:
        """Numbers of the calls that set their guidance."""
        return tuple(sorted(self._scales.items()))

    @property
    def negative(self) -> str:
        """The negative prompt of the calls, as `accel.seams.underway` tells it."""
        return self._negative

    def steps(self, pipe: Any, call: Mapping[str, Any]) -> Iterator[int]:
        """The steps that are to be estimated.

        Raises:
            BadInput: If there is none.
        """
        self.watch(pipe, [call], 0)
        guided = [i for i in range(self._total) if i < self.method.guided * self._total]
        estimated = [index for index in guided if not self.method.evaluates(index)]
        if not estimated:
            raise BadInput(
                f"Of {self._total} evaluations {len(guided)} are guided, and none is to be "
                "estimated: take more steps."
            )
        yield from estimated

    def watch(self, pipe: Any, calls: Iterable[Mapping[str, Any]], index: int) -> Normal:
        """Run the calls up to a step.

        Raises:
            BadInput: If a call has no unconditional branch there, or another number of steps.
        """
        self._index, self._normal = index, Normal()
        for call in calls:
            run = Run((self,), pipe)
            try:
                pipe(**_again(call))
            except Reached:
                continue
            finally:
                run.detach()
            raise BadInput(
                f"The call has no unconditional branch at step {index}: guidance is off or "
                "embedded, or the run is shorter. LinearAG is for calls with guidance."
            )
        return self._normal

    def attach(self, site: Site) -> Iterator[Undo]:
        """Run as LinearAG does, up to the step."""
        yield from claim_all(site)
        history = _Fitted(self, site)
        yield site.on_start(history.reset)
        engine = Unconditional(site.tally, history.needed, history.keep, history.estimate)
        yield from engine.attach(site)

    def reached(self, total: int | None, scales: Mapping[str, float], negative: str) -> None:
        """Write down what kind of run this is, and end it.

        Raises:
            BadInput: If it is of another number of evaluations, or another negative prompt, than
                those before.
            Reached: Always.
        """
        if self._total not in (0, total or 0):
            raise BadInput(
                f"Calls of {self._total} and of {total} evaluations: LinearAG is fitted to calls "
                "of one number of steps."
            )
        if self._negative and is_another(self._negative, negative, LinearAG.name):
            raise BadInput("Calls of two negative prompts: LinearAG is fitted to calls of one.")
        self._total, self._scales, self._negative = total or 0, dict(scales), negative
        raise Reached


class _Fitted(History):
    """The history of a run that ends at the step which is fitted."""

    def __init__(self, fitting: Fitting, site: Site) -> None:
        super().__init__(fitting.method, site)
        self._fitting = fitting

    def keep(self, call: Call, pairs: dict[int, Pair]) -> None:
        super().keep(call, pairs)
        fitting, index = self._fitting, call.step.index
        if index != fitting._index:
            return
        for sample, pair in pairs.items():
            if index:
                fitting._normal.add(self.columns(sample, index, pair.cond), pair.uncond)
        pipe = self._pipe
        fitting.reached(call.step.total, guidance_of(pipe), negative_prompt(pipe))


def _again(call: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call, with copies of its generators: every run draws the same noise."""
    return {name: _copied(value) for name, value in call.items()}


def _copied(value: Any) -> Any:
    import torch

    if isinstance(value, list):
        return [_copied(item) for item in value]
    if not isinstance(value, torch.Generator):
        return value
    copied = torch.Generator(value.device)
    copied.set_state(value.get_state())
    return copied
