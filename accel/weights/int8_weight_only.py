"""Int8 weights, activations as they are: less memory, the same arithmetic.

Source: torchao, `Int8WeightOnlyConfig`.
"""

from __future__ import annotations

from typing import ClassVar

from accel.attach import Site
from accel.weights.fields import Form, Int8


class Int8WeightOnly(Int8):
    """Store the linear layers in int8, a scale for each output channel; compute as before.

    The product is one of floating point: each call widens the weights, so this saves memory and
    no time, except where reading weights is what takes the time. The original weights wait on the
    CPU and come back bit for bit when the plan comes off: memory is saved on an accelerator, not
    on a CPU.
    """

    name: ClassVar[str] = "weights.Int8WeightOnly"
    source: ClassVar[str] = "Int8WeightOnlyConfig of torchao, https://github.com/pytorch/ao"
    integers: ClassVar[bool] = False

    def _form(self, _site: Site) -> Form:
        from accel.seams.quantizing import weight_only

        return Form(weight_only())
