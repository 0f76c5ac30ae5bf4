"""Several processes that make one picture: started by `--devices`, by torchrun or by Slurm."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from accel.errors import BadInput
from app.flags import Given
from app.plans import chosen
from app.request import Choice, Source, make

if TYPE_CHECKING:
    from parallel.launch import Place

Made = Callable[..., None]
"""Called as ``made(given)`` or ``made(given, place)``."""


def run(given: Given, devices: int, made: Made) -> None:
    """Make a picture in this process, or together with others.

    Args:
        given: The options that were typed.
        devices: How many processes were asked for.
        made: Makes it; importable.

    Raises:
        BadInput: If the plan does not say how to share the work, or torchrun has started another
            number of processes.
    """
    from parallel import launch

    place = launch.told(os.environ)
    if place is None and devices == 1:
        made(given)
        return
    _check_plan(given, devices if place is None else place.size)
    if place is None:
        launch.spread(devices, _member, given, made)
        return
    if devices not in (1, place.size):
        raise BadInput(
            f"--devices {devices}, and {place.size} processes were started: leave --devices out."
        )
    with launch.joined(place):
        _member(place, given, made)


def _member(place: Place, given: Given, made: Made) -> None:
    """Make it in one of several processes, with one seed and a device of its own."""
    from app.request import Request
    from parallel import launch

    told = {**given, "device": _device(given, place)}
    if "like" not in given:  # else the file says which
        told["seed"] = launch.agreed(make(Request, given).seeded().seed)
    made(told, place)


def _device(given: Given, place: Place) -> str:
    """The device of a process.

    Raises:
        BadInput: If there are fewer than processes, or one was named.
    """
    import torch

    asked = make(Source, given).device
    kind = asked or ("cuda" if torch.cuda.is_available() else "cpu")
    if ":" in kind:
        raise BadInput(f"--device {kind} for several processes: name the kind alone (cuda, cpu).")
    return kind if kind == "cpu" else f"{kind}:{place.local}"


def _check_plan(given: Given, processes: int) -> None:
    """Refuse processes that would all do the same."""
    plan = chosen(make(Choice, given))
    if "like" not in given and not any(one.name.startswith("parallel.") for one in plan):
        raise BadInput(
            f"{processes} processes would all do the same: the plan shares no work out. Add "
            "--set parallel.CFG.degree=2 (a guidance branch each), or --set "
            "parallel.DistriFusion.degree=0 (a band of the picture each), or beside "
            "resolution.Pixelsmith --set parallel.Windows.degree=0 (a share of its patches each)."
        )
