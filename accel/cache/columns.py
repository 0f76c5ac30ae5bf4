"""Columns of a table: what one character of a line stands for, and the rule that it is.

Source: the router of HarmoniCa at inference, arXiv 2410.01723.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field

from accel.cache.policies import Listed
from accel.errors import UnsupportedModel

if TYPE_CHECKING:
    from accel.attach import Site
    from accel.seams.denoisers import Denoiser
    from accel.seams.modules import Module
    from accel.trajectory import Step

By = Literal["kind", "block", "module"]
Line = Annotated[str, Field(pattern="^[01]+$")]


def unfit(lines: Sequence[str], by: By) -> str | None:
    """Why some lines are no table, or ``None``."""
    widths = sorted({len(line) for line in lines})
    if len(widths) > 1:
        return f"the lines of a table are of one length, not of {widths}"
    if by == "kind" and widths not in ([], [4]):
        return "a table by kind has 4 characters a line: self, cross, temporal, mlp"
    return None


def grouping(site: Site, lines: Sequence[str], by: By) -> Callable[[Module], int | None]:
    """From a module to its place in the lines; ``None`` where it is always computed.

    Raises:
        UnsupportedModel: For a network with another number of columns.
    """
    columns = {denoiser: _places(denoiser, len(lines[0]), by) for denoiser in site.denoisers}
    skipped = {
        column for column in range(len(lines[0])) if any(line[column] == "0" for line in lines)
    }

    def group(module: Module) -> int | None:
        column = columns[module.denoiser][column_of(module, by)]
        return column if column in skipped else None

    return group


def _places(denoiser: Denoiser, width: int, by: By) -> dict[Hashable, int]:
    """Place of each column in a line."""
    names = columns_of(denoiser, by)
    if len(names) != width:
        raise UnsupportedModel(
            f"The table has {width} characters a line, but {type(denoiser.core).__name__} has "
            f"{len(names)} (by {by}): it does not fit. Build a table for this network "
            "with accel.cache.table.build."
        )
    return {name: index for index, name in enumerate(names)}


class Column:
    """The rule of one column: its steps, where need be those nearest in another number of steps."""

    def __init__(self, listed: Listed, stretch: bool) -> None:
        self._listed = listed
        self._stretch = stretch

    @classmethod
    def of(cls, lines: Sequence[str], column: Any, stretch: bool) -> Self:
        """The rule of a column of some lines."""
        computed = tuple(i for i, line in enumerate(lines) if line[column] == "1")
        return cls(Listed(computed, len(lines), "The table"), stretch)

    def due(self, step: Step, value: float | None) -> bool:
        """Whether the table says so.

        Raises:
            UnsupportedModel: If the run has another number of steps and is not to be stretched,
                or if the pipeline cuts its schedule unseen.
        """
        if not self._stretch or self._listed.total in (None, step.total):
            return self._listed.due(step, value)
        if step.turns is None:
            raise UnsupportedModel(
                "This pipeline cuts its schedule where no public call shows it, so a table cannot "
                "be stretched to the run: it does not fit. Use a scheduler that has "
                "set_begin_index, or cache.FORA."
            )
        share = step.turn / max(step.turns - 1, 1)
        return round(share * (self._listed.total - 1)) in self._listed.steps

    def computed(self, step: Step) -> None:
        """Nothing is kept."""


def column_of(module: Module, by: By) -> Hashable:
    """Which column of a table is for a module."""
    if by == "kind":
        return module.kind
    return (module.block, module.kind) if by == "block" else module.index


def columns_of(denoiser: Denoiser, by: By) -> tuple[Hashable, ...]:
    """The columns of a table for a network, in order."""
    from accel.seams.modules import KINDS, find_modules

    if by == "kind":
        return KINDS
    return tuple(dict.fromkeys(column_of(module, by) for module in find_modules(denoiser)))
