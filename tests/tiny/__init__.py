"""Tiny random pipelines of every family, built offline in a moment: `PIPELINES["sd15"]`."""

from tiny import dits, mmdits, unets, videos
from tiny.base import NEGATIVE, PROMPTS, Ask, Tiny

PIPELINES: dict[str, Tiny] = {
    tiny.name: tiny for family in (unets, mmdits, dits, videos) for tiny in family.FAMILIES
}

TINIES: dict[str, Tiny] = PIPELINES | {unets.KEYS.name: unets.KEYS}
"""With those that are in no matrix of the laws."""

__all__ = ["NEGATIVE", "PIPELINES", "PROMPTS", "TINIES", "Ask", "Tiny"]
