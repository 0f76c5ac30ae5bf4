"""Attention: by what it is computed, and which image token looks at which. One method a file.

Where text and image tokens lie says `accel.seams.layout`. A *pattern* says which image query may
attend to which image key; patterns compose with ``&`` and ``|`` (`patterns`). `blocks` compiles a
pattern for a layout into groups of queries that share their keys, and `lowerings` compute attention
from that. Text is always kept: image queries attend to every valid text token, text queries to
every valid token, and nothing attends to padding.
"""

from accel.attention.adaspa import AdaSpa as AdaSpa
from accel.attention.backend import Backend as Backend
from accel.attention.grat import GRAT as GRAT
from accel.attention.neighbourhood import Neighbourhood as Neighbourhood
from accel.attention.pattern import Pattern as Pattern
from accel.attention.radial import Radial as Radial
from accel.attention.searched import Searched as Searched
from accel.attention.sparge import SpargeAttn as SpargeAttn
from accel.attention.svg import SVG as SVG
from accel.attention.svg2 import SVG2 as SVG2

__all__ = [
    "GRAT",
    "SVG",
    "SVG2",
    "AdaSpa",
    "Backend",
    "Neighbourhood",
    "Pattern",
    "Radial",
    "Searched",
    "SpargeAttn",
]
