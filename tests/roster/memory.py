"""Methods that move weights, change how they are stored, or let less live at once."""

from tiny import PIPELINES

from accel import memory
from roster.row import Row

NO_UNETS = frozenset(tiny.blocks for tiny in PIPELINES.values()) - {"unet"}

HERE = {"onload_device": "cpu", "offload_device": "cpu"}

ROWS = {
    "memory.GroupOffload": Row(
        engine="memory",
        active=memory.GroupOffload(**HERE),
        variants=(
            memory.GroupOffload(num_blocks_per_group=2, text_encoders=True, vae=True, **HERE),
            memory.GroupOffload(offload_type="leaf_level", **HERE),
        ),
        lossless=True,
    ),
    "memory.LayerwiseCasting": Row(
        engine="casting",
        active=memory.LayerwiseCasting(),
        variants=(
            memory.LayerwiseCasting(storage="bfloat16"),
            memory.LayerwiseCasting(storage="float8_e5m2"),
        ),
    ),
    "memory.OperatorGrouping": Row(
        engine="slices",
        active=memory.OperatorGrouping(),
        variants=(memory.OperatorGrouping(spatial=2, temporal=3),),
        unserved=NO_UNETS,
        lossless=None,
    ),
    "memory.FeatureSlicing": Row(
        engine="slices",
        active=memory.FeatureSlicing(),
        variants=(memory.FeatureSlicing(temporal=1),),
        unserved=NO_UNETS,
        lossless=None,
    ),
}
