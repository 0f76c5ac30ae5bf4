"""Which lowering computes a table: the one that is asked for, or the fastest that was measured."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial
from typing import TYPE_CHECKING

from accel.attention import timing
from accel.attention.lowerings import NAMES, refusals
from accel.errors import BadInput

if TYPE_CHECKING:
    from torch import Tensor

    from accel.attention.blocks import BlockSparse, ByHead
    from accel.attention.lowerings.lowering import Lowering
    from accel.seams.attention import Asked

AUTO = "auto"

OR_DENSE = "auto-dense"
"""As `AUTO`; where dense attention is faster than all lowerings, it stays dense."""

REFERENCE = "dense"
"""Saves nothing, so that it is taken by force alone."""


class Choice:
    """The lowering for each kind of table.

    Where one alone can serve, as on the CPU, nothing is measured. Where several can, the choice
    may be another in the next run, and with it the last bits: force one to have them again.

    Args:
        wanted: A lowering, ``auto`` or ``auto-dense``.
        seconds: What measures.

    Attributes:
        failed: By lowering, why it could not be measured.
        forced: Whether one lowering is wanted and no other.
        yields: Whether attention stays dense where that is faster than by any lowering.
        seconds: What measures.
    """

    def __init__(self, wanted: str, seconds: timing.Clock | None = None) -> None:
        self.failed: dict[str, str] = {}
        self.forced = wanted not in (AUTO, OR_DENSE)
        self.yields = wanted == OR_DENSE
        self._wanted = wanted
        self.seconds = seconds or timing.seconds
        self._chosen: dict[Hashable, str] = {}

    def of(
        self,
        key: Hashable,
        table: BlockSparse | ByHead,
        make: Callable[[str], Lowering],
        asked: Asked,
        text_mask: Tensor | None,
    ) -> str:
        """The name of the lowering.

        Args:
            key: What attentions that take equally long have in common: tables and shapes.
            table: One of them.
            make: Makes the lowering of a name for the table, or finds it made. What it takes
                counts.
            asked: What is to be computed.
            text_mask: Which text is valid.

        Raises:
            BadInput: If the lowering that is wanted cannot serve the table here.
        """
        device = asked.query.device
        if self.forced:
            return self._wanted
        key = (key, asked.query.dtype, device)
        if key not in self._chosen:
            refused = refusals(table, device)
            names = [name for name in NAMES if name != REFERENCE and name not in refused]
            self._chosen[key] = (
                names[0] if len(names) == 1 else self._fastest(names, make, asked, text_mask)
            )
        return self._chosen[key]

    def _fastest(
        self,
        names: list[str],
        make: Callable[[str], Lowering],
        asked: Asked,
        text_mask: Tensor | None,
    ) -> str:
        found: dict[str, float] = {}
        for name in names:
            try:
                run = partial(_run, make, name, asked, text_mask)
                found[name] = self.seconds(run, asked.query.device)
            except RuntimeError as error:  # a kernel that this device or width does not have
                self.failed[name] = str(error).partition("\n")[0]
        if not found:
            reasons = "; ".join(f"{name}: {why}" for name, why in self.failed.items())
            raise BadInput(f"No lowering serves this attention ({reasons}): force another one.")
        return min(found, key=lambda name: found[name])


def _run(
    make: Callable[[str], Lowering], name: str, asked: Asked, text_mask: Tensor | None
) -> Tensor:
    return make(name)(asked.query, asked.key, asked.value, asked.scale, text_mask)
