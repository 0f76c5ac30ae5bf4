"""Training-free samplers: schedules × prediction conversions × pure steps, for diffusers.

Each sampler has two names: an accelerator that goes in a Plan (`DPMSolverPP`) and the diffusers
scheduler that it attaches, usable alone (`DPMSolverPPScheduler`). Importing this package imports
neither torch nor diffusers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from samplers.dpmsolverpp import DPMSolverPP as DPMSolverPP
    from samplers.dpmsolverpp_scheduler import DPMSolverPPScheduler as DPMSolverPPScheduler

_HOMES = {
    "DPMSolverPP": "samplers.dpmsolverpp",
    "DPMSolverPPScheduler": "samplers.dpmsolverpp_scheduler",
}

__all__ = ["DPMSolverPP", "DPMSolverPPScheduler"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'samplers' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
