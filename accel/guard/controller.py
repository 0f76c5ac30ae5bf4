"""One controller a run: who may approximate which sample, and what has been spent."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from accel.guard.account import Account, Ahead, Charge, Growth, Line
from accel.guard.gain import gain, left, span
from accel.guard.gate import Metered, Switch, reach

if TYPE_CHECKING:
    from torch import Tensor

    from accel.guard.model import Guard
    from accel.seams.denoisers import Call, Inner, Onion, Result
    from accel.trajectory import Step, Trajectory, Update

Undo = Callable[[], None]
Place = tuple[str, int]
"""Denoiser and stage of the solver: what is kept in one is no answer in the other."""

Key = tuple[Metered, Place, int]
"""A method's gate, a place and a sample."""


@dataclass
class Filed:
    """What a spot check found of one sample, until the guided output is known.

    Attributes:
        line: Whose check it is.
        gate: The gate.
        horizon: How far the approximation reached.
        errors: By branch; of ``""``: of the guided output itself.
    """

    line: Line
    gate: Metered
    horizon: float
    errors: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Seen:
    """What one sample's branches were given and answered at this evaluation.

    Attributes:
        network: Class name of the network.
        rows: By branch, input and answer.
    """

    network: str = ""
    rows: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


class Controller:
    """Spends the budget of every sample of a run. It reads the device at spot checks alone.

    Args:
        guard: The promise.
        scale: Real error for each unit of estimate; infinite: nothing may be spent.
        note: What the scale rests on.
        onions: By denoiser.
    """

    def __init__(self, guard: Guard, scale: float, note: str, onions: Mapping[str, Onion]) -> None:
        self.note = note
        self._guard = guard
        self._scale = scale
        self._onions = onions
        self._gates: list[Metered] = []
        self._accounts: dict[int, Account] = {}
        self._filed: dict[Key, Filed] = {}
        self._errors: dict[Key, Tensor] = {}
        self._seen: dict[int, Seen] = {}
        self._depths: dict[int, tuple[int, set[int]]] = {}
        self._requests: dict[int, tuple[int, int]] = {}
        self._ahead: tuple[int, tuple[Ahead, ...]] = (-1, ())

    def attach(self, trajectory: Trajectory) -> Iterator[Undo]:
        """Follow a run: outermost around every denoiser, last in front of ``scheduler.step``."""
        trajectory.starts.append(self.reset)
        yield lambda: trajectory.starts.remove(self.reset)
        for onion in self._onions.values():
            yield onion.add(-1, self._look)
        yield trajectory.edit(-1, self._settle)

    def gate(self, method: str, depth: int, saving: float, **kind: bool) -> Metered:
        """A gate for a method."""
        gate = Metered(self, method, depth, saving, **kind)
        self._gates.append(gate)
        return gate

    def gates(self, method: str) -> list[Metered]:
        """The gates that a method has taken."""
        return [gate for gate in self._gates if gate.method == method]

    def reset(self) -> None:
        """Forget the run before."""
        for gate in self._gates:
            gate.asked = gate.allowed = 0
        self._accounts.clear()
        self._depths.clear()
        self._requests.clear()
        self._forget()
        self._ahead = (-1, ())

    def _forget(self) -> None:
        """Drop every tensor."""
        self._filed.clear()
        self._seen.clear()
        self._errors.clear()

    def account(self, sample: int) -> Account:
        """The account of a sample."""
        if sample not in self._accounts:
            barred = math.isinf(self._scale)
            budget, scale = (0.0, 1.0) if barred else (self._guard.max_error, self._scale)
            self._accounts[sample] = Account(budget, scale)
        return self._accounts[sample]

    def line(self, gate: Metered, place: Place, sample: int) -> Line:
        """What a method did for a sample at a denoiser and stage."""
        lines = self.account(sample).lines
        key = (id(gate), *place)
        if key not in lines:
            lines[key] = Line(Growth(gate.grows), gate.saving)
        return lines[key]

    # Before an approximation.

    def allows(
        self, gate: Metered, step: Step, place: Place, sample: int, newest: int | None
    ) -> bool:
        """Whether it may be made; see `accel.guard.gate.Gate`."""
        line = self.line(gate, place, sample)
        if line.asked != step.index:
            gate.asked += 1
            charge = Charge(gain(step), reach(step, newest))
            line.asked = step.index
            line.answer = self._judge(gate, line, step, sample, charge)
            if line.answer:
                gate.allowed += 1
                line.charges.append(charge)
                self._depths_at(step, sample).add(gate.depth)
        return line.answer

    def _judge(self, gate: Metered, line: Line, step: Step, sample: int, charge: Charge) -> bool:
        account = self.account(sample)
        if account.left <= 0.0 or self._blocked(gate, step, sample):
            return False
        old = line.growth.old(step.index, self._guard.check_every)
        if old:
            line.wanted = step.index
            self._requests[sample] = (step.index, gate.depth)
        if old or line.growth.error is None:
            return False
        return account.affords(line, charge, self._to_come(step))

    def _blocked(self, gate: Metered, step: Step, sample: int) -> bool:
        """Whether a method above is being checked: what lies below it has to compute.

        The request of the evaluation before counts as well: where branches are calls of their own,
        the first had been answered when the second asked.
        """
        index, depth = self._requests.get(sample, (-9, -1))
        return step.index - index <= 1 and depth < gate.depth

    def _depths_at(self, step: Step, sample: int) -> set[int]:
        """Layers that approximated a sample at this evaluation."""
        index, depths = self._depths.get(sample, (-1, set()))
        if index != step.index:
            depths = set()
            self._depths[sample] = (step.index, depths)
        return depths

    def _to_come(self, step: Step) -> tuple[Ahead, ...]:
        """The evaluations after a step."""
        if self._ahead[0] != step.position:
            ahead = (Ahead(gain(step, k), span(step, k)) for k in range(1, left(step) + 1))
            self._ahead = (step.position, tuple(ahead))
        return self._ahead[1]

    # Spot checks.

    def dense(self, gate: Metered, call: Call) -> Result:
        """Run a call through what lies below a method, without what approximates there."""
        return self._onions[call.denoiser.name].below(
            gate.depth, call, lambda layer: not isinstance(layer, Switch)
        )

    def file(
        self,
        gate: Metered,
        step: Step,
        place: Place,
        row: tuple[str, int],
        error: Tensor,
        newest: int | None,
    ) -> None:
        """Keep what a row was off by, unless what it is compared with was approximated itself."""
        branch, sample = row
        if any(depth > gate.depth for depth in self._depths_at(step, sample)):
            return
        line = self.line(gate, place, sample)
        filed = Filed(line, gate, reach(step, newest))
        self._filed.setdefault((gate, place, sample), filed).errors[branch] = error

    def _look(self, call: Call, inner: Inner) -> Result:
        """Remember what the pipeline is given for its branches, until it puts them together."""
        result = inner(call)
        for index, row in enumerate(call.rows):
            seen = self._seen.setdefault(row.sample, Seen())
            seen.network = type(call.denoiser.core).__name__
            seen.rows[row.branch] = (call.sample[index], result.value[index])
        return result

    def _settle(self, update: Update) -> Tensor:
        """Turn what was filed into errors of the guided output. The output stays as it is."""
        output: Tensor = update.output
        try:
            if self._filed:
                self._resolve(update)
        finally:
            self._filed.clear()
            self._seen.clear()
        if not left(update.step):
            self._forget()
        return output

    def _resolve(self, update: Update) -> None:
        import torch

        sizes = self._units(update)
        errors = {key: self._guided_error(update, key[2], one) for key, one in self._filed.items()}
        found = [measure for key, error in errors.items() for measure in self._measures(key, error)]
        numbers = torch.stack([*found, *sizes.values()]).tolist()
        for sample, size in zip(sizes, numbers[len(found) :], strict=True):
            self.account(sample).unit = size
        pairs = zip(numbers[: len(found) : 2], numbers[1 : len(found) : 2], strict=True)
        for (key, filed), (error, cosine) in zip(self._filed.items(), pairs, strict=True):
            known = cosine if key in self._errors else None
            self._learn(filed, key[2], error, update.step.index, known)
        self._errors |= errors

    def _measures(self, key: Key, error: Tensor) -> tuple[Tensor, Tensor]:
        """The size of an error, and its cosine with that of the check before."""
        from accel.guard.spot import cosine, rms

        return rms(error), cosine(error, self._errors.get(key, error))

    def _learn(
        self, filed: Filed, sample: int, error: float, index: int, cosine: float | None
    ) -> None:
        self.account(sample).checks += 1
        if self._requests.get(sample, (0, -1))[1] == filed.gate.depth:
            del self._requests[sample]
        if filed.gate.silent and error == 0.0:
            filed.line.unknown(index)
            return
        filed.line.learn(error, filed.horizon, index, cosine)

    def _units(self, update: Update) -> dict[int, Tensor]:
        """The size of the clean sample of everyone who was checked."""
        from accel.guard.spot import LEADER, clean_size

        sizes = {}
        for sample in {key[2] for key in self._filed}:
            seen, like = self._seen[sample], update.output[sample]
            x, y = seen.rows.get(LEADER) or next(iter(seen.rows.values()))
            sizes[sample] = clean_size(y, x, update.step, seen.network, like)
        return sizes

    def _guided_error(self, update: Update, sample: int, filed: Filed) -> Tensor:
        from accel.guard.spot import fitted, weights

        if "" in filed.errors:
            return filed.errors[""]
        guided = update.output[sample]
        answers = {b: fitted(y, guided) for b, (_, y) in self._seen[sample].rows.items()}
        shares = weights(guided, answers)
        parts = [fitted(e, guided) * shares[branch] for branch, e in filed.errors.items()]
        return sum(parts[1:], parts[0])

    # What came of it.

    def why_idle(self, method: str) -> str | None:
        """Why a method approximated nothing, where that was the guard's doing."""
        gates = self.gates(method)
        asked = sum(gate.asked for gate in gates)
        if not asked or any(gate.allowed for gate in gates):
            return None
        return f"the guard refused all {asked} approximations that it asked for"

    def told(self) -> list[dict[str, Any]]:
        """For each sample what it spent, of what, and the spot checks."""
        return [
            {"spent": account.spent, "budget": account.budget, "checks": account.checks}
            for _, account in sorted(self._accounts.items())
        ]
