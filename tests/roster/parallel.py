"""Work shared out over processes: in one alone there is nothing to share; see `test_parallel`."""

from tiny import PIPELINES

from parallel import CFG, PCPP, USP, VAE, AsyncDiff, DistriFusion, Ring, Ulysses
from roster.row import Row

ALONE = frozenset(PIPELINES)
"""In the one process of the laws they find nothing to do, or refuse the run."""

NO_UNET = frozenset(tiny.blocks for tiny in PIPELINES.values() if tiny.blocks != "unet")
IN_TIME = frozenset({"animatediff", "svd"})

SHARED = frozenset(
    {
        *("sd3", "sd35_skip_layer", "sd3_controlnet", "qwenimage", "pixart_sigma", "ltx"),
        *("flux", "flux_schnell", "flux_cfg", "flux_controlnet", "flux_img2img", "flux_kontext"),
        *("wan21", "wan22"),
    }
)
"""Tiny pipelines of whose networks it is known where their tokens are shared out."""

NO_PLAN = frozenset(PIPELINES) - SHARED

OTHER_DECODER = frozenset(
    {"svd", "hunyuanimage", "qwenimage", "sana", "wan21", "wan22"}
    | {"ltx", "cogvideox", "hunyuanvideo", "mochi"}
)
"""Tiny pipelines whose decoder is another than the one of Stable Diffusion and Flux."""

ROWS = {
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
    "parallel.PCPP": Row("processes", PCPP(), unserved=NO_UNET, refused=IN_TIME, idle=ALONE),
    "parallel.Ring": Row("processes", Ring(), refused=NO_PLAN, idle=ALONE),
    "parallel.USP": Row("processes", USP(), refused=NO_PLAN, idle=ALONE),
    "parallel.Ulysses": Row("processes", Ulysses(), refused=NO_PLAN, idle=ALONE),
    "parallel.VAE": Row("processes", VAE(), refused=OTHER_DECODER, idle=ALONE, lossless=None),
}
