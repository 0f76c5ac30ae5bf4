"""Devices and the links between them, as the model of costs sees them: described, or known by name.

A description is a TOML or JSON file with the fields of `Cluster`, such as::

    operations = 147e12
    bandwidth = 230e9
    latency = 2e-5
    fixed = 1e-5
    memory = 80e9
    per_node = 8
    far_bandwidth = 20e9
    far_latency = 5e-5
"""

from __future__ import annotations

import json
import math
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from accel.errors import BadInput

Positive = Annotated[float, Field(gt=0)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclass(frozen=True)
class Traffic:
    """What a device sends.

    Attributes:
        bytes: In all.
        messages: In so many.
        among: Devices that talk to each other: all to all, or 2: to its neighbours.
        stride: How far apart they are, in devices.
    """

    bytes: float
    messages: float
    among: int
    stride: int = 1


@dataclass(frozen=True, config={"extra": "forbid"})
class Cluster:
    """Devices that are alike, and links between them that are alike within a node, and beyond.

    Attributes:
        devices: How many.
        operations: That a device makes a second, in this network; multiply-adds count twice.
        bandwidth: Bytes a second that a device sends.
        latency: Seconds of a message, however short.
        fixed: Seconds of an operator that do not get shorter with its work: launches, Python.
        memory: Bytes of a device.
        per_node: Devices in a node; 0: all are in one.
        far_bandwidth: Bytes a second that a device sends to other nodes.
        far_latency: Seconds of a message to them.
    """

    devices: Annotated[int, Field(ge=1)]
    operations: Positive
    bandwidth: Positive
    latency: Seconds
    fixed: Seconds = 0.0
    memory: Positive = math.inf
    per_node: Annotated[int, Field(ge=0)] = 0
    far_bandwidth: Positive = math.inf
    far_latency: Seconds = 0.0

    def seconds(self, traffic: Traffic) -> float:
        """How long a device sends, where all do the same.

        Of those that talk to their neighbours the pair that is in two nodes counts.
        """
        far = self._far(traffic)
        near = traffic.messages * self.latency + traffic.bytes / self.bandwidth
        beyond = traffic.messages * self.far_latency + traffic.bytes / self.far_bandwidth
        return (1 - far) * near + far * beyond

    def _far(self, traffic: Traffic) -> float:
        """Which share goes to other nodes."""
        span = self.devices if traffic.among == 2 else traffic.among * traffic.stride
        if not self.per_node or span <= self.per_node:
            return 0.0
        if traffic.among == 2:
            return 1.0
        inside = max(1, self.per_node // traffic.stride)
        return (traffic.among - inside) / (traffic.among - 1)


A100 = Cluster(
    devices=1,
    operations=167e12,
    bandwidth=230e9,
    latency=2e-5,
    fixed=8e-6,
    memory=80e9,
    per_node=8,
    far_bandwidth=20e9,
    far_latency=5e-5,
)

NAMED = {
    "a100-nvlink": A100,
    "a100-pcie": replace(A100, bandwidth=20e9),
    "h100-nvlink": replace(A100, operations=470e12, bandwidth=350e9, far_bandwidth=40e9),
    "a5000-pcie": replace(A100, operations=56e12, bandwidth=12e9, memory=24e9, far_bandwidth=10e9),
    "4090-pcie": replace(A100, operations=83e12, bandwidth=12e9, memory=24e9, far_bandwidth=10e9),
}
"""Clusters by name: nodes of eight, in half precision, without a compiler.

``a100-nvlink``: operations and ``fixed`` are such that SDXL at 1280 x 1920 takes what DistriFusion
(arXiv 2402.19481, figure 1) measured on one A100 and on four: 12.3 and 4.16 s for 50 steps. That is
half of the 312e12 operations a second that NVIDIA states, and 8 µs an operator. NVLink has 300e9
bytes a second each way by the same data sheet, of which collectives reach some three quarters; a
card of the bus (PCIe 4.0 x16: 32e9) two thirds without, and a third through the host's memory, as
A5000 and 4090 have it. The others have the same half of what their data sheets state (dense, half
precision): H100 SXM 989e12 and NVLink 450e9 each way, A5000 111e12, 4090 165e12. Nodes have a link
of 200 Gbit/s, 400 for H100, and what their bus allows.
"""


def described(name: str) -> Cluster:
    """A cluster by its name, or by the file that describes it.

    Raises:
        BadInput: If there is no such name or file, or the file does not describe one.
    """
    if name in NAMED:
        return NAMED[name]
    path = Path(name)
    if not path.is_file():
        raise BadInput(
            f"--cluster {name}: there is no such file, and no cluster of that name. Known are "
            f"{', '.join(NAMED)}."
        )
    text = path.read_text()
    try:
        told = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
        return TypeAdapter(Cluster).validate_python({"devices": 1} | told)
    except (json.JSONDecodeError, tomllib.TOMLDecodeError, TypeError) as error:
        raise BadInput(f"{path} cannot be read: {error}.") from error
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()]
        raise BadInput(
            f"{path} does not describe a cluster ({'; '.join(lines)}): it needs operations, "
            "bandwidth and latency, and may have fixed, memory, per_node, far_bandwidth and "
            "far_latency."
        ) from error
