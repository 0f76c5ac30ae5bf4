"""Caches: answer from what was computed before. One method a file."""

from accel.cache.custom import Custom as Custom
from accel.cache.dbcache import DBCache as DBCache
from accel.cache.deepcache import DeepCache as DeepCache
from accel.cache.delta_dit import DeltaDiT as DeltaDiT
from accel.cache.dmd import DMD as DMD
from accel.cache.easycache import EasyCache as EasyCache
from accel.cache.first_block import FirstBlock as FirstBlock
from accel.cache.foca import FoCa as FoCa
from accel.cache.fora import FORA as FORA
from accel.cache.hicache import HiCache as HiCache
from accel.cache.magcache import MagCache as MagCache
from accel.cache.pab import PAB as PAB
from accel.cache.sada import SADA as SADA
from accel.cache.step_rehash import StepRehash as StepRehash
from accel.cache.table import Table as Table
from accel.cache.taylorseer import TaylorSeer as TaylorSeer
from accel.cache.teacache import TeaCache as TeaCache
from accel.cache.text_kv import TextKV as TextKV
from accel.cache.zeus import ZEUS as ZEUS

__all__ = [
    "DMD",
    "FORA",
    "PAB",
    "SADA",
    "ZEUS",
    "Custom",
    "DBCache",
    "DeepCache",
    "DeltaDiT",
    "EasyCache",
    "FirstBlock",
    "FoCa",
    "HiCache",
    "MagCache",
    "StepRehash",
    "Table",
    "TaylorSeer",
    "TeaCache",
    "TextKV",
]
