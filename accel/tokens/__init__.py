"""Token reduction: fewer image tokens in the place of many, and the way back. One method a file.

A *reduction* (`reduction`) merges and unmerges; `exclusive`, `matching` and `mixture` make them.
`layers` takes the self-attention of every network, `merging` runs it on merged tokens, `pruning`
runs whole blocks on some.
"""

from accel.tokens.importance import Importance as Importance
from accel.tokens.sada import SADA as SADA
from accel.tokens.todo import ToDo as ToDo
from accel.tokens.toma import ToMA as ToMA
from accel.tokens.tome import ToMe as ToMe
from accel.tokens.transforming import Transforming as Transforming

__all__ = ["SADA", "Importance", "ToDo", "ToMA", "ToMe", "Transforming"]
