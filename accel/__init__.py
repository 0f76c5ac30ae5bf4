"""Training-free accelerators that attach to stock diffusers pipelines.

Importing this package imports neither torch nor diffusers.
"""

from accel import attention as attention
from accel import cache as cache
from accel import edit as edit
from accel import errors as errors
from accel import guidance as guidance
from accel import loop as loop
from accel import memory as memory
from accel import region as region
from accel import resolution as resolution
from accel import tokens as tokens
from accel import weights as weights
from accel.attach import Accelerator as Accelerator
from accel.attach import Run as Run
from accel.attach import Site as Site
from accel.bundled import asset as asset
from accel.bundled import load as load
from accel.explain import explain as explain
from accel.guard import Guard as Guard
from accel.plan import Plan as Plan
from accel.plan import methods as methods
from accel.report import Report as Report
from accel.tuning import prove as prove
from accel.tuning import tune as tune

__all__ = [
    "Accelerator",
    "Guard",
    "Plan",
    "Report",
    "Run",
    "Site",
    "asset",
    "attention",
    "cache",
    "edit",
    "errors",
    "explain",
    "guidance",
    "load",
    "loop",
    "memory",
    "methods",
    "prove",
    "region",
    "resolution",
    "tokens",
    "tune",
    "weights",
]
