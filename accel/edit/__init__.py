"""Edits of a picture: from its inversion, or of the region that changes alone."""

from accel.edit.inversion import Inversion as Inversion
from accel.edit.inversion import invert as invert
from accel.edit.sparse import Edited as Edited
from accel.edit.sparse import Edits as Edits
from accel.edit.sparse import sparse as sparse

__all__ = ["Edited", "Edits", "Inversion", "invert", "sparse"]
