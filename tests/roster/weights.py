"""Methods that compute in int8. Ends are not skipped: of tiny networks they are nearly all."""

from hashlib import sha256
from pathlib import Path

from tiny import PIPELINES

from accel import weights
from roster.row import Row

INNER = ("embedders", "modulation", "output")

SCALES = Path(__file__).with_name("int8.safetensors")
"""Made up, and for any model: `test_weights_scales` holds what is in it."""

TIES = frozenset(PIPELINES)
"""Rounding of activations to 8 bits turns over where the stock pipeline's own rounding differs, in
a batch of another size. What one layer does is the same in company (`test_weights`)."""

STATIC = weights.Int8Static(
    skip=INNER, scales=SCALES, sha256=sha256(SCALES.read_bytes()).hexdigest()
)

ROWS = {
    "weights.Int8Dynamic": Row(
        engine="int8",
        active=weights.Int8Dynamic(skip=INNER),
        variants=(weights.Int8Dynamic(skip=()),),
        unsteady=TIES,
    ),
    "weights.Int8WeightOnly": Row(
        engine="int8",
        active=weights.Int8WeightOnly(skip=INNER),
        variants=(weights.Int8WeightOnly(skip=()),),
    ),
    "weights.Int8Static": Row(
        engine="int8",
        active=STATIC,
        unready=frozenset({"*"}),
        unsteady=TIES,
    ),
}
