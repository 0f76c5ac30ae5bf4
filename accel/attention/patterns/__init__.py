"""Patterns of sparse attention: frozen values that compose with ``&`` and ``|``. No torch here."""

from accel.attention.patterns.grat import CrissCross as CrissCross
from accel.attention.patterns.grat import Surrounding as Surrounding
from accel.attention.patterns.neighbourhood import Neighbourhood as Neighbourhood
from accel.attention.patterns.neighbourhood import sliding_tile as sliding_tile
from accel.attention.patterns.pattern import Full as Full
from accel.attention.patterns.pattern import Pattern as Pattern
from accel.attention.patterns.pattern import PerHead as PerHead
from accel.attention.patterns.radial import Radial as Radial
from accel.attention.patterns.sparse_videogen import Spatial as Spatial
from accel.attention.patterns.sparse_videogen import Temporal as Temporal

__all__ = [
    "CrissCross",
    "Full",
    "Neighbourhood",
    "Pattern",
    "PerHead",
    "Radial",
    "Spatial",
    "Surrounding",
    "Temporal",
    "sliding_tile",
]
