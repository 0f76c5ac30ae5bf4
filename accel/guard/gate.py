"""What a method that approximates asks before it does: the one seam between methods and guard."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from accel.guard.controller import Controller, Place
    from accel.seams.denoisers import Call, Inner, Layer, Result
    from accel.trajectory import Step


class Gate(Protocol):
    """What a method asks, and where it tells what its approximations were off by."""

    def allows(self, call: Call, sample: int, newest: int | None = None) -> bool:
        """Whether a sample may be approximated at this evaluation; it is charged if so.

        To be asked only where the method itself would. Asked again at the same evaluation, the
        answer is the same and nothing more is charged.

        Args:
            call: The call.
            sample: Position in the batch.
            newest: Evaluation that the approximation reaches forward from; ``None``: from none.
        """
        ...

    def listens(self, sample: int) -> bool:
        """Whether it is of use to compare, where that costs no part of a network."""
        ...

    def wants(self, call: Call, sample: int) -> bool:
        """Whether a check was asked for at this evaluation: compare, whatever it costs."""
        ...

    def compare(
        self, call: Call, rows: Sequence[int], guesses: Tensor, values: Tensor, newest: int | None
    ) -> None:
        """Tell what would have been answered, and what was computed.

        Args:
            call: The call.
            rows: Indices into ``call.rows``.
            guesses: What the method would have answered, ``[len(rows), …]``.
            values: What the network did.
            newest: As `allows` has it.
        """
        ...

    def compare_output(
        self, step: Step, sample: int, guess: Tensor, value: Tensor, newest: int | None
    ) -> None:
        """The same of a sample's guided output, as ``scheduler.step`` takes it."""
        ...

    def dense(self, call: Call) -> Result:
        """Run a call through what lies below the method, without what approximates there."""
        ...


class Open:
    """The gate of a run without a guard: everything is allowed, nothing is looked at."""

    def allows(self, call: Call, sample: int, newest: int | None = None) -> bool:  # noqa: ARG002
        """Yes."""
        return True

    def listens(self, sample: int) -> bool:  # noqa: ARG002
        """No."""
        return False

    def wants(self, call: Call, sample: int) -> bool:  # noqa: ARG002
        """No."""
        return False

    def compare(self, *told: object) -> None:
        """Nothing."""

    def compare_output(self, *told: object) -> None:
        """Nothing."""

    def dense(self, call: Call) -> Result:
        """Is never asked for."""
        raise AssertionError(f"there is no guard to check a call of {call.denoiser.name} for")


OPEN: Gate = Open()


class Metered:
    """The gate of one method under a guard.

    Args:
        controller: Holds the budget.
        method: Its name.
        depth: Its layer.
        saving: Share of an evaluation of all branches that it saves, the price of its errors.
        grows: Whether its error grows with how far it reaches.
        silent: Whether an error of nothing at all only says that it did nothing.
        whole: Whether it acts on the guided output, whatever networks that is made of.
    """

    def __init__(
        self,
        controller: Controller,
        method: str,
        depth: int,
        saving: float,
        *,
        grows: bool = True,
        silent: bool = False,
        whole: bool = False,
    ) -> None:
        self.method, self.depth, self.saving = method, depth, saving
        self.grows, self.silent = grows, silent
        self._whole = whole
        self.asked = self.allowed = 0
        self._controller = controller

    def allows(self, call: Call, sample: int, newest: int | None = None) -> bool:
        """Ask the controller, once an evaluation."""
        return self._controller.allows(self, call.step, self._place(call), sample, newest)

    def _place(self, call: Call) -> Place:
        return ("" if self._whole else call.denoiser.name), call.step.stage

    def listens(self, sample: int) -> bool:
        """While there is something left to spend."""
        return self._controller.account(sample).left > 0.0

    def wants(self, call: Call, sample: int) -> bool:
        """Whether the controller refused for want of a check."""
        line = self._controller.line(self, self._place(call), sample)
        return line.wanted == call.step.index

    def compare(
        self, call: Call, rows: Sequence[int], guesses: Tensor, values: Tensor, newest: int | None
    ) -> None:
        """Tell the controller, row by row."""
        for index, guess, value in zip(rows, guesses, values, strict=True):
            row, error = call.rows[index], guess.float() - value.float()
            self._controller.file(self, call.step, self._place(call), row, error, newest)

    def compare_output(
        self, step: Step, sample: int, guess: Tensor, value: Tensor, newest: int | None
    ) -> None:
        """Tell the controller."""
        error = guess.float() - value.float()
        self._controller.file(self, step, ("", step.stage), ("", sample), error, newest)

    def dense(self, call: Call) -> Result:
        """Ask the onion."""
        return self._controller.dense(self, call)


def reach(step: Step, newest: int | None) -> float:
    """How far an answer reaches that was computed at an evaluation before, in `Step.time`."""
    if newest is None:
        return 0.0
    older = replace(step, index=newest, position=step.position - (step.index - newest))
    return abs(step.time - older.time)


class Switch:
    """Puts a guard around a method that works inside a computed call: tokens, attention.

    The samples that the guard allows go through the method, the others past it. Where a check was
    asked for, a sample goes both ways, and past it counts.

    Args:
        gate: The method's.
        layer: The method's.
        quiet: Around a check: nothing of it is to be told as done.
    """

    def __init__(
        self, gate: Metered, layer: Layer, quiet: Callable[[], Callable[[], None]]
    ) -> None:
        self._gate = gate
        self._layer = layer
        self._quiet = quiet

    def __call__(self, call: Call, inner: Inner) -> Result:
        """Answer a call."""
        from accel.seams.denoisers import Result
        from accel.seams.rows import scatter

        shut = call.where(lambda row: not self._gate.allows(call, row.sample))
        if not shut:
            return self._layer(call, inner)
        past = call.take(shut)
        dense = inner(past)
        self._check(past, dense)
        if len(shut) == len(call.rows):
            return dense
        free = [index for index in range(len(call.rows)) if index not in shut]
        through = self._layer(call.take(free), inner)
        value = scatter([(shut, dense.value), (free, through.value)], len(call.rows))
        fresh = dict(zip((*shut, *free), (*dense.fresh, *through.fresh), strict=True))
        return Result(value, tuple(fresh[index] for index in range(len(call.rows))))

    def _check(self, call: Call, dense: Result) -> None:
        wanted = call.where(lambda row: self._gate.wants(call, row.sample))
        if not wanted:
            return
        restore = self._quiet()
        guess = self._layer(call.take(wanted), self._gate.dense)
        restore()
        self._gate.compare(call, wanted, guess.value, dense.value[wanted], None)
