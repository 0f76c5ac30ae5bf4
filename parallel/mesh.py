"""The processes that make one picture: a grid with named axes, checked once.

Every process runs the same program on the same input (SPMD), and each method of a plan splits the
work along an axis of its own. The axes multiply to the number of processes; one may be left open
and takes what the others leave.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from accel.errors import BadInput, Conflict

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    from parallel.exchange import Exchange

Name = Literal["dp", "cfg", "pipe", "clip", "ring", "ulysses", "patch"]
AXES: tuple[Name, ...] = ("dp", "cfg", "pipe", "clip", "ring", "ulysses", "patch")
"""From the one that communicates least to the one that communicates most: neighbours of the last
axis are neighbouring processes, which as a rule have the fastest link."""


def world() -> int:
    """How many processes there are; 1 where torch.distributed was not started."""
    from torch import distributed

    started = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if started else 1


@dataclass(frozen=True)
class Claim:
    """What a method wants of the mesh.

    Attributes:
        owner: Its name.
        degree: Processes along its axis; 0: as many as are left.
    """

    owner: str
    degree: int


class Mesh:
    """The grid of processes of one plan: ``site.shared(Mesh)`` is that of all its methods."""

    def __init__(self) -> None:
        self._claims: dict[Name, Claim] = {}
        self._sizes: dict[Name, int] = {}
        self._devices: DeviceMesh | None = None

    def claim(self, name: Name, degree: int, owner: str) -> Axis:
        """Split work along an axis.

        Args:
            name: Of the axis.
            degree: Processes along it; 0: as many as the other axes leave.
            owner: The method.

        Raises:
            Conflict: If another method splits along it, or is left open as well.
        """
        if name in self._claims:
            raise Conflict(
                f"{owner} and {self._claims[name].owner} both split along the axis '{name}': leave "
                "one of them out of the plan."
            )
        open_ones = [claim.owner for claim in self._claims.values() if claim.degree == 0]
        if degree == 0 and open_ones:
            raise Conflict(
                f"{owner} and {open_ones[0]} both take all the processes that are left: give one "
                "of them a degree."
            )
        self._claims[name] = Claim(owner, degree)
        self._sizes.clear()
        return Axis(self, name)

    def release(self, name: Name) -> None:
        """The method that claimed an axis is off."""
        del self._claims[name]
        self._sizes.clear()
        self._devices = None

    def size(self, name: Name) -> int:
        """Processes along an axis.

        Raises:
            BadInput: If the axes do not multiply to the number of processes.
        """
        if not self._sizes:
            self._sizes = sizes({key: claim.degree for key, claim in self._claims.items()}, world())
        return self._sizes[name]

    def group(self, name: Name, device: str) -> ProcessGroup:
        """The processes that differ from this one along an axis alone. All have to ask for it."""
        from torch.distributed.device_mesh import init_device_mesh

        self.size(name)
        if self._devices is None:
            names = [axis for axis in AXES if axis in self._sizes]
            shape = tuple(self._sizes[axis] for axis in names)
            self._devices = init_device_mesh(device, shape, mesh_dim_names=tuple(names))
        return self._devices.get_group(name)


def sizes(degrees: dict[Name, int], processes: int) -> dict[Name, int]:
    """Processes along each axis.

    Args:
        degrees: As asked for; at most one of them is 0, and takes what is left.
        processes: How many there are.

    Raises:
        BadInput: If they do not multiply to ``processes``.
    """
    fixed = math.prod(degree for degree in degrees.values() if degree)
    asked = " × ".join(f"{name} {degree or 'the rest'}" for name, degree in degrees.items())
    rest = processes // fixed
    if fixed * rest != processes:
        raise BadInput(
            f"The plan splits its work {asked}, which takes {fixed} processes or a multiple of "
            f"that, and there are {processes}: start as many (`accel generate --devices {fixed}`, "
            "or torchrun), or give its methods other degrees."
        )
    if rest > 1 and 0 not in degrees.values():
        raise BadInput(
            f"The plan splits its work {asked}, which keeps {fixed} processes busy, and there are "
            f"{processes}: give one of its methods a degree of 0, so that it takes the rest, or "
            f"start {fixed}."
        )
    return {name: degree or rest for name, degree in degrees.items()}


class Axis:
    """One axis of a mesh, for the method that splits along it."""

    def __init__(self, mesh: Mesh, name: Name) -> None:
        self._mesh = mesh
        self._exchange: Exchange | None = None
        self.name = name

    @property
    def size(self) -> int:
        """Processes along it.

        Raises:
            BadInput: If the axes do not multiply to the number of processes.
        """
        return self._mesh.size(self.name)

    def exchange(self, device: str) -> Exchange:
        """How they talk to each other; all have to ask for it at the same point."""
        if self._exchange is None:
            from parallel.exchange import Exchange

            self._exchange = Exchange(self._mesh.group(self.name, device))
        return self._exchange

    def reset(self) -> None:
        """A run starts: what does not fit is said now, and bytes are counted from here.

        Raises:
            BadInput: If the axes do not multiply to the number of processes.
        """
        if self.size > 1 and self._exchange is not None:
            self._exchange.reset()

    def release(self) -> None:
        """The method is off."""
        self._exchange = None
        self._mesh.release(self.name)
