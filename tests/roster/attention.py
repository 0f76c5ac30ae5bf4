"""Methods of the attention itself."""

from accel.attention import GRAT, Backend
from roster.row import Row

UNORDERED = frozenset({"lumina2", "hunyuanimage", "zimage", "mochi"})
"""Networks whose order of tokens is not known."""

DENSE = frozenset({"chroma", "sana", "flux_kontext"})
"""A mask that adds 1 to some scores; linear attention; a picture of reference beside the own."""

ROWS = {
    "attention.Backend": Row(
        engine="attention",
        active=Backend(backend="_native_math"),
        variants=(Backend(),),
    ),
    "attention.GRAT": Row(
        engine="sparse attention",
        active=GRAT(box=(1, 2, 2), warm_up=0.2),
        variants=(GRAT(form="surrounding", box=(1, 2, 4), warm_up=0.0, dense_layers=1),),
        refused=UNORDERED,
        idle=DENSE,
    ),
}
