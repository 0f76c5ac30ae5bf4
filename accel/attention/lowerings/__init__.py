"""Ways to compute the same sparse attention. All take and give the same (`lowering.Lowering`)."""

from __future__ import annotations

import torch

from accel.attention.blocks import BlockSparse, ByHead
from accel.attention.lowerings import xformers
from accel.attention.lowerings.dense import Dense
from accel.attention.lowerings.flex import Flex
from accel.attention.lowerings.gather import Gather
from accel.attention.lowerings.lowering import HeadByHead, Lowering
from accel.attention.lowerings.xformers import XFormers
from accel.errors import BadInput

NAMES = ("dense", "gather", "flex", "xformers")


def lowered(name: str, table: BlockSparse | ByHead) -> Lowering:
    """A lowering made for a table.

    Args:
        name: ``dense``, ``gather``, ``flex`` or ``xformers``.
        table: Which group attends to which cell, or that for each set of heads.

    Raises:
        BadInput: For another name, or a lowering that cannot serve the table where it is.
    """
    if isinstance(table, ByHead):
        return HeadByHead([(heads, lowered(name, one)) for heads, one in table.parts])
    match name:
        case "dense":
            return Dense(table)
        case "gather":
            return Gather(table)
        case "flex":
            return Flex(table)
        case "xformers":
            return XFormers(table)
    raise BadInput(f"There is no lowering {name!r}: take one of {', '.join(NAMES)}.")


def refusals(table: BlockSparse | ByHead, device: torch.device | str) -> dict[str, str]:
    """Which lowerings are no choice for a table on a device, and why; all others can serve.

    ``flex`` can be forced on the CPU, where it is right and slow.
    """
    device = torch.device(device)
    found = {}
    if device.type != "cuda":
        found["flex"] = f"FlexAttention is a kernel on CUDA only, and attention is on {device.type}"
    parts = [one for _, one in table.parts] if isinstance(table, ByHead) else [table]
    reasons = [reason for one in parts if (reason := xformers.refusal(one, device))]
    if reasons:
        found["xformers"] = reasons[0]
    return found
