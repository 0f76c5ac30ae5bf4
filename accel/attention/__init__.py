"""Attention: by what it is computed, and which image token looks at which. One method a file.

Where text and image tokens lie says `accel.seams.layout`. A *pattern* says which image query may
attend to which image key; patterns compose with ``&`` and ``|`` (`patterns`). `blocks` compiles a
pattern for a layout into groups of queries that share their keys, and `lowerings` compute attention
from that. Text is always kept: image queries attend to every valid text token, text queries to
every valid token, and nothing attends to padding.
"""

from accel.attention.backend import Backend as Backend
from accel.attention.grat import GRAT as GRAT
from accel.attention.neighbourhood import Neighbourhood as Neighbourhood
from accel.attention.pattern import Pattern as Pattern
from accel.attention.radial import Radial as Radial

__all__ = ["GRAT", "Backend", "Neighbourhood", "Pattern", "Radial"]
