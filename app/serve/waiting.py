"""How long jobs still wait: the queue laid out over the devices, in its order."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

Device = str | None
"""``None``: the device that torch takes by default; of a job: any."""


@dataclass(frozen=True)
class Load:
    """A job as the devices see it.

    Attributes:
        job: Its id.
        device: Where it has to run; ``None``: on any.
        seconds: That it still takes; ``None``: unknown.
        yields: Whether it gives way to all jobs that do not.
    """

    job: str
    device: Device
    seconds: float | None
    yields: bool = False


def ends(
    running: Iterable[Load], waiting: Iterable[Load], devices: Sequence[Device]
) -> dict[str, float | None]:
    """Seconds until each job ends: the next one goes to the device that is free first.

    Args:
        running: At most one a device.
        waiting: In the order of the queue, in which those that yield are last.
        devices: A worker each.
    """
    own = {load.job: load.seconds for load in running}
    clocks: dict[Device, float | None] = dict.fromkeys(devices, 0.0)
    giving: list[tuple[Device, float | None]] = []
    for device, load in _taken(running, devices):
        if load.yields:
            giving.append((device, load.seconds))
        else:
            clocks[device] = load.seconds
    for load in waiting:
        if load.yields and giving:  # it waits for what gives way, too
            clocks |= {device: _sum(clocks[device], left) for device, left in giving}
            giving = []
        device = _free_first(clocks, load.device)
        own[load.job] = _sum(clocks.get(device), load.seconds)
        if device in clocks:
            clocks[device] = own[load.job]
    return own


def _taken(running: Iterable[Load], devices: Sequence[Device]) -> list[tuple[Device, Load]]:
    """Which device runs what: those that a job has to run on first, then the others."""
    left, found = list(devices), list[tuple[Device, Load]]()
    for load in sorted(running, key=lambda one: one.device is None):
        device = load.device if load.device in left else next(iter(left), None)
        if device in left:
            left.remove(device)
            found.append((device, load))
    return found


def _free_first(clocks: dict[Device, float | None], wanted: Device) -> Device:
    """The device that a job goes to; of those that are busy for an unknown time, none if it can."""
    if wanted is not None:
        return wanted
    return min(clocks, key=lambda one: (clocks[one] is None, clocks[one] or 0.0))


def _sum(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one + other
