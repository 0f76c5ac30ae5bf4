"""How long each way of sharing the work takes on a described cluster: a model of costs.

A step takes what its operations take on one device, plus what does not get shorter, plus what is
sent and not hidden behind the operations. Sending takes a latency for each message, and bytes over
bandwidth. No device is slower than another, and no link than another: of real clusters it says what
is possible, not what will be. Figures of one process and of a link can be measured
(`accel explain --devices N`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from parallel.components import cut
from parallel.work import Work


@dataclass(frozen=True)
class Cluster:
    """Devices that are alike, and links between them that are alike.

    Attributes:
        devices: How many.
        operations: That a device makes a second, in this network.
        bandwidth: Bytes a second that a device sends.
        latency: Seconds of a message, however short.
        fixed: Seconds of a call that do not get shorter with the work: launches, Python.
    """

    devices: int
    operations: float
    bandwidth: float
    latency: float
    fixed: float = 0.0

    def sent(self, size: float, messages: float = 1.0) -> float:
        """Seconds that a device takes to send so many bytes in so many messages."""
        return messages * self.latency + size / self.bandwidth


@dataclass(frozen=True)
class Prediction:
    """What one way of sharing the work takes.

    Attributes:
        method: Its name.
        seconds: Of the denoising of one picture.
        faster: Than one device.
        bytes: That a device sends for it.
        reason: Why it does not serve; empty if it does.
    """

    method: str
    seconds: float
    faster: float
    bytes: float
    reason: str = ""


@dataclass(frozen=True)
class Cost:
    """A step on several devices.

    Attributes:
        share: Of the operations of a step that the busiest device makes.
        bytes: That it sends.
        messages: In how many messages.
        hidden: Whether it computes while they are under way.
        calls: Calls of the network that it makes, for each of which ``fixed`` counts.
    """

    share: float
    bytes: float
    messages: float
    hidden: bool
    calls: float


class Unfit(Exception):
    """A way of sharing that does not serve; the message says why."""


def one_device(work: Work, cluster: Cluster) -> float:
    """Seconds of a step on one device."""
    return cluster.fixed * work.calls + work.operations / cluster.operations


def cfg(work: Work, devices: int) -> Cost:
    """A branch each."""
    if work.branches < 2:
        raise Unfit("there is one guidance branch")
    if devices != 2:
        raise Unfit("it takes two devices; with more, beside another method")
    return Cost(0.5, work.output / 2, 1, False, max(1, work.calls / 2))


def bands(work: Work, devices: int, fraction: float | None, hidden: bool) -> Cost:
    """A band of rows each; ``fraction``: of a band that neighbours see, ``None``: all of it."""
    if not work.rows:
        raise Unfit("it is no UNet over pictures")
    if work.rows < devices:
        raise Unfit(f"a latent of {work.rows} rows has no band for each")
    neighbours = min(2, devices - 1)
    borders = neighbours * sum(work.borders)
    moments = (devices - 1) * sum(work.moments)
    band = sum(work.tokens) / devices
    tokens = band * (devices - 1 if fraction is None else neighbours * fraction)
    output = (devices - 1) * work.output / devices
    calls = len(work.borders) + len(work.moments) + len(work.tokens) + 1
    return Cost(1 / devices, borders + moments + tokens + output, calls, hidden, work.calls)


def components(work: Work, devices: int) -> Cost:
    """A part of the network each, on what is a step old."""
    if len(work.units) < devices:
        raise Unfit(f"the network has {len(work.units)} blocks that could be shared out")
    ends = (0, *cut(work.units, devices))
    dearest = max(sum(work.units[a:b]) for a, b in itertools.pairwise(ends))
    rest = work.operations - sum(work.units)
    kept = work.answers if work.whole else [work.answers[end - 1] for end in ends[1:]]
    sent = (devices - 1) * sum(kept) / devices
    return Cost((dearest + rest) / work.operations, sent, work.calls, False, work.calls)


def heads(work: Work, devices: int) -> Cost:
    """A part of the tokens each, exchanged for heads in every attention."""
    if work.rows or not work.tokens:
        raise Unfit("it is no transformer")
    moved = 2 * sum(work.tokens) * (devices - 1) / devices**2  # q, k, v there and the answer back
    output = (devices - 1) * work.output / devices
    return Cost(1 / devices, moved + output, 2 * len(work.tokens) + 1, False, work.calls)


def ring(work: Work, devices: int) -> Cost:
    """A part of the tokens each; keys and values go round while attention is computed."""
    if work.rows or not work.tokens:
        raise Unfit("it is no transformer")
    moved = sum(work.tokens) * (devices - 1) / devices
    output = (devices - 1) * work.output / devices
    messages = (devices - 1) * len(work.tokens) + 1
    return Cost(1 / devices, moved + output, messages, True, work.calls)


WAYS: Mapping[str, Callable[[Work, int], Cost]] = {
    "parallel.CFG": cfg,
    "parallel.DistriFusion (sync)": lambda work, n: bands(work, n, None, False),
    "parallel.DistriFusion": lambda work, n: bands(work, n, None, True),
    "parallel.PCPP": lambda work, n: bands(work, n, 0.3, True),
    "parallel.AsyncDiff": components,
    "parallel.Ulysses": heads,
    "parallel.Ring": ring,
}
"""By method, what a step costs on so many devices."""

SYNC_STEPS = {"parallel.DistriFusion": 5, "parallel.PCPP": 5}
"""Steps at the beginning in which nothing is hidden: the default warm-up and the first step."""

FULL_STEPS = {"parallel.AsyncDiff": 4}
"""Steps at the beginning that every device computes in full."""


def predict(work: Work, cluster: Cluster, steps: int) -> list[Prediction]:
    """What every way of sharing takes, the fastest first; those that do not serve are last.

    Args:
        work: Of a step.
        cluster: Where.
        steps: Of a picture.
    """
    alone = steps * one_device(work, cluster)
    found = [Prediction("one device", alone, 1.0, 0.0)]
    for method, way in WAYS.items():
        try:
            cost = way(work, cluster.devices)
        except Unfit as reason:
            found.append(Prediction(method, math.inf, 0.0, 0.0, str(reason)))
            continue
        full = min(steps, FULL_STEPS.get(method, 0))
        sync = min(steps - full, SYNC_STEPS.get(method, 0))
        late = steps - full - sync
        seconds = (
            full * one_device(work, cluster)
            + sync * _step(work, cluster, cost, hidden=False)
            + late * _step(work, cluster, cost, hidden=cost.hidden)
        )
        found.append(Prediction(method, seconds, alone / seconds, (steps - full) * cost.bytes))
    return sorted(found, key=lambda one: one.seconds)


def _step(work: Work, cluster: Cluster, cost: Cost, *, hidden: bool) -> float:
    computed = cost.share * work.operations / cluster.operations
    sent = cluster.sent(cost.bytes, cost.messages)
    shared = max(computed, sent) if hidden else computed + sent
    return cluster.fixed * cost.calls + shared
