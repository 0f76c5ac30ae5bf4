"""Work shared out over processes: in one alone there is nothing to share; see `test_parallel`."""

from tiny import PIPELINES

from parallel import CFG, PCPP, AsyncDiff, DistriFusion
from roster.row import Row

ALONE = frozenset(PIPELINES)
"""In the one process of the laws they find nothing to do, or refuse the run."""

NO_UNET = frozenset(tiny.blocks for tiny in PIPELINES.values() if tiny.blocks != "unet")

ROWS = {
    "parallel.AsyncDiff": Row("processes", AsyncDiff(), idle=ALONE),
    "parallel.CFG": Row("processes", CFG(), idle=ALONE, branches=True),
    "parallel.DistriFusion": Row(
        "processes",
        DistriFusion(),
        unserved=NO_UNET,
        idle=ALONE,
        variants=(DistriFusion(mode="sync"),),
    ),
    "parallel.PCPP": Row("processes", PCPP(), unserved=NO_UNET, idle=ALONE),
}
