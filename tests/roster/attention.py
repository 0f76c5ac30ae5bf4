"""Methods of the attention itself."""

from tiny import PIPELINES

from accel.attention import GRAT, Backend, Neighbourhood, Pattern, Radial
from roster.row import Row

UNORDERED = frozenset({"lumina2", "hunyuanimage", "zimage", "mochi"})
"""Networks whose order of tokens is not known."""

DENSE = frozenset({"chroma", "sana", "flux_kontext"})
"""A mask that adds 1 to some scores; linear attention; a picture of reference beside the own."""

CLIPS = frozenset({"wan21", "wan22", "ltx", "cogvideox", "hunyuanvideo"})
"""Networks whose attention looks over frames."""

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
    "attention.Neighbourhood": Row(
        engine="sparse attention",
        active=Neighbourhood(window=(0, 4, 4), stride=(1, 2, 2), warm_up=0.2),
        variants=(
            Neighbourhood(form="sliding tile", window=(1, 1, 3), stride=(1, 2, 2), warm_up=0.0),
            Neighbourhood(window=(2, 3, 3), stride=(1, 1, 1), dilation=(1, 2, 1), dense_layers=1),
        ),
        refused=UNORDERED,
        idle=DENSE,
    ),
    "attention.Pattern": Row(
        engine="sparse attention",
        active=Pattern(expression="Surrounding((1, 2, 2), 0) | CrissCross((1, 4, 4))", warm_up=0.2),
        variants=(
            Pattern(
                expression="CrissCross((2, 2, 2)) & Surrounding((1, 2, 2), 2)", lowering="dense"
            ),
        ),
        refused=UNORDERED,
        idle=DENSE,
    ),
    "attention.Radial": Row(
        engine="sparse attention",
        active=Radial(decay=0.1, block=8, warm_up=0.2),
        variants=(Radial(decay=0.1, block=16, exact=True, sink=True, warm_up=0.0),),
        refused=UNORDERED,
        idle=frozenset(PIPELINES) - CLIPS,
    ),
}
