"""Caches: answer from what was computed before. One method a file."""

from accel.cache.deepcache import DeepCache as DeepCache
from accel.cache.easycache import EasyCache as EasyCache
from accel.cache.first_block import FirstBlock as FirstBlock

__all__ = ["DeepCache", "EasyCache", "FirstBlock"]
