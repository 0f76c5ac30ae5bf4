"""Tables of what is computed: for each step and each module yes or no, and a way to make them.

Source: Huang et al., "HarmoniCa: Harmonizing Training and Inference for Better Feature Caching in
Diffusion Transformer Acceleration", arXiv 2410.01723: the form of its router at inference. The
builder here trains nothing: it measures.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import Field, PrivateAttr, model_validator

from accel.attach import Accelerator, Run, Site, Undo
from accel.cache.columns import By, Column, Line, column_of, columns_of, grouping, unfit
from accel.cache.fields import Cache, Limited
from accel.calibration import one_evaluation_a_step
from accel.errors import BadInput

if TYPE_CHECKING:
    from accel.cache.modules import ModuleWatch


class Table(Cache, Limited):
    """Compute what a table says: one line a step, one character a module (1 computed, 0 kept).

    It never reads the device. Step 0, and what a branch has not computed yet, is computed whatever
    the table says. Make a table with `accel.cache.table.build`.
    """

    name: ClassVar[str] = "cache.Table"
    layer: ClassVar[str] = "block cache"
    seam: ClassVar[str] = "modules"
    supports: ClassVar[str] = "transformers and UNets whose blocks hold attention modules"
    source: ClassVar[str] = "arXiv 2410.01723 (HarmoniCa), inference"

    steps: tuple[Line, ...] = Field(
        default=(),
        description="one line of 0s and 1s for each step: 1 computes, 0 fills in; without a 0 it "
        "is off",
    )
    by: By = Field(
        default="block",
        description="what one character stands for: every 'module'; the modules of one kind in "
        "one 'block'; or all of a 'kind' (self, cross, temporal, mlp)",
    )
    stretch: bool = Field(
        default=False,
        description="serve runs of another number of steps by the nearest line; else refuse them",
    )
    last: bool = Field(default=False, description="always compute the last step")

    @model_validator(mode="after")
    def _is_even(self) -> Self:
        problem = unfit(self.steps, self.by)
        if problem:
            raise ValueError(problem)
        return self

    @classmethod
    def off(cls) -> Self:
        """An empty table."""
        return cls()

    def why_off(self) -> str | None:
        """A table without a 0 computes everything."""
        return None if any("0" in line for line in self.steps) else "the table computes everything"

    def attach(self, site: Site) -> Iterator[Undo]:
        """Put the cache into every module.

        Raises:
            UnsupportedModel: For a network without such modules, with compiled blocks, or with
                another number of modules than the table is for.
        """
        from accel.cache.modules import ModuleCache

        yield site.claim("blocks")
        cache = ModuleCache(
            site.tally,
            grouping(site, self.steps, self.by),
            lambda column: self.guarded(Column.of(self.steps, column, self.stretch)),
            self.forecast,
            self.memory_limit,
        )
        yield from cache.attach(site)


class Measured(Accelerator):
    """Looks at what modules answer and changes nothing; for `build`, and in no list of methods."""

    name: ClassVar[str] = "cache.Measured"
    layer: ClassVar[str] = "block cache"
    seam: ClassVar[str] = "modules"
    supports: ClassVar[str] = Table.supports
    source: ClassVar[str] = "accel.cache.table"

    by: By
    _watch: ModuleWatch = PrivateAttr()

    @classmethod
    def off(cls) -> None:
        """It changes nothing as it is."""

    def why_off(self) -> None:
        """It always looks."""

    def attach(self, site: Site) -> Iterator[Undo]:
        """Look at every module."""
        from accel.cache.modules import ModuleWatch

        yield site.claim("blocks")
        self._watch = ModuleWatch(site.tally, partial(column_of, by=self.by))
        yield from self._watch.attach(site)

    def changes(self) -> list[dict[Hashable, float]]:
        """Step by step, the mean change of each column since the step before."""
        return self._watch.changes()


def build(
    pipe: Any,
    call: Mapping[str, Any],
    prompts: Sequence[str | Mapping[str, Any]],
    threshold: float,
    by: By = "block",
) -> Table:
    """Make a table for a pipeline from what its modules do on some prompts.

    Args:
        pipe: The pipeline.
        call: Arguments of its call, with the number of steps, without the prompt.
        prompts: What to measure on; where a pipeline takes no prompt, other arguments of a call.
        threshold: Summed change at which a column is computed; 0 computes everything.
        by: What one character of the table stands for.

    Raises:
        BadInput: Without prompts.
        UnsupportedModel: For a pipeline that `Table` does not serve.
    """
    own = ({"prompt": one} if isinstance(one, str) else dict(one) for one in prompts)
    return build_from(pipe, ({**call, **given} for given in own), threshold, by)


def build_from(
    pipe: Any, calls: Iterable[Mapping[str, Any]], threshold: float, by: By = "block"
) -> Table:
    """Make a table from what the modules of a pipeline do in some calls of equal length.

    A column is computed when its changes since its last compute sum up to the threshold; what is
    NaN is computed.

    Raises:
        BadInput: Without a call, or for calls of different numbers of steps.
        UnsupportedModel: For a pipeline that `Table` does not serve.
    """
    changes, columns = measure(pipe, calls, by)
    return chosen(changes, columns, threshold, by)


def measure(
    pipe: Any, calls: Iterable[Mapping[str, Any]], by: By = "block"
) -> tuple[list[dict[Hashable, float]], tuple[Hashable, ...]]:
    """Measure how outputs change from each step to the next: mean|new − old| / mean|old|.

    Nothing is cached. The mean is over calls, branches and the modules of a column.

    Returns:
        Step by step, by column, the change since the step before; and all columns in order.

    Raises:
        BadInput: Without a call, or for calls of different numbers of steps.
        UnsupportedModel: For a pipeline that `Table` does not serve, or a scheduler that evaluates
            more than once a step.
    """
    one_evaluation_a_step(pipe, Table.name, "cache.FORA")
    method = Measured(by=by)
    run = Run((method,), pipe)
    runs = []
    try:
        columns = dict.fromkeys(c for d in run.denoisers for c in columns_of(d, by))
        for call in calls:
            pipe(**call)
            runs.append(method.changes())
    finally:
        run.detach()
    if len({len(steps) for steps in runs}) != 1:
        raise BadInput(
            f"{len(runs)} calls of {sorted({len(steps) for steps in runs})} steps: a table is "
            "built from at least one prompt, and from calls of one number of steps."
        )
    return [_mean(steps) for steps in zip(*runs, strict=True)], tuple(columns)


def chosen(
    changes: Sequence[Mapping[Hashable, float]],
    columns: Sequence[Hashable],
    threshold: float,
    by: By,
) -> Table:
    """The table for what was measured, at a threshold."""
    lines = zip(*(_computed(column, changes, threshold) for column in columns), strict=True)
    return Table(steps=tuple("".join(line) for line in lines), by=by)


def _computed(
    column: Hashable, changes: Sequence[Mapping[Hashable, float]], threshold: float
) -> Iterator[str]:
    """A column of the table. What has no change because it had no step before is computed."""
    total = 0.0
    for step in changes:
        total += step.get(column, math.inf)
        due = not total < threshold
        total = 0.0 if due else total
        yield "1" if due else "0"


def _mean(runs: Sequence[Mapping[Hashable, float]]) -> dict[Hashable, float]:
    columns = dict.fromkeys(column for run in runs for column in run)
    values = {column: [run[column] for run in runs if column in run] for column in columns}
    return {column: sum(found) / len(found) for column, found in values.items()}
