"""Int8 weights and activations, these scaled as they come: products of int8 matrices.

Source: torchao, `Int8DynamicActivationInt8WeightConfig`.
"""

from __future__ import annotations

from typing import ClassVar

from accel.attach import Site
from accel.weights.fields import Form, Int8


class Int8Dynamic(Int8):
    """Compute the linear layers in int8, with a scale for each token and each output channel.

    Needs no calibration: the scales follow what comes, at every noise level. Faster where the
    device multiplies int8 matrices faster than floating point (CUDA; a CPU with VNNI or AMX), and
    many times slower on a CPU without. The original weights wait on the CPU and come back bit for
    bit when the plan comes off: memory is saved on an accelerator, not on a CPU.
    """

    name: ClassVar[str] = "weights.Int8Dynamic"
    source: ClassVar[str] = (
        "Int8DynamicActivationInt8WeightConfig of torchao, https://github.com/pytorch/ao"
    )
    integers: ClassVar[bool] = True

    def _form(self, _site: Site) -> Form:
        from accel.seams.quantizing import dynamic

        return Form(dynamic())
