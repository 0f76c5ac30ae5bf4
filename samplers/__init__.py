"""Training-free samplers: schedules × prediction conversions × pure steps, for diffusers.

Each sampler has two names: an accelerator that goes in a Plan (`DPMSolverPP`) and the diffusers
scheduler that it attaches, usable alone (`DPMSolverPPScheduler`). Importing this package imports
neither torch nor diffusers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from samplers.deis import DEIS as DEIS
    from samplers.deis_scheduler import DEISScheduler as DEISScheduler
    from samplers.dpmsolver_v3 import DPMSolverV3 as DPMSolverV3
    from samplers.dpmsolver_v3_scheduler import DPMSolverV3Scheduler as DPMSolverV3Scheduler
    from samplers.dpmsolverpp import DPMSolverPP as DPMSolverPP
    from samplers.dpmsolverpp_scheduler import DPMSolverPPScheduler as DPMSolverPPScheduler
    from samplers.dpmsolverpp_single import DPMSolverPPSingle as DPMSolverPPSingle
    from samplers.dpmsolverpp_single_scheduler import (
        DPMSolverPPSingleScheduler as DPMSolverPPSingleScheduler,
    )
    from samplers.dualfast import DualFast as DualFast
    from samplers.olss import OLSS as OLSS
    from samplers.olss_scheduler import OLSSScheduler as OLSSScheduler
    from samplers.pseudo_corrector import PseudoCorrector as PseudoCorrector
    from samplers.pseudo_corrector_scheduler import (
        PseudoCorrectorScheduler as PseudoCorrectorScheduler,
    )
    from samplers.rho_rk import RhoRK as RhoRK
    from samplers.rho_rk_scheduler import RhoRKScheduler as RhoRKScheduler
    from samplers.sa_solver import SASolver as SASolver
    from samplers.sa_solver_scheduler import SASolverScheduler as SASolverScheduler
    from samplers.schedule_method import Schedule as Schedule
    from samplers.steps import Steps as Steps
    from samplers.unipc import UniPC as UniPC
    from samplers.unipc_scheduler import UniPCScheduler as UniPCScheduler

_HOMES = {
    "DEIS": "samplers.deis",
    "DEISScheduler": "samplers.deis_scheduler",
    "DPMSolverPP": "samplers.dpmsolverpp",
    "DPMSolverPPScheduler": "samplers.dpmsolverpp_scheduler",
    "DPMSolverPPSingle": "samplers.dpmsolverpp_single",
    "DPMSolverPPSingleScheduler": "samplers.dpmsolverpp_single_scheduler",
    "DPMSolverV3": "samplers.dpmsolver_v3",
    "DPMSolverV3Scheduler": "samplers.dpmsolver_v3_scheduler",
    "DualFast": "samplers.dualfast",
    "OLSS": "samplers.olss",
    "OLSSScheduler": "samplers.olss_scheduler",
    "PseudoCorrector": "samplers.pseudo_corrector",
    "PseudoCorrectorScheduler": "samplers.pseudo_corrector_scheduler",
    "RhoRK": "samplers.rho_rk",
    "RhoRKScheduler": "samplers.rho_rk_scheduler",
    "SASolver": "samplers.sa_solver",
    "SASolverScheduler": "samplers.sa_solver_scheduler",
    "Schedule": "samplers.schedule_method",
    "Steps": "samplers.steps",
    "UniPC": "samplers.unipc",
    "UniPCScheduler": "samplers.unipc_scheduler",
}

__all__ = [
    "DEIS",
    "OLSS",
    "DEISScheduler",
    "DPMSolverPP",
    "DPMSolverPPScheduler",
    "DPMSolverPPSingle",
    "DPMSolverPPSingleScheduler",
    "DPMSolverV3",
    "DPMSolverV3Scheduler",
    "DualFast",
    "OLSSScheduler",
    "PseudoCorrector",
    "PseudoCorrectorScheduler",
    "RhoRK",
    "RhoRKScheduler",
    "SASolver",
    "SASolverScheduler",
    "Schedule",
    "Steps",
    "UniPC",
    "UniPCScheduler",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'samplers' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
