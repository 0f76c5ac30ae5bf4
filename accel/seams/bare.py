"""Networks with shapes and no weights: plans attach to them as to whole ones, and nothing runs."""

from __future__ import annotations

from torch import nn


def is_bare(network: nn.Module) -> bool:
    """Whether all weights of a network are on torch's device ``meta``.

    Weights that accelerate took away for a while are not meant: it leaves a hook behind.
    """
    taken = any(hasattr(module, "_hf_hook") for module in network.modules())
    return not taken and {weight.device.type for weight in network.parameters()} == {"meta"}
