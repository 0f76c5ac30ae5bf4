"""Parallel strategies: one picture over several devices. One method a file."""

from parallel.asyncdiff import AsyncDiff as AsyncDiff
from parallel.cfg import CFG as CFG
from parallel.distrifusion import DistriFusion as DistriFusion
from parallel.pcpp import PCPP as PCPP
from parallel.ring import Ring as Ring
from parallel.ulysses import Ulysses as Ulysses
from parallel.usp import USP as USP
from parallel.vae import VAE as VAE

__all__ = ["CFG", "PCPP", "USP", "VAE", "AsyncDiff", "DistriFusion", "Ring", "Ulysses"]
