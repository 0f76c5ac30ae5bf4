"""Methods that move weights or change how they are stored."""

from accel import memory
from roster.row import Row

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
}
