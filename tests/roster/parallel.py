"""Work shared out over processes: in one alone there is nothing to share; see `test_parallel`."""

from tiny import PIPELINES

from parallel import (
    ASG,
    CFG,
    PCPP,
    USP,
    VAE,
    AsyncDiff,
    DistriFusion,
    DualParal,
    PipeFusion,
    Ring,
    Ulysses,
    VideoInfinity,
    Windows,
)
from roster.row import Row

ALONE = frozenset(PIPELINES)
"""In the one process of the laws they find nothing to do, or refuse the run."""

NO_UNET = frozenset(tiny.blocks for tiny in PIPELINES.values() if tiny.blocks != "unet")
IN_TIME = frozenset({"animatediff", "svd"})

SHARED = frozenset(
    {
        *("sd3", "sd35_skip_layer", "sd3_controlnet", "qwenimage", "pixart_sigma", "ltx"),
        *("flux", "flux_schnell", "flux_cfg", "flux_controlnet", "flux_img2img", "flux_kontext"),
        *("wan21", "wan22", "cogvideox", "hunyuanvideo", "mochi"),
        *("chroma", "hunyuanimage", "zimage", "lumina2", "cogview4", "dit"),
    }
)
"""Tiny pipelines of whose networks it is known where their tokens are shared out."""

NO_PLAN = frozenset(PIPELINES) - SHARED
NO_PATCHES = frozenset({"hunyuanimage", "mochi", "zimage", "chroma"})
"""Tiny pipelines with text neither first nor last, two streams, or masks by query."""

OTHER_DECODER = frozenset(
    {"svd", "hunyuanimage", "qwenimage", "sana", "wan21", "wan22"}
    | {"ltx", "cogvideox", "hunyuanvideo", "mochi"}
)
"""Tiny pipelines whose decoder is another than the one of Stable Diffusion and Flux."""

NO_CLIP = frozenset(PIPELINES) - {"wan21", "wan22"}
"""Tiny pipelines of which parallel.DualParal does not know where the frames of a block lie."""

WHOLE = frozenset({"animatediff", "svd", "flux_kontext", "zimage", "dit"}) | {
    tiny.name for tiny in PIPELINES.values() if tiny.media == "video"
}
"""Tiny pipelines whose pictures parallel.ASG cannot make of patches, and those of clips."""

NO_FRAMES = frozenset(PIPELINES) - {
    *("animatediff", "svd", "ltx", "wan21", "wan22", "cogvideox", "hunyuanvideo")
}
"""Tiny pipelines that make no clip, and Mochi, whose attention does not tell whose it is."""

ROWS = {
    "parallel.ASG": Row(
        "patches",
        ASG(base=16),
        refused=WHOLE,
        variants=(ASG(base=16, mode="stale", warmup=0, shuffle=False),),
        follows=frozenset({"uncond"}),
    ),
    "parallel.AsyncDiff": Row("processes", AsyncDiff(), idle=ALONE),
    "parallel.CFG": Row("processes", CFG(), idle=ALONE, branches=True),
    "parallel.DistriFusion": Row(
        "processes",
        DistriFusion(),
        unserved=NO_UNET,
        refused=IN_TIME,
        idle=ALONE,
        variants=(DistriFusion(mode="sync"),),
    ),
    "parallel.DualParal": Row(
        "blocks of a clip",
        DualParal(frames=1, context=1),
        refused=NO_CLIP,
        variants=(DualParal(frames=2, context=1, left="latest", noise="shuffled"),),
    ),
    "parallel.PCPP": Row("processes", PCPP(), unserved=NO_UNET, refused=IN_TIME, idle=ALONE),
    "parallel.PipeFusion": Row("processes", PipeFusion(), refused=NO_PLAN | NO_PATCHES, idle=ALONE),
    "parallel.Ring": Row("processes", Ring(), refused=NO_PLAN, idle=ALONE),
    "parallel.USP": Row("processes", USP(), refused=NO_PLAN, idle=ALONE),
    "parallel.Ulysses": Row("processes", Ulysses(), refused=NO_PLAN, idle=ALONE),
    "parallel.VAE": Row("processes", VAE(), refused=OTHER_DECODER, idle=ALONE, lossless=None),
    "parallel.VideoInfinity": Row("processes", VideoInfinity(), refused=NO_FRAMES, idle=ALONE),
    "parallel.Windows": Row("processes", Windows(), idle=ALONE),
}
