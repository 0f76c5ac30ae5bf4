"""Parallel strategies: one picture over several devices. One method a file."""

from parallel.asyncdiff import AsyncDiff as AsyncDiff
from parallel.cfg import CFG as CFG
from parallel.distrifusion import DistriFusion as DistriFusion
from parallel.pcpp import PCPP as PCPP
from parallel.ulysses import Ulysses as Ulysses

__all__ = ["CFG", "PCPP", "AsyncDiff", "DistriFusion", "Ulysses"]
