"""Which rows go into one call of a pipeline: a pure function of the input and the chosen sizes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from app.batch.job import Row


@dataclass(frozen=True, slots=True)
class Call:
    """Rows that are made in one call of a pipeline, or have been.

    Attributes:
        rows: In the order of the input.
    """

    rows: tuple[Row, ...]

    @property
    def ids(self) -> tuple[str, ...]:
        """Those of its rows."""
        return tuple(row.id for row in self.rows)

    @property
    def key(self) -> str:
        """What tells it from all others."""
        return hashlib.sha256("\0".join(self.ids).encode()).hexdigest()[:16]


def groups(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows that could be made in one call, by the digest of their group.

    Groups of one model stand together, so that it is loaded once; else they are in the order of
    the input.
    """
    by_group: dict[str, list[Row]] = {}
    for row in rows:
        by_group.setdefault(row.form.group, []).append(row)
    models: dict[str, int] = {}
    for group in by_group.values():
        models.setdefault(group[0].form.model, len(models))
    ordered = sorted(by_group, key=lambda name: models[by_group[name][0].form.model])
    return {name: by_group[name] for name in ordered}


def calls(rows: Sequence[Row], sizes: Mapping[str, int]) -> list[Call]:
    """All calls of a job.

    Args:
        rows: In the order of the input.
        sizes: Rows in a call, by group.
    """
    return [
        Call(tuple(members[start : start + sizes[name]]))
        for name, members in groups(rows).items()
        for start in range(0, len(members), sizes[name])
    ]
