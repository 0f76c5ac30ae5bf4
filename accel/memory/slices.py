"""Operators of UNets in slices: the engine of feature slicing and of operator grouping.

Stateless but for what it counts: an operator is called once for each slice of the axis whose
entries it keeps apart, and each answer is written to its place before the next one is computed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from accel.seams.slicing import Operator, find_operators, slices, why_whole

if TYPE_CHECKING:
    from accel.attach import Site, Undo
    from accel.report import Tally
    from accel.trajectory import Step

AXES = {"spatial": "batch and frames", "temporal": "positions"}


class Slices:
    """Runs the operators of all networks of a pipeline in slices, and says what it did.

    Args:
        tally: Where it says so.
        counts: By kind, about how many slices; 1 leaves the kind alone.
        grouped: Whether runs of consecutive operators are one.
    """

    def __init__(self, tally: Tally, counts: dict[str, int], *, grouped: bool) -> None:
        self._tally = tally
        self._counts = counts
        self._grouped = grouped
        self._never: Counter[str] = Counter()
        self._hooked = 0
        tally.reason = self._why_idle
        self.reset()

    def reset(self) -> None:
        """Forget the run before."""
        self._cut: dict[str, dict[Operator, int]] = {}
        self._whole: dict[str, set[Operator]] = {}
        self._tally.change = None

    def attach(self, site: Site) -> Iterator[Undo]:
        """Hook the operators.

        Raises:
            Conflict: If another method cuts them already.
            UnsupportedModel: If a network is no UNet, or compiled around them.
        """
        yield site.claim("operators")
        yield site.on_start(self.reset)
        yield site.on_step(self._tell)
        for denoiser in site.denoisers:
            found = find_operators(denoiser, grouped=self._grouped)
            if self._counts["temporal"] > 1:
                self._never.update({why: len(paths) for why, paths in found.whole.items()})
            for operator in found.cut:
                if self._counts[operator.kind] > 1:
                    self._hooked += 1
                    yield operator.wrap(partial(self._around, operator))

    def _around(
        self, operator: Operator, inner: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        pieces = slices(operator.length(args, kwargs), self._counts[operator.kind])
        if len(pieces) < 2:
            return inner(*args, **kwargs)
        why = why_whole(operator.module)
        if why is not None:
            self._whole.setdefault(why, set()).add(operator)
            return inner(*args, **kwargs)
        answer = operator.run(inner, args, kwargs, pieces)
        kind = self._cut.setdefault(operator.kind, {})
        kind[operator] = max(kind.get(operator, 0), len(pieces))
        return answer

    def _tell(self, _step: Step, _result: Any) -> None:
        """At the end of a step, say what was cut so far."""
        self._tally.change = self._said() if self._cut else None

    def _said(self) -> str:
        kinds = (_spread(self._cut[kind], kind) for kind in AXES if kind in self._cut)
        return "; ".join([", ".join(kinds), *self._left()])

    def _left(self) -> list[str]:
        """What is not cut, in words."""
        whole = [f"{number} {why}" for why, number in self._never.items()]
        whole += [f"{len(operators)} {why}" for why, operators in self._whole.items()]
        return [f"whole: {', '.join(whole)}"] if whole else []

    def _why_idle(self) -> str:
        if not self._hooked:
            return "; ".join(["the network has no operators of that kind", *self._left()])
        if self._whole:
            return "; ".join(["no operator could be cut", *self._left()])
        return "no operator had more than one entry to cut: one picture without guidance"


def _spread(operators: dict[Operator, int], kind: str) -> str:
    """How many operators of a kind ran in how many slices."""
    low, high = min(operators.values()), max(operators.values())
    number = f"{low}" if low == high else f"{low} to {high}"
    return f"{len(operators)} {kind} operators in {number} slices of {AXES[kind]}"
