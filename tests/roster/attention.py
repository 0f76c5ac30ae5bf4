"""Methods of the attention itself."""

from tiny import PIPELINES

from accel.attention import (
    GRAT,
    SVG,
    SVG2,
    AdaSpa,
    Backend,
    Neighbourhood,
    Pattern,
    Radial,
    Searched,
    SpargeAttn,
)
from roster.row import Row

UNORDERED = frozenset({"lumina2", "hunyuanimage", "zimage"})
"""Networks whose order of tokens is not known."""

DENSE = frozenset({"chroma", "sana", "flux_kontext"})
"""A mask that adds 1 to some scores; linear attention; a picture of reference beside the own."""

CLIPS = frozenset({"wan21", "wan22", "ltx", "cogvideox", "hunyuanvideo", "mochi"})
"""Networks whose attention looks over frames."""

FORCED = {"lowering": "gather"}
"""What is forced is not timed at these lengths, and nobody is warned that it does not pay."""

ROWS = {
    "attention.Backend": Row(
        engine="attention",
        active=Backend(backend="_native_math"),
        variants=(Backend(),),
        exact=(Backend(),),
    ),
    "attention.GRAT": Row(
        engine="sparse attention",
        active=GRAT(box=(1, 2, 2), warm_up=0.2, **FORCED),
        variants=(GRAT(form="surrounding", box=(1, 2, 4), warm_up=0.0, dense_layers=1, **FORCED),),
        refused=UNORDERED,
        idle=DENSE,
    ),
    "attention.Neighbourhood": Row(
        engine="sparse attention",
        active=Neighbourhood(window=(0, 4, 4), stride=(1, 2, 2), warm_up=0.2, **FORCED),
        variants=(
            Neighbourhood(
                form="sliding tile", window=(1, 1, 3), stride=(1, 2, 2), warm_up=0.0, **FORCED
            ),
            Neighbourhood(
                window=(2, 3, 3), stride=(1, 1, 1), dilation=(1, 2, 1), dense_layers=1, **FORCED
            ),
        ),
        refused=UNORDERED,
        idle=DENSE,
    ),
    "attention.Pattern": Row(
        engine="sparse attention",
        active=Pattern(
            expression="Surrounding((1, 2, 2), 0) | CrissCross((1, 4, 4))", warm_up=0.2, **FORCED
        ),
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
        active=Radial(decay=0.1, block=8, warm_up=0.2, **FORCED),
        variants=(Radial(decay=0.1, block=16, exact=True, sink=True, warm_up=0.0, **FORCED),),
        refused=UNORDERED,
        idle=frozenset(PIPELINES) - CLIPS,
    ),
    "attention.Searched": Row(
        engine="searched attention",
        # one search, before rounding has grown: later it turns ties over between alone and
        # together, as it does in the second network of Wan 2.2, which begins in the middle
        unsteady=frozenset({"wan22"}),
        active=Searched(
            block=8, cell=4, share=0.6, likeness=-1.0, when=(0.0,), warm_up=0.0, **FORCED
        ),
        variants=(
            Searched(block=8, cell=4, share=0.6, likeness=-1.0, warm_up=0.2, **FORCED),
            Searched(
                indicator="exact", selection="top-k", block=4, cell=8, when=(0.2, 0.5), **FORCED
            ),
            Searched(indicator="low-bit", block=8, cell=8, share=0.5, when=(0.0, 0.6), **FORCED),
            Searched(
                indicator="centroids", selection="top-k", groups=4, cells=7, first=3, **FORCED
            ),
        ),
        refused=UNORDERED,
        idle=DENSE,
    ),
    "attention.AdaSpa": Row(
        engine="searched attention",
        active=AdaSpa(block=8, keep=0.3, moved=0.5, **FORCED),
        refused=UNORDERED,
        idle=DENSE,
    ),
    "attention.SpargeAttn": Row(
        engine="searched attention",
        active=SpargeAttn(block=8, cell=4, share=0.6, likeness=-1.0, **FORCED),
        refused=UNORDERED,
        idle=DENSE,
    ),
    "attention.SVG2": Row(
        engine="searched attention",
        active=SVG2(groups=2, cells=4, share=0.6, first=2, later=1, **FORCED),
        refused=UNORDERED,
        idle=DENSE,
    ),
    "attention.SVG": Row(
        engine="searched attention",
        active=SVG(keep=0.9, block=4, dense_layers=0, samples=16, **FORCED),
        refused=UNORDERED,
        idle=DENSE,
    ),
}
