"""Parallel strategies: one picture over several devices. One method a file."""

from parallel.asg import ASG as ASG
from parallel.asyncdiff import AsyncDiff as AsyncDiff
from parallel.cfg import CFG as CFG
from parallel.distrifusion import DistriFusion as DistriFusion
from parallel.dualparal import DualParal as DualParal
from parallel.pcpp import PCPP as PCPP
from parallel.pipefusion import PipeFusion as PipeFusion
from parallel.ring import Ring as Ring
from parallel.ulysses import Ulysses as Ulysses
from parallel.usp import USP as USP
from parallel.vae import VAE as VAE
from parallel.videoinfinity import VideoInfinity as VideoInfinity
from parallel.windows import Windows as Windows

__all__ = [
    "ASG",
    "CFG",
    "PCPP",
    "USP",
    "VAE",
    "AsyncDiff",
    "DistriFusion",
    "DualParal",
    "PipeFusion",
    "Ring",
    "Ulysses",
    "VideoInfinity",
    "Windows",
]
