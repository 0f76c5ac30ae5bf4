"""Resolution: large pictures by a network that is asked about smaller ones. One method a file."""

from accel.resolution.bottleneck import Bottleneck as Bottleneck
from accel.resolution.pixelsmith import Pixelsmith as Pixelsmith

__all__ = ["Bottleneck", "Pixelsmith"]
