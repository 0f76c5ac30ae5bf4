"""Methods of the attention itself."""

from accel.attention import Backend
from roster.row import Row

ROWS = {
    "attention.Backend": Row(
        engine="attention",
        active=Backend(backend="_native_math"),
        variants=(Backend(),),
    ),
}
